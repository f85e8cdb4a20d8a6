"""Near-duplicates: entries of a list are removed in rounds, those with the closest match first.

Used by VisPruner. A round compares the entries at even indices of the list with those at odd indices, and removes up to
ROUND even ones, those with the closest match. The remaining even ones, closest match first, and then the odd ones are
the list of the next round: its order decides which entries are compared, so it is kept exactly.

The reference reads all cosines of even with odd entries in every round, about R^3 / 100 in all. On a CPU an entry
looks its closest match up in a list of its nearest entries, from which half a dozen are read.

Shapes: B images, R entries, D channels, K entries that stay.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llava.reduction.greedy.cosines import BLOCK, Floats, Indices, array, fits, on_host, row_blocks, slices
from llava.reduction.states import State

ROUND = 8  # near-duplicates removed at a time
# Entries from which on all cosines of a round are read: faster than lists of the nearest ones.
FEW = 640
NEAREST = 64  # length of these lists
LOOK = 8  # entries of them that are read at a time

Block = Callable[[Indices, Indices], Floats]


def distinct(tokens: Tensor, count: int, state: State | None = None) -> Tensor:
    """[B, count] int64 indices of the entries that stay, in the order of the last list.

    Args:
        tokens: [B, R, D] in the order of the first list, of any length and type.
        count: 1 <= count <= R.
        state: counts the operations.
    """
    state = state or State(ids=())
    unit = F.normalize(tokens.float(), dim=-1)
    batch, total = unit.shape[:2]
    if not fits(total):
        make = _by_products if on_host(unit) else from_tokens
        return torch.stack([make(image, count, state) for image in unit])
    chosen = []
    for part in slices(batch, total):
        cosine = state.matmul(unit[part], unit[part].transpose(1, 2))
        if on_host(cosine):
            found = [_on_host(_look_up(image), total, count) for image in array(cosine)]
            chosen.append(torch.from_numpy(np.stack(found)))
        else:
            chosen.append(reference(cosine, count))
    return chosen[0] if len(chosen) == 1 else torch.cat(chosen)


def _look_up(cosine: Floats) -> Block:
    return lambda rows, columns: cosine[rows[:, None], columns]


def _by_products(unit: Tensor, count: int, state: State) -> Tensor:
    """[R, D] -> [count], where all cosines would need too much memory."""
    numbers = array(unit)

    def block(rows: Indices, columns: Indices) -> Floats:
        first, second = (torch.from_numpy(numbers[part]) for part in (rows, columns))
        return array(state.matmul(first, second.t()))

    return torch.from_numpy(_on_host(block, len(unit), count))


def _on_host(block: Block, total: int, count: int) -> Indices:
    """[count] entries of one image that stay.

    Args:
        block: entries [r] and [c] -> their cosines [r, c].
    """
    places = np.arange(total)
    while len(places) > count:
        listed = len(places)
        if listed <= FEW:
            closest = _from_all(block, places)
            stop = count
        else:
            closest = _from_nearest(block, places, total)
            stop = max(count, listed // 2)  # then new lists, without the entries that are gone
        while len(places) > stop:
            even, odd = places[::2], places[1::2]
            gone = min(ROUND, len(places) - count)  # or all even ones, if they are fewer
            order = np.argsort(-closest(even, odd), kind="stable")
            places = np.concatenate([even[order[gone:]], odd])
    return places[:count]


def _from_all(block: Block, places: Indices) -> Callable[[Indices, Indices], Floats]:
    """The highest cosine of each even entry to the odd ones, from all cosines of the list."""
    cosine = block(places, places)
    inside = np.empty(places.max() + 1, np.int64)
    inside[places] = np.arange(len(places))
    return lambda even, odd: cosine[inside[even][:, None], inside[odd]].max(1)


def _from_nearest(block: Block, places: Indices, total: int) -> Callable[[Indices, Indices], Floats]:
    """The same from the nearest entries of each entry, of which about half are odd."""
    order = np.sort(places)
    near = np.empty((total, NEAREST), np.int64)
    value = np.empty((total, NEAREST), np.float32)
    for start in range(0, len(order), BLOCK):
        rows = order[start : start + BLOCK]
        highest = torch.from_numpy(block(rows, order)).topk(NEAREST, dim=1)
        value[rows], near[rows] = array(highest.values), order[array(highest.indices)]
    is_odd = np.empty(total, bool)

    def closest(even: Indices, odd: Indices) -> Floats:
        is_odd[:] = False
        is_odd[odd] = True
        found, open_ = np.empty(len(even), np.float32), np.arange(len(even))
        for start in range(0, NEAREST, LOOK):
            rows = even[open_]
            match = is_odd[near[rows, start : start + LOOK]]
            first = match.argmax(1)
            hit = match[np.arange(len(rows)), first]
            found[open_[hit]] = value[rows[hit], start + first[hit]]
            open_ = open_[~hit]
            if not len(open_):
                return found
        found[open_] = block(even[open_], odd).max(1)  # no odd entry among the nearest
        return found

    return closest


# The references.


def from_tokens(unit: Tensor, count: int, state: State) -> Tensor:
    """`distinct` in torch, from the tokens [R, D] of one image: a few rows of cosines at a time, in every round."""

    def closest(even: Tensor, odd: Tensor) -> Tensor:
        others = unit[odd[0]].t()
        blocks = even[0].tensor_split(row_blocks(even.shape[1]))
        return torch.cat([state.matmul(unit[block], others).amax(1) for block in blocks])[None]

    return _loop(closest, torch.arange(len(unit), device=unit.device)[None], count)[0]


def reference(cosine: Tensor, count: int) -> Tensor:
    """`distinct` in torch, from all cosines [B, R, R]."""
    batch, length = cosine.shape[:2]
    rows = torch.arange(batch, device=cosine.device)[:, None, None]

    def closest(even: Tensor, odd: Tensor) -> Tensor:
        return cosine[rows, even.unsqueeze(2), odd.unsqueeze(1)].amax(2)

    return _loop(closest, torch.arange(length, device=cosine.device).expand(batch, -1), count)


def _loop(closest: Callable[[Tensor, Tensor], Tensor], places: Tensor, count: int) -> Tensor:
    """[B, R] all entries -> [B, count]; `closest` gives the highest cosine of each even entry to the odd ones."""
    while places.shape[1] > count:  # lengths are host integers: no round waits for the device
        even, odd = places[:, ::2], places[:, 1::2]
        gone = min(ROUND, places.shape[1] - count)
        order = closest(even, odd).argsort(dim=1, descending=True, stable=True)
        places = torch.cat([even.gather(1, order[:, gone:]), odd], 1)
    return places[:, :count]
