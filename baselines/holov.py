"""HoloV: split the budget over chunks of the image by attention and variance, so that every region keeps tokens.

Paper: https://arxiv.org/abs/2510.02912
Official code read: obananas/HoloV@1d2e65e, llava/model/utils.py, HoloV
Differs from it: inside a chunk, tokens are ranked by the score that also ranks the chunk (the release ranks them by
    attention alone, so that variance never chooses a token). Tokens that do not fit into a chunk go to the others in
    proportion to their scores (the release appends zero vectors instead). Tokens stay in raster order (the release:
    sorted by attention inside each chunk). `official` follows the release in all three. Both need chunks of one size.
    With tiles, both cut each tile into chunks (the release: the joined tokens of all tiles; at 672 x 672 pixels 42 to
    54 of 64 tokens agree).

Shapes: B images, N tokens, P chunks of S = N / P tokens, D channels. A chunk is consecutive in raster order; 16 chunks
of LLaVA-1.5's 24 x 24 patches have 1.5 rows each.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava.reduction import (
    MethodMetadata,
    ModelSpec,
    PromptState,
    Reducer,
    Reduction,
    Release,
    TowerScore,
    UserError,
    option,
    ranks,
    register,
)

MatMul = Callable[[Tensor, Tensor], Tensor]
ATTENTION_SCALE = 1e3
EPS = 1e-6


def token_scores(tokens: Tensor, attention: Tensor, chunks: int, alpha: float, matmul: MatMul = torch.matmul) -> Tensor:
    """[B, P, S] float32: CLS attention plus `alpha` times the variance of a token's cosines to its chunk.

    The variance is first scaled to the chunk's mean attention. As in the release, the cosine of a token to itself is 0,
    and sums are divided by S - 1.

    Args:
        tokens: [B, N, D].
        attention: [B, N].
    """
    attention = attention.float().unflatten(1, (chunks, -1))
    size = attention.shape[-1]
    if size == 1:
        return attention
    attention = attention * ATTENTION_SCALE
    tokens = tokens.float()
    unit = (tokens / (tokens.norm(dim=-1, keepdim=True) + EPS)).unflatten(1, (chunks, -1))
    cosine = matmul(unit, unit.transpose(-1, -2)) * (1 - torch.eye(size, device=unit.device))
    mean = cosine.sum(-1, keepdim=True) / (size - 1)
    variance = (cosine - mean).square().sum(-1) / (size - 1)
    scale = attention.abs().mean(-1, keepdim=True) / (variance.mean(-1, keepdim=True) + EPS)
    return attention + alpha * (variance * scale)


def deal_as_released(score: Tensor, budget: int) -> Tensor:
    """[B, P] chunk scores -> [B, P] tokens of each chunk, in proportion; they may exceed the size of a chunk."""
    share = score / (score.sum(1, keepdim=True) + EPS)
    given = (share * budget).floor().long()
    left = budget - given.sum(1, keepdim=True)
    return given + (ranks(share) < left)


def deal(score: Tensor, size: int, budget: int) -> Tensor:
    """[B, P] chunk scores -> [B, P] int64 tokens of each chunk, at most `size` each, `budget` in sum.

    Tokens are dealt in proportion to the scores; those that do not fit into a chunk go to the others in the same
    proportion. Fractions are cut off, and the remaining tokens go one each to the chunks with the highest scores.
    """
    score = score.clamp(min=EPS * EPS)  # so that a chunk without attention can take tokens when all others are full
    chunks = score.shape[1]
    # The full chunks are those with the highest scores. Their number is the smallest at which no other chunk would be
    # full, too. All numbers are tried at once: [B, P + 1, P].
    number = torch.arange(chunks + 1, device=score.device)
    full = ranks(score)[:, None] < number[:, None]
    left = score[:, None].masked_fill(full, 0).sum(2, keepdim=True).clamp(min=EPS * EPS)
    quota = score[:, None] * ((budget - size * number)[:, None] / left)
    settled = (full | (quota >= size)).sum(2) == number
    first = settled.byte().argmax(1)[:, None, None].expand(-1, 1, chunks)
    full, quota = full.gather(1, first)[:, 0], quota.gather(1, first)[:, 0]
    given = torch.where(full, size, quota.floor().long())
    left = budget - given.sum(1, keepdim=True)
    return given + (ranks(score.masked_fill(full, -1)) < left)


def reduction_as_released(attention: Tensor, given: Tensor, budget: int) -> Reduction:
    """Tokens chunk by chunk, highest attention first, then zero vectors where chunks have too few tokens.

    Args:
        attention: [B, P, S].
        given: [B, P], may exceed S; a chunk that is kept whole stays in raster order.
    """
    size, tokens = attention.shape[-1], attention[0].numel()
    place = torch.arange(size, device=attention.device)
    order = torch.where((given >= size).unsqueeze(-1), place, ranks(attention))
    count = given.clamp(min=0, max=size)
    slot = (count.cumsum(1) - count).unsqueeze(-1) + order
    assignment = torch.where(order < count.unsqueeze(-1), slot, -1).flatten(1)
    # Kept tokens first, then dropped ones: a zero vector has the index of a dropped token, and no members.
    kept = torch.where(assignment < 0, tokens, assignment).argsort(dim=1, stable=True)[:, :budget]
    return Reduction(kept, tokens, assignment, (assignment >= 0).float())


@register("holov")
@dataclass(frozen=True, kw_only=True)
class HoloV(Reducer):
    """Acts after the projector, as it scores projected tokens."""

    summary: ClassVar[str] = "budget split over chunks by attention and variance"
    metadata: ClassVar[MethodMetadata] = MethodMetadata(
        acts="before decoder layer 0",
        score="CLS attention, block −2, and variance of cosines, inside chunks",
        needs="CLS token",
        reads=("cls_attention -2", "tokens", "order"),
        paper="HoloV, 2510.02912",
        url="https://arxiv.org/abs/2510.02912",
        code="obananas/HoloV@1d2e65e",
        release=Release(
            order="by attention inside each chunk",
            count="tokens that do not fit into a chunk are zero vectors",
            ours="raster order, and other chunks take these tokens",
            licence="Apache-2.0",
        ),
    )

    known_deviations: ClassVar[dict[str, str]] = {
        "unsorted with official=true": "the release orders the tokens of a chunk by attention",
        "scale with official=true": "the release fills up with zero vectors where chunks have too few tokens",
    }

    chunks: int = option(16, "number of chunks, consecutive in raster order, that the budget is split over")
    alpha: float = option(0.09, "weight of the variance beside the attention")
    official: bool = option(False, "rank by attention alone, its order, and zero vectors on overflow, as the release")

    def check(self, spec: ModelSpec) -> None:
        super().check(spec)
        tokens = spec.visual_tokens
        if not 1 <= self.chunks <= tokens or tokens % self.chunks:
            possible = [count for count in range(1, tokens + 1) if tokens % count == 0]
            raise UserError(
                f"holov.chunks must divide the {tokens} visual tokens of this model "
                f"({', '.join(map(str, possible))}), got {self.chunks}."
            )

    def scores(self) -> tuple[TowerScore, ...]:
        return (TowerScore("cls_attention"),)

    def prompt(self, state: PromptState) -> Reduction | None:
        tokens = state.tokens.shape[1]
        attention = state.scores[TowerScore("cls_attention")]
        # An unpadded tile can have any number of patches: the largest number of equal chunks.
        chunks = next(count for count in range(self.chunks, 0, -1) if tokens % count == 0)
        score = token_scores(state.tokens, attention, chunks, self.alpha, state.matmul)
        if self.official:
            given = deal_as_released(score.mean(-1), self.budget)
            return reduction_as_released(attention.unflatten(1, (chunks, -1)), given, self.budget)
        given = deal(score.mean(-1), score.shape[-1], self.budget)
        best = (ranks(score) < given.unsqueeze(-1)).flatten(1)  # of each chunk as many as it was given
        kept = best.byte().argsort(dim=1, descending=True, stable=True)[:, : self.budget]
        return Reduction(kept, tokens)
