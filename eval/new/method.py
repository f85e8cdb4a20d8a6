"""template_name: keep the patches that other patches attend to, near the middle of the image.

Paper: none, an example.
Official code read: none.
Differs from it: nothing known.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llava.reduction import EncoderState, MethodMetadata, Scorer, TowerScore, option, register

RECEIVED = TowerScore("received_attention")  # computed beside the tower's own pass, float32


@register("template_name")
@dataclass(frozen=True, kw_only=True)
class TemplateName(Scorer):
    """A method that only ranks. See `Reducer` for one that merges, or acts inside the tower or the decoder."""

    summary: ClassVar[str] = "the patches that other patches attend to"
    metadata: ClassVar[MethodMetadata] = MethodMetadata(acts="after the tower", score="attention from all patches")

    middle: float = option(0.1, "weight of nearness to the middle of the image", least=0, most=0.5)

    def scores(self) -> tuple[TowerScore, ...]:
        return (RECEIVED,)

    def score(self, state: EncoderState) -> Tensor:
        attention = state.scores[RECEIVED]  # [B, N]
        distance = state.coordinates().square().sum(1)  # [N], 0 in the middle and 2 in a corner
        return attention / attention.amax(1, keepdim=True) - self.middle * distance  # the highest are kept
