"""Training batches of videos: which tokens of a run a step sees, and the questions about it."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tinyllava.longer import Visuals
from tinyllava.packed import Asked, Packed, pack
from tinyllava.video_corpus import FRAME_TOKENS, RUN, VideoCorpus
from tinyllava.video_questions import VideoQuestion, ask_video
from tinyllava.video_scenes import SEEN, Actor
from tinyllava.video_vocabulary import encode, ids
from tinyllava.vocabulary import ASSISTANT, PAD

QUESTION_LENGTH = 12  # longest question (9 words), role, answer
ENOUGH = 4  # patches of a thing in a frame that come first: more say the same again
STATES = ("still", "left", "right", "up", "down", "appear", "change")


def questions_about(corpus: VideoCorpus, rows, families: Sequence[Sequence[str]], rng: np.random.Generator) -> Packed:
    """One question of each of the given families about each video, where there is one."""
    asked: list[list[Asked | None]] = []
    for row, wanted in zip(rows, families, strict=True):
        plan = corpus.plan(int(row))
        asked.append([as_ids(ask_video(plan, family, rng, tries=12)) for family in wanted])
    return pack(asked, [ids()[ASSISTANT]], QUESTION_LENGTH, ids()[PAD])


def as_ids(question: VideoQuestion | None) -> Asked | None:
    if question is None:
        return None
    return Asked(question.family, encode(question.text), encode(question.answer)[0])


def whole_video(frames: Sequence[int] = range(SEEN)) -> np.ndarray:
    """Places of all tokens of the given frames."""
    return np.concatenate([np.arange(frame * FRAME_TOKENS, (frame + 1) * FRAME_TOKENS) for frame in frames])


def things_first(
    corpus: VideoCorpus, row: int, keep: int, rng: np.random.Generator, enough: int = ENOUGH
) -> np.ndarray:
    """`keep` places, ascending: every CLS, `enough` patches of every thing in every frame, then anything."""
    owners = corpus.owners[row]
    order = rng.random((SEEN, FRAME_TOKENS))
    order[:, 0] += 3
    for frame in range(SEEN):
        for thing in set(owners[frame].tolist()) - {-1}:
            mine = np.flatnonzero(owners[frame] == thing) + 1
            first = rng.permutation(mine)[:enough]
            order[frame, first] += 2
    return _top(order, keep)


def anywhere(keep: int, rng: np.random.Generator) -> np.ndarray:
    """`keep` places drawn blindly, ascending."""
    return _top(rng.random((SEEN, FRAME_TOKENS)), keep)


def _top(order: np.ndarray, keep: int) -> np.ndarray:
    return np.sort(np.argpartition(-order.ravel(), keep - 1)[:keep])


def visuals(corpus: VideoCorpus, rows, places: Sequence[np.ndarray]) -> Visuals:
    """The tokens at equally many places of several videos."""
    width, shape = corpus.features.shape[-1], (len(rows), len(places[0]))
    bits = [np.asarray(corpus.features[row]).reshape(-1, width)[place] for row, place in zip(rows, places, strict=True)]
    return Visuals(
        torch.from_numpy(np.stack(bits)).view(torch.bfloat16),
        torch.zeros(shape, dtype=torch.bool),
        torch.from_numpy(np.stack(places)),
        torch.full(shape[:1], RUN),
        torch.ones(shape, dtype=torch.bool),
    )


def watched(corpus: VideoCorpus, rows, seen: Visuals) -> tuple[Tensor, Tensor]:
    """What a decoder can know about a token where it stands, having seen what comes before it.

    Returns:
        [B, V] float32 in -1..1, the frame it is from; [B, V] int64, index into STATES of what its thing has done so
        far, from the third frame on, -100 for background and earlier.
    """
    frame = seen.places // FRAME_TOKENS
    patch = seen.places % FRAME_TOKENS - 1
    states = torch.full(seen.places.shape, -100)
    for i, row in enumerate(rows):
        actors = corpus.plan(row).actors
        table = torch.tensor([[STATES.index(state_so_far(actor, f)) for actor in actors] for f in range(SEEN)])
        owner = torch.from_numpy(corpus.owners[row].astype(np.int64))[frame[i], patch[i].clamp(min=0)]
        told = (frame[i] >= 2) & (patch[i] >= 0) & (owner >= 0)
        states[i][told] = table[frame[i][told], owner[told]]
    return frame.float() / (SEEN - 1) * 2 - 1, states


def state_so_far(actor: Actor, frame: int) -> str:
    """One of STATES: nothing yet, its direction, come into view, or another colour than at first."""
    if actor.direction:
        return actor.direction
    if not actor.visible[0]:
        return "appear"
    return "change" if actor.colors[frame] != actor.colors[0] else "still"
