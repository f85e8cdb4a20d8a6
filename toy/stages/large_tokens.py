"""Training batches of large pictures: which visual tokens a step sees, and where in the picture they lie."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from toy.data.corpus import FIELDS, KINDS
from toy.data.large_corpus import LargeCorpus
from toy.data.tiles import PATCHES, run_sources
from toy.packing import Visuals

# Small things and frames first: most questions are about them. A big thing is recognised from some of its patches.
SMALL_FIRST, BIG_NEXT, PANEL_LAST = 1.0, 0.5, 0.3
THUMBNAIL = 0.2  # share of the kept tokens


@dataclass(frozen=True)
class Chosen:
    """Tokens of one picture: their positions, ascending, and their sources (crop * 576 + patch, -1 for a newline)."""

    positions: np.ndarray
    sources: np.ndarray
    total: int


def whole_sequence(corpus: LargeCorpus, row: int, thumbnail_only: bool = False) -> Chosen:
    """Every token; or those of the thumbnail alone, as if there were no tiles."""
    sources = run_sources(corpus.arrangement(row))
    if thumbnail_only:
        sources = sources[:PATCHES]
    return Chosen(np.arange(len(sources)), sources, len(sources))


def things_first(corpus: LargeCorpus, row: int, keep: int, rng: np.random.Generator, newlines: bool = True) -> Chosen:
    """`keep` tokens: a share of the thumbnail, all newlines (or none), and tiles; small things before big ones."""
    return _choose(corpus, row, keep, rng, newlines, priority(corpus, row))


def anywhere(corpus: LargeCorpus, row: int, keep: int, rng: np.random.Generator, newlines: bool = True) -> Chosen:
    """The same with patches drawn blindly."""
    return _choose(corpus, row, keep, rng, newlines, np.zeros(corpus.owners[row].size))


def _choose(corpus, row, keep, rng, newlines, first) -> Chosen:
    sources = run_sources(corpus.arrangement(row))
    ends = np.flatnonzero(sources < 0)
    tiles = np.flatnonzero(sources >= PATCHES)
    order = rng.random(len(sources)) + np.where(sources < 0, 0.0, first[sources])
    thumbnail = round(THUMBNAIL * keep)
    tile_share = keep - thumbnail - newlines * len(ends)
    kept = [_top(order, np.arange(PATCHES), thumbnail), _top(order, tiles, tile_share), *([ends] if newlines else [])]
    positions = np.sort(np.concatenate(kept))
    return Chosen(positions, sources[positions], len(sources))


def _top(order: np.ndarray, pool: np.ndarray, count: int) -> np.ndarray:
    return pool[np.argpartition(-order[pool], count - 1)[:count]]


def priority(corpus: LargeCorpus, row: int) -> np.ndarray:
    """[5 * 576] how much sooner than background a patch is chosen."""
    table = corpus.things[row]
    kind, big = table[:, 0].astype(int), table[:, FIELDS.index("big")]
    first = np.select(
        [kind == KINDS.index("frame"), kind == KINDS.index("panel"), kind == 0, big == 1],
        [SMALL_FIRST, PANEL_LAST, 0.0, BIG_NEXT],
        SMALL_FIRST,
    )
    owners = corpus.owners[row].reshape(-1)
    return np.where(owners < 0, 0.0, first[owners])


def visuals(corpus: LargeCorpus, rows: Sequence[int], chosen: Sequence[Chosen]) -> Visuals:
    """The chosen tokens of several pictures, padded to the longest."""
    longest, width = max(len(one.positions) for one in chosen), corpus.features.shape[-1]
    bits = np.zeros((len(rows), longest, width), np.int16)
    newline, present = np.zeros((2, len(rows), longest), bool)
    positions = np.zeros((len(rows), longest), np.int64)
    for i, (row, one) in enumerate(zip(rows, chosen, strict=True)):
        count, patches = len(one.positions), one.sources >= 0
        # One read of the picture's slice of the file; a fancy index into the file would read token by token.
        table = np.asarray(corpus.features[row]).reshape(-1, width)
        bits[i, :count][patches] = table[one.sources[patches]]
        newline[i, :count], present[i, :count], positions[i, :count] = ~patches, True, one.positions
    return Visuals(
        torch.from_numpy(bits).view(torch.bfloat16),
        torch.from_numpy(positions),
        torch.tensor([one.total for one in chosen]),
        torch.from_numpy(newline),
        torch.from_numpy(present),
    )


def centres(corpus: LargeCorpus, rows: Sequence[int], seen: Visuals) -> Tensor:
    """[B, V, 2] float32 in -1..1: centre of each token's patch in the picture, across and down; NaN for others."""
    assert seen.newline is not None and seen.present is not None
    target = torch.full((*seen.positions.shape, 2), float("nan"))
    for i, row in enumerate(rows):
        arrangement = corpus.arrangement(row)
        tall = len(arrangement.newlines)
        wide = (arrangement.tokens - PATCHES) // tall - 1
        place, side = seen.positions[i], arrangement.grid[1]
        after = place - PATCHES
        thumbnail = torch.stack([(place % side + 0.5) / side, (place // side + 0.5) / arrangement.grid[0]], 1)
        tiles = torch.stack([(after % (wide + 1) + 0.5) / wide, (after // (wide + 1) + 0.5) / tall], 1)
        target[i] = torch.where((after < 0)[:, None], thumbnail, tiles) * 2 - 1
    target[seen.newline | ~seen.present] = float("nan")
    return target
