"""vispruner: half of the budget by CLS attention, half from the rest by removing near-duplicates.

Paper: https://arxiv.org/abs/2412.01818 (version 3)
Official code read: Theia-4869/VisPruner@aefa01a, llava/model/llava_arch.py, encode_images
Differs from it: works with an odd number of important tokens and at tiny budgets (theirs raises IndexError); scores are
    in float32 and ties go to the earlier entry; all cosines are computed once, not once per round.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.reduction import (
    EncoderState,
    MethodMetadata,
    Reducer,
    Reduction,
    TowerScore,
    UserError,
    gather_tokens,
    option,
    register,
)

ROUND = 8  # near-duplicates removed at a time


def distinct(similarity: Tensor, count: int) -> Tensor:
    """Remove near-duplicates from a list in rounds until `count` entries are left.

    A round compares the entries at even indices of the list with those at odd indices, and removes up to ROUND even
    ones, those with the closest match. The remaining even ones, closest match first, and then the odd ones are the list
    of the next round: its order decides which entries are compared, so it is kept exactly.

    Args:
        similarity: [B, R, R] of the entries, in the order of the list.
        count: entries to keep, 1 <= count <= R.

    Returns:
        [B, count] int64 indices into the first list, in the order of the last one.
    """
    batch, length = similarity.shape[:2]
    rows = torch.arange(batch, device=similarity.device)[:, None, None]
    places = torch.arange(length, device=similarity.device).expand(batch, -1)
    while places.shape[1] > count:  # lengths are host integers: no round waits for the device
        even, odd = places[:, ::2], places[:, 1::2]
        gone = min(ROUND, places.shape[1] - count)  # or all even ones, if they are fewer
        closest = similarity[rows, even.unsqueeze(2), odd.unsqueeze(1)].amax(2)
        order = closest.argsort(dim=1, descending=True, stable=True)
        places = torch.cat([even.gather(1, order[:, gone:]), odd], 1)
    return places[:, :count]


@register("vispruner")
@dataclass(frozen=True, kw_only=True)
class VisPruner(Reducer):
    """Keeps important tokens and diverse tokens; the question is not used."""

    summary: ClassVar[str] = "highest CLS attention, then the rest without near-duplicates"
    metadata: ClassVar[MethodMetadata] = MethodMetadata(
        acts="after the tower",
        score="half by CLS attention, block −2, half by removing the closest cosines of features",
        needs="CLS token",
        paper="VisPruner, 2412.01818",
        url="https://arxiv.org/abs/2412.01818",
        code="Theia-4869/VisPruner@aefa01a",
    )

    important: float = option(0.5, "share of the budget chosen by attention; the rest is chosen by diversity")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.important <= 1:
            raise UserError(f"vispruner.important must be between 0 and 1, got {self.important:g}.")

    def scores(self) -> tuple[TowerScore, ...]:
        return (TowerScore("cls_attention"),)

    def encoder(self, state: EncoderState) -> Reduction | None:
        tokens = state.features.shape[1]
        order = state.scores[TowerScore("cls_attention")].argsort(dim=1, descending=True, stable=True)
        important = int(self.budget * self.important)
        kept, rest = order[:, :important], order[:, important:]
        if important < self.budget:
            unit = F.normalize(gather_tokens(state.features, rest).float(), dim=-1)
            similarity = state.matmul(unit, unit.transpose(1, 2))
            kept = torch.cat([kept, rest.gather(1, distinct(similarity, self.budget - important))], 1)
        return Reduction(kept.sort(dim=1).values, tokens)
