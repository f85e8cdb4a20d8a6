"""fastervlm: the patches that CLS looks at.

Paper: https://arxiv.org/abs/2412.01818v1 (version 1; version 3 of the same number is VisPruner)
Official code read: Theia-4869/FasterVLM@f5d5f12, llava/model/llava_arch.py, encode_images
Differs from it: attention is ranked in float32 (theirs is in the model's float16, where different values tie), and only
    the kept patches are projected.
"""

from dataclasses import dataclass
from typing import ClassVar

from llava.reduction import Reduction, keep_top
from llava.reduction.metadata import Card
from llava.reduction.reducer import EncoderState, Reducer
from llava.reduction.registry import register
from llava.reduction.scores import Signal


@register("fastervlm")
@dataclass(frozen=True, kw_only=True)
class FasterVLM(Reducer):
    """The simplest use of the CLS token; the question plays no part."""

    summary: ClassVar[str] = "highest CLS attention"
    card: ClassVar[Card] = Card(
        acts="after the tower",
        score="CLS attention, block −2",
        needs="CLS token",
        paper="FasterVLM, 2412.01818v1",
        url="https://arxiv.org/abs/2412.01818v1",
        code="Theia-4869/FasterVLM@f5d5f12",
    )

    def signals(self) -> tuple[Signal, ...]:
        return (Signal("cls_attention"),)

    def encoder(self, state: EncoderState) -> Reduction | None:
        tokens = state.features.shape[1]
        return Reduction(keep_top(state.signals[Signal("cls_attention")], self.budget), tokens)
