"""PruMerge: patches that CLS looks at, each with a share of its nearest by key, and one token for all the others.

Paper: https://arxiv.org/abs/2403.15388
Official code read: 42Shawn/LLaVA-PruMerge@097c041, llava/model/multimodal_encoder/clip_encoder.py,
    token_prune_merge_advanced
Differs from it: keeps budget - 1 tokens and the one for the others (the release keeps as many as attention has
    outliers), divides each merged token by the sum of its weights (the release does not), and stays in raster order
    (the release: by attention). `official` does as the release in all three; `fixed` with it takes the release's other
    branch, which keeps a given number of tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
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
    register,
)

MatMul = Callable[[Tensor, Tensor], Tensor]
NEIGHBOURS = 32


def by_attention(attention: Tensor, count: int) -> Tensor:
    """[B, N] -> [B, count] positions, highest first, ties to the lower index."""
    return attention.argsort(dim=1, descending=True, stable=True)[:, :count]


def outliers(attention: Tensor) -> Tensor:
    """[B, N] -> [B] int64, how many lie above the third quartile by more than 1.5 times the interquartile range."""
    low, high = torch.quantile(attention, torch.tensor([0.25, 0.75], device=attention.device), dim=1)
    return (attention > (high + 1.5 * (high - low)).unsqueeze(1)).sum(1)


def left_over(kept: Tensor, total: int) -> Tensor:
    """[B, K] positions -> [B, N-K] positions that are not among them, ascending.

    Where `kept` names a position twice, the lowest of the others are missing, as in the release.
    """
    places = torch.arange(total, device=kept.device).expand(len(kept), -1)
    return places.scatter(1, kept, -1).sort(dim=1).values[:, kept.shape[1] :]


def shares(kept: Tensor, attention: Tensor, keys: Tensor, neighbours: int, matmul: MatMul = torch.matmul) -> Tensor:
    """[B, K+1, N] float32, what each output token is made of: K kept tokens, then the one for the others.

    A kept token counts 1 and each of its nearest, kept or not, its attention. In the last token all others count their
    attention.

    Args:
        kept: [B, K] positions.
        attention: [B, N].
        keys: [B, N, D]; nearest are those with the highest cosine.
    """
    batch, total = attention.shape
    count, others = kept.shape[1], left_over(kept, total)
    listed = torch.cat([kept, others], 1)
    unit = F.normalize(keys.float(), dim=-1)
    cosine = matmul(gather_tokens(unit, kept), gather_tokens(unit, listed).transpose(1, 2))  # [B, K, N]
    itself = torch.eye(count, listed.shape[1], dtype=torch.bool, device=cosine.device)
    order = cosine.masked_fill(itself, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    per_kept = lambda values: values.unsqueeze(1).expand(-1, count, -1)  # noqa: E731
    nearest = per_kept(listed).gather(2, order[:, :, : min(neighbours, total - 1)])  # [B, K, neighbours]
    mix = attention.new_zeros(batch, count + 1, total)
    mix[:, :-1].scatter_add_(2, nearest, per_kept(attention).gather(2, nearest))
    mix[:, :-1].scatter_add_(2, kept.unsqueeze(-1), mix.new_ones(batch, count, 1))
    mix[:, -1].scatter_add_(1, others, attention.gather(1, others))
    return mix


def place_of_others(kept: Tensor, attention: Tensor) -> Tensor:
    """[B, 1] where the token for the others stands: the one of them with the highest attention."""
    return attention.scatter(1, kept, -1).argmax(1, keepdim=True)


@register("prumerge")
@dataclass(frozen=True, kw_only=True)
class PruMerge(Reducer):
    """The queries and keys are those of the tower's last block, all heads taken as one."""

    summary: ClassVar[str] = "highest CLS attention, supplemented by near keys, and one token for the rest"
    metadata: ClassVar[MethodMetadata] = MethodMetadata(
        acts="after the tower",
        score="CLS attention, block −1, heads taken as one",
        rest="the 32 nearest keys added to each kept token by attention; all others averaged into one token",
        order="raster, the token for the others last",
        needs="CLS token",
        paper="LLaVA-PruMerge, 2403.15388",
        url="https://arxiv.org/abs/2403.15388",
        code="42Shawn/LLaVA-PruMerge@097c041",
    )
    known_deviations: ClassVar[dict[str, str]] = {"appended": "the token made of all that were not kept stands last"}

    neighbours: int = option(NEIGHBOURS, "nearest keys that each kept token is supplemented by")
    official: bool = option(False, "as the release: as many tokens as outliers, their order, weights not normalised")
    fixed: bool = option(False, "official: the release's other branch, which keeps to the budget")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.neighbours < 0:
            raise UserError(f"{self.name}.neighbours must be at least 0, got {self.neighbours}.")
        if self.fixed and not self.official:
            raise UserError(f"{self.name}.fixed is a branch of the release and needs {self.name}.official=true.")

    @property
    def adaptive(self) -> bool:
        """The picture decides how many tokens stay, whatever the budget."""
        return self.official and not self.fixed

    def tokens_per_layer(self, spec: ModelSpec) -> tuple[int, ...] | None:
        return None if self.adaptive else super().tokens_per_layer(spec)

    def scores(self) -> tuple[TowerScore, ...]:
        return TowerScore("fused_cls_attention", -1), TowerScore("whole_keys", -1)

    def keeps_all(self, tokens: int) -> bool:
        return super().keeps_all(tokens) and not self.adaptive

    def encoder(self, state: EncoderState) -> Reductions:
        attention, keys = (state.scores[score] for score in self.scores())
        if self.adaptive:
            # The picture decides the length of its sequence, so this method has to look at the device once.
            rows = zip(attention.split(1), keys.split(1), outliers(attention).tolist(), strict=True)
            return [self._merge(self.keep_adaptively(row, count), row, key, state) for row, key, count in rows]
        kept = self.keep_as_released(attention) if self.official else self.keep(attention)
        return self._merge(kept, attention, keys, state)

    def keep(self, attention: Tensor) -> Tensor:
        """[B, N] -> [B, budget - 1] positions, ascending."""
        return keep_top(attention, self.budget - 1)

    def keep_as_released(self, attention: Tensor) -> Tensor:
        """[B, N] -> [B, budget - 1] positions in the release's order."""
        return by_attention(attention, self.budget - 1)

    def keep_adaptively(self, attention: Tensor, count: int) -> Tensor:
        """[1, N] -> [1, K] positions in the release's order.

        Args:
            count: outliers of this picture.
        """
        return by_attention(attention, count)

    def _merge(self, kept: Tensor, attention: Tensor, keys: Tensor, state: EncoderState) -> Reduction:
        anchor = torch.cat([kept, place_of_others(kept, attention)], 1)
        if self.official:
            mix = shares(kept, attention, keys, self.neighbours, state.matmul)
        else:
            # The floor keeps attention that underflows to zero from becoming 0/0.
            mix = shares(kept, attention.clamp(min=1e-12), keys, self.neighbours, state.matmul)
            mix = mix / mix.sum(-1, keepdim=True)
        return Reduction(anchor, attention.shape[1], merge_matrix=mix, appended=1)
