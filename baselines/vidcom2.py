"""VidCom2: frames that differ from the video keep more tokens, in each frame those that differ from video and frame.

Paper: https://arxiv.org/abs/2505.14454
Official code read: xuyang-liu16/VidCom2@944a17d, token_compressor/vidcom2/vidcom2.py
Differs from it: scores are in float32 (theirs: in the model's half precision). The tokens of a video are exactly the
    budget: the k-th best token of a frame, minus the frame's share of tokens, orders the tokens of all frames, and the
    first ones are kept. That cuts fractions off the shares and gives the remaining tokens one each to the frames with
    the largest fractions; what does not fit into a full frame goes to the others in turn. Each frame keeps a token
    where the budget has one for each. The release rounds each share and misses its total (119 for 120, 52 for 57.6),
    as `official` does here. An image, with or without tiles, is one frame: then the tokens farthest from the mean are
    kept. The newline tokens that the release keeps on top of its budget in LLaVA-Video are no tokens of a method here.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.reduction import (
    MethodMetadata,
    ModelSpec,
    PromptState,
    Reducer,
    Reduction,
    Reductions,
    Release,
    keep_top,
    option,
    ranks,
    register,
)

WIDTHS = (1 / 8, 1 / 4, 1 / 2, 1, 2)  # twice each is the scale of squared distances in one Gaussian
TEMPERATURE = 0.01  # of the softmax over frames


def likeness(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """How much each token is like its whole video, and like its own frame, [B, F, n] each.

    Args:
        tokens: [B, F, n, D] of F frames. Only the half of the channels that vary least over the video count.
    """
    flat = tokens.flatten(1, 2)
    steady = flat.var(1, correction=0).argsort(dim=1, stable=True)[:, : tokens.shape[3] // 2]
    unit = F.normalize(flat.gather(2, steady.unsqueeze(1).expand(-1, flat.shape[1], -1)), dim=-1)
    unit = unit.unflatten(1, tokens.shape[1:3])
    twice = 2 * torch.tensor(WIDTHS, dtype=unit.dtype).to(unit.device, non_blocking=True)

    def to(centre: Tensor) -> Tensor:
        distance = (unit - centre).square().sum(-1, keepdim=True)
        similarity: Tensor = (-distance / twice).exp().sum(-1)
        return similarity

    return to(unit.mean((1, 2), keepdim=True)), to(unit.mean(2, keepdim=True))


def shares(video: Tensor, ratio: float) -> Tensor:
    """[B, F] float64 tokens of each frame, with fractions: more for frames that are less like the video.

    Most frames have nearly the same share, and in float32 rounding would decide which of them get one token more.

    Args:
        video: [B, F, n] likeness to the video.
        ratio: share of the tokens to keep.
    """
    part = (-video.mean(2).double() / TEMPERATURE).softmax(1)
    return (ratio * (1 + part - part.mean(1, keepdim=True))).clamp(max=1) * video.shape[2]


def within(order: Tensor, share: Tensor, budget: int) -> Tensor:
    """[B, budget] ascending numbers of the kept tokens in the video; see "Differs from it" above.

    Args:
        order: [B, F, n] rank of each token in its frame, 0 for the one to keep first.
    """
    behind = order + 1 - share.unsqueeze(2)
    if budget >= order.shape[1]:
        behind = behind.masked_fill(order == 0, -torch.inf)
    return keep_top(-behind.flatten(1), budget)


def released(order: Tensor, share: Tensor) -> list[Tensor]:
    """For each video, [1, k] ascending numbers of the tokens that the release keeps."""
    kept = order < share.round().clamp(min=1).unsqueeze(2)
    return [own.flatten().nonzero().T for own in kept]


@register("vidcom2")
@dataclass(frozen=True, kw_only=True)
class VidCom2(Reducer):
    """Acts after the projector, on all frames of a video together."""

    summary: ClassVar[str] = "tokens unlike their frame and the video; more for frames unlike the others"
    known_deviations: ClassVar[dict[str, str]] = {
        "uncounted with official=true": "the release rounds the tokens of each frame, so a video's total depends on it",
        "unused official": "the one frame that an image is gets the whole budget, rounded or not",
    }
    metadata: ClassVar[MethodMetadata] = MethodMetadata(
        acts="before decoder layer 0",
        score="low Gaussian similarity of projected tokens to the means of video and frame, in the steadier channels",
        reads=("tokens",),
        paper="VidCom2, 2505.14454",
        url="https://arxiv.org/abs/2505.14454",
        code="xuyang-liu16/VidCom2@944a17d",
        release=Release(
            batch="a batch other than 1 silently switches it off",
            dtype="scores in the model's half precision, where many tie",
            count="rounded in each frame; newline tokens of LLaVA-Video come on top",
            ours="float32, any batch, exactly the budget",
            licence="Apache-2.0",
        ),
    )

    tile_budget: str = option("global", "ranks the frames of a video together", ("global",))
    official: bool = option(False, "each frame's tokens rounded as released, so that a video's total is off the budget")

    def tokens_per_layer(self, spec: ModelSpec) -> tuple[int, ...] | None:
        return None if self.official else super().tokens_per_layer(spec)

    def prompt(self, state: PromptState) -> Reductions:
        total = state.tokens.shape[1]
        video, frame = likeness(state.tokens.float().unflatten(1, (state.spec.frames, -1)))
        order, share = ranks(-(video + frame)), shares(video, self.budget / total)
        if self.official:
            return [Reduction(kept, total) for kept in released(order, share)]
        return Reduction(within(order, share, self.budget), total)
