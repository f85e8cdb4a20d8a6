"""Training batches of videos: which visual tokens a step sees, and the questions about them."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from toy.data.video_corpus import FRAME_TOKENS, RUN, VideoCorpus
from toy.data.video_questions import VideoQuestion, ask_video
from toy.data.video_scenes import SEEN, Actor
from toy.data.vocabulary import ASSISTANT, PAD, VIDEO_WORDS
from toy.packing import Asked, Questions, Visuals, pack

QUESTION_LENGTH = 12  # longest question (9 words), role, answer
ENOUGH = 4  # patches of a thing in a frame that come first: more say the same again
STATES = ("still", "left", "right", "up", "down", "appear", "change")


def ask_videos(corpus: VideoCorpus, rows, families: Sequence[Sequence[str]], rng: np.random.Generator) -> Questions:
    """One question of each of the given families about each video, where there is one."""
    asked: list[list[Asked | None]] = []
    for row, wanted in zip(rows, families, strict=True):
        plan = corpus.plan(int(row))
        asked.append([as_ids(ask_video(plan, family, rng, tries=12)) for family in wanted])
    return pack(asked, [VIDEO_WORDS.ids[ASSISTANT]], QUESTION_LENGTH, VIDEO_WORDS.ids[PAD])


def as_ids(question: VideoQuestion | None) -> Asked | None:
    """A question as ids; None stays None."""
    if question is None:
        return None
    return Asked(question.family, VIDEO_WORDS.encode(question.text), VIDEO_WORDS.encode(question.answer)[0])


def whole_video(frames: Sequence[int] = range(SEEN)) -> np.ndarray:
    """Positions of all tokens of the given frames."""
    return np.concatenate([np.arange(frame * FRAME_TOKENS, (frame + 1) * FRAME_TOKENS) for frame in frames])


def things_first(
    corpus: VideoCorpus, row: int, keep: int, rng: np.random.Generator, enough: int = ENOUGH
) -> np.ndarray:
    """`keep` positions, ascending: every CLS, `enough` patches of every thing in every frame, then anything."""
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
    """`keep` positions drawn blindly, ascending."""
    return _top(rng.random((SEEN, FRAME_TOKENS)), keep)


def _top(order: np.ndarray, keep: int) -> np.ndarray:
    return np.sort(np.argpartition(-order.ravel(), keep - 1)[:keep])


def visuals(corpus: VideoCorpus, rows: Sequence[int], positions: Sequence[np.ndarray]) -> Visuals:
    """The tokens at equally many positions of several videos."""
    width = corpus.features.shape[-1]
    pairs = zip(rows, positions, strict=True)
    bits = [np.asarray(corpus.features[row]).reshape(-1, width)[at] for row, at in pairs]
    features = torch.from_numpy(np.stack(bits)).view(torch.bfloat16)
    return Visuals(features, torch.from_numpy(np.stack(positions)), torch.full((len(rows),), RUN))


def frames_and_states(corpus: VideoCorpus, rows: Sequence[int], seen: Visuals) -> tuple[Tensor, Tensor]:
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
