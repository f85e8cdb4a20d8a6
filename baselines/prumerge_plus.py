"""PruMerge+: PruMerge with a quarter of its tokens chosen by attention and the rest spread over the image.

Paper: https://arxiv.org/abs/2403.15388
Official code read: 42Shawn/LLaVA-PruMerge@097c041, llava/model/multimodal_encoder/clip_encoder.py,
    token_prune_merge_advanced_plus
Differs from it: as prumerge does, and spreads tokens over those that attention did not choose, so that their number is
    exact. `official` works for images without outliers and for images with more than a third of outliers (the release
    divides by zero, or steps by zero): the spread tokens are then the first one, or all.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from baselines.prumerge import PruMerge, by_attention
from llava.reduction import MethodMetadata, ModelSpec, UserError, keep_top, option, others, register


def spread(taken: Tensor, total: int, count: int) -> Tensor:
    """[B, count] indices, ascending, spread evenly over those that are not in `taken` [B, K]."""
    rest = others(taken, total)
    step = torch.arange(count, device=rest.device) * rest.shape[1] // max(count, 1)
    return rest[:, step]


def released_grid(total: int, found: int) -> range:
    """The indices that the release adds to `found` outliers: about three times as many, from index 0 on."""
    if found == 0:
        return range(1)
    return range(0, total - 1, max(1, total // found // 3))


def fixed_grid(total: int, count: int) -> range:
    """Indices of the release's fixed branch: every n-th from the middle of the first step."""
    step = total // count
    return range(step // 2, total - 1, step)


def released_budgets(total: int) -> list[int]:
    """Budgets whose fixed grid has as many indices as attention chooses; at others the release fails."""
    return [2 * count + 1 for count in range(1, total // 2) if len(fixed_grid(total, count)) == count]


@register("prumerge_plus")
@dataclass(frozen=True, kw_only=True)
class PruMergePlus(PruMerge):
    """Spread tokens are merged with their nearest tokens like the others."""

    summary: ClassVar[str] = "PruMerge with tokens spread over the image"
    metadata: ClassVar[MethodMetadata] = replace(
        PruMerge.metadata, score="CLS attention, block −1, heads taken as one; three quarters spread evenly"
    )

    known_deviations: ClassVar[dict[str, str]] = {
        **PruMerge.known_deviations,
        "duplicates with official=true": "a token of the release's grid may be kept by its attention, too",
    }

    spatial: float = option(0.75, "share of the kept tokens that are spread over the image", least=0, most=1)

    def check(self, spec: ModelSpec) -> None:
        super().check(spec)
        fitting = released_budgets(spec.visual_tokens)
        if self.fixed and self.budget not in fitting:
            near = sorted(sorted(fitting, key=lambda budget: abs(budget - self.budget))[:4])
            raise UserError(
                "The release's fixed branch of prumerge_plus keeps as many tokens on a grid as by attention, and one "
                f"more; a budget of {self.budget} has no such grid, near it are {', '.join(map(str, near))}."
            )

    def keep(self, attention: Tensor) -> Tensor:
        count = round((self.budget - 1) * self.spatial)
        top = keep_top(attention, self.budget - 1 - count)
        return torch.cat([top, spread(top, attention.shape[1], count)], 1).sort(dim=1).values

    def keep_as_released(self, attention: Tensor) -> Tensor:
        """As many tokens by attention as on a grid; the grid may repeat a token."""
        half = (self.budget - 1) // 2
        grid = torch.tensor(fixed_grid(attention.shape[1], half), device=attention.device)
        return torch.cat([by_attention(attention, half), grid.expand(len(attention), -1)], 1)

    def keep_adaptively(self, attention: Tensor, count: int) -> Tensor:
        top = super().keep_adaptively(attention, count)
        grid = torch.tensor(released_grid(attention.shape[1], count), device=attention.device)
        fresh = grid[~torch.isin(grid, top)]
        return torch.cat([top, fresh.unsqueeze(0)], 1)
