"""GlobalCom²: scores of the base image (thumbnail) split the budget over tiles and are added to the scores of tiles.

Paper: https://arxiv.org/abs/2501.05179
Official code read: xuyang-liu16/GlobalCom2@96b2d00, llava/model/llava_arch.py (generate_scale_for_crop_features,
    compress_thumbnail, compress_crops) and multimodal_encoder/apply_customvit.py
Differs from it: newline tokens count (theirs come on top of the budget). A tile's richness is summed over the region
    that it shows (theirs: over equal parts of the base image, whatever unpadding cuts off). The budget is met, because
    fractions and tokens that do not fit into a tile go to other tiles (theirs are lost). `official` follows the release
    in these three; its ratio is budget / patches of the image. Two more differences remain with it. Kept tokens are in
    raster order (theirs: the best of the base image first, and in tiles that lost columns to unpadding at the indices
    of whole tiles). Rows that unpadding cuts off have no newline token (theirs keep it). An image of one tile is its
    own base image (the release does not reduce it).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.reduction import (
    NEWLINES,
    EncoderState,
    MethodMetadata,
    ModelSpec,
    Reducer,
    Reduction,
    Release,
    TokenLayout,
    TowerScore,
    UserError,
    covered,
    keep_top,
    option,
    register,
    split_evenly,
)

SCORE = TowerScore("cls_logits", -1)
EPS = 1e-8


def adjustment(richness: Sequence[float], temperature: float) -> list[float]:
    """The factor by which each tile's ratio changes: 1 + softmax(richness / temperature) - mean of the softmax."""
    best = max(richness)
    powers = [exp((value - best) / temperature) for value in richness]
    weights = [power / (sum(powers) + EPS) for power in powers]
    mean = sum(weights) / len(weights)
    return [1 + weight - mean for weight in weights]


def equal_parts(score: Tensor, grid: tuple[int, int], tiles: tuple[int, int]) -> list[float]:
    """Sum the base image's scores [P] over equal parts, one for each tile; the last part takes the remainder."""
    row, column = (
        (torch.arange(length) // max(1, length // parts)).clamp(max=parts - 1)
        for length, parts in zip(grid, tiles, strict=True)
    )
    part = (row[:, None] * tiles[1] + column).flatten()
    return torch.zeros(tiles[0] * tiles[1], dtype=torch.double).scatter_add_(0, part, score.double()).tolist()


@register("globalcom2")
@dataclass(frozen=True, kw_only=True)
class GlobalCom2(Reducer):
    """Without a base image (one tile, or frames of a video) each tile keeps its own best patches."""

    summary: ClassVar[str] = "CLS logits of tiles and of the base image, which also split the budget"
    metadata: ClassVar[MethodMetadata] = MethodMetadata(
        acts="after the tower",
        score="CLS logits before the softmax, block −1, of a tile and of the base image at the same place",
        needs="CLS token",
        reads=("cls_logits -1",),
        paper="GlobalCom², 2501.05179",
        url="https://arxiv.org/abs/2501.05179",
        code="xuyang-liu16/GlobalCom2@96b2d00",
        release=Release(
            order="the tokens of the base image stand by score",
            count="newline tokens come on top, and tokens that do not fit into a tile are lost",
            ours="raster order, and the budget is met",
            licence="Apache-2.0",
        ),
    )

    # Not "global": scores are normalised per tile, so those of different tiles cannot be compared.
    tile_budget: str = option(
        "adaptive", "the budget over tiles: by the paper's rule, or others", ("adaptive", "each", "thumbnail")
    )
    newlines: str = option("keep", "newline tokens where patches are chosen: drop, or keep and count", NEWLINES)
    temperature: float = option(10.0, "temperature of the softmax over richness: higher gives more equal ratios")
    official: bool = option(False, "newlines uncounted, equal parts and shares rounded down, as the release")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature > 0:
            raise UserError(f"{self.name}.temperature must be above 0, got {self.temperature:g}.")

    def tokens_per_layer(self, spec: ModelSpec) -> tuple[int, ...] | None:
        return None if self.official else super().tokens_per_layer(spec)

    def for_image(self, spec: ModelSpec) -> Self:
        if self.retention_ratio and self.official:  # the release applies the ratio to patches
            return self.with_budget(max(1, int(self.retention_ratio * spec.patches + 0.5)))
        return super().for_image(spec)

    def scores(self) -> tuple[TowerScore, ...]:
        return (SCORE,)

    def crop_shares(self, layout: TokenLayout, scores: dict[TowerScore, Tensor], budget: int) -> list[int] | None:
        if self.tile_budget != "adaptive" or layout.tiles is None:
            return None
        score = scores[SCORE][0].cpu()  # of the base image; the one wait for the device, as token counts become shapes
        richness = equal_parts(score, layout.grid, layout.tiles) if self.official else covered(layout, score)
        factors = adjustment(richness, self.temperature)
        sizes = [len(crop.patches) for crop in layout.crops]
        if self.official:
            # Each tile keeps its own ratio of its own patches, rounded down.
            ratio = min(1.0, self.budget / layout.patches)
            ratios = [ratio, *(min(ratio * factor, 1.0) for factor in factors)]
            return [int(size * own) for size, own in zip(sizes, ratios, strict=True)]
        # The base image keeps the ratio of the whole image; the tiles share the rest by size times factor.
        budget = min(budget, sum(sizes))
        first = int(budget * sizes[0] / sum(sizes) + 0.5)
        weights = [size * factor for size, factor in zip(sizes[1:], factors, strict=True)]
        return [first, *split_evenly(budget - first, sizes[1:], weights)]

    def encoder(self, state: EncoderState) -> Reduction | None:
        assert state.thumbnail is not None  # the pipeline sets it
        tokens = state.features.shape[1]
        score = F.normalize(state.scores[SCORE], dim=-1) + F.normalize(state.thumbnail(SCORE), dim=-1)
        return Reduction(keep_top(score, self.budget), tokens)
