"""HiRED: keep the patches with the highest CLS attention; attention of block 0 splits the budget over tiles.

Paper: https://arxiv.org/abs/2408.10945
Official code read: hasanar1f/HiRED@502d6dd, transformers/src/transformers/models/llava/modeling_llava.py and
    llava_next/modeling_llava_next.py, both under the same fork
Differs from it: no difference is known for one tile, as in LLaVA-1.5. With tiles there are three. Salient patches are
    counted in the region that each tile shows (the release cuts the flat 24 x 24 map into one run per tile: strips of
    whole rows). Fractions and tokens that do not fit into a tile go to other tiles, and to the base image if all tiles
    are full (the release loses them). Only patches that unpadding leaves can be chosen (the release also chooses
    padding and cuts it off afterwards). `official` follows the release in these three.
    The release's fork swaps rows and columns of tiles when their numbers differ, and then keeps other tokens. Neither
    variant does that here.
"""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from llava.reduction import (
    SPLITS,
    EncoderState,
    MethodMetadata,
    ModelSpec,
    Release,
    Scorer,
    TokenLayout,
    TowerScore,
    UserError,
    covered,
    keep_top,
    option,
    register,
    split_evenly,
)

LATE, EARLY = TowerScore("cls_attention"), TowerScore("cls_attention", 0)


def salient_patches(early: Tensor, count: int) -> Tensor:
    """[P] float32: 1 for the `count` patches of the base image with the highest early attention [P], 0 for others."""
    return torch.zeros_like(early).scatter_(0, keep_top(early[None], count)[0], 1.0)


def crop_budgets(salient: Tensor, layout: TokenLayout, budget: int) -> list[int]:
    """Split a budget over the tiles in proportion to the salient patches in the region that each tile shows.

    Args:
        salient: [P], 1 for every salient patch of the base image.
    """
    sizes = [len(tile.patches) for tile in layout.crops[1:]]
    return split_evenly(budget, sizes, covered(layout, salient))


def crop_budgets_as_released(salient: Tensor, tiles: int, budget: int) -> list[int]:
    """Like `crop_budgets`, but over consecutive runs of the flat map, rounded down in float32, at most a whole tile."""
    if len(salient) % tiles:
        raise UserError(
            f"hired.official cuts the {len(salient)} patches of the base image into equal runs, one for each tile, and "
            f"cannot do so for {tiles} tiles; leave it out."
        )
    runs = salient.long().reshape(tiles, -1).sum(1)
    return (runs / runs.sum().clamp(min=1) * budget).int().clamp(max=len(salient)).tolist()


@register("hired")
@dataclass(frozen=True, kw_only=True)
class HiRED(Scorer):
    """With one tile it keeps what FasterVLM keeps. Frames of a video get equal budgets."""

    summary: ClassVar[str] = "highest CLS attention; the budget of tiles by early attention"
    metadata: ClassVar[MethodMetadata] = MethodMetadata(
        acts="after the tower",
        score="CLS attention, block −2; tiles by that of block 0 in the base image",
        needs="CLS token",
        reads=("cls_attention -2",),
        paper="HiRED, 2408.10945",
        url="https://arxiv.org/abs/2408.10945",
        code="hasanar1f/HiRED@502d6dd",
        release=Release(
            count="with tiles, fractions and tokens that do not fit into a tile are lost",
            ours="they go to other tiles",
            licence="MIT",
        ),
    )

    tile_budget: str = option(
        "content", "the budget over tiles: by the paper's visual content, or others", ("content", *SPLITS)
    )
    alpha: float = option(0.5, "share of the budget for the base image; 1 - alpha of its patches count as salient")
    official: bool = option(False, "as released: salient patches by strips, shares rounded down, padding chosen")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise UserError(f"{self.name}.alpha must be between 0 and 1, got {self.alpha:g}.")

    def tokens_per_layer(self, spec: ModelSpec) -> tuple[int, ...] | None:
        return None if self.official and self.tile_budget == "content" else super().tokens_per_layer(spec)

    def for_image(self, spec: ModelSpec) -> Self:
        if self.retention_ratio and self.official and spec.crops:  # the release applies the ratio to whole tiles
            return self.with_budget(max(1, int(len(spec.crops) * spec.crops[0].tokens * self.retention_ratio)))
        return super().for_image(spec)

    def scores(self) -> tuple[TowerScore, ...]:
        return (LATE,)

    def score(self, state: EncoderState) -> Tensor:
        return state.scores[LATE]

    def split_scores(self) -> tuple[TowerScore, ...]:
        return (*super().split_scores(), *((EARLY,) if self.tile_budget == "content" else ()))

    def crop_shares(self, layout: TokenLayout, scores: dict[TowerScore, Tensor], budget: int) -> list[int] | None:
        if self.tile_budget != "content" or layout.tiles is None:
            return None
        base = len(layout.crops[0].patches)
        first = min(int(budget * self.alpha), base)
        early = scores[EARLY][0]
        salient = salient_patches(early, int(len(early) * (1 - self.alpha))).cpu()  # token counts become shapes
        if not self.official:
            first = min(base, max(first, budget - (layout.patches - base)))
            return [first, *crop_budgets(salient, layout, budget - first)]
        tiles = len(layout.crops) - 1
        rest = min(budget - first, tiles * len(salient))
        given = torch.tensor([first, *crop_budgets_as_released(salient, tiles, rest)])
        # The release chooses among the patches of whole tiles, and unpadding cuts off some of the chosen ones. Those
        # that are left are the best of the patches that are left, so their number suffices.
        rank = scores[LATE].cpu().argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        chosen = (rank < given[:, None]).long()
        return [int(row[crop.patches].sum()) for row, crop in zip(chosen, layout.crops, strict=True)]
