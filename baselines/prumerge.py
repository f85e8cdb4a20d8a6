"""PruMerge: keep the patches with the highest CLS attention, add their nearest by key, and average all others.

PruMerge+ chooses a quarter of its tokens by attention and spreads the others over the image.

Paper: https://arxiv.org/abs/2403.15388
Official code read: 42Shawn/LLaVA-PruMerge@097c041, llava/model/multimodal_encoder/clip_encoder.py,
    token_prune_merge_advanced and token_prune_merge_advanced_plus
Differs from it: it keeps budget - 1 tokens and one average of the others (the release keeps as many as attention has
    outliers), divides each merged token by the sum of its weights (the release does not), and stays in raster order
    (the release: sorted by attention). `official` follows the release in all three; with `fixed` it takes the release's
    other branch, which keeps a given number of tokens. PruMerge+ spreads tokens over those that attention did not
    choose, so that their number is exact. Its `official` also works for images without outliers and for images with
    more than a third of outliers (the release fails with a division or a step of zero): it then spreads over the first
    token alone, or over all.

Shapes: B images, N tokens, K kept tokens, D channels of the keys.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.reduction import (
    EncoderState,
    MethodMetadata,
    ModelSpec,
    Reducer,
    Reduction,
    Reductions,
    TowerScore,
    UserError,
    gather_tokens,
    keep_top,
    option,
    others,
    register,
)

MatMul = Callable[[Tensor, Tensor], Tensor]
NEIGHBOURS = 32


def by_attention(attention: Tensor, count: int) -> Tensor:
    """[B, N] -> [B, count] indices of the highest, best first; ties go to the lower index."""
    return attention.argsort(dim=1, descending=True, stable=True)[:, :count]


def outliers(attention: Tensor) -> Tensor:
    """[B, N] -> [B] int64, the number of values more than 1.5 interquartile ranges above the third quartile."""
    low, high = torch.quantile(attention, torch.tensor([0.25, 0.75], device=attention.device), dim=1)
    number: Tensor = (attention > (high + 1.5 * (high - low)).unsqueeze(1)).sum(1)
    return number


def shares(kept: Tensor, attention: Tensor, keys: Tensor, neighbours: int, matmul: MatMul = torch.matmul) -> Tensor:
    """[B, K+1, N] float32 merge matrix: K kept tokens, then the average of the others.

    A kept token has weight 1, and each of its nearest tokens, kept or not, has its attention as weight. In the last
    output token, each of the others has its attention as weight.

    Args:
        kept: [B, K] indices.
        attention: [B, N].
        keys: [B, N, D]; the nearest tokens are those with the highest cosine.
    """
    (batch, total), count = attention.shape, kept.shape[1]
    # The others, ascending. As in the release, the lowest one is missing for every index that `kept` has twice.
    places = torch.arange(total, device=kept.device).expand(batch, -1)
    rest = places.scatter(1, kept, -1).sort(dim=1).values[:, count:]
    listed = torch.cat([kept, rest], 1)
    unit = F.normalize(keys.float(), dim=-1)
    cosine = matmul(gather_tokens(unit, kept), gather_tokens(unit, listed).transpose(1, 2))  # [B, K, N]
    itself = torch.eye(count, listed.shape[1], dtype=torch.bool, device=cosine.device)
    order = cosine.masked_fill(itself, -torch.inf).argsort(dim=-1, descending=True, stable=True)

    def per_kept(values: Tensor) -> Tensor:
        return values.unsqueeze(1).expand(-1, count, -1)

    nearest = per_kept(listed).gather(2, order[:, :, : min(neighbours, total - 1)])  # [B, K, neighbours]
    matrix = attention.new_zeros(batch, count + 1, total)
    matrix[:, :-1].scatter_add_(2, nearest, per_kept(attention).gather(2, nearest))
    matrix[:, :-1].scatter_add_(2, kept.unsqueeze(-1), matrix.new_ones(batch, count, 1))
    matrix[:, -1].scatter_add_(1, rest, attention.gather(1, rest))
    return matrix


@register("prumerge")
@dataclass(frozen=True, kw_only=True)
class PruMerge(Reducer):
    """Reads queries and keys of the tower's last block, with all heads taken as one."""

    summary: ClassVar[str] = "highest CLS attention, supplemented by near keys, and one token for the rest"
    metadata: ClassVar[MethodMetadata] = MethodMetadata(
        acts="after the tower",
        score="CLS attention, block −1, heads taken as one",
        rest="the 32 nearest keys added to each kept token by attention; all others averaged into one token",
        order="raster, the token for the others last",
        needs="CLS token",
        reads=("fused_cls_attention -1", "whole_keys -1"),
        similarity="keys",
        weights="score",
        paper="LLaVA-PruMerge, 2403.15388",
        url="https://arxiv.org/abs/2403.15388",
        code="42Shawn/LLaVA-PruMerge@097c041",
    )
    known_deviations: ClassVar[dict[str, str]] = {
        "appended": "the average of the tokens that are not kept comes last",
        "unsorted with official=true": "the release keeps tokens in the order of their attention",
        "scale with official=true": "the release does not normalise the weights",
    }

    neighbours: int = option(NEIGHBOURS, "nearest tokens by key that are merged into each kept token", least=0)
    official: bool = option(False, "as the release: as many tokens as outliers, their order, weights not normalised")
    fixed: bool = option(False, "official: the release's other branch, which keeps a given number of tokens")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fixed and not self.official:
            raise UserError(f"{self.name}.fixed is a branch of the release and needs {self.name}.official=true.")

    @property
    def by_image(self) -> bool:
        """Whether the number of kept tokens depends on the image and not on the budget."""
        return self.official and not self.fixed

    def tokens_per_layer(self, spec: ModelSpec) -> tuple[int, ...] | None:
        return None if self.by_image else super().tokens_per_layer(spec)

    def scores(self) -> tuple[TowerScore, ...]:
        return TowerScore("fused_cls_attention", -1), TowerScore("whole_keys", -1)

    def keeps_all(self, tokens: int) -> bool:
        return super().keeps_all(tokens) and not self.by_image

    def encoder(self, state: EncoderState) -> Reductions:
        attention, keys = (state.scores[score] for score in self.scores())
        if self.by_image:
            # The number of tokens depends on the image, so the host waits for the device once.
            rows = zip(attention.split(1), keys.split(1), outliers(attention).tolist(), strict=True)
            return [self._merge(self.keep(row, count), row, key, state) for row, key, count in rows]
        return self._merge(self.keep(attention), attention, keys, state)

    def keep(self, attention: Tensor, found: int | None = None) -> Tensor:
        """[B, N] -> [B, K] indices of kept tokens, ascending, or with `official` in the release's order.

        Args:
            found: number of outliers of the only image, which the release keeps; None keeps budget - 1 tokens.
        """
        if not self.official:
            return keep_top(attention, self.budget - 1)
        return by_attention(attention, self.budget - 1 if found is None else found)

    def _merge(self, kept: Tensor, attention: Tensor, keys: Tensor, state: EncoderState) -> Reduction:
        # The average of the others gets the place of the one with the highest attention among them.
        outputs = torch.cat([kept, attention.scatter(1, kept, -1).argmax(1, keepdim=True)], 1)
        if self.official:
            matrix = shares(kept, attention, keys, self.neighbours, state.matmul)
        else:
            # Clamped, so that attention that underflows to zero does not give 0/0.
            matrix = shares(kept, attention.clamp(min=1e-12), keys, self.neighbours, state.matmul)
            matrix = matrix / matrix.sum(-1, keepdim=True)
        return Reduction(outputs, attention.shape[1], merge_matrix=matrix, appended=1)


# PruMerge+


def fixed_grid(total: int, count: int) -> range:
    """Indices that the release's fixed branch adds: every n-th, starting in the middle of the first step."""
    step = total // count
    return range(step // 2, total - 1, step)


@register("prumerge_plus")
@dataclass(frozen=True, kw_only=True)
class PruMergePlus(PruMerge):
    """Merges the spread tokens with their nearest tokens, like those chosen by attention."""

    summary: ClassVar[str] = "PruMerge with tokens spread over the image"
    metadata: ClassVar[MethodMetadata] = replace(
        PruMerge.metadata,
        score="CLS attention, block −1, heads taken as one; three quarters spread evenly",
        reads=(*PruMerge.metadata.reads, "order"),
    )

    known_deviations: ClassVar[dict[str, str]] = {
        **PruMerge.known_deviations,
        "duplicates with official=true": "a token of the release's grid may be kept by its attention, too",
    }

    spatial: float = option(0.75, "share of the kept tokens that are spread over the image", least=0, most=1)

    def check(self, spec: ModelSpec) -> None:
        super().check(spec)
        # Elsewhere the release fails: its grid has another number of indices than attention chooses.
        total = spec.visual_tokens
        fitting = [2 * count + 1 for count in range(1, total // 2) if len(fixed_grid(total, count)) == count]
        if self.fixed and self.budget not in fitting:
            near = sorted(sorted(fitting, key=lambda budget: abs(budget - self.budget))[:4])
            raise UserError(
                "The release's fixed branch of prumerge_plus keeps as many tokens on a grid as by attention, and one "
                f"more; a budget of {self.budget} has no such grid, near it are {', '.join(map(str, near))}."
            )

    def keep(self, attention: Tensor, found: int | None = None) -> Tensor:
        total, device = attention.shape[1], attention.device
        if not self.official:
            # The highest, and tokens spread evenly over the others.
            count = round((self.budget - 1) * self.spatial)
            top = keep_top(attention, self.budget - 1 - count)
            rest = others(top, total)
            step = torch.arange(count, device=device) * rest.shape[1] // max(count, 1)
            return torch.cat([top, rest[:, step]], 1).sort(dim=1).values
        if found is None:
            # The release's fixed branch: half by attention, half on a grid, which may repeat a token.
            half = (self.budget - 1) // 2
            grid = torch.tensor(fixed_grid(total, half), device=device)
            return torch.cat([by_attention(attention, half), grid.expand(len(attention), -1)], 1)
        # The outliers, and a grid of about three times as many that starts at index 0.
        top = by_attention(attention, found)
        indices = range(0, total - 1, max(1, total // found // 3)) if found else range(1)
        grid = torch.tensor(indices, device=device)
        fresh = grid[~torch.isin(grid, top)]
        return torch.cat([top, fresh.unsqueeze(0)], 1)
