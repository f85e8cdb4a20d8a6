"""Coverage: each choice is the token with the largest gain in coverage times its weight.

Used by SCOPE. The coverage of a token is its highest cosine to a chosen one, at least 0; a gain is summed over all
tokens. A gain never grows while tokens are chosen, so an earlier gain is a bound: on a CPU the gains of a few tokens
with the highest bounds are computed again until the best of them is above all other bounds. Rounding does not change
the order of two sums of which one has the smaller terms, so the choices are exactly those of the full loop.

Paper: Minoux, Accelerated greedy algorithms for maximizing submodular set functions, 1978

Shapes: B images, N tokens, D channels, K chosen tokens.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llava.reduction.greedy.cosines import Floats, Indices, Rows, array, blocks, fits, on_host, slices, zeros
from llava.reduction.greedy.cuda_graph import run
from llava.reduction.states import State

# Numbers that a step of the reference reads at a time: 8 MB, which fit into a processor's cache.
SLICE = 2**21
# Tokens whose gains are computed together. With 16 a step takes the least time, with 32 half of the operations.
TOGETHER = 32


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
    if on_host(unit, weight) and not fits(total):
        return torch.stack([_by_rows(unit[image], weight[image], count, state) for image in range(batch)])
    chosen = []
    for part in slices(batch, total):
        cosine = state.matmul(unit[part], unit[part].transpose(1, 2))
        if on_host(cosine, weight):
            chosen.append(_by_cosines(cosine, weight[part], count))
        else:
            chosen.append(run(reference, cosine, weight[part], count=count))
    return chosen[0] if len(chosen) == 1 else torch.cat(chosen)


def _by_cosines(cosine: Tensor, weight: Tensor, count: int) -> Tensor:
    """[B, N, N] -> [B, count]."""
    gain, numbers, shares = array(cosine.clamp(min=0).sum(2)), array(cosine), array(weight)
    chosen = [
        _on_host(partial(numbers[image].take, axis=0), gain[image], shares[image], count)
        for image in range(len(cosine))
    ]
    return torch.from_numpy(np.stack(chosen))


def _by_rows(unit: Tensor, weight: Tensor, count: int, state: State) -> Tensor:
    """[N, D] -> [count], where all cosines would need too much memory."""
    rows = Rows(unit, state)
    gain = [array(cosine.clamp_(min=0).sum(2))[0] for _, cosine in blocks(unit[None], state)]
    return torch.from_numpy(_on_host(rows.of, np.concatenate(gain), array(weight), count))


def _on_host(rows: Callable[[Indices], Floats], gain: Floats, weight: Floats, count: int) -> Indices:
    """[count] choices of one image.

    Args:
        rows: tokens [m] -> cosines [m, N].
        gain: [N] of every token if it is the first choice.
    """
    total = len(gain)
    bound = gain * weight  # at least the gain of every token; minus infinity once it is chosen
    group = min(TOGETHER, total)
    covered, current = zeros(total), np.ones(total, bool)  # current: the bound is the gain itself
    # Sums are torch's, for the bits of the full loop.
    gap, sums = zeros(group, total), zeros(group)
    above, summed = torch.from_numpy(gap), torch.from_numpy(sums)
    chosen = np.empty(count, np.int64)
    for step in range(count):
        while not current[best := bound.argmax()]:
            tokens = bound.argpartition(total - group)[total - group :]
            tokens[0] = best  # where bounds are equal, it may not be among them
            np.subtract(rows(tokens), covered, out=gap)
            np.maximum(gap, 0, out=gap)
            torch.sum(above, 1, out=summed)
            bound[tokens] = sums * weight[tokens]
            bound[chosen[:step]] = -np.inf
            current[tokens] = True
        chosen[step] = best
        bound[best] = -np.inf
        current[:] = False
        np.maximum(covered, rows(chosen[step : step + 1])[0], out=covered)
    return chosen


# The reference.


def reference(cosine: Tensor, weight: Tensor, count: int) -> Tensor:
    """`cover_greedily` in torch, from all cosines [B, N, N]."""
    images = max(1, SLICE // cosine[0].numel())
    pairs = zip(cosine.split(images), weight.split(images), strict=True)
    return torch.cat([_cover(part, share, count) for part, share in pairs])


def _cover(cosine: Tensor, weight: Tensor, count: int) -> Tensor:
    """[B, N, N] cosines and [B, N] weights of a few images -> [B, count]."""
    images = torch.arange(len(cosine), device=cosine.device)
    covered = torch.zeros_like(weight)
    free = torch.zeros_like(weight)  # -inf once a token is chosen
    chosen, gap = [], torch.empty_like(cosine)
    for _ in range(count):
        torch.sub(cosine, covered.unsqueeze(1), out=gap).clamp_(min=0)
        gain = gap.sum(-1) * weight
        chosen.append((gain + free).argmax(1))
        covered = torch.maximum(covered, cosine[images, chosen[-1]])
        free = free.scatter(1, chosen[-1].unsqueeze(1), -torch.inf)
    return torch.stack(chosen, 1)
