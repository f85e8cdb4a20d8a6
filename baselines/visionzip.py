"""VisionZip: keep the tokens with the highest CLS attention, and average the rest around evenly spaced targets.

Paper: https://arxiv.org/abs/2412.04467
Official code read: dvlab-research/VisionZip@3151f6d, visionzip/clip_encoder.py and visionzip/utils.py
Differs from it: contextual tokens are averages, as in the paper; the release, and `official` here, adds the mean of the
    members to their target, which nearly doubles a token's norm. A budget is split in the release's proportion. With
    tiles, `official` too keeps contextual tokens in raster order of the tiles' grid (the release: tile after tile).
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
    TowerScore,
    UserError,
    merge_plan,
    option,
    register,
    split,
)

CONTEXTUAL_SHARE = 10 / 64  # 54 + 10, 108 + 20 and 162 + 30 in the release, CLS among the first


def zip_tokens(
    saliency: Tensor, keys: Tensor, dominant: int, contextual: int, weights: str, cls: bool = True
) -> Reduction:
    """Dominant tokens in raster order, CLS first, then contextual ones in the raster order of their targets.

    Args:
        saliency: [B, N] attention of CLS.
        keys: [B, N, d] of the same block, mean over heads.
        dominant: tokens kept as they are, CLS among them; at least 1.
        contextual: tokens that the rest is merged into; every n-th of the rest is a target.
        weights: "mean" (a group is averaged) or "anchor_plus_mean" (the mean of the others is added to the target).
        cls: there is a CLS token before the N patches; without one, all dominant tokens are patches.
    """
    kept, rest = split(saliency, dominant - cls)
    plan = merge_plan(kept, rest, contextual, saliency, keys, "stride", weights, True)
    return plan.with_cls() if cls else plan


@register("visionzip")
@dataclass(frozen=True, kw_only=True)
class VisionZip(Reducer):
    """The CLS token is one of the tokens that the decoder sees."""

    summary: ClassVar[str] = (
        "CLS, the tokens with its highest attention, and averages of the rest around evenly spaced targets"
    )
    metadata: ClassVar[MethodMetadata] = MethodMetadata(
        acts="after the tower",
        score="CLS attention, block −2",
        rest="averaged into 10 of 64 tokens, each joins the target with the most similar key",
        order="CLS, dominant in raster order, then contextual",
        needs="CLS token",
        reads=("cls_attention -2", "keys -2", "order"),
        similarity="keys",
        weights="mean",
        paper="VisionZip, 2412.04467",
        url="https://arxiv.org/abs/2412.04467",
        code="dvlab-research/VisionZip@3151f6d",
    )
    keep_cls: ClassVar[bool] = True
    known_deviations: ClassVar[dict[str, str]] = {
        "appended": "contextual tokens come after the dominant ones",
        "scale with official=true": "the release adds the mean of its members to a contextual token",
    }

    # Every tile keeps its own class token, so tokens of all tiles are not ranked together.
    tile_budget: str = option(
        "each", "the budget over tiles: even, or by the base image's attention", ("each", "thumbnail")
    )
    contextual: float = option(CONTEXTUAL_SHARE, "share of the budget that contextual tokens take")
    official: bool = option(False, "contextual token = target + mean of its members, as in the release")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.contextual < 1:
            raise UserError(f"visionzip.contextual must be at least 0 and below 1, got {self.contextual}.")

    def split(self) -> tuple[int, int]:
        """Dominant (CLS among them) and contextual tokens."""
        contextual = min(round(self.budget * self.contextual), self.budget - 1)
        return self.budget - contextual, contextual

    def scores(self) -> tuple[TowerScore, ...]:
        return TowerScore("cls_attention"), TowerScore("keys")

    def encoder(self, state: EncoderState) -> Reduction:
        saliency, keys = (state.scores[score] for score in self.scores())
        patches, tokens = saliency.shape[1], state.features.shape[1]
        if self.budget >= patches:
            everything = torch.arange(tokens - patches, tokens, device=saliency.device)
            return Reduction(everything.expand(len(saliency), -1), tokens)  # LLaVA itself drops CLS
        dominant, contextual = self.split()
        weights = "anchor_plus_mean" if self.official else "mean"
        return zip_tokens(saliency, keys, dominant, contextual, weights, cls=tokens > patches)
