"""Cosines between the tokens of an image: all of them where they fit, otherwise the rows that are asked for.

Shapes: N tokens, D channels. `unit` is [N, D] of length 1.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llava.reduction.states import State

Floats = NDArray[np.float32]
Indices = NDArray[np.int64]

# Numbers of a matrix that is held whole: 64 MB in float32, all cosines of 4,096 tokens.
WHOLE = 2**24
# Rows made at a time. One row alone costs as much as all tokens take to be read from memory; sixteen cost little more.
# Products of eight rows and more also have the last bits of the product of all rows.
TOGETHER = 16
BLOCK = 192  # rows made at a time where all are needed
# Multiplications from which on a pair's cosine is made once, not for both of its tokens; below, one product is faster.
ONCE = 2**27
# Rows kept for later at the most: 24 MB at 11,520 tokens.
KEPT = 512


def on_host(*tensors: Tensor) -> bool:
    """Whether numpy can read the tensors where they are."""
    readable = all(t.device.type == "cpu" and t.dtype in (torch.float32, torch.float64) for t in tensors)
    return readable and not torch.compiler.is_compiling()


def array(tensor: Tensor) -> NDArray:
    """The numbers of a CPU tensor as a numpy array: the same memory, no copy."""
    return tensor.numpy(force=tensor.requires_grad)


def zeros(*shape: int) -> Floats:
    """Memory for numpy to which torch.from_numpy gives torch access: fewer operations of torch than the other way."""
    return np.zeros(shape, np.float32)


def fits(tokens: int) -> bool:
    """Whether the cosines of so many tokens of one image are held whole."""
    return tokens * tokens <= WHOLE


def row_blocks(tokens: int) -> int:
    """Blocks of rows, each of which is held whole, that the cosines of one image are made in."""
    return max(1, min(tokens * tokens // WHOLE + 1, tokens // TOGETHER))


def slices(images: int, tokens: int) -> Iterator[slice]:
    """Images in groups whose cosines are held together."""
    size = max(1, WHOLE // (tokens * tokens))
    return (slice(start, start + size) for start in range(0, images, size))


def with_itself(unit: Tensor, state: State) -> Floats:
    """[B, N] cosine of every token to itself: 1, up to the last bits that a product of all tokens has.

    Args:
        unit: [B, N, D], on the host.
    """
    batch, total, channels = unit.shape
    size = min(TOGETHER, total)
    whole = total // size * size
    found = zeros(batch, total)
    groups = unit[:, :whole].reshape(-1, size, channels)
    found[:, :whole] = array(_diagonals(groups, state)).reshape(batch, -1)
    if whole < total:  # the last group overlaps the one before it
        found[:, -size:] = array(_diagonals(unit[:, -size:], state))
    return found


def _diagonals(groups: Tensor, state: State) -> Tensor:
    """[G, size, D] -> [G, size] cosine of every token to itself."""
    return state.matmul(groups, groups.transpose(1, 2)).diagonal(dim1=1, dim2=2)


def upper(unit: Tensor, state: State) -> Iterator[tuple[int, Tensor]]:
    """[B, N, D] -> a few tokens after the other: the first one's index i, and their cosines [B, m, N - i].

    These are the cosines to the tokens from i on: a table of all pairs is symmetric, bit for bit. m is BLOCK, but for
    the last ones.
    """
    start, total = 0, unit.shape[1]
    while start < total:
        size = BLOCK if total - start >= BLOCK + TOGETHER else total - start
        later = unit[:, start:]
        yield start, state.matmul(later[:, :size], later.transpose(1, 2))
        start += size


def whole(unit: Tensor, state: State) -> Floats:
    """[B, N, D] on the host -> [B, N, N] cosines of all pairs."""
    batch, total, channels = unit.shape
    if total * total * channels < ONCE:
        return array(state.matmul(unit, unit.transpose(1, 2)))
    found = np.empty((batch, total, total), np.float32)
    for start, cosine in upper(unit, state):
        rows = array(cosine)
        end = start + rows.shape[1]
        found[:, start:end, start:] = rows
        found[:, end:, start:end] = rows[:, :, end - start :].transpose(0, 2, 1)
    return found


class Rows:
    """Rows of the cosines of one image, made when they are asked for.

    Args:
        unit: [N, D].
        state: counts the operations.
    """

    def __init__(self, unit: Tensor, state: State):
        unit = unit.contiguous()  # of other layouts `take` copies everything
        self.state = state
        self._made: dict[int, Floats] = {}
        # Operands and result of every product: one operation of torch for several rows.
        some = min(TOGETHER, len(unit))
        self._arrays = array(unit), zeros(some, unit.shape[1]), zeros(some, len(unit))
        self._some, self._cosine = map(torch.from_numpy, self._arrays[1:])
        self._every = unit.t()

    def next(self, token: int, promise: Floats) -> Floats:
        """[N] cosines of a token that is asked for once.

        Args:
            promise: [N], the higher, the sooner a token will be asked for. The rows of the next ones are made together.
        """
        if token not in self._made:
            if len(self._made) + TOGETHER > KEPT:
                self._made.clear()
            promise = promise.copy()
            promise[[token, *self._made]] = -np.inf
            first = max(0, len(promise) - TOGETHER + 1)
            self._make([token, *promise.argpartition(first)[first:].tolist()])
        return self._made.pop(token)

    def _make(self, tokens: list[int]) -> None:
        """Make the rows of at most TOGETHER tokens."""
        unit, some, cosine = self._arrays
        unit.take(np.resize(tokens, len(some)), axis=0, out=some, mode="clip")  # repeated where they are fewer
        torch.mm(self._some, self._every, out=self._cosine)
        self.state.flops += 2 * self._cosine.numel() * self._some.shape[1]
        # A copy, as the next product has the same memory.
        self._made.update((token, row.copy()) for token, row in zip(tokens, cosine, strict=False))
