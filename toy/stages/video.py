"""Stage "video": fine-tune the toy model into a Video-LLaVA, eight frames of 257 tokens, on what happens in a video.

The video tower stays as it is and sees every frame alone; only the decoder compares frames. A step sees some of the
tokens of each video, chosen here with their places.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from toy.data.corpus import FRAME_PATCHES, FRAME_TOKENS, RUN, VideoCorpus, encode_videos
from toy.data.videos import FAMILIES, SEEN, Actor, ask_video
from toy.data.vocabulary import ASSISTANT, VIDEO_WORDS
from toy.llava import Trainee, build_video_llava, load_toy
from toy.packing import Questions, Visuals, pack
from toy.stages import LongStage, Recipe, Settings, draw_splits

QUESTION_LENGTH = 12  # longest question (9 words), role, answer
ENOUGH = 4  # patches of a thing in a frame that come first: more say the same again
STATES = ("still", "left", "right", "up", "down", "appear", "change")
WHOLE = np.arange(RUN)  # positions of all tokens
SAMPLED = [*FAMILIES, "direction", "mover", "mover", "appear", "appear", "appear", "order", "times", "count"]
# The first part of the steps sees few tokens of many videos, the next whole things of fewer, as in stage "next".
FEW_TOKENS, BLIND = 0.62, 0.05  # share of the steps; of the videos in them whose tokens are drawn blindly
# Which frame a token is from, and what its thing has done, is predicted from the decoder's states here. Without this
# loss nothing teaches the lower layers to compare frames until a question happens to need it.
PROBE_AT, PROBE_LOSS = 4, 2.0
STATE_WEIGHTS = [0.4 if state == "still" else 1.0 for state in STATES]  # most things do nothing


class Video(LongStage):
    """Fine-tune the toy model on videos of eight frames."""

    name = "video"
    defaults = Settings(
        1160, 1000, batch=12, validation=100, watched=16, final=40, keep=208, questions=10, keep_later=640, whole=0.085
    )
    quick = Settings(4, 6, batch=3, validation=4, watched=4, final=4, keep=64, questions=3, keep_later=128, whole=0.3)
    recipe = Recipe(lr=2e-3, adam_lr=1e-3, clip=1.0, decay=0.4, dtype="float32", evaluate_every=200, save_every=25)
    at_once, words, families, sampled, few_tokens = 4, VIDEO_WORDS, tuple(FAMILIES), SAMPLED, FEW_TOKENS

    def __init__(self, folder: Path, settings: Settings, model: Path):
        super().__init__(folder, settings, model)
        llava = build_video_llava(load_toy(model))
        draw_splits(folder, settings, partial(encode_videos, tower=llava.model.video_tower))
        self.corpus = VideoCorpus(folder / "train", "train", settings.images)
        self.val = VideoCorpus(folder / "val", "val")
        self.trainee = Trainee(llava, probe=1 + len(STATES))

    @staticmethod
    def ask(corpus: VideoCorpus, rows, families: Sequence[Sequence[str]], rng: np.random.Generator) -> Questions:
        asked = [
            [ask_video(corpus.plan(int(row)), family, rng, tries=12) for family in wanted]
            for row, wanted in zip(rows, families, strict=True)
        ]
        return pack(asked, VIDEO_WORDS, (ASSISTANT,), QUESTION_LENGTH)

    def whole(self, rows: np.ndarray) -> Visuals:
        return visuals(self.val, rows, [WHOLE] * len(rows))

    def loss(self, step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        few, full, rows, questions = self.batch(step, rng)
        renumber = not full and rng.random() < 0.15
        seen = visuals(self.corpus, rows, [WHOLE if full else self.choose(row, few, rng) for row in rows])
        decoded, loss, numbers = self.answer(seen, questions, renumber, PROBE_AT)
        assert decoded.early is not None
        frame, states = frames_and_states(self.corpus, rows, seen)
        frame_error = (decoded.early[..., 0] - frame).square().mean()
        state_loss = F.cross_entropy(
            decoded.early[..., 1:].flatten(0, 1), states.flatten(), torch.tensor(STATE_WEIGHTS)
        )
        numbers |= {"frame": frame_error.item(), "state": state_loss.item()}
        return loss + PROBE_LOSS * (frame_error + state_loss), numbers

    def choose(self, row: int, few: bool, rng: np.random.Generator) -> np.ndarray:
        """The positions of the tokens of one video that a step sees."""
        if not few:
            return things_first(self.corpus, row, self.settings.keep_later, rng, enough=FRAME_PATCHES)
        if rng.random() < BLIND:
            return anywhere(self.settings.keep, rng)
        return things_first(self.corpus, row, self.settings.keep, rng)


# Which visual tokens a step sees, and what the decoder can know about them.


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
