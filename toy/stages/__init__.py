"""What a training stage is: its data, what it trains, its loss, optimizer settings, steps and evaluation."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from toy.clip import COLUMN, PANEL, SHAPE
from toy.data.corpus import Corpus, Features
from toy.data.questions import ask
from toy.data.scenes import PATCHES
from toy.data.vocabulary import ASSISTANT, EOS, SHORT_ANSWER, TOY_WORDS, Vocabulary
from toy.optimizer import RANK, WORLD, wait_for_ranks
from toy.packing import Decoded, Questions, Visuals, accuracy, answer_logits, answer_loss, forward, pack

# Longest question about a scene (12 words), suffix, role, answer.
QUESTION_LENGTH = 16


@dataclass(frozen=True)
class Recipe:
    """Optimizer settings of a stage, and how often it evaluates and saves."""

    lr: float  # of Muon
    adam_lr: float
    clip: float  # gradient norm
    decay: float  # share of the steps over which the learning rate falls to zero
    dtype: str = "bfloat16"  # of the weights while training; the master weights are float32
    evaluate_every: int = 100
    save_every: int = 100


@dataclass(frozen=True)
class Settings:
    """Sizes of a run. A stage does not use those that are 0 in its defaults."""

    steps: int
    images: int  # training scenes, pictures or videos
    batch: int  # of them per rank and step
    validation: int  # scenes, pictures or videos drawn for validation
    watched: int  # of them in the evaluations while training
    final: int  # of them in the last evaluation
    keep: int  # visual tokens per image at first
    questions: int = 0  # per image
    keep_later: int = 0  # visual tokens per image in the second part
    whole: float = 0.0  # share of the steps, at the end, that see all visual tokens


class Stage(ABC):
    """A training stage. Making one draws its data, computes features and builds the model.

    Attributes:
        name: of the stage and of its files.
        defaults: of the full training; `quick` are those of a trial of a few steps.
        trainee: whose parameters are trained.
    """

    name: ClassVar[str]
    defaults: ClassVar[Settings]
    quick: ClassVar[Settings]
    recipe: ClassVar[Recipe]
    trainee: nn.Module

    @abstractmethod
    def __init__(self, folder: Path, settings: Settings, model: Path):
        """`model` is the toy model that fine-tuning starts from."""
        self.settings = settings

    @staticmethod
    def is_hidden(name: str) -> bool:
        """Whether Muon trains the parameter: 2-D weights of blocks. AdamW trains the others."""
        return ".layers." in name

    @abstractmethod
    def loss(self, step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        """The loss of a step, and numbers to log."""

    @abstractmethod
    def validate(self, rows: np.ndarray) -> dict[str, float]:
        """Numbers over some validation rows; `self.rng` draws the questions."""

    at_once: ClassVar[int]  # validation rows

    @torch.no_grad()
    def evaluate(self, count: int) -> dict[str, float]:
        """Mean numbers over the first `count` validation rows, the same questions in every call."""
        self.rng = np.random.default_rng(5)
        parts = [
            self.validate(np.arange(start, min(start + self.at_once, count))) for start in range(0, count, self.at_once)
        ]
        names = dict.fromkeys(name for part in parts for name in part)
        return {name: float(np.nanmean([part.get(name, np.nan) for part in parts])) for name in names}

    def is_whole(self, step: int) -> bool:
        """Whether the step is one of the last ones, which see all visual tokens."""
        return step >= (1 - self.settings.whole) * self.settings.steps


class QuestionStage(Stage):
    """A stage whose model answers questions in one word.

    Attributes:
        words: of the model.
        families: of the questions.
        val: the data for validation.
    """

    words: ClassVar[Vocabulary]
    families: ClassVar[Sequence[str]]
    val: Any

    @abstractmethod
    def ask(
        self, corpus: Any, rows: np.ndarray, families: Sequence[Sequence[str]], rng: np.random.Generator
    ) -> Questions:
        """One question of each of the given families about each row, where there is one."""

    @abstractmethod
    def whole(self, rows: np.ndarray) -> Visuals:
        """All visual tokens of some validation rows."""

    def answer(
        self, visuals: Visuals, questions: Questions, renumber: bool = False, early_at: int | None = None
    ) -> tuple[Decoded, Tensor, dict[str, float]]:
        """The decoder's states, its loss on the answers, and the share of right ones; arguments as of `forward`."""
        decoded = forward(self.trainee, self.words.prefix, visuals, questions.text, renumber, early_at)
        logits = answer_logits(self.trainee, decoded, questions)
        loss = answer_loss(logits, questions.answer, self.words.ids[EOS])
        return decoded, loss, accuracy(logits, questions, self.families)

    def validate(self, rows: np.ndarray) -> dict[str, float]:
        questions = self.ask(self.val, rows, [list(self.families)] * len(rows), self.rng)
        return self.answer(self.whole(rows), questions)[2]


class LongStage(QuestionStage):
    """Fine-tuning on many visual tokens: first few of many rows, then most of fewer, at the end all of two.

    Attributes:
        few_tokens: share of the steps in the first part.
        sampled: families that the questions of a step are drawn from.
    """

    few_tokens: ClassVar[float]
    sampled: ClassVar[Sequence[str]]
    corpus: Any

    def batch(self, step: int, rng: np.random.Generator) -> tuple[bool, bool, np.ndarray, Questions]:
        """Whether the step is of the first part, whether of the last, its rows, and the questions about them."""
        settings = self.settings
        few, full = step < self.few_tokens * settings.steps, self.is_whole(step)
        size = settings.batch if few else 2 if full else settings.batch // 3
        rows = np.sort(rng.choice(len(self.corpus), size, replace=False))
        count = settings.questions if few else settings.questions + 4
        return few, full, rows, self.ask(self.corpus, rows, drawn_families(self.sampled, count, rows, rng), rng)


def draw_splits(folder: Path, settings: Settings, draw: Callable[[Path, str, int], None]) -> None:
    """Draw training and validation data into FOLDER/train and FOLDER/val on the first rank; the others wait for it.

    Args:
        draw: (folder, split, rows) -> the data on disk.
    """
    if RANK == 0:
        draw(folder / "train", "train", settings.images)
        draw(folder / "val", "val", settings.validation)
    wait_for_ranks()


def load_features(folder: Path, settings: Settings, tower: nn.Module) -> tuple[Corpus, Features, Corpus, Features]:
    """Scenes and features for training and validation; all ranks compute the features together."""
    corpus, val = Corpus(folder / "train", settings.images), Corpus(folder / "val", settings.validation)
    features = Features(folder / "features.bin", corpus, tower, (RANK, WORLD))
    val_features = Features(folder / "features_val.bin", val, tower, (RANK, WORLD))
    wait_for_ranks()
    return corpus, features, val, val_features


def ask_questions(
    corpus, rows: Sequence[int] | np.ndarray, families: Sequence[Sequence[str]], rng: np.random.Generator
) -> Questions:
    """One question of each of the given families about each scene, where there is one."""
    asked = []
    for row, wanted in zip(rows, families, strict=True):
        things = corpus.list_things(int(row))
        asked.append([ask(things, family, rng, tries=12) for family in wanted])
    return pack(asked, TOY_WORDS, (SHORT_ANSWER, ASSISTANT), QUESTION_LENGTH)


def drawn_families(sampled: Sequence[str], count: int, rows: np.ndarray, rng: np.random.Generator) -> list[list[str]]:
    """`count` of the families for each row, drawn with replacement."""
    return [[sampled[k] for k in rng.integers(0, len(sampled), count)] for _ in rows]


def keep_things_first(labels: Tensor, keep: int) -> Tensor:
    """[B, 576, 9] labels -> [B, keep] positions: askable things before panels before background."""
    kind = labels[..., COLUMN["kind"]]
    first = torch.where(kind >= SHAPE, 1.0, torch.where(kind == PANEL, 0.3, 0.0))
    return (torch.rand(kind.shape) + first).topk(keep, 1).indices.sort(1).values


def gather(table: Tensor, positions: Tensor) -> Tensor:
    """[B, P, D] and [B, K] -> [B, K, D]."""
    return table.gather(1, positions[..., None].expand(-1, -1, table.shape[-1]))


def part_of_image(features: Tensor, labels: Tensor, keep: int, guided_share: float) -> Visuals:
    """`keep` visual tokens of each image: of a share of the images those of things, of the others any."""
    batch = len(features)
    guided = keep_things_first(labels, keep)
    anywhere = torch.rand(batch, PATCHES).topk(keep, 1).indices.sort(1).values
    kept = torch.where(torch.rand(batch, 1) < guided_share, guided, anywhere)
    return Visuals(gather(features, kept), kept, torch.full((batch,), PATCHES))
