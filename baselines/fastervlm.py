"""fastervlm: keep the patches with the highest CLS attention.

Paper: https://arxiv.org/abs/2412.01818v1 (version 1; version 3 of the same number is VisPruner)
Official code read: Theia-4869/FasterVLM@f5d5f12, llava/model/llava_arch.py, encode_images
Differs from it: attention is ranked in float32 (theirs: in the model's float16, where different values tie), and only
    the kept patches are projected.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llava.reduction import EncoderState, MethodMetadata, Release, Scorer, TowerScore, register


@register("fastervlm")
@dataclass(frozen=True, kw_only=True)
class FasterVLM(Scorer):
    """Ranks by CLS attention alone; the question is not used."""

    summary: ClassVar[str] = "highest CLS attention"
    metadata: ClassVar[MethodMetadata] = MethodMetadata(
        acts="after the tower",
        score="CLS attention, block −2",
        needs="CLS token",
        reads=("cls_attention -2",),
        paper="FasterVLM, 2412.01818v1",
        url="https://arxiv.org/abs/2412.01818v1",
        code="Theia-4869/FasterVLM@f5d5f12",
        release=Release(
            dtype="attention is ranked in float16, where different values tie",
            ours="ranked in float32",
            licence="Apache-2.0",
        ),
    )

    def scores(self) -> tuple[TowerScore, ...]:
        return (TowerScore("cls_attention"),)

    def score(self, state: EncoderState) -> Tensor:
        return state.scores[TowerScore("cls_attention")]
