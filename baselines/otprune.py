"""OTPrune: greedily keep the tokens of the largest determinant of a second-order kernel.

Paper: https://arxiv.org/abs/2602.20205
Official code read: xiwenc1/OTPrune@3414730, LLaVA/llava/model/llava_arch.py, OTPrune and greedy_select
Differs from it: kept tokens stay in raster order (theirs enter the decoder in the order of a Python set; official=true
does that). The determinant is in float32 throughout (theirs: partly in the model's float16). Newline tokens of
LLaVA-NeXT are not among the candidates.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava.reduction import (
    MethodMetadata,
    PromptState,
    Reducer,
    Reduction,
    Release,
    largest_determinant_of,
    option,
    register,
)


def hash_order(chosen: Tensor) -> Tensor:
    """[B, K] indices, reordered as a Python set of them iterates; the host waits for the device."""
    return torch.tensor([list(set(row)) for row in chosen.tolist()], device=chosen.device)


@register("otprune")
@dataclass(frozen=True, kw_only=True)
class OTPrune(Reducer):
    """Compares projected tokens, each channel scaled to length 1 over all tokens; the question is not used."""

    summary: ClassVar[str] = "a diverse subset by the determinant of a second-order kernel of the tokens"
    metadata: ClassVar[MethodMetadata] = MethodMetadata(
        acts="before decoder layer 0",
        score="greedy determinant of 1 + γ S², S the products of projected tokens with channels of length 1",
        reads=("tokens",),
        paper="OTPrune, CVPR 2026",
        url="https://arxiv.org/abs/2602.20205",
        code="xiwenc1/OTPrune@3414730",
        release=Release(
            batch="one sample at a time",
            dtype="rows of the Cholesky factor are rounded to it",
            order="that of a Python set, neither raster nor by rank",
            ours="raster order; official=true takes theirs",
            licence="Apache-2.0",
        ),
    )
    known_deviations: ClassVar[dict[str, str]] = {
        "unsorted with official=true": "the release passes kept tokens on in the order of a Python set"
    }

    tile_budget: str = option(
        "global",
        "all tiles together as in the release, or the budget split over tiles",
        ("global", "each", "thumbnail"),
    )
    gamma: float = option(0.01, "γ, the weight of the second-order kernel beside 1", least=0)
    official: bool = option(False, "kept tokens in the order of a Python set, as in the release")

    def prompt(self, state: PromptState) -> Reduction | None:
        tokens = state.tokens.float()
        scaled = tokens / tokens.norm(dim=1, keepdim=True).clamp(min=torch.finfo(tokens.dtype).tiny)
        products = state.matmul(scaled, scaled.mT)  # [B, N, N]
        kernel = state.matmul(products, products.mT) * self.gamma
        kernel.diagonal(dim1=1, dim2=2).add_(1)
        chosen = largest_determinant_of(kernel, self.budget, state.matmul)
        return Reduction(hash_order(chosen) if self.official else chosen.sort(1).values, tokens.shape[1])
