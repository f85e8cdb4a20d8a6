"""Stage "next": fine-tune the toy model into a LLaVA-NeXT, with tiles, newline tokens and up to 2,928 visual tokens.

The vision tower stays as it is. Projector, decoder and newline vector are trained on questions about cached features. A
step sees some of the tokens of each picture, chosen here with their places.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from toy.data.corpus import LargeCorpus, encode_pictures, run_sources
from toy.data.questions import FAMILIES
from toy.data.scenes import FIELDS, KINDS, PATCHES
from toy.data.vocabulary import NEXT_WORDS
from toy.llava import Trainee, load_toy
from toy.packing import Visuals
from toy.stages import LongStage, Recipe, Settings, ask_questions, draw_splits

# Which visual tokens a step sees, and where in the picture they lie.

# Small things and frames first: most questions are about them. A big thing is recognised from some of its patches.
SMALL_FIRST, BIG_NEXT, PANEL_LAST = 1.0, 0.5, 0.3
THUMBNAIL = 0.2  # share of the kept tokens


@dataclass(frozen=True)
class Chosen:
    """Tokens of one picture: their positions, ascending, and their sources (crop * 576 + patch, -1 for a newline)."""

    positions: np.ndarray
    sources: np.ndarray
    total: int


def whole_sequence(corpus: LargeCorpus, row: int) -> Chosen:
    """Every token."""
    sources = run_sources(corpus.arrangement(row))
    return Chosen(np.arange(len(sources)), sources, len(sources))


def choose_tokens(
    corpus: LargeCorpus, row: int, keep: int, rng: np.random.Generator, newlines: bool = True, blind: bool = False
) -> Chosen:
    """`keep` tokens: a share of the thumbnail, all newlines (or none), and tiles.

    Args:
        blind: draw patches without looking; else small things come before big ones, and these before background.
    """
    sources = run_sources(corpus.arrangement(row))
    first = np.zeros(corpus.owners[row].size) if blind else priority(corpus, row)
    order = rng.random(len(sources)) + np.where(sources < 0, 0.0, first[sources])
    ends = np.flatnonzero(sources < 0) if newlines else np.empty(0, np.int64)
    thumbnail = round(THUMBNAIL * keep)
    kept = [ends]
    for pool, count in (
        (np.arange(PATCHES), thumbnail),
        (np.flatnonzero(sources >= PATCHES), keep - thumbnail - len(ends)),
    ):
        kept.append(pool[np.argpartition(-order[pool], count - 1)[:count]])
    positions = np.sort(np.concatenate(kept))
    return Chosen(positions, sources[positions], len(sources))


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


# The stage.

POSITIONS = ["side", "side", "choose", "choose", "verify", "verify", "relate", "relate"]
SAMPLED = [*FAMILIES, *POSITIONS, "count", "count", "digit", "exist", "shape"]
# The first part of the steps sees few tokens of many pictures, the next most things of fewer: with things missing, what
# is there and how many cannot be told, and a model trained so to the end misjudges both in a whole sequence.
FEW_TOKENS, BLIND = 0.54, 0.2  # share of the steps; of the pictures in them whose tokens are drawn blindly
# Where in the picture a token lies is predicted from the decoder's states here: a tile's features only say where in the
# tile. Without this loss the questions about places are learned much later.
PROBE_AT, PROBE_LOSS = 3, 1.0


class Next(LongStage):
    """Fine-tune the toy model on large pictures in tiles."""

    name = "next"
    defaults = Settings(
        460, 600, batch=12, validation=100, watched=12, final=40, keep=240, questions=10, keep_later=700, whole=0.02
    )
    quick = Settings(4, 4, batch=3, validation=2, watched=2, final=2, keep=200, questions=3, keep_later=300, whole=0.3)
    recipe = Recipe(lr=1.5e-3, adam_lr=1e-3, clip=1.0, decay=0.5, dtype="float32", save_every=25)
    at_once, words, families, sampled, few_tokens = 2, NEXT_WORDS, tuple(FAMILIES), SAMPLED, FEW_TOKENS

    def __init__(self, folder: Path, settings: Settings, model: Path):
        super().__init__(folder, settings, model)
        llava = load_toy(model)
        draw_splits(folder, settings, partial(encode_pictures, tower=llava.model.vision_tower))
        self.corpus, self.val = LargeCorpus(folder / "train", settings.images), LargeCorpus(folder / "val")
        self.trainee = Trainee(llava, newline=True, probe=2)

    ask = staticmethod(ask_questions)

    def whole(self, rows: np.ndarray) -> Visuals:
        return visuals(self.val, rows, [whole_sequence(self.val, row) for row in rows])

    def loss(self, step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        few, full, rows, questions = self.batch(step, rng)
        renumber, newlines = not full and rng.random() < 0.3, full or rng.random() < 0.8
        chosen = [whole_sequence(self.corpus, row) if full else self.choose(row, few, newlines, rng) for row in rows]
        seen = visuals(self.corpus, rows, chosen)
        # Renumbered, or with newlines missing, a token's state cannot tell where it lies.
        probed = newlines and not renumber
        decoded, loss, numbers = self.answer(seen, questions, renumber, PROBE_AT if probed else None)
        if decoded.early is not None:
            where = centres(self.corpus, rows, seen)
            known = ~where.isnan()
            error = (decoded.early[known] - where[known]).square().mean()
            loss, numbers = loss + PROBE_LOSS * error, {**numbers, "centre": error.item()}
        return loss, numbers

    def choose(self, row: int, few: bool, newlines: bool, rng: np.random.Generator) -> Chosen:
        """The tokens of one picture that a step sees."""
        blind = few and rng.random() < BLIND
        keep = self.settings.keep if few else self.settings.keep_later
        return choose_tokens(self.corpus, row, keep, rng, newlines, blind)
