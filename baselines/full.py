"""full: every visual token goes through every layer; the reference of all tables.

Paper: none, this is the model itself.
Official code read: none.
Differs from it: nothing known.
"""

from dataclasses import dataclass
from typing import ClassVar

from llava.errors import UserError
from llava.reduction.metadata import Card
from llava.reduction.model_spec import ModelFacts
from llava.reduction.reducer import Reducer
from llava.reduction.registry import register


@register("full")
@dataclass(frozen=True, kw_only=True)
class Full(Reducer):
    """No reduction; its budget can only be the number of tokens there are."""

    summary: ClassVar[str] = "no reduction, the reference of every table"
    card: ClassVar[Card] = Card(acts="nowhere", rest="nothing")

    def check(self, facts: ModelFacts) -> None:
        super().check(facts)
        if self.budget != facts.visual_tokens:
            raise UserError(
                f"full keeps all {facts.visual_tokens} visual tokens, got budget {self.budget}; leave the budget out."
            )
