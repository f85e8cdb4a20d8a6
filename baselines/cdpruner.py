"""CDPruner: the subset of tokens that is most diverse under a point process weighted by relevance to the question.

Paper: https://arxiv.org/abs/2506.10967
Official code read: Theia-4869/CDPruner@9541616, llava/model/llava_arch.py (encode_images) and
llava/model/multimodal_encoder/clip_encoder.py
Differs from it: relevance is scaled over one image (theirs over all tiles of a batch: one in LLaVA-1.5); when the
chosen tokens span all others, these follow by relevance (theirs divides by zero and repeats tokens); every chunk of a
text too long for CLIP is a framed text (official=true: only the first has its begin, only the last its end token).

Shapes: B images, N visual tokens, K of them kept.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.reduction import (
    RELEVANCE,
    MethodMetadata,
    PromptState,
    Reducer,
    Reduction,
    option,
    register,
    signed,
    text_similarity,
)

# A token whose residual is below this fraction of its kernel entry is spanned by the chosen ones, to float32 accuracy.
SPANNED = 1e-6


def unit_interval(relevance: Tensor) -> Tensor:
    """[B, N] -> [B, N] between 0 and 1 in every row, the lowest just above 0, so that no kernel row is zero."""
    low, high = relevance.amin(1, keepdim=True), relevance.amax(1, keepdim=True)
    return (relevance - low + 1e-6) / (high - low).clamp(min=1e-6)


def greedy_map(kernel: Tensor, budget: int, matmul: Callable[[Tensor, Tensor], Tensor] = torch.matmul) -> Tensor:
    """Greedy maximum of the determinant of a submatrix, by an incremental Cholesky factor (Chen et al., 2018).

    Args:
        kernel: [B, N, N] float32, symmetric and positive semidefinite.
        budget: K.
        matmul: product of two batched matrices.

    Returns:
        [B, K] int64 in the order of choice, without repetition, also if K exceeds the rank of the kernel.
    """
    batch, total, _ = kernel.shape
    own = kernel.diagonal(dim1=1, dim2=2)
    left = own.clone()  # the factor by which each token would multiply the determinant
    last = own - own.amax(1, keepdim=True) - 1  # below every `left`: the order of the spanned tokens
    factor = kernel.new_zeros(batch, budget, total)
    chosen = []
    for step in range(budget):
        free = left > SPANNED * own
        pick = torch.where(free, left, last).argmax(1, keepdim=True)  # [B, 1]
        at = pick.unsqueeze(-1)
        past = factor[:, :step]
        shared = matmul(past.gather(2, at.expand(-1, step, 1)).transpose(1, 2), past)
        row = kernel.gather(1, at.expand(-1, 1, total)) - shared
        pivot = left.gather(1, pick).clamp(min=torch.finfo(left.dtype).tiny).sqrt()
        row = torch.where(free.gather(1, pick), row.squeeze(1) / pivot, 0.0)
        factor[:, step] = row
        left = (left - row.square()).scatter(1, pick, -torch.inf)
        last = last.scatter(1, pick, -torch.inf)
        chosen.append(pick)
    return torch.cat(chosen, 1)


@register("cdpruner")
@dataclass(frozen=True, kw_only=True)
class CDPruner(Reducer):
    """Uses the similarity of projected tokens; relevance is computed from tower features."""

    summary: ClassVar[str] = "a diverse subset by a determinantal point process, weighted by relevance to the question"
    needs_text_tower: ClassVar[bool] = True
    metadata: ClassVar[MethodMetadata] = MethodMetadata(
        acts="before decoder layer 0",
        score="greedy determinant of the cosine kernel, scaled by (negated) CLIP similarity to the question",
        needs="CLIP text tower",
        paper="CDPruner, NeurIPS 2025",
        url="https://arxiv.org/abs/2506.10967",
        code="Theia-4869/CDPruner@9541616",
    )

    relevance: str = option(
        "tower", "CLIP similarity as relevance: negated (the release), plain, or by the text tower's config", RELEVANCE
    )
    official: bool = option(False, "cut texts that are too long for CLIP as the release does")

    def prompt(self, state: PromptState) -> Reduction | None:
        total = state.tokens.shape[1]
        long = "cut" if self.official else "frame"
        similarity = text_similarity(state, state.questions, cosine=True, long=long)
        relevance = unit_interval(signed(similarity, self.relevance, state.clip))
        unit = F.normalize(state.tokens.float(), dim=-1)
        kernel = relevance[:, :, None] * state.matmul(unit, unit.transpose(1, 2)) * relevance[:, None]
        return Reduction(greedy_map(kernel, self.budget, state.matmul).sort(1).values, total)
