"""full: every visual token enters every layer; the reference of all tables.

Paper: none, this is the model itself.
Official code read: none.
Differs from it: nothing known.
"""

from dataclasses import dataclass
from typing import ClassVar

from llava.reduction import MethodMetadata, ModelSpec, Reducer, UserError, register


@register("full")
@dataclass(frozen=True, kw_only=True)
class Full(Reducer):
    """No reduction; the budget can only be the number of visual tokens."""

    summary: ClassVar[str] = "no reduction, the reference of every table"
    metadata: ClassVar[MethodMetadata] = MethodMetadata(acts="nowhere", rest="nothing")

    def check(self, spec: ModelSpec) -> None:
        super().check(spec)
        if self.budget != spec.visual_tokens:
            raise UserError(
                f"full keeps all {spec.visual_tokens} visual tokens, got budget {self.budget}; leave the budget out."
            )
