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

from llava.reduction.greedy.cosines import Rows, array, fits, on_host, slices, with_itself, zeros
from llava.reduction.greedy.cuda_graph import run
from llava.reduction.states import State

# A token whose residual is below this fraction of its kernel entry is spanned by the chosen ones, to float32 accuracy.
SPANNED = 1e-6
# Rows of the factor that are multiplied together. Those that are not made yet are zero and change no sum; as long as
# the shapes stay the same, a step needs no new views.
CHUNK = 64


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
        return _on_host(unit, weight, count, state)
    batch, total, channels = unit.shape
    state.flops += batch * total * count * (count - 1)  # products with the factor
    if not fits(total):
        state.flops += 2 * batch * total * channels * count
        return run(from_tokens, unit, weight, count=count)
    parts = []
    for part in slices(batch, total):
        cosine = state.matmul(unit[part], unit[part].transpose(1, 2))
        parts.append(run(reference, cosine, weight[part], count=count))
    return torch.cat(parts)


def _on_host(unit: Tensor, weight: Tensor, count: int, state: State) -> Tensor:
    """The loop on numpy arrays. Only the rows of chosen tokens, and of some that may be next, are made."""
    batch, total, _ = unit.shape
    images, worth = np.arange(batch), array(weight)
    rows = [Rows(image, state) for image in unit]
    own = worth * with_itself(unit, state) * worth
    left = own.copy()  # the factor by which each token would multiply the determinant
    last = own - own.max(1, keepdims=True) - 1  # below every `left`: the order of the spanned tokens
    spanned = np.float32(SPANNED) * own
    chosen = np.empty((batch, count), np.int64)
    length = -(-count // CHUNK) * CHUNK
    numbers, entries, product = zeros(batch, length, total), zeros(batch, 1, length), zeros(batch, 1, total)
    factor, column, shared = map(torch.from_numpy, (numbers, entries, product))
    row, pivot = zeros(batch, total), zeros(batch, 1)
    root = torch.from_numpy(pivot)
    for step in range(count):
        if step % CHUNK == 0:
            past, at = factor[:, : step + CHUNK], column[:, :, : step + CHUNK]
        free = left > spanned
        order = np.where(free, left, last)
        pick = chosen[:, step] = order.argmax(1)
        if step:
            entries[:, 0, :step] = numbers[images, :step, pick]
            torch.bmm(at, past, out=shared)
            state.flops += 2 * past.numel()
        for image in images:
            row[image] = rows[image].next(int(pick[image]), order[image])
        row *= worth[images, pick][:, None]
        row *= worth
        row -= product[:, 0]
        np.maximum(left[images, pick], np.finfo(np.float32).tiny, out=pivot[:, 0])
        root.sqrt_()  # torch's, for the bits of the reference
        row /= pivot
        row[~free[images, pick]] = 0
        numbers[:, step] = row
        left -= np.square(row, out=row)
        left[images, pick] = last[images, pick] = -np.inf
    return torch.from_numpy(chosen)


# The references.


def from_tokens(unit: Tensor, weight: Tensor, count: int) -> Tensor:
    images = torch.arange(len(unit), device=unit.device)

    def row(pick: Tensor) -> Tensor:
        cosine = (unit @ unit[images, pick].unsqueeze(-1)).squeeze(-1)
        return weight[images, pick].unsqueeze(1) * cosine * weight

    return _loop(row, weight * unit.square().sum(-1) * weight, count)


def reference(cosine: Tensor, weight: Tensor, count: int) -> Tensor:
    """`largest_determinant` in torch, from all cosines [B, N, N]."""
    images = torch.arange(len(cosine), device=cosine.device)
    own = weight * cosine.diagonal(dim1=1, dim2=2) * weight
    return _loop(lambda pick: weight[images, pick].unsqueeze(1) * cosine[images, pick] * weight, own, count)


def _loop(row: Callable[[Tensor], Tensor], own: Tensor, count: int) -> Tensor:
    """[B, count]; `row` gives the kernel [B, N] of tokens [B] with all, `own` [B, N] is its diagonal."""
    left = own.clone()
    last = own - own.amax(1, keepdim=True) - 1
    factor = own.new_zeros(len(own), count, own.shape[1])
    chosen = []
    for step in range(count):
        free = left > SPANNED * own
        pick = torch.where(free, left, last).argmax(1, keepdim=True)  # [B, 1]
        past = factor[:, :step]
        shared = past.gather(2, pick.unsqueeze(-1).expand(-1, step, 1)).transpose(1, 2) @ past
        pivot = left.gather(1, pick).clamp(min=torch.finfo(left.dtype).tiny).sqrt()
        new = torch.where(free.gather(1, pick), (row(pick[:, 0]) - shared[:, 0]) / pivot, 0.0)
        factor[:, step] = new
        left = (left - new.square()).scatter(1, pick, -torch.inf)
        last = last.scatter(1, pick, -torch.inf)
        chosen.append(pick)
    return torch.cat(chosen, 1)
