"""SCOPE: greedily keep the token with the largest gain in coverage times CLS attention.

Paper: https://arxiv.org/abs/2510.24214
Official code read: kinredon/SCOPE@6bf7306, scope/clip_encoder.py, SCOPE
Differs from it: nothing known; alpha, there an environment variable, is an option.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.reduction import EncoderState, MethodMetadata, Reducer, Reduction, TowerScore, UserError, option, register

MatMul = Callable[[Tensor, Tensor], Tensor]
# Similarities processed at a time: 8 MB, which fit into a processor's cache (7 times faster than 48 images of 576
# tokens at once).
SLICE = 2**21


def cover_greedily(features: Tensor, weight: Tensor, budget: int, matmul: MatMul = torch.matmul) -> Tensor:
    """[B, budget] indices of the chosen tokens in the order of choice.

    The coverage of token j is its highest cosine to a chosen token, at least 0. Each step takes the token with the
    highest product of its weight and its gain in coverage, summed over all tokens.

    Args:
        features: [B, N, D].
        weight: [B, N], at least 0.
    """
    unit = F.normalize(features.float(), dim=-1)
    similarity = matmul(unit, unit.transpose(1, 2))  # [B, N, N]
    images = max(1, SLICE // similarity[0].numel())
    pairs = zip(similarity.split(images), weight.split(images), strict=True)
    return torch.cat([_cover(part, share, budget) for part, share in pairs])


def _cover(similarity: Tensor, weight: Tensor, budget: int) -> Tensor:
    """`cover_greedily` for a few images, from similarities [B, N, N] and weights [B, N]."""
    rows = torch.arange(len(similarity), device=similarity.device)
    covered = torch.zeros_like(weight)
    free = torch.zeros_like(weight)  # -inf once a token is chosen
    chosen, gap = [], torch.empty_like(similarity)
    for _ in range(budget):
        torch.sub(similarity, covered.unsqueeze(1), out=gap).clamp_(min=0)
        gain = gap.sum(-1) * weight
        chosen.append((gain + free).argmax(1))
        covered = torch.maximum(covered, similarity[rows, chosen[-1]])
        free = free.scatter(1, chosen[-1].unsqueeze(1), -torch.inf)
    return torch.stack(chosen, 1)


@register("scope")
@dataclass(frozen=True, kw_only=True)
class Scope(Reducer):
    """Chooses by saliency and coverage together; the question is not used."""

    summary: ClassVar[str] = "greedy gain in coverage, weighted by CLS attention"
    metadata: ClassVar[MethodMetadata] = MethodMetadata(
        acts="after the tower",
        score="gain in cosine coverage × CLS attention, block −2",
        needs="CLS token",
        paper="SCOPE, 2510.24214",
        url="https://arxiv.org/abs/2510.24214",
        code="kinredon/SCOPE@6bf7306",
    )

    alpha: float = option(1.0, "power of the CLS attention: 0 is coverage alone")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha < 0:
            raise UserError(f"scope.alpha must be at least 0, got {self.alpha}.")

    def scores(self) -> tuple[TowerScore, ...]:
        return (TowerScore("cls_attention"),)

    def encoder(self, state: EncoderState) -> Reduction | None:
        tokens = state.features.shape[1]
        # The release sums over heads; the mean differs by a constant factor, so the choices are the same.
        weight = state.scores[TowerScore("cls_attention")].pow(self.alpha)
        chosen = cover_greedily(state.features, weight, self.budget, state.matmul)
        return Reduction(chosen.sort(dim=1).values, tokens)
