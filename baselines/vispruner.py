"""vispruner: half of the budget by CLS attention, half from the rest by removing near-duplicates.

Paper: https://arxiv.org/abs/2412.01818 (version 3)
Official code read: Theia-4869/VisPruner@aefa01a, llava/model/llava_arch.py, encode_images
Differs from it: it works with an odd number of important tokens and at tiny budgets (theirs raises IndexError). Scores
    are in float32, and ties go to the earlier entry. All cosines are computed once, not once per round.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from llava.reduction import (
    EncoderState,
    MethodMetadata,
    Reducer,
    Reduction,
    Release,
    TowerScore,
    distinct,
    gather_tokens,
    option,
    register,
)


@register("vispruner")
@dataclass(frozen=True, kw_only=True)
class VisPruner(Reducer):
    """Keeps important and diverse tokens, without the question."""

    summary: ClassVar[str] = "highest CLS attention, then the rest without near-duplicates"
    metadata: ClassVar[MethodMetadata] = MethodMetadata(
        acts="after the tower",
        score="half by CLS attention, block −2, half by removing the closest cosines of features",
        needs="CLS token",
        reads=("cls_attention -2", "features"),
        similarity="features",
        paper="VisPruner, 2412.01818",
        url="https://arxiv.org/abs/2412.01818",
        code="Theia-4869/VisPruner@aefa01a",
        release=Release(
            dtype="scores are in float16, and one swap of near ties changes all later rounds",
            ours="scores in float32, ties to the earlier entry",
            licence="Apache-2.0",
        ),
    )

    important: float = option(
        0.5, "share of the budget chosen by attention; the rest is chosen by diversity", least=0, most=1
    )

    def scores(self) -> tuple[TowerScore, ...]:
        return (TowerScore("cls_attention"),)

    def encoder(self, state: EncoderState) -> Reduction | None:
        order = state.scores[TowerScore("cls_attention")].argsort(dim=1, descending=True, stable=True)
        important = int(self.budget * self.important)
        kept, rest = order[:, :important], order[:, important:]
        if important < self.budget:  # near-duplicates of the others are removed until the rest of the budget is left
            diverse = distinct(gather_tokens(state.features, rest), self.budget - important, state.matmul)
            kept = torch.cat([kept, rest.gather(1, diverse)], 1)
        return Reduction(kept.sort(dim=1).values, state.features.shape[1])
