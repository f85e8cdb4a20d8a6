"""RESTORE: keep the tokens that another method chooses, and average all others around the most distinctive of them.

METHOD+restore, such as holov+restore, keeps half of the budget (`share`, halves rounded up) by METHOD and makes the
other half of averages. Alone, restore makes the whole budget of averages, of all tokens. METHOD is one that acts before
the decoder and merges nothing. What is averaged, and compared, are the vectors that METHOD reduces: features of the
tower or projected tokens.

Paper: https://arxiv.org/abs/2606.01711
Official code read: cvlab-yonsei/RESTORE@9b27e68, tokenreduction/tore/merge.py, as formulas and recorded results alone,
    because it is GPL-3.0
Differs from it: the calibration of attention is missing, so the paper's numbers cannot be reached. There, every decoder
    layer adds log s + log(2 - D) to the attention logits of visual tokens during the prefill: s tokens are in an
    average, and D is the mean cosine of tokens at an offset in the grid. In the paper's ablation, 64
    tokens keep 92.2 % of the full accuracy without RESTORE, 90.6 % with original position ids alone, 93.1 % with the
    calibration as well and 96.5 % with everything. `positions=renumber` leaves out the original ids, too. A token is
    compared with those of larger centrality, as in the paper; `official` takes those of smaller centrality, as the
    release does. With tiles, METHOD and restore act on each view, and tokens are in the order of their position ids.

Shapes: B images, N tokens, K kept ones, L others, M averages, T = K + M, D channels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.reduction import (
    Completion,
    EncoderState,
    MethodMetadata,
    PromptState,
    Reduction,
    Release,
    gather_tokens,
    keep_top,
    option,
    others,
    places,
    register,
)

MatMul = Callable[[Tensor, Tensor], Tensor]
AT_A_TIME = 2**24  # cosines
NONE = -2.0  # below every cosine


def distinctiveness(unit: Tensor, official: bool, matmul: MatMul = torch.matmul) -> Tensor:
    """[B, L] centrality R times one minus the highest cosine to a more central token (`official`: a less central one).

    R is the sum of a token's cosines to all tokens, itself included. Without such a token, the score is R.

    Args:
        unit: [B, L, D] of length 1.
    """
    central = matmul(unit.sum(1, keepdim=True), unit.mT)  # [B, 1, L]
    blocks = len(unit) * unit.shape[1] ** 2 // AT_A_TIME + 1
    closest = []
    for rows, own in zip(unit.tensor_split(blocks, 1), central.tensor_split(blocks, 2), strict=True):
        left_out = central >= own.mT if official else central <= own.mT
        closest.append(matmul(rows, unit.mT).masked_fill_(left_out, NONE).amax(2))
    highest = torch.cat(closest, 1)
    return central[:, 0] * (1 - highest.masked_fill(highest == NONE, 0.0))


@register("restore")
@dataclass(frozen=True, kw_only=True)
class Restore(Completion):
    """Compares projected tokens when it is alone."""

    summary: ClassVar[str] = (
        "averages of all tokens around the most distinctive ones; METHOD+restore keeps half by METHOD"
    )
    completes: ClassVar[str] = "then averages of the others around the most distinctive of them"
    metadata: ClassVar[MethodMetadata] = MethodMetadata(
        acts="before decoder layer 0",
        score="sum of cosines to all tokens, times one minus the highest to a token with a larger sum",
        rest="averaged into the most similar of these tokens",
        order="by the first source of each token",
        reads=("tokens", "order"),
        similarity="tokens",
        weights="mean",
        paper="RESTORE, 2606.01711",
        url="https://arxiv.org/abs/2606.01711",
        code="cvlab-yonsei/RESTORE@9b27e68",
        release=Release(
            order="by the first source of each token; position ids are medians, so they do not ascend",
            licence="GPL-3.0",
        ),
    )
    known_deviations: ClassVar[dict[str, str]] = {
        "unsorted with positions=original": "in the order of their first sources, with the position ids of median ones",
    }

    positions: str = option(
        "original", "position ids: the median of an average's original ids, or renumbered", ("original", "renumber")
    )
    official: bool = option(False, "compare with tokens of smaller, not larger, centrality, as the release")

    def prompt(self, state: PromptState) -> Reduction:
        nothing = torch.empty(len(state.tokens), 0, dtype=torch.int64, device=state.tokens.device)
        return self.complete(state, state.tokens, nothing)

    def complete(self, state: EncoderState, tokens: Tensor, kept: Tensor) -> Reduction:
        (batch, total), device, own = tokens.shape[:2], tokens.device, kept.shape[1]

        # The most distinctive of the other tokens are anchors; the others join the most similar one.
        rest = others(kept, total)
        unit = F.normalize(gather_tokens(tokens, rest).float(), dim=-1)
        anchors = keep_top(distinctiveness(unit, self.official, state.matmul), self.budget - own)
        nearest = state.matmul(unit, gather_tokens(unit, anchors).mT).argmax(2)
        nearest = nearest.scatter(1, anchors, places(batch, self.budget - own, device))

        # The group of each token: kept ones are alone in theirs.
        group = torch.empty(batch, total, dtype=torch.int64, device=device)
        group.scatter_(1, torch.cat([kept, rest], 1), torch.cat([places(batch, own, device), nearest + own], 1))
        sizes = torch.zeros(batch, self.budget, dtype=torch.int64, device=device)
        sizes.scatter_add_(1, group, torch.ones_like(group))

        # Groups are ordered by their first tokens. Ids are those of the middle ones, of two the earlier.
        members = group.argsort(dim=1, stable=True)
        start = sizes.cumsum(1) - sizes
        first = members.gather(1, start)
        order = first.argsort(dim=1)
        place = members.gather(1, start + (sizes - 1) // 2) if self.positions == "original" else first
        return Reduction(
            place.gather(1, order),
            total,
            order.argsort(dim=1).gather(1, group),
            (1 / sizes).gather(1, group),
            drops=False,
        )
