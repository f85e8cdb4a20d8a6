"""The stages on many visual tokens, which see few of many rows first, then most of fewer, at the end all of two.

"next" fine-tunes the toy model into a LLaVA-NeXT, with tiles, newline tokens and up to 2,928 visual tokens. "video"
fine-tunes it into a Video-LLaVA, eight frames of 257 tokens, on what happens in a video. The vision tower stays as it
is, and sees every tile and frame alone; only the decoder compares frames. Projector, decoder and newline vector are
trained on questions about cached features, of which a step sees some, chosen here with their places.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lab.toy.data.corpus import FRAME_PATCHES, FRAME_TOKENS, RUN, Corpus, run_sources, write_pictures, write_videos
from lab.toy.data.questions import FAMILIES
from lab.toy.data.scenes import FIELDS, KINDS, PATCHES
from lab.toy.data.videos import FAMILIES as VIDEO_FAMILIES
from lab.toy.data.videos import SEEN, Actor, ask_video
from lab.toy.data.vocabulary import NEXT_WORDS, VIDEO_WORDS
from lab.toy.llava import Trainee, build_video_llava, load_toy
from lab.toy.packing import Line, Visuals, question_line
from lab.toy.stages import Numbers, QuestionStage, Settings, drawn_families


class LongStage(QuestionStage):
    """Fine-tuning with few, most, then all visual tokens.

    Attributes:
        few_tokens: share of the steps in the first part.
        sampled: families that the questions of a step are drawn from.
        renumbered: share of the steps before the last part that number the tokens they see 0, 1, ...
    """

    few_tokens: ClassVar[float]
    sampled: ClassVar[Sequence[str]]
    renumbered: ClassVar[float]

    @abstractmethod
    def choose(self, rows: np.ndarray, few: bool, rng: np.random.Generator) -> Visuals:
        """The tokens of these rows that a step of the first part (`few`) or of the second part sees."""

    def can_tell(self, seen: Visuals, renumber: bool) -> bool:
        """Whether a token's state can tell what the model's probe is to predict from it."""
        return True

    @abstractmethod
    def probe_loss(self, rows: np.ndarray, seen: Visuals, probed: Tensor) -> tuple[Tensor, Numbers]:
        """The loss of the model's probe [B, V, numbers] of the tokens, and numbers to log."""

    def loss(self, step: int, rng: np.random.Generator) -> tuple[Tensor, Numbers]:
        settings = self.settings
        few, full = step < self.few_tokens * settings.steps, self.is_whole(step)
        size = settings.batch if few else 2 if full else settings.batch // 3
        rows = np.sort(rng.choice(len(self.corpus), size, replace=False))
        count = settings.questions if few else settings.questions + 4
        lines = self.ask(self.corpus, rows, drawn_families(self.sampled, count, rows, rng), rng)
        renumber = not full and rng.random() < self.renumbered
        seen = self.all_tokens(self.corpus, rows) if full else self.choose(rows, few, rng)
        decoded, loss, numbers = self.answer(seen, lines, renumber, early=self.can_tell(seen, renumber))
        if decoded.early is not None:
            further, more = self.probe_loss(rows, seen, decoded.early)
            loss, numbers = loss + further, numbers | more
        return loss, numbers


@dataclass(frozen=True)
class Chosen:
    """Visual tokens of one row.

    Attributes:
        positions: in the whole sequence, ascending.
        sources: place of each token's features in the row of the corpus, -1 for a newline.
        total: tokens of the whole sequence.
    """

    positions: np.ndarray
    sources: np.ndarray
    total: int


def visuals(corpus: Corpus, rows: Sequence[int] | np.ndarray, chosen: Sequence[Chosen]) -> Visuals:
    """The chosen tokens of several rows, padded to the longest."""
    shape = len(rows), max(len(one.positions) for one in chosen)
    features = torch.zeros(*shape, corpus.features.shape[-1], dtype=torch.bfloat16)
    newline, present = torch.zeros((2, *shape), dtype=torch.bool)
    positions = torch.zeros(shape, dtype=torch.long)
    for i, (row, one) in enumerate(zip(rows, chosen, strict=True)):
        count, patches = len(one.positions), torch.from_numpy(one.sources >= 0)
        features[i, :count][patches] = corpus.tokens(row, one.sources[one.sources >= 0])
        newline[i, :count], present[i, :count], positions[i, :count] = ~patches, True, torch.from_numpy(one.positions)
    total = torch.tensor([one.total for one in chosen])
    return Visuals(features, positions, total, newline if newline.any() else None, present)


# Stage "next".

POSITIONS = ["side", "side", "choose", "choose", "verify", "verify", "relate", "relate"]
# Small things and frames first: most questions are about them. A big thing is recognised from some of its patches.
SMALL_FIRST, BIG_NEXT, PANEL_LAST = 1.0, 0.5, 0.3
THUMBNAIL = 0.2  # share of the kept tokens


class Next(LongStage):
    """Fine-tune the toy model on large pictures in tiles."""

    name = "next"
    at_once, words = 2, NEXT_WORDS
    sampled = (*FAMILIES, *POSITIONS, "count", "count", "digit", "exist", "shape")
    # The first part of the steps sees few tokens of many pictures, the next most things of fewer: with things missing,
    # what is there and how many cannot be told, and a model trained so to the end misjudges both in a whole sequence.
    few_tokens, blind = 0.54, 0.2  # share of the steps; of the pictures in them whose tokens are drawn blindly
    renumbered, newlines = 0.3, 0.8  # shares of the steps; in the others the newlines are left out
    # Where in the picture a token lies is predicted from the decoder's states here: a tile's features only say where in
    # the tile. Without this loss the questions about places are learned much later.
    early_at, probe_weight = 3, 1.0

    def __init__(self, folder: Path, settings: Settings, model: Path):
        super().__init__(folder, settings, model)
        llava = load_toy(model)
        self.draw(folder, write_pictures, llava.model.vision_tower)
        self.trainee = Trainee(llava, newline=True, probe=2)

    def all_tokens(self, corpus: Corpus, rows: np.ndarray) -> Visuals:
        return visuals(corpus, rows, [whole_sequence(corpus, row) for row in rows])

    def choose(self, rows: np.ndarray, few: bool, rng: np.random.Generator) -> Visuals:
        newlines, keep = rng.random() < self.newlines, self.settings.keep if few else self.settings.keep_later
        chosen = [
            choose_tokens(self.corpus, row, keep, rng, newlines, blind=few and rng.random() < self.blind)
            for row in rows
        ]
        return visuals(self.corpus, rows, chosen)

    def can_tell(self, seen: Visuals, renumber: bool) -> bool:
        # Renumbered, or with newlines missing, a token's state cannot tell where it lies.
        return seen.newline is not None and not renumber

    def probe_loss(self, rows: np.ndarray, seen: Visuals, probed: Tensor) -> tuple[Tensor, Numbers]:
        where = centres(self.corpus, rows, seen)
        known = ~where.isnan()
        error = (probed[known] - where[known]).square().mean()
        return self.probe_weight * error, {"centre": error.item()}


def whole_sequence(corpus: Corpus, row: int) -> Chosen:
    """Every token of a picture."""
    sources = run_sources(corpus.layout(row))
    return Chosen(np.arange(len(sources)), sources, len(sources))


def choose_tokens(
    corpus: Corpus, row: int, keep: int, rng: np.random.Generator, newlines: bool = True, blind: bool = False
) -> Chosen:
    """`keep` tokens of a picture: a share of the thumbnail, all newlines (or none), and tiles.

    Args:
        blind: draw patches without looking; else small things come before big ones, and these before background.
    """
    sources = run_sources(corpus.layout(row))
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


def priority(corpus: Corpus, row: int) -> np.ndarray:
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


def centres(corpus: Corpus, rows: Sequence[int] | np.ndarray, seen: Visuals) -> Tensor:
    """[B, V, 2] float32 in -1..1: centre of each token's patch in the picture, across and down; NaN for others."""
    assert seen.newline is not None and seen.present is not None
    target = torch.full((*seen.positions.shape, 2), float("nan"))
    for i, row in enumerate(rows):
        layout = corpus.layout(row)
        tall = len(layout.newlines)
        wide = (layout.tokens - PATCHES) // tall - 1
        place, side = seen.positions[i], layout.grid[1]
        after = place - PATCHES
        thumbnail = torch.stack([(place % side + 0.5) / side, (place // side + 0.5) / layout.grid[0]], 1)
        tiles = torch.stack([(after % (wide + 1) + 0.5) / wide, (after // (wide + 1) + 0.5) / tall], 1)
        target[i] = torch.where((after < 0)[:, None], thumbnail, tiles) * 2 - 1
    target[seen.newline | ~seen.present] = float("nan")
    return target


# Stage "video".

ENOUGH = 4  # patches of a thing in a frame that come first: more say the same again
STATES = ("still", "left", "right", "up", "down", "appear", "change")
STATE_WEIGHTS = [0.4 if state == "still" else 1.0 for state in STATES]  # most things do nothing


class Video(LongStage):
    """Fine-tune the toy model on videos of eight frames."""

    name = "video"
    at_once, words, kinds = 4, VIDEO_WORDS, tuple(VIDEO_FAMILIES)
    sampled = (*VIDEO_FAMILIES, "direction", "mover", "mover", *["appear"] * 3, "order", "times", "count")
    # The first part of the steps sees few tokens of many videos, the next whole things of fewer, as in stage "next".
    few_tokens, blind = 0.62, 0.05  # share of the steps; of the videos in them whose tokens are drawn blindly
    renumbered = 0.15
    # Which frame a token is from, and what its thing has done, is predicted from the decoder's states here. Without
    # this loss nothing teaches the lower layers to compare frames until a question happens to need it.
    early_at, probe_weight = 4, 2.0

    def __init__(self, folder: Path, settings: Settings, model: Path):
        super().__init__(folder, settings, model)
        llava = build_video_llava(load_toy(model))
        self.draw(folder, write_videos, llava.model.video_tower)
        self.trainee = Trainee(llava, probe=1 + len(STATES))

    def lines(self, corpus: Corpus, row: int, kinds: Sequence[str], rng: np.random.Generator) -> list[Line]:
        asked = [ask_video(corpus.plan(row), family, rng, tries=12) for family in kinds]
        return [question_line(VIDEO_WORDS, question) for question in asked if question is not None]

    def all_tokens(self, corpus: Corpus, rows: np.ndarray) -> Visuals:
        return visuals(corpus, rows, [frame_tokens(np.arange(RUN))] * len(rows))

    def choose(self, rows: np.ndarray, few: bool, rng: np.random.Generator) -> Visuals:
        keep, enough = (self.settings.keep, ENOUGH) if few else (self.settings.keep_later, FRAME_PATCHES)
        chosen = [
            choose_frame_tokens(self.corpus, row, keep, rng, enough, blind=few and rng.random() < self.blind)
            for row in rows
        ]
        return visuals(self.corpus, rows, chosen)

    def probe_loss(self, rows: np.ndarray, seen: Visuals, probed: Tensor) -> tuple[Tensor, Numbers]:
        frame, states = frames_and_states(self.corpus, rows, seen)
        frame_error = (probed[..., 0] - frame).square().mean()
        state_loss = F.cross_entropy(probed[..., 1:].flatten(0, 1), states.flatten(), torch.tensor(STATE_WEIGHTS))
        numbers = {"frame": frame_error.item(), "state": state_loss.item()}
        return self.probe_weight * (frame_error + state_loss), numbers


def frame_tokens(positions: np.ndarray) -> Chosen:
    """The tokens of a video at these positions."""
    return Chosen(positions, positions, RUN)


def choose_frame_tokens(
    corpus: Corpus, row: int, keep: int, rng: np.random.Generator, enough: int = ENOUGH, blind: bool = False
) -> Chosen:
    """`keep` tokens of a video: every CLS, `enough` patches of every thing in every frame, then anything.

    Args:
        blind: draw all of them without looking.
    """
    owners = corpus.owners[row]
    order = rng.random((SEEN, FRAME_TOKENS))
    order[:, 0] += 0 if blind else 3
    for frame in () if blind else range(SEEN):
        for thing in set(owners[frame].tolist()) - {-1}:
            mine = np.flatnonzero(owners[frame] == thing) + 1
            first = rng.permutation(mine)[:enough]
            order[frame, first] += 2
    return frame_tokens(np.sort(np.argpartition(-order.ravel(), keep - 1)[:keep]))


def frames_and_states(corpus: Corpus, rows: Sequence[int] | np.ndarray, seen: Visuals) -> tuple[Tensor, Tensor]:
    """What the decoder can know about a token from the tokens up to it.

    Returns:
        [B, V] float32 in -1..1, the frame it is from; [B, V] int64, index into STATES of what its thing has done so
        far, from the third frame on, -100 for background and earlier.
    """
    frame = seen.positions // FRAME_TOKENS
    patch = seen.positions % FRAME_TOKENS - 1
    states = torch.full(seen.positions.shape, -100)
    for i, row in enumerate(rows):
        actors = corpus.plan(row).actors
        table = torch.tensor([[STATES.index(state_so_far(actor, f)) for actor in actors] for f in range(SEEN)])
        owner = torch.from_numpy(corpus.owners[row].astype(np.int64))[frame[i], patch[i].clamp(min=0)]
        told = (frame[i] >= 2) & (patch[i] >= 0) & (owner >= 0)
        states[i][told] = table[frame[i][told], owner[told]]
    return frame.float() / (SEEN - 1) * 2 - 1, states


def state_so_far(actor: Actor, frame: int) -> str:
    """One of STATES: nothing yet, its direction, it has appeared, or its colour differs from the first one."""
    if actor.direction:
        return actor.direction
    if not actor.visible[0]:
        return "appear"
    return "change" if actor.colors[frame] != actor.colors[0] else "still"
