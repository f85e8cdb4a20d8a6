"""Farthest points: each choice is the token whose nearest chosen token is farthest away, by cosine distance.

Used for ConsensusDrop's merge targets and by DivPrune.

Shapes: B images, N tokens, D channels, K chosen tokens. `unit` is [B, N, D] of length 1, float32.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llava.reduction.greedy.cosines import Floats, Indices, Rows, array, fits, on_host, slices, upper, whole, zeros
from llava.reduction.states import State


def farthest_from(unit: Tensor, first: Tensor, count: int) -> Tensor:
    """[B, count] int64 in the order of choice; equally far ones by index.

    Each step compares all tokens with the one chosen last: 2 B N D (count - 1) operations, no N x N cosines.

    Args:
        first: [B], the first choice.
    """
    if not on_host(unit):
        return from_tokens(unit, first, count)
    batch, total, _ = unit.shape
    numbers, images = array(unit), np.arange(batch)
    cosine = zeros(batch, total, 1)

    def row(token: Indices, nearest: Floats) -> Floats:
        # numpy's product: of so few numbers torch.bmm is 1.1 to 10 times slower.
        np.matmul(numbers, numbers[images, token][:, :, None], out=cosine)
        return cosine[:, :, 0]

    return _on_host(row, array(first), total, count)


def farthest_apart(tokens: Tensor, count: int, state: State | None = None) -> Tensor:
    """[B, count] int64 in the order of choice.

    First the token whose nearest other token is farthest away, then repeatedly the one farthest from all chosen.

    Args:
        tokens: [B, N, D], of any length and type.
        state: counts the operations.
    """
    state = state or State(ids=())
    unit = F.normalize(tokens.float(), dim=-1)
    batch, total = tokens.shape[:2]
    chosen = [_apart(unit[part], count, state) for part in slices(batch, total)]
    return chosen[0] if len(chosen) == 1 else torch.cat(chosen)


def _apart(unit: Tensor, count: int, state: State) -> Tensor:
    """`farthest_apart` for as many images as are held together."""
    total = unit.shape[1]
    if not fits(total):
        first = _loneliest_by_blocks(unit, state)
        if on_host(unit):
            rows = Rows(unit[0], state)
            row = lambda token, nearest: rows.next(int(token[0]), nearest[0])  # noqa: E731
            return _on_host(row, array(first), total, count)
        return from_tokens(unit, first, count, state)
    if not on_host(unit):
        return reference(state.matmul(unit, unit.transpose(1, 2)), count)
    numbers, images, every = whole(unit, state), np.arange(len(unit)), np.arange(total)
    numbers[:, every, every] = -np.inf  # a token is not its own neighbour
    first = (1 - numbers.max(2)).argmax(1)
    return _on_host(lambda token, nearest: numbers[images, token], first, total, count)


def _on_host(row: Callable[[Indices, Floats], Floats], first: Indices, total: int, count: int) -> Tensor:
    """The loop on numpy arrays.

    Args:
        row: tokens [B] and distances to the chosen ones [B, N] -> cosines [B, N] of these tokens to all.
    """
    images = np.arange(len(first))
    chosen = np.empty((len(first), count), np.int64)
    chosen[:, 0] = first
    nearest = np.full((len(first), total), np.inf, np.float32)
    distance = np.empty_like(nearest)
    for step in range(1, count):
        last = chosen[:, step - 1]
        np.subtract(1, row(last, nearest), out=distance)
        np.minimum(nearest, distance, out=nearest)
        nearest[images, last] = -np.inf  # never chosen again, not even if all tokens are identical
        chosen[:, step] = nearest.argmax(1)
    return torch.from_numpy(chosen)


# The references.


def from_tokens(unit: Tensor, first: Tensor, count: int, state: State | None = None) -> Tensor:
    """`farthest_from` in torch."""
    images, state = torch.arange(len(unit), device=unit.device), state or State(ids=())
    return _loop(lambda token: state.matmul(unit, unit[images, token].unsqueeze(-1)).squeeze(-1), first, count)


def reference(cosine: Tensor, count: int) -> Tensor:
    """`farthest_apart` in torch, from all cosines [B, N, N]."""
    images = torch.arange(len(cosine), device=cosine.device)
    itself = torch.eye(cosine.shape[1], dtype=torch.bool, device=cosine.device)
    first = (1 - cosine.masked_fill(itself, -torch.inf).amax(2)).argmax(1)
    return _loop(lambda token: cosine[images, token], first, count)


def _loop(row: Callable[[Tensor], Tensor], first: Tensor, count: int) -> Tensor:
    """[B, count]; `row` gives the cosines [B, N] of tokens [B] to all."""
    chosen, nearest = [first], None
    for _ in range(count - 1):
        distance = 1 - row(chosen[-1])
        nearest = distance if nearest is None else torch.minimum(nearest, distance)
        nearest = nearest.scatter(1, chosen[-1].unsqueeze(1), -torch.inf)
        chosen.append(nearest.argmax(1))
    return torch.stack(chosen, 1)


def _loneliest_by_blocks(unit: Tensor, state: State) -> Tensor:
    """[B] the token whose nearest other token is farthest away, from a few rows of cosines at a time."""
    closest = unit.new_full(unit.shape[:2], -torch.inf)
    for start, cosine in upper(unit, state):
        rows = cosine.shape[1]
        cosine[:, :, :rows].diagonal(dim1=1, dim2=2).fill_(-torch.inf)
        later = closest[:, start:]
        torch.maximum(later, cosine.amax(1), out=later)  # of the later tokens to these ones
        torch.maximum(later[:, :rows], cosine.amax(2), out=later[:, :rows])
    return (1 - closest).argmax(1)
