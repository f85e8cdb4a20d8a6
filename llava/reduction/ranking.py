"""Rank tokens by score: equal scores always go to the lower index, on every device.

Index tensors that depend on sizes alone are made once and kept on the device (`made_once`): a short prefill is bound by
the host, which issues one operation after the other.

Shapes: B images, N tokens, K kept tokens, D channels.
"""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")
KEPT = 64  # results of each function


def made_once(function: Callable[..., Made]) -> Callable[..., Made]:
    """Decorator: remember what a function returns for the same arguments, which are whole numbers and the device.

    The tensors are shared: a caller must not write into them. They are ordinary tensors, also where they are first
    asked for in inference mode.
    """

    @lru_cache(maxsize=KEPT)
    @wraps(function)
    def remembered(*arguments: object) -> Made:
        with torch.inference_mode(False):
            return function(*arguments)

    return remembered


@made_once
def places(batch: int, count: int, device: torch.device) -> Tensor:
    """[B, N] int64: 0, 1, 2, ..., N - 1 in every row. Shared: it must not be written into."""
    return torch.arange(count, device=device).repeat(batch, 1)


@made_once
def rows(batch: int, device: torch.device) -> Tensor:
    """[B, 1] int64: 0, 1, 2, ... Shared: it must not be written into."""
    return torch.arange(batch, device=device)[:, None]


def in_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32; itself where it is, because a cast that changes nothing is dispatched all the same."""
    return tensor if tensor.dtype == torch.float32 else tensor.float()


def gather_tokens(tokens: Tensor, keep: Tensor) -> Tensor:
    """[B, N, ...] tokens, [B, K] indices -> [B, K, ...]."""
    # An index moves whole rows; `gather` would read one index per number.
    return tokens[rows(len(keep), keep.device), keep]


def descending_order(score: Tensor) -> Tensor:
    """[..., N] indices, the highest score first; whole numbers are compared exactly, others in float32."""
    # stable: equal scores are ordered by index on every device.
    values = in_float32(score) if score.is_floating_point() else score
    return values.argsort(dim=-1, descending=True, stable=True)


def ranks(score: Tensor) -> Tensor:
    """[..., N] int64: 0 for the highest score, N - 1 for the lowest."""
    order = descending_order(score)
    numbers = places(1, order.shape[-1], order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, numbers)


def keep_top(score: Tensor, budget: int) -> Tensor:
    """Indices of the `budget` highest scores, in raster order.

    Args:
        score: [B, N], higher means more important.
        budget: 1 <= budget <= N.

    Returns:
        [B, budget] int64, ascending.
    """
    return descending_order(score)[:, :budget].sort(dim=-1).values


def split(score: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    """`keep_top`, and all other indices [B, N - budget], ascending."""
    order = descending_order(score)
    return order[:, :budget].sort(dim=-1).values, order[:, budget:].sort(dim=-1).values


def others(kept: Tensor, total: int) -> Tensor:
    """[B, K] indices -> the other [B, N-K] indices, ascending."""
    taken = torch.zeros(kept.shape[0], total, dtype=torch.uint8, device=kept.device)
    taken.scatter_(1, kept, 1)
    return taken.argsort(dim=1, stable=True)[:, : total - kept.shape[1]]
