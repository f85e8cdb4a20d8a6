"""The training stages: what a stage is, and the four on scenes of 192 x 192 pixels.

"vision" trains the CLIP tower and its text tower on rendered scenes. "language" trains projector and decoder on
questions about the tower's features. "instruct" fine-tunes them on the answer formats of all benchmarks, and "boxes"
goes on from there with the boxes of things; the tower stays as it is. The stages on large pictures and videos are in
`toy.long_stages`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.config import DEFAULT_MODEL
from eval.yaml_files import read_yaml
from lab.toy import clip
from lab.toy.clip import COLUMN, PANEL, SHAPE
from lab.toy.data.corpus import Corpus, is_strip, write_boxed_scenes, write_scenes
from lab.toy.data.formats import BLIND, FORMATS, INSTRUCT_WORDS, LETTERS, Pair, compose, lmms_wording
from lab.toy.data.questions import FAMILIES, ask
from lab.toy.data.regions import BOX_WORDS, COORDINATES, box_pair
from lab.toy.data.scenes import PATCHES, SIDE, Thing
from lab.toy.data.vocabulary import COLOR_NAMES, DIGITS, SHAPES, SIZES, TOY_WORDS, Vocabulary
from lab.toy.llava import Trainee, build_boxes, build_instruct, build_llava, fold_feature_scale
from lab.toy.packing import (
    Decoded,
    Line,
    Lines,
    Visuals,
    accuracy,
    answer_loss,
    as_line,
    forward,
    pack,
    predict,
    question_line,
    whole,
)

# Stage -> the optimizer's settings ("recipe"), and the other fields of its Settings in "full" and "quick" runs.
RECIPES: dict[str, Any] = read_yaml(Path(__file__).with_name("recipes.yaml"))


def fast_dtype(name: str) -> torch.dtype:
    """The dtype of this name; float32 for bfloat16 on a CPU that emulates it, where products take 40 times as long."""
    native = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.float32 if name == "bfloat16" and not native else getattr(torch, name)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Optimizer and sizes of a run. A stage does not use the sizes that are 0 in the full training."""

    lr: float  # of Muon
    adam_lr: float
    clip: float  # gradient norm
    decay: float  # share of the steps over which the learning rate falls to zero
    warmup: int = 60  # steps over which the learning rate rises
    dtype: str = "bfloat16"  # of the weights while training, see `fast_dtype`; the master weights are float32
    evaluate_every: int = 100  # steps
    save_every: int = 100
    steps: int
    images: int  # training scenes, pictures or videos
    batch: int  # of them per step
    validation: int  # scenes, pictures or videos drawn for validation
    watched: int  # of them in the evaluations while training
    final: int  # of them in the last evaluation
    keep: int  # visual tokens per image at first
    questions: int = 0  # per image
    keep_later: int = 0  # visual tokens per image in the second part
    whole: float = 0.0  # share of the steps, at the end, that see all visual tokens


Numbers = dict[str, float]  # by what they count


class Stage(ABC):
    """A training stage. Making one draws its data, computes features and builds the model.

    Attributes:
        name: of the stage and of its files.
        start: the shipped toy model that fine-tuning starts from.
        at_once: validation rows.
        trainee: whose parameters are trained.
    """

    name: ClassVar[str]
    start: ClassVar[Path] = Path(DEFAULT_MODEL)
    at_once: ClassVar[int]
    trainee: nn.Module
    corpus: Corpus
    val: Corpus

    @abstractmethod
    def __init__(self, folder: Path, settings: Settings, model: Path):
        """`model` is the toy model that fine-tuning starts from."""
        self.settings = settings

    def draw(self, folder: Path, write: Callable[..., None], *tower: nn.Module) -> None:
        """Write and open the corpora for training and validation: FOLDER/NAME/train and FOLDER/NAME/val."""
        home, settings = folder / self.name, self.settings
        write(home / "train", "train", settings.images, *tower)
        write(home / "val", "val", settings.validation, *tower)
        self.corpus, self.val = Corpus(home / "train", "train"), Corpus(home / "val", "val")

    @abstractmethod
    def loss(self, step: int, rng: np.random.Generator) -> tuple[Tensor, Numbers]:
        """The loss of a step, and numbers to log."""

    @abstractmethod
    def validate(self, rows: np.ndarray) -> Numbers:
        """Numbers over some validation rows; `self.rng` draws the questions."""

    @torch.no_grad()
    def evaluate(self, count: int) -> Numbers:
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
    """A stage whose model answers questions.

    Attributes:
        words: of the model.
        kinds: families or formats of the questions that validation asks.
        early_at: decoder layers after which a loss looks at the states as well; None for no such loss.
    """

    words: ClassVar[Vocabulary]
    kinds: ClassVar[Sequence[str]] = tuple(FAMILIES)
    early_at: ClassVar[int | None] = None

    def lines(self, corpus: Corpus, row: int, kinds: Sequence[str], rng: np.random.Generator) -> list[Line]:
        """One question of each of the kinds about a row, where there is one."""
        return scene_lines(corpus.list_things(row), kinds, rng)

    @abstractmethod
    def all_tokens(self, corpus: Corpus, rows: np.ndarray) -> Visuals:
        """All visual tokens of some rows."""

    def ask(self, corpus: Corpus, rows, kinds: Sequence[Sequence[str]], rng: np.random.Generator) -> Lines:
        """Questions of the given kinds about each row."""
        return pack([self.lines(corpus, int(row), wanted, rng) for row, wanted in zip(rows, kinds, strict=True)])

    def answer(
        self, visuals: Visuals, lines: Lines, renumber: bool = False, early: bool = True
    ) -> tuple[Decoded, Tensor, Numbers]:
        """The decoder's states, its loss on the answers, and the share of right ones."""
        early_at = self.early_at if early else None
        decoded = forward(self.trainee, self.words.prefix, visuals, lines, renumber, early_at)
        logits = predict(self.trainee, decoded.states, decoded.start, lines.target)
        return decoded, answer_loss(logits, lines), accuracy(logits, lines)

    def validate(self, rows: np.ndarray) -> Numbers:
        lines = self.ask(self.val, rows, [list(self.kinds)] * len(rows), self.rng)
        return self.answer(self.all_tokens(self.val, rows), lines, early=False)[2]


def scene_lines(things: tuple[Thing, ...], families: Sequence[str], rng: np.random.Generator) -> list[Line]:
    """One question of each of the families about a scene, where there is one."""
    asked = [ask(things, family, rng, tries=12) for family in families]
    return [question_line(TOY_WORDS, question) for question in asked if question is not None]


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


# Stage "vision".

PATCH_LOSS = 0.1  # light: real CLIP aligns patches with words only weakly


class VisionTrainee(nn.Module):
    """CLIP with the parts that only training needs."""

    def __init__(self):
        super().__init__()
        self.clip = clip.build_clip()
        self.heads = clip.DenseHeads(self.clip.config.vision_config.hidden_size)
        self.bias = nn.Parameter(torch.tensor([-3.0, -3.0]))


class Vision(Stage):
    """Train the CLIP tower and its text tower on scenes."""

    name = "vision"
    at_once = 40

    def __init__(self, folder: Path, settings: Settings, model: Path):
        super().__init__(folder, settings, model)
        self.draw(folder, write_scenes)
        self.trainee = VisionTrainee()

    def loss(self, step: int, rng: np.random.Generator) -> tuple[Tensor, Numbers]:
        whole, batch = self.is_whole(step), self.settings.batch
        rows = np.sort(rng.choice(len(self.corpus), batch // 2 if whole else batch, replace=False))
        return self.losses(self.corpus, rows, None if whole else self.settings.keep)

    def validate(self, rows: np.ndarray) -> Numbers:
        return self.losses(self.val, rows, None)[1]

    def losses(self, corpus: Corpus, rows: np.ndarray, keep: int | None) -> tuple[Tensor, Numbers]:
        """Loss and numbers of some scenes, of which the tower sees `keep` patches, things first; None for all."""
        model = self.trainee
        labels, patches = torch.from_numpy(corpus.patch_labels(rows)), clip.patchify(corpus.images[rows])
        chosen = None
        if keep is not None:
            chosen = keep_things_first(labels, keep)
            labels, patches = gather(labels, chosen), gather(patches, chosen)
        penultimate, final = clip.vision_states(model.clip.vision_model, patches, chosen)
        dense, numbers = clip.dense_loss(model.heads, penultimate[:, 1:], labels)
        targets = clip.phrase_targets(corpus.things[rows])
        whole, patch = clip.caption_losses(model.clip, model.bias, final, *targets)
        return dense + whole + PATCH_LOSS * patch, {**numbers, "caption": whole.item(), "patch": patch.item()}


class SceneStage(QuestionStage):
    """A stage on questions about scenes, of which most steps see a part of the visual tokens.

    Attributes:
        guided: share of the scenes whose tokens are those of things first.
    """

    guided: ClassVar[float]

    def all_tokens(self, corpus: Corpus, rows: np.ndarray) -> Visuals:
        return whole(torch.stack([corpus.tokens(row) for row in rows]))

    @abstractmethod
    def wanted(self, step: int, full: bool, rows: np.ndarray, rng: np.random.Generator) -> Sequence[Sequence[str]]:
        """The kinds of questions that a step asks about each of its rows; `full`: it sees all visual tokens."""

    @abstractmethod
    def help(self, step: int, decoded: Decoded, lines: Lines, labels: Tensor) -> tuple[Tensor | float, Numbers]:
        """A further loss of the step that helps learning, and numbers to log; labels [B, V, 9] of the tokens seen."""

    def scenes(self, step: int) -> int | np.ndarray:
        """The rows that a step draws from."""
        return len(self.corpus)

    def loss(self, step: int, rng: np.random.Generator) -> tuple[Tensor, Numbers]:
        settings, full = self.settings, self.is_whole(step) and rng.random() < 0.8
        batch = settings.batch // 2 if full else settings.batch
        rows = np.sort(rng.choice(self.scenes(step), batch, replace=False))
        lines = self.ask(self.corpus, rows, self.wanted(step, full, rows, rng), rng)
        labels, visuals = torch.from_numpy(self.corpus.patch_labels(rows)), self.all_tokens(self.corpus, rows)
        if not full:
            visuals = part_of_image(visuals.features, labels, settings.keep, self.guided)
            labels = gather(labels, visuals.positions)
        renumber = not full and rng.random() < 0.3
        decoded, loss, numbers = self.answer(visuals, lines, renumber)
        further, more = self.help(step, decoded, lines, labels)
        return loss + further, numbers | more


# Stage "language".

# At first natural scenes only, and mostly the families in which a word must find a thing and read it off. Everything
# else builds on that; with dense scenes and yes/no questions in between it comes several hundred steps later.
FIRST = 0.45  # share of the steps
FIRST_FAMILIES = [*FAMILIES, *["color", "shape", "relate"] * 2, "count", "digit"]
# Then all scenes, and mostly positions: where one thing is, where it is from another, which frame holds the digit.
POSITIONS = ["side", "side", *["choose"] * 4, *["verify"] * 3]
THEN_FAMILIES = [*FAMILIES, *POSITIONS, "count", "count", "exist", "digit", "relate"]
ALIGNMENT = 0.3  # weight at the start, half of it after the first part, gone for the last fifth of the steps


class Language(SceneStage):
    """Train projector and decoder on questions about scenes."""

    name = "language"
    at_once, words, guided = 20, TOY_WORDS, 0.8

    def __init__(self, folder: Path, settings: Settings, model: Path):
        super().__init__(folder, settings, model)
        tower = clip.load_clip(folder).to(fast_dtype("bfloat16")).vision_model
        self.draw(folder, write_scenes, tower)
        llava = build_llava(tower.config)
        fold_feature_scale(llava.model.multi_modal_projector, self.all_tokens(self.corpus, np.arange(8)).features)
        self.trainee = Trainee(llava)

    def scenes(self, step: int) -> np.ndarray:
        return np.arange(0, len(self.corpus), 2 if step < FIRST * self.settings.steps else 1)  # even rows are natural

    def wanted(self, step: int, full: bool, rows: np.ndarray, rng: np.random.Generator) -> list[list[str]]:
        sampled = FIRST_FAMILIES if step < FIRST * self.settings.steps else THEN_FAMILIES
        return drawn_families(sampled, self.settings.questions + 4 * full, rows, rng)

    def help(self, step: int, decoded: Decoded, lines: Lines, labels: Tensor) -> tuple[Tensor | float, Numbers]:
        steps = self.settings.steps
        if step >= 0.8 * steps:
            return 0.0, {}
        table = self.trainee.language_model.embed_tokens.weight
        weight = ALIGNMENT * max(0.5, 1 - step / (FIRST * steps))
        return weight * alignment_loss(table, decoded.visual, labels), {}


def alignment_loss(table: Tensor, visual: Tensor, labels: Tensor) -> Tensor:
    """Projected patches against the words for what they show and where, as LLaVA's caption stage aligns them.

    Shape, colour, digit and size; left or right half, top or bottom half. It favours methods that compare word
    embeddings with visual tokens, so it is light and ends early.
    """
    total, ids, askable = visual.new_zeros((), dtype=torch.float32), TOY_WORDS.ids, labels[..., 0] > 1
    targets = [
        (names, labels[..., COLUMN[column]].long())
        for column, names in (("shape", SHAPES), ("color", COLOR_NAMES), ("digit", DIGITS), ("big", SIZES))
    ]
    targets += [
        (names, (labels[..., COLUMN[column]] > SIDE / 2).long())
        for column, names in (("x", ("left", "right")), ("y", ("top", "bottom")))
    ]
    for names, label in targets:
        known = (label >= 0) & askable
        candidates = table[torch.tensor([ids[name] for name in names])]
        total = total + F.cross_entropy(0.5 * (visual[known] @ candidates.T).float(), label[known])
    return total


# Stage "instruct".

# How often a format is asked. What the toy model knows comes often enough not to be forgotten; letters are new.
SHARES = {
    "short": 4, "yes_no": 2, "single_word": 1, "bare": 1, "ocr": 0.5, "viz": 1.5,
    "letters": 8, "several": 1, "letters_cn": 5, "parens": 2, "mmstar": 3, "realworld": 2,
    "context": 4, "context_text": 1.5, "caption": 2, "describe": 2, "match": 1,
}  # fmt: skip
# At first more text without an image: what a letter stands for is learned there before it is in images.
FIRST_FORMATS = 0.6  # share of the steps
FIRST_SHARES = SHARES | {"letters": 6, "letters_cn": 4, "context_text": 3, "match": 5, "recite": 2}
LMMS = 0.2  # share of the pairs in the words of lmms-eval, where it has words of its own
READ_LOSS = 0.5


class Instruct(SceneStage):
    """Fine-tune the toy model on the answer formats of all benchmarks."""

    name = "instruct"
    at_once, words, kinds, guided = 10, INSTRUCT_WORDS, tuple(FORMATS), 0.85
    # Where a letter is due, the word it stands for is predicted from the decoder's states after this many layers.
    # Otherwise the model knows the word only in its last layers, too late to look up the letter beside it.
    early_at = 5
    build, write = staticmethod(build_instruct), staticmethod(write_scenes)

    def __init__(self, folder: Path, settings: Settings, model: Path):
        super().__init__(folder, settings, model)
        llava = self.build(model)
        self.draw(folder, self.write, llava.model.vision_tower.to(fast_dtype("bfloat16")))
        self.trainee = Trainee(llava)

    def wanted(self, step: int, full: bool, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        shares = FIRST_SHARES if step < FIRST_FORMATS * self.settings.steps else SHARES
        chances = np.array(list(shares.values())) / sum(shares.values())
        return rng.choice(list(shares), (len(rows), self.settings.questions), p=chances)

    def lines(self, corpus: Corpus, row: int, kinds: Sequence[str], rng: np.random.Generator) -> list[Line]:
        return format_lines(corpus.list_things(row), kinds, rng, 0.0 if corpus is self.val else LMMS, self.words)

    def help(self, step: int, decoded: Decoded, lines: Lines, labels: Tensor) -> tuple[Tensor | float, Numbers]:
        meant = lines.meant[lines.meant != -100]
        read = predict(self.trainee, decoded.early, decoded.start, lines.meant)
        loss = READ_LOSS * F.cross_entropy(read, meant, reduction="sum") / sum(map(len, lines.kinds))
        return loss, {"read": (read.argmax(-1) == meant).float().mean().item()}


def format_lines(
    things: tuple[Thing, ...],
    names: Sequence[str],
    rng: np.random.Generator,
    lmms: float = 0.0,
    words: Vocabulary = INSTRUCT_WORDS,
) -> list[Line]:
    """One pair of each format about a scene, where there is one; the share `lmms` in the words of lmms-eval."""
    drawn = [(name, compose(things, name, rng, tries=12)) for name in names]
    asked = [(name, pair) for name, pair in drawn if pair is not None]
    return [format_line(name, lmms_wording(name, pair) if rng.random() < lmms else pair, words) for name, pair in asked]


def format_line(name: str, pair: Pair, words: Vocabulary = INSTRUCT_WORDS) -> Line:
    """A pair of the format `name` as ids."""
    meant = -100
    if pair.options and pair.answer in LETTERS:
        (meant,) = words.encode(pair.options[LETTERS.index(pair.answer)])
    return as_line(words, name, pair.message, pair.answer, meant, name in BLIND)


# Stage "boxes".

# How often a kind of thing is asked for, and the share of boxes among all pairs: at first, and from then on. The other
# pairs are of the formats above.
BOX_SHARES = {"big": 4, "small": 3, "frame": 2, "panel": 1}
FIRST_BOXES, BOXES, FIRST_STEPS = 0.8, 0.5, 0.6
# Weight of the loss between a coordinate and those near it, and its deviation in hundredths of the picture's side.
NEAR_LOSS, NEAR = 0.5, 1.5
FIRST_COORDINATE = BOX_WORDS.ids[COORDINATES[0]]  # the others follow it


class Boxes(Instruct):
    """Fine-tune the model of all formats on the boxes of things; half of what it is asked stays as before."""

    name = "boxes"
    start = Path(DEFAULT_MODEL).with_name("tinyllava_instruct")
    words, kinds = BOX_WORDS, (*FORMATS, *BOX_SHARES)
    build, write = staticmethod(build_boxes), staticmethod(write_boxed_scenes)

    def wanted(self, step: int, full: bool, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        boxes = FIRST_BOXES if step < FIRST_STEPS * self.settings.steps else BOXES
        chances = [
            share * value / sum(shares.values())
            for shares, share in ((SHARES, 1 - boxes), (BOX_SHARES, boxes))
            for value in shares.values()
        ]
        return rng.choice([*SHARES, *BOX_SHARES], (len(rows), self.settings.questions), p=chances)

    def lines(self, corpus: Corpus, row: int, kinds: Sequence[str], rng: np.random.Generator) -> list[Line]:
        things, boxes, lmms = corpus.list_things(row), corpus.boxes[row].tolist(), 0.0 if corpus is self.val else LMMS
        drawn = [(kind, box_pair(things, boxes, kind, rng, lmms)) for kind in kinds if kind in BOX_SHARES]
        lines = [format_line(kind, pair, self.words) for kind, pair in drawn if pair is not None]
        if not is_strip(row):  # what other formats ask about may lie outside a strip
            lines += super().lines(corpus, row, [kind for kind in kinds if kind not in BOX_SHARES], rng)
        return lines

    def help(self, step: int, decoded: Decoded, lines: Lines, labels: Tensor) -> tuple[Tensor | float, Numbers]:
        read, numbers = super().help(step, decoded, lines, labels)
        near, more = self.near(decoded, lines)
        return read + NEAR_LOSS * near, numbers | more

    def validate(self, rows: np.ndarray) -> Numbers:
        lines = self.ask(self.val, rows, [list(self.kinds)] * len(rows), self.rng)
        decoded, _, numbers = self.answer(self.all_tokens(self.val, rows), lines, early=False)
        return numbers | self.near(decoded, lines)[1]

    def near(self, decoded: Decoded, lines: Lines) -> tuple[Tensor, Numbers]:
        """Cross-entropy with a bell curve around every coordinate, per pair; Acc@0.5 by kind.

        Every coordinate follows the true ones before it, so these boxes are a little better than those of answers.
        """
        there = (lines.target >= FIRST_COORDINATE) & (lines.target < FIRST_COORDINATE + len(COORDINATES))
        due = torch.where(there, lines.target, -100)
        logits = predict(self.trainee, decoded.states, decoded.start, due)[:, FIRST_COORDINATE:][:, : len(COORDINATES)]
        true = lines.target[there] - FIRST_COORDINATE
        bell = torch.softmax(-0.5 * ((torch.arange(len(COORDINATES)) - true[:, None]) / NEAR) ** 2, -1)
        loss = F.cross_entropy(logits, bell, reduction="sum") / sum(map(len, lines.kinds))
        hit = (overlap(logits.argmax(-1).view(-1, 4), true.view(-1, 4)) >= 0.5).tolist()
        kinds = [kind for row in lines.kinds for kind in row if kind in BOX_SHARES]
        by_kind: dict[str, list[bool]] = {}
        for kind, flag in zip(kinds, hit, strict=True):
            by_kind.setdefault(f"{kind}/iou", []).append(flag)
        return loss, {kind: float(np.mean(flags)) for kind, flags in by_kind.items()}


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """[n] intersection over union of [n, 4] boxes; 0 for an inverted one."""
    area = [(box[:, 2:] - box[:, :2]).clamp(min=0).prod(1) for box in (a, b)]
    both = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0).prod(1)
    return both / (area[0] + area[1] - both).clamp(min=1)
