"""Stage "video": fine-tune the toy model into a Video-LLaVA, eight frames of 257 tokens, on what happens in a video.

The video tower stays as it is and sees every frame alone; only the decoder compares frames.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from toy import ranks
from toy.data.video_corpus import PATCHES, VideoCorpus, encode_videos
from toy.data.video_questions import FAMILIES
from toy.data.vocabulary import EOS, VIDEO_WORDS
from toy.model.decoder import answer_logits, forward
from toy.model.llava import Trainee, load_toy
from toy.model.video import build_video_llava
from toy.packing import accuracy, answer_loss
from toy.stages.base import Recipe, Settings, Stage, drawn_families, every_family
from toy.stages.video_tokens import STATES, anywhere, ask_videos, frames_and_states, things_first, visuals, whole_video

SAMPLED = [*FAMILIES, "direction", "mover", "mover", "appear", "appear", "appear", "order", "times", "count"]
# The first part of the steps sees few tokens of many videos, the next whole things of fewer, as in stage "next".
FEW_TOKENS, BLIND = 0.62, 0.05  # share of the steps; of the videos in them whose tokens are drawn blindly
# Which frame a token is from, and what its thing has done, is predicted from the decoder's states here. Without this
# loss nothing teaches the lower layers to compare frames until a question happens to need it.
PROBE_AT, PROBE_LOSS = 4, 2.0
STATE_WEIGHTS = [0.4 if state == "still" else 1.0 for state in STATES]  # most things do nothing


class Video(Stage):
    """Fine-tune the toy model on videos of eight frames."""

    name = "video"
    defaults = Settings(
        1160, 1000, batch=12, validation=100, watched=16, final=40, keep=208, questions=10, keep_later=640, whole=0.085
    )
    quick = Settings(4, 6, batch=3, validation=4, watched=4, final=4, keep=64, questions=3, keep_later=128, whole=0.3)
    recipe = Recipe(lr=2e-3, adam_lr=1e-3, clip=1.0, decay=0.4, dtype="float32", evaluate_every=200, save_every=25)
    at_once = 4

    def __init__(self, folder: Path, settings: Settings, model: Path):
        super().__init__(folder, settings, model)
        llava = build_video_llava(load_toy(model))
        if ranks.RANK == 0:
            encode_videos(folder / "val", "val", settings.validation, llava.model.video_tower)
            encode_videos(folder / "train", "train", settings.images, llava.model.video_tower)
        ranks.wait()
        self.corpus = VideoCorpus(folder / "train", "train", settings.images)
        self.val = VideoCorpus(folder / "val", "val")
        self.trainee = Trainee(llava, probe=1 + len(STATES))

    def loss(self, step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        settings = self.settings
        few, full = step < FEW_TOKENS * settings.steps, self.is_whole(step)
        batch = settings.batch if few else 2 if full else settings.batch // 3
        rows = np.sort(rng.choice(len(self.corpus), batch, replace=False))
        families = drawn_families(SAMPLED, settings.questions if few else settings.questions + 4, rows, rng)
        questions = ask_videos(self.corpus, rows, families, rng)
        renumber = not full and rng.random() < 0.15
        positions = [whole_video() if full else self.choose(row, few, rng) for row in rows]
        seen = visuals(self.corpus, rows, positions)
        decoded = forward(self.trainee, VIDEO_WORDS.prefix, seen, questions.text, renumber, PROBE_AT)
        logits = answer_logits(self.trainee, decoded, questions)
        assert decoded.early is not None
        frame, states = frames_and_states(self.corpus, rows, seen)
        frame_error = (decoded.early[..., 0] - frame).square().mean()
        state_loss = F.cross_entropy(
            decoded.early[..., 1:].flatten(0, 1), states.flatten(), torch.tensor(STATE_WEIGHTS)
        )
        numbers = {**accuracy(logits, questions, FAMILIES), "frame": frame_error.item(), "state": state_loss.item()}
        loss = answer_loss(logits, questions.answer, VIDEO_WORDS.ids[EOS])
        return loss + PROBE_LOSS * (frame_error + state_loss), numbers

    def choose(self, row: int, few: bool, rng: np.random.Generator) -> np.ndarray:
        """The positions of the tokens of one video that a step sees."""
        if not few:
            return things_first(self.corpus, row, self.settings.keep_later, rng, enough=PATCHES)
        if rng.random() < BLIND:
            return anywhere(self.settings.keep, rng)
        return things_first(self.corpus, row, self.settings.keep, rng)

    def validate(self, rows: np.ndarray) -> dict[str, float]:
        questions = ask_videos(self.val, rows, every_family(rows, tuple(FAMILIES)), self.rng)
        seen = visuals(self.val, rows, [whole_video()] * len(rows))
        decoded = forward(self.trainee, VIDEO_WORDS.prefix, seen, questions.text)
        return accuracy(answer_logits(self.trainee, decoded, questions), questions, FAMILIES)
