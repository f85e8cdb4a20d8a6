"""What a training stage is: its data, what it trains, its loss, optimizer settings, steps and evaluation."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from toy import ranks
from toy.data.corpus import Corpus, Features
from toy.data.questions import FAMILIES, ask
from toy.data.vocabulary import ASSISTANT, PAD, SHORT_ANSWER, TOY_WORDS
from toy.model.clip_losses import COLUMN, PANEL, SHAPE
from toy.model.llava import PATCHES
from toy.packing import Asked, Questions, Visuals, pack

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


@dataclass(frozen=True)
class Option:
    """A setting as a command-line flag."""

    name: str
    type: type
    flags: tuple[str, ...]
    help: str


def options(defaults: Settings) -> list[Option]:
    """The flags of a stage with these default settings."""
    found = []
    for field in dataclasses.fields(Settings):
        value = getattr(defaults, field.name)
        if value:
            flags = (f"--{field.name.replace('_', '-')}", *(("--videos",) if field.name == "images" else ()))
            found.append(Option(field.name, type(value), flags, f"default {value:,}"))
    return found


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


def load_features(
    folder: Path, settings: Settings, tower: nn.Module, suffix: str = ""
) -> tuple[Corpus, Features, Corpus, Features]:
    """Scenes and features for training and validation; all ranks compute the features together."""
    corpus, val = Corpus(folder / "train", settings.images), Corpus(folder / "val", settings.validation)
    share = (ranks.RANK, ranks.WORLD)
    features = Features(folder / "features.bin", corpus, tower, share)
    val_features = Features(folder / "features_val.bin", val, tower, share)
    ranks.wait()
    return corpus, features, val, val_features


def ask_questions(
    corpus, rows: Sequence[int] | np.ndarray, families: Sequence[Sequence[str]], rng: np.random.Generator
) -> Questions:
    """One question of each of the given families about each scene, where there is one."""
    found: list[list[Asked | None]] = []
    for row, wanted in zip(rows, families, strict=True):
        things = corpus.list_things(int(row))
        asked = [ask(things, family, rng, tries=12) for family in wanted]
        found.append([q and Asked(q.family, TOY_WORDS.encode(q.text), TOY_WORDS.encode(q.answer)[0]) for q in asked])
    ids = TOY_WORDS.ids
    return pack(found, [ids[SHORT_ANSWER], ids[ASSISTANT]], QUESTION_LENGTH, ids[PAD])


def every_family(rows: np.ndarray, families: Sequence[str] = tuple(FAMILIES)) -> list[list[str]]:
    """All families for each row."""
    return [list(families) for _ in rows]


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
