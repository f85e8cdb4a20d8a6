"""HiPrune: a few patches that a middle block attends to, with their neighbours; the rest by attention of a deep block.

Paper: https://arxiv.org/abs/2508.00553
Official code read: Danielement321/HiPrune@6e83a12, LLaVA/llava/model/llava_arch.py (encode_images) and
    Qwen2_5_VL/qwen2_5_vl_HiPrune.py
Differs from it: attention is ranked in float32, and ties go to the lower index (theirs: in the model's half precision).
    Neighbours are found in the grid that a view has (theirs: 24 columns in LLaVA). As in the release, the neighbour
    to the left of a row's first patch is the last patch of the row above. At most a fifth of the budget are anchors, so
    that they fit into it with their neighbours (theirs: with an alpha near 1 they can be more tokens than the budget).
    With tiles, fractions of the budget are not lost, and only patches that unpadding leaves are chosen (theirs: among
    whole tiles, without newlines; `merge=spatial` here). The blocks for Qwen2.5-VL are the release's, 16 and 32 counted
    from 1. HiPrune++, which reads the question, was not released.

An anchor is one of the patches that the middle block attends to most. Below 25 tokens per view there is none.

Shapes: B views, N patches, A anchors.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava.reduction import (
    EncoderState,
    MethodMetadata,
    Reducer,
    Reduction,
    Release,
    TowerScore,
    keep_top,
    option,
    register,
)

DEEP = TowerScore("received_from_all")
NEIGHBOURHOOD = 5  # tokens of an anchor: itself and its four neighbours


def around(anchors: Tensor, columns: int, total: int) -> Tensor:
    """Anchors [B, A] and their four neighbours, [B, 5 A], with repetitions; row ends are not seen."""
    near = torch.cat([anchors, anchors - 1, anchors + 1, anchors - columns, anchors + columns], 1)
    return near.clamp(0, total - 1)


@register("hiprune")
@dataclass(frozen=True, kw_only=True)
class HiPrune(Reducer):
    """Reads attention of the whole tower's tokens, so it needs neither a CLS token nor the question."""

    summary: ClassVar[str] = "patches that a middle block attends to and their neighbours, then those of a deep block"
    metadata: ClassVar[MethodMetadata] = MethodMetadata(
        acts="after the tower",
        score="attention received from all tokens: a tenth with neighbours by block 8 of 24, the others by block −2",
        reads=("received_from_all 8/24", "received_from_all -2", "grid"),
        paper="HiPrune, 2508.00553",
        url="https://arxiv.org/abs/2508.00553",
        code="Danielement321/HiPrune@6e83a12",
        release=Release(
            batch="the budget is split over all images of a batch",
            dtype="attention is averaged and ranked in half precision, where patches tie",
            licence="MIT",
        ),
    )

    # Neighbours are those in the patch's own tile.
    tile_budget: str = option(
        "each", "the budget over tiles: even, or by the base image's attention", ("each", "thumbnail")
    )
    alpha: float = option(0.1, "share of the budget for anchors and their neighbours", least=0, most=1)
    object_block: int = option(8, "tower block, of 24, whose attention finds the anchors", least=0, most=23)

    def scores(self) -> tuple[TowerScore, ...]:
        return TowerScore("received_from_all", self.object_block, depth=24), DEEP

    def encoder(self, state: EncoderState) -> Reduction:
        middle, deep = (state.scores[score] for score in self.scores())  # [B, N]
        total = deep.shape[1]
        count = min(round(self.budget * self.alpha / NEIGHBOURHOOD), self.budget // NEIGHBOURHOOD)
        if count:
            anchors = middle.argsort(dim=1, descending=True, stable=True)[:, :count]
            deep = deep.scatter(1, around(anchors, state.layout.columns, total), torch.inf)
        return Reduction(keep_top(deep, self.budget), total)
