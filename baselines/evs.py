"""EVS: the first frame of a video whole, and of the others the tokens that changed since the frame before.

Paper: https://arxiv.org/abs/2510.14624
Official code read: none: the file of vLLM that ships it (vllm-project/vllm, vllm/multimodal/evs.py) has a proprietary
    notice of NVIDIA beside its licence, so it was not read. This is its formula: a token changed by 1 minus its cosine
    with the token of the same place one frame before.
Differs from it: changes are in float32. The paper itself compares pixels (L1), not tokens. The release keeps the first
    frame whole at any budget, and of a budget below one frame it keeps the first frame alone, more than it was asked
    for; `official` does so too. By default such a budget is met: the first frame gets an even part of it (the budget by
    the number of frames, rounded up), at an even grid as `uniform` takes, and the tokens that changed most get the
    rest. An image, with or without tiles, is a first frame, so its whole budget is an even grid.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.reduction import (
    MethodMetadata,
    ModelSpec,
    PatchGrid,
    PromptState,
    Reducer,
    Reduction,
    Release,
    even_grid,
    keep_top,
    option,
    register,
)

FIRST, LAST = 255.0, -1.0  # above and below every change, which is 0 to 2


def kept_tokens(tokens: Tensor, budget: int, grid: PatchGrid) -> Tensor:
    """[B, budget] ascending numbers of the kept tokens in the video.

    Args:
        tokens: [B, F, n, D] of F frames.
        grid: of the first frame, if the budget is below n.
    """
    batch, frames, count, _ = tokens.shape
    unit = F.normalize(tokens, dim=-1)
    # 1 minus the cosine, as half a squared distance: exactly 0 for tokens that are equal, which a cosine is not.
    change = (unit[:, 1:] - unit[:, :-1]).square().sum(-1) / 2
    first = torch.full((count,), FIRST, dtype=change.dtype)
    if budget < count:
        first = torch.full_like(first, LAST).index_fill(0, even_grid(grid, -(-budget // frames)), FIRST)
    first = first.to(change.device, non_blocking=True)
    return keep_top(torch.cat([first.expand(batch, -1), change.flatten(1)], 1), budget)


@register("evs")
@dataclass(frozen=True, kw_only=True)
class EVS(Reducer):
    """Acts after the projector, on all frames of a video together."""

    summary: ClassVar[str] = "the first frame of a video, and what changed since the frame before"
    known_deviations: ClassVar[dict[str, str]] = {
        "uncounted with official=true": "the release keeps the first frame whole, whatever the budget"
    }
    metadata: ClassVar[MethodMetadata] = MethodMetadata(
        acts="before decoder layer 0",
        score="cosine distance of projected tokens to the same place one frame before; an even grid of an image",
        reads=("tokens", "grid", "order"),
        paper="EVS, 2510.14624",
        url="https://arxiv.org/abs/2510.14624",
        release=Release(
            count="at least one frame, whatever the budget",
            ours="any budget; a part of the first frame below one frame",
            licence="Apache-2.0 with a proprietary notice, so it was not read",
        ),
    )

    tile_budget: str = option("global", "ranks the frames of a video together", ("global",))
    official: bool = option(False, "the first frame stays whole at budgets below it, as released")

    def tokens_per_layer(self, spec: ModelSpec) -> tuple[int, ...]:
        # Without tiles, all tokens are of the first frame.
        least = spec.crops[0].tokens if spec.frames > 1 else spec.visual_tokens
        return (max(self.budget, least) if self.official else self.budget,) * spec.layers

    def prompt(self, state: PromptState) -> Reduction:
        tokens = state.tokens.float().unflatten(1, (state.spec.frames, -1))
        budget = max(self.budget, tokens.shape[2]) if self.official else self.budget
        grid = state.layout if state.layout.crops == state.spec.frames else PatchGrid(1, tokens.shape[2])  # of tiles
        return Reduction(kept_tokens(tokens, budget, grid), state.tokens.shape[1])
