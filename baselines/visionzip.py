"""VisionZip: keep the tokens with the highest CLS attention, and average the rest around evenly spaced targets.

Paper: https://arxiv.org/abs/2412.04467
Official code read: dvlab-research/VisionZip@3151f6d, visionzip/clip_encoder.py and visionzip/utils.py
Differs from it: contextual tokens are averages, as in the paper. The release, and `official` here, adds the mean of the
    members to their target, which nearly doubles a token's norm. Any budget is split in the release's proportion. With
    tiles, contextual tokens are in raster order of the stitched tiles, also with `official` (the release: tile after
    tile).

Shapes: B images, N patches, d channels of the keys.
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
    UserError,
    merge_plan,
    option,
    register,
    split,
)

CONTEXTUAL_SHARE = 10 / 64  # 54 + 10, 108 + 20 and 162 + 30 in the release, CLS among the first


@register("visionzip")
@dataclass(frozen=True, kw_only=True)
class VisionZip(Reducer):
    """Keeps the CLS token as one of the budget's tokens, where the tower has one."""

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
        release=Release(
            order="contextual tokens come last, with tiles tile after tile",
            norms="contextual tokens: the mean of the members is added to the target, which nearly doubles it",
            ours="averages",
            licence="Apache-2.0",
        ),
    )
    keep_cls: ClassVar[bool] = True
    known_deviations: ClassVar[dict[str, str]] = {
        "appended": "contextual tokens come after the dominant ones",
        "scale with official=true": "the release adds the mean of its members to a contextual token",
    }

    # Every tile keeps its own class token, so the tokens of all tiles cannot be ranked together.
    tile_budget: str = option(
        "each", "the budget over tiles: even, or by the base image's attention", ("each", "thumbnail")
    )
    contextual: float = option(CONTEXTUAL_SHARE, "share of the budget that contextual tokens take")
    official: bool = option(False, "contextual token = target + mean of its members, as in the release")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.contextual < 1:
            raise UserError(f"visionzip.contextual must be at least 0 and below 1, got {self.contextual}.")

    def scores(self) -> tuple[TowerScore, ...]:
        return TowerScore("cls_attention"), TowerScore("keys")

    def encoder(self, state: EncoderState) -> Reduction:
        saliency, keys = (state.scores[score] for score in self.scores())  # [B, N], and [B, N, d] as mean over heads
        patches, tokens = saliency.shape[1], state.features.shape[1]
        has_cls = tokens > patches
        if self.budget >= patches:  # all patches without CLS, as LLaVA has them without reduction
            everything = torch.arange(tokens - patches, tokens, device=saliency.device)
            return Reduction(everything.expand(len(saliency), -1), tokens)

        # Dominant tokens, CLS first, are kept as they are. Every n-th of the others is a target: it and the tokens with
        # the most similar keys become a contextual token.
        contextual = min(round(self.budget * self.contextual), self.budget - 1)
        kept, rest = split(saliency, self.budget - contextual - has_cls)
        weights = "anchor_plus_mean" if self.official else "mean"
        plan = merge_plan(kept, rest, contextual, saliency, keys, "stride", weights, appended=True)
        return plan.with_cls() if has_cls else plan
