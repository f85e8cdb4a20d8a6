"""divprune: the tokens that are farthest from each other; neither the question nor CLS attention is used.

Paper: https://arxiv.org/abs/2503.02175
Official code read: vbdi/divprune@799e2d9, LLaVA/llava/model/llava_arch.py, DivPrune
Differs from it: distances are in float32 (theirs are in the model's float16, where many choices depend on rounding),
    and no token is chosen twice (theirs can be, once only duplicates are left).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.reduction import MethodMetadata, PromptState, Reducer, Reduction, option, register

MatMul = Callable[[Tensor, Tensor], Tensor]


def farthest_apart(tokens: Tensor, budget: int, matmul: MatMul = torch.matmul) -> Tensor:
    """[B, budget] indices of the chosen tokens of [B, N, D] in the order of choice, by cosine distance.

    First the token whose nearest other token is farthest away, then repeatedly the one farthest from all chosen.
    """
    unit = F.normalize(tokens.float(), dim=-1)
    distance = 1 - matmul(unit, unit.transpose(1, 2))  # [B, N, N]
    itself = torch.eye(tokens.shape[1], dtype=torch.bool, device=tokens.device)
    rows = torch.arange(len(tokens), device=tokens.device)
    chosen = [distance.masked_fill(itself, torch.inf).amin(2).argmax(1)]
    nearest = torch.full_like(distance[:, 0], torch.inf)  # [B, N] distance to the chosen ones, -inf for themselves
    for _ in range(budget - 1):
        nearest = torch.minimum(nearest, distance[rows, chosen[-1]])
        nearest = nearest.scatter(1, chosen[-1].unsqueeze(1), -torch.inf)
        chosen.append(nearest.argmax(1))
    return torch.stack(chosen, 1)


@register("divprune")
@dataclass(frozen=True, kw_only=True)
class DivPrune(Reducer):
    """Compares projected tokens, so it acts after the projector."""

    summary: ClassVar[str] = "the most diverse tokens: greedily the one farthest from all chosen"
    metadata: ClassVar[MethodMetadata] = MethodMetadata(
        acts="before decoder layer 0",
        score="largest cosine distance of projected tokens to the nearest chosen one",
        paper="DivPrune, 2503.02175",
        url="https://arxiv.org/abs/2503.02175",
        code="vbdi/divprune@799e2d9",
    )

    crops: str = option(
        "global",
        "all tiles together as in the release, or the budget split over tiles",
        ("global", "each", "thumbnail"),
    )

    def prompt(self, state: PromptState) -> Reduction | None:
        tokens = state.tokens.shape[1]
        chosen = farthest_apart(state.tokens, self.budget, state.matmul)
        return Reduction(chosen.sort(dim=1).values, tokens)
