"""Coverage: each choice is the token with the largest gain in coverage times its weight.

Used by SCOPE. The coverage of a token is its highest cosine to a chosen one, at least 0; a gain is summed over all
tokens. A gain never grows while tokens are chosen, so an earlier gain is a bound: on a CPU the gains of a few tokens
with the highest bounds are computed again until the best of them is above all other bounds. They are summed in any
order. Only tokens that are nearer to the best one than rounding can tell apart are compared by the sums of the full
loop, so the choices are exactly the same.

Paper: Minoux, Accelerated greedy algorithms for maximizing submodular set functions, 1978

Shapes: B images, N tokens, D channels, K chosen tokens.
"""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llava.reduction.greedy.cosines import (
    BLOCK,
    TOGETHER,
    Floats,
    Indices,
    array,
    fits,
    on_host,
    row_blocks,
    slices,
    upper,
    whole,
    zeros,
)
from llava.reduction.states import State

# Numbers that a step of the reference reads at a time: 8 MB, which fit into a processor's cache.
SLICE = 2**21
# Largest relative error of a sum of float32 numbers that are not negative, for each of them.
ROUNDING = float(np.finfo(np.float32).eps) / 2

Rows = Callable[[Indices], Floats]


def cover_greedily(tokens: Tensor, weight: Tensor, count: int, state: State | None = None) -> Tensor:
    """[B, count] int64 in the order of choice; of equal gains the lower index.

    Args:
        tokens: [B, N, D], of any length and type.
        weight: [B, N] float32, at least 0.
        state: counts the operations.
    """
    state = state or State(ids=())
    unit = F.normalize(tokens.float(), dim=-1)
    batch, total = weight.shape
    chosen = []
    for part in slices(batch, total):
        if on_host(unit, weight):
            pairs = zip(_tables(unit[part], state), array(weight[part]), strict=True)
            found = [_on_host(rows, gain, share, count) for (rows, gain), share in pairs]
            chosen.append(torch.from_numpy(np.stack(found)))
        elif fits(total):
            cosine = state.matmul(unit[part], unit[part].transpose(1, 2))
            chosen.append(reference(cosine, weight[part], count))
        else:
            chosen.append(from_tokens(unit[part], weight[part], count, state))
    return chosen[0] if len(chosen) == 1 else torch.cat(chosen)


def _tables(unit: Tensor, state: State) -> Iterator[tuple[Rows, Floats]]:
    """[B, N, D] -> per image its rows, tokens [m] to cosines [m, N], and the gains [N] of tokens as first choice."""
    if fits(unit.shape[1]):
        for cosine in whole(unit, state):
            yield partial(cosine.take, axis=0), _first_gains(cosine)
    else:
        for image in unit:
            yield partial(_product, image.contiguous(), state), _first_gains_by_blocks(image, state)


def _first_gains(cosine: Floats) -> Floats:
    """[N, N] -> [N]."""
    total = len(cosine)
    none = zeros(total)
    return np.concatenate([_sums(_gaps(cosine[start : start + BLOCK], none)) for start in range(0, total, BLOCK)])


def _first_gains_by_blocks(unit: Tensor, state: State) -> Floats:
    """[N, D] -> [N], where all cosines would need too much memory."""
    gain = zeros(len(unit))
    for start, cosine in upper(unit[None], state):
        positive = array(cosine.clamp_(min=0)[0])
        end = start + len(positive)
        gain[start:end] += _sums(positive)
        gain[end:] += positive[:, end - start :].sum(0)
    return gain


def _product(unit: Tensor, state: State, tokens: Indices) -> Floats:
    """[m, N] cosines of m tokens, from a product of TOGETHER rows or more, for its last bits."""
    some = min(max(len(tokens), TOGETHER), len(unit))
    wanted = torch.from_numpy(np.resize(tokens, some))  # repeated where they are fewer
    return array(state.matmul(unit[wanted], unit.t()))[: len(tokens)]


def _sums(numbers: Floats) -> Floats:
    """[m, N] -> [m], three times as fast as numpy's sum."""
    return np.einsum("mn->m", numbers)


def _on_host(rows: Rows, gain: Floats, weight: Floats, count: int) -> Indices:
    """[count] choices of one image.

    Args:
        rows: tokens [m] -> cosines [m, N].
        gain: [N] of every token if it is the first choice.
    """
    total = len(gain)
    # Two sums of the same numbers differ by less, so no token below this part of the best can have the largest gain.
    near = 1 - 4 * ROUNDING * (total + 2)
    bound = gain * weight  # at least the gain of every token, but for rounding; minus infinity once it is chosen
    covered = zeros(total)
    current = np.ones(total, bool)  # the bound is the gain itself, or the token is chosen
    chosen = np.empty(count, np.int64)
    for step in range(count):
        group, leader, cosine = TOGETHER, -1, covered
        best = int(bound.argmax())
        # Gains of 0 are 0 in every order. (Numbers that are none end the search, too.)
        while bound[best] > 0 and not current[bound >= near * bound[best]].all():
            tokens = _highest(np.where(current, -np.inf, bound), group)
            made = rows(tokens)
            bound[tokens] = _sums(_gaps(made, covered)) * weight[tokens]
            current[tokens] = True
            group, best = min(2 * group, BLOCK), int(bound.argmax())
            if best in tokens:
                leader, cosine = best, made[tokens == best][0]
        rivals = np.flatnonzero(bound >= near * bound[best])
        if bound[best] > 0 and len(rivals) > 1:
            best = int(rivals[_exact_gains(rows, rivals, covered, weight).argmax()])
        if best != leader:
            cosine = rows(np.array([best]))[0]
        np.maximum(covered, cosine, out=covered)
        chosen[step], bound[best] = best, -np.inf
        current = bound == -np.inf
    return chosen


def _highest(bound: Floats, count: int) -> Indices:
    """The tokens with the highest bounds, without those of minus infinity."""
    first = max(0, len(bound) - count)
    tokens = bound.argpartition(first)[first:]
    return tokens[bound[tokens] > -np.inf]


def _gaps(cosine: Floats, covered: Floats) -> Floats:
    """What tokens [m, N] would add to the coverage [N]."""
    gap = cosine - covered
    return np.maximum(gap, np.zeros_like(covered), out=gap)  # an array of zeros: twice as fast as the number


def _exact_gains(rows: Rows, tokens: Indices, covered: Floats, weight: Floats) -> Floats:
    """[m] gains with the bits of the reference, whose sums are torch's."""
    parts = [tokens[start : start + BLOCK] for start in range(0, len(tokens), BLOCK)]
    gains = [array(torch.from_numpy(_gaps(rows(part), covered)).sum(1)) for part in parts]
    return np.concatenate(gains) * weight[tokens]


# The references.


def from_tokens(unit: Tensor, weight: Tensor, count: int, state: State) -> Tensor:
    """`cover_greedily` in torch, from tokens [B, N, D]: a few rows of cosines at a time, made again at every step."""
    images, total, others = torch.arange(len(unit), device=unit.device), unit.shape[1], unit.transpose(1, 2)
    blocks = unit.tensor_split(row_blocks(total), 1)

    def gain(covered: Tensor) -> Tensor:
        gaps = (state.matmul(block, others).sub_(covered.unsqueeze(1)).clamp_(min=0) for block in blocks)
        return torch.cat([gap.sum(-1) for gap in gaps], 1)

    def row(token: Tensor) -> Tensor:
        # A product of several rows, for its last bits.
        return state.matmul(unit[images, token].unsqueeze(1).expand(-1, TOGETHER, -1), others)[:, 0]

    return _loop(gain, row, weight, count)


def reference(cosine: Tensor, weight: Tensor, count: int) -> Tensor:
    """`cover_greedily` in torch, from all cosines [B, N, N]."""
    images = max(1, SLICE // cosine[0].numel())
    pairs = zip(cosine.split(images), weight.split(images), strict=True)
    return torch.cat([_cover(part, share, count) for part, share in pairs])


def _cover(cosine: Tensor, weight: Tensor, count: int) -> Tensor:
    """[B, N, N] cosines and [B, N] weights of a few images -> [B, count]."""
    images, gap = torch.arange(len(cosine), device=cosine.device), torch.empty_like(cosine)

    def gain(covered: Tensor) -> Tensor:
        return torch.sub(cosine, covered.unsqueeze(1), out=gap).clamp_(min=0).sum(-1)

    return _loop(gain, lambda token: cosine[images, token], weight, count)


def _loop(gain: Callable[[Tensor], Tensor], row: Callable[[Tensor], Tensor], weight: Tensor, count: int) -> Tensor:
    """[B, count]; `gain` is what tokens [B, N] add to the coverage [B, N], `row` gives the cosines of tokens [B]."""
    covered = torch.zeros_like(weight)
    free = torch.zeros_like(weight)  # -inf once a token is chosen
    chosen: list[Tensor] = []
    for _ in range(count):
        chosen.append((gain(covered) * weight + free).argmax(1))
        covered = torch.maximum(covered, row(chosen[-1]))
        free = free.scatter(1, chosen[-1].unsqueeze(1), -torch.inf)
    return torch.stack(chosen, 1)
