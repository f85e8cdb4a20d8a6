"""Largest determinant: each choice is the token that multiplies the determinant of the chosen ones' kernel most.

Used by CDPruner. The kernel of two tokens is their cosine times both weights. The determinant grows by the part of a
token that the chosen ones do not span, which an incremental Cholesky factor gives.

Paper: https://arxiv.org/abs/1709.05135 (Chen et al., 2018: greedy MAP inference of determinantal point processes)

Shapes: B images, N tokens, D channels, K chosen tokens.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llava.reduction.greedy.cosines import (
    Floats,
    Indices,
    array,
    fits,
    on_host,
    slices,
    with_itself,
    zeros,
)
from llava.reduction.states import State

# A token whose residual is below this fraction of its kernel entry is spanned by the chosen ones, to float32 accuracy.
SPANNED = 1e-6
# Rows of the factor that are multiplied together. Those that are not made yet are zero and change no sum; as long as
# the shapes stay the same, no new views are needed.
CHUNK = 64
AHEAD = 32  # rows made together; with fewer, more operations and no less time


def largest_determinant(tokens: Tensor, weight: Tensor, count: int, state: State | None = None) -> Tensor:
    """[B, count] int64 in the order of choice, without repetition, also beyond the rank of the kernel.

    Equal tokens are chosen by index, spanned ones by weight.

    Args:
        tokens: [B, N, D], of any length and type.
        weight: [B, N] float32, above 0.
        state: counts the operations.
    """
    state = state or State(ids=())
    unit = F.normalize(tokens.float(), dim=-1)
    if on_host(unit, weight):
        worth = array(weight)
        own = worth * with_itself(unit, state) * worth
        chosen = [_on_host(*image, count, state) for image in zip(unit, worth, own, strict=True)]
        return torch.from_numpy(np.stack(chosen))
    if not fits(unit.shape[1]):
        return from_tokens(unit, weight, count, state)
    parts = []
    for part in slices(*weight.shape):
        cosine = state.matmul(unit[part], unit[part].transpose(1, 2))
        parts.append(reference(cosine, weight[part], count, state))
    return torch.cat(parts)


def _on_host(unit: Tensor, worth: Floats, own: Floats, count: int, state: State) -> Indices:
    """[count] choices of one image, on numpy arrays.

    Only the kernel's rows of chosen tokens are needed. They are made together with those of the tokens that would
    multiply the determinant most if nothing else were chosen, which are often the next choices.

    Args:
        unit: [N, D].
        own: [N], the kernel's diagonal.
    """
    left = own.copy()  # the factor by which each token would multiply the determinant
    last = own - own.max() - 1  # below every `left`: the order of the spanned tokens
    spanned = np.float32(SPANNED) * own
    ahead = Ahead(unit, worth, count, state)
    chosen = np.empty(count, np.int64)
    for step in range(count):
        free = left > spanned
        order = np.where(free, left, last)
        pick = chosen[step] = order.argmax()
        if free[pick]:
            row = ahead.row(int(pick), step, order) / np.sqrt(left[pick])
            ahead.choose(row, step)
            left -= np.square(row, out=row)
        left[pick] = last[pick] = -np.inf
    return chosen


class Ahead:
    """Rows of the kernel of one image, less what the chosen tokens span, for a few tokens at a time.

    Args:
        unit: [N, D].
        worth: [N] weights.
        count: tokens that will be chosen.
        state: counts the operations.
    """

    def __init__(self, unit: Tensor, worth: Floats, count: int, state: State):
        unit = unit.contiguous()  # of other layouts `take` copies everything
        total, channels = unit.shape
        some, length = min(AHEAD, total), -(-count // CHUNK) * CHUNK
        self.worth, self.state = worth, state
        self.tokens: Indices = np.empty(0, np.int64)
        self.rows, self.products = zeros(some, total), zeros(some, total)
        self.factor = zeros(length, total)  # one row for each chosen token
        self.columns = zeros(some, length)  # those of `tokens`
        self.unit, self.units = array(unit), zeros(some, channels)
        # Operands and results of products: the same memory for torch.
        self._every, self._units, self._rows = unit.t(), torch.from_numpy(self.units), torch.from_numpy(self.rows)
        self._factor, self._columns = torch.from_numpy(self.factor), torch.from_numpy(self.columns)
        self._past = self._at = self._factor[:0]

    def row(self, token: int, step: int, order: Floats) -> Floats:
        """[N] the row of a token.

        Args:
            step: number of tokens chosen before.
            order: [N], the higher, the sooner a token may be chosen.
        """
        if token not in self.tokens:
            self._make(token, step, order)
        return self.rows[np.flatnonzero(self.tokens == token)[0]]

    def choose(self, row: Floats, step: int) -> None:
        """Take away what the token that is chosen now spans.

        Args:
            row: [N], the factor's new row.
        """
        self.factor[step] = row
        np.multiply(row[self.tokens][:, None], row, out=self.products)
        self.rows -= self.products

    def _make(self, token: int, step: int, order: Floats) -> None:
        """Make the rows of a token and of others that may be chosen soon."""
        total, some = len(order), len(self.rows)
        self.tokens = order.argpartition((total - some, total - 1))[total - some :]
        self.tokens[-1] = token  # it was there already, but for ties
        self.unit.take(self.tokens, axis=0, out=self.units, mode="clip")
        torch.mm(self._units, self._every, out=self._rows)
        self.state.flops += 2 * self._rows.numel() * self._units.shape[1]
        self.rows *= self.worth[self.tokens][:, None]
        self.rows *= self.worth
        if step:
            length = -(-step // CHUNK) * CHUNK
            if length != len(self._past):
                self._past, self._at = self._factor[:length], self._columns[:, :length]
            self.columns[:, :step] = self.factor[:step, self.tokens].T
            torch.addmm(self._rows, self._at, self._past, alpha=-1, out=self._rows)
            self.state.flops += 2 * self._rows.numel() * length


# The references.


def from_tokens(unit: Tensor, weight: Tensor, count: int, state: State) -> Tensor:
    """`largest_determinant` in torch, from tokens [B, N, D]."""
    images = torch.arange(len(unit), device=unit.device)

    def row(pick: Tensor) -> Tensor:
        cosine = state.matmul(unit, unit[images, pick].unsqueeze(-1)).squeeze(-1)
        return weight[images, pick].unsqueeze(1) * cosine * weight

    return _loop(row, weight * unit.square().sum(-1) * weight, count, state)


def reference(cosine: Tensor, weight: Tensor, count: int, state: State | None = None) -> Tensor:
    """`largest_determinant` in torch, from all cosines [B, N, N]."""
    images = torch.arange(len(cosine), device=cosine.device)
    own = weight * cosine.diagonal(dim1=1, dim2=2) * weight
    return _loop(lambda pick: weight[images, pick].unsqueeze(1) * cosine[images, pick] * weight, own, count, state)


def _loop(row: Callable[[Tensor], Tensor], own: Tensor, count: int, state: State | None) -> Tensor:
    """[B, count]; `row` gives the kernel [B, N] of tokens [B] with all, `own` [B, N] is its diagonal."""
    state = state or State(ids=())
    left = own.clone()
    last = own - own.amax(1, keepdim=True) - 1
    factor = own.new_zeros(len(own), count, own.shape[1])
    chosen = []
    for step in range(count):
        free = left > SPANNED * own
        pick = torch.where(free, left, last).argmax(1, keepdim=True)  # [B, 1]
        past = factor[:, :step]
        shared = state.matmul(past.gather(2, pick.unsqueeze(-1).expand(-1, step, 1)).transpose(1, 2), past)
        pivot = left.gather(1, pick).clamp(min=torch.finfo(left.dtype).tiny).sqrt()
        new = torch.where(free.gather(1, pick), (row(pick[:, 0]) - shared[:, 0]) / pivot, 0.0)
        factor[:, step] = new
        left = (left - new.square()).scatter(1, pick, -torch.inf)
        last = last.scatter(1, pick, -torch.inf)
        chosen.append(pick)
    return torch.cat(chosen, 1)
