"""The stages on scenes of 192 x 192 pixels.

"vision" trains the CLIP tower and its text tower on rendered scenes. "language" trains projector and decoder on
questions about the tower's cached features. "instruct" fine-tunes them on the answer formats of all benchmarks; the
tower stays as it is.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toy import clip
from toy.clip import COLUMN
from toy.data.corpus import Corpus, render
from toy.data.formats import FORMATS, INSTRUCT_WORDS
from toy.data.questions import FAMILIES
from toy.data.scenes import SIDE
from toy.data.vocabulary import COLOR_NAMES, DIGITS, SHAPES, SIZES, TOY_WORDS
from toy.llava import Trainee, build_instruct, build_llava, fold_feature_scale
from toy.packing import READ_AT, Visuals, ask_lines, forward, pair_accuracy, pair_loss, predictions, whole
from toy.stages import (
    QuestionStage,
    Recipe,
    Settings,
    Stage,
    ask_questions,
    draw_splits,
    drawn_families,
    gather,
    keep_things_first,
    load_features,
    part_of_image,
)

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
    defaults = Settings(1400, 12000, batch=20, validation=200, watched=200, final=200, keep=184, whole=0.1)
    quick = Settings(4, 40, batch=4, validation=40, watched=40, final=40, keep=48, whole=0.1)
    recipe = Recipe(lr=2e-3, adam_lr=1.5e-3, clip=2.0, decay=0.6, evaluate_every=400)
    at_once = 40

    def __init__(self, folder: Path, settings: Settings, model: Path):
        super().__init__(folder, settings, model)
        draw_splits(folder, settings, render)
        self.corpus, self.val = Corpus(folder / "train", settings.images), Corpus(folder / "val", settings.validation)
        self.trainee = VisionTrainee()

    def loss(self, step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        whole, batch = self.is_whole(step), self.settings.batch
        rows = np.sort(rng.choice(len(self.corpus), batch // 2 if whole else batch, replace=False))
        return self.losses(self.corpus, rows, None if whole else self.settings.keep)

    def validate(self, rows: np.ndarray) -> dict[str, float]:
        return self.losses(self.val, rows, None)[1]

    def losses(self, corpus: Corpus, rows: np.ndarray, keep: int | None) -> tuple[Tensor, dict[str, float]]:
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


# Stage "language".

# At first natural scenes only, and mostly the families in which a word must find a thing and read it off. Everything
# else builds on that; with dense scenes and yes/no questions in between it comes several hundred steps later.
FIRST = 0.45  # share of the steps
FIRST_FAMILIES = [*FAMILIES, *["color", "shape", "relate"] * 2, "count", "digit"]
# Then all scenes, and mostly positions: where one thing is, where it is from another, which frame holds the digit.
POSITIONS = ["side", "side", *["choose"] * 4, *["verify"] * 3]
THEN_FAMILIES = [*FAMILIES, *POSITIONS, "count", "count", "exist", "digit", "relate"]
ALIGNMENT = 0.3  # weight at the start, half of it after the first part, gone for the last fifth of the steps


class Language(QuestionStage):
    """Train projector and decoder on questions about scenes."""

    name = "language"
    defaults = Settings(
        2300, 9000, batch=20, validation=100, watched=100, final=100, keep=136, questions=10, whole=0.05
    )
    quick = Settings(4, 40, batch=4, validation=20, watched=20, final=20, keep=48, questions=3, whole=0.3)
    recipe = Recipe(lr=2e-3, adam_lr=1.5e-3, clip=1.0, decay=0.35, evaluate_every=300)
    at_once, words, families = 20, TOY_WORDS, tuple(FAMILIES)

    def __init__(self, folder: Path, settings: Settings, model: Path):
        super().__init__(folder, settings, model)
        tower = clip.load_clip(folder).bfloat16().vision_model
        self.corpus, self.features, self.val, self.val_features = load_features(folder, settings, tower)
        llava = build_llava(tower.config)
        fold_feature_scale(llava.model.multi_modal_projector, self.features[np.arange(8)])
        self.trainee = Trainee(llava)

    ask = staticmethod(ask_questions)

    def whole(self, rows: np.ndarray) -> Visuals:
        return whole(self.val_features[rows])

    def loss(self, step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        settings, first = self.settings, step < FIRST * self.settings.steps
        full = self.is_whole(step) and rng.random() < 0.8
        batch, count = (settings.batch // 2, settings.questions + 4) if full else (settings.batch, settings.questions)
        pool = np.arange(0, len(self.corpus), 2 if first else 1)  # even rows are natural scenes
        rows = np.sort(rng.choice(pool, batch, replace=False))
        families = drawn_families(FIRST_FAMILIES if first else THEN_FAMILIES, count, rows, rng)
        questions = self.ask(self.corpus, rows, families, rng)
        labels, visuals = torch.from_numpy(self.corpus.patch_labels(rows)), whole(self.features[rows])
        if not full:
            visuals = part_of_image(visuals.features, labels, settings.keep, guided_share=0.8)
            labels = gather(labels, visuals.positions)
        renumber = not full and rng.random() < 0.3
        decoded, loss, numbers = self.answer(visuals, questions, renumber)
        if step < 0.8 * settings.steps:
            weight = ALIGNMENT * max(0.5, 1 - step / (FIRST * settings.steps))
            table = self.trainee.language_model.embed_tokens.weight
            loss = loss + weight * alignment_loss(table, decoded.visual, labels)
        return loss, numbers


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


class Instruct(Stage):
    """Fine-tune the toy model on the answer formats of all benchmarks."""

    name = "instruct"
    defaults = Settings(1300, 9000, batch=8, validation=400, watched=60, final=60, keep=136, questions=16, whole=0.06)
    quick = Settings(4, 40, batch=4, validation=20, watched=20, final=20, keep=48, questions=4, whole=0.3)
    recipe = Recipe(lr=2.5e-3, adam_lr=1.5e-3, clip=1.0, decay=0.35, save_every=50)
    at_once = 10

    def __init__(self, folder: Path, settings: Settings, model: Path):
        super().__init__(folder, settings, model)
        llava = build_instruct(model)
        draw_splits(folder, settings, render)
        tower = llava.model.vision_tower.bfloat16()
        self.corpus, self.features, self.val, self.val_features = load_features(folder, settings, tower)
        self.trainee = Trainee(llava)

    def loss(self, step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        settings = self.settings
        full = self.is_whole(step) and rng.random() < 0.8
        batch = settings.batch // 2 if full else settings.batch
        rows = np.sort(rng.choice(len(self.corpus), batch, replace=False))
        shares = FIRST_SHARES if step < FIRST_FORMATS * settings.steps else SHARES
        chances = np.array(list(shares.values())) / sum(shares.values())
        wanted = rng.choice(list(shares), (batch, settings.questions), p=chances)
        lines = ask_lines(self.corpus, rows, wanted, rng, LMMS)
        visuals = whole(self.features[rows])
        if not full:
            labels = torch.from_numpy(self.corpus.patch_labels(rows))
            visuals = part_of_image(visuals.features, labels, settings.keep, guided_share=0.85)
        renumber = not full and rng.random() < 0.3
        decoded = forward(self.trainee, INSTRUCT_WORDS.prefix, visuals, lines.text, renumber, READ_AT)
        said, read = predictions(self.trainee, decoded, lines)
        meant = (read.argmax(-1) == lines.meant[lines.meant != -100]).float().mean().item()
        return pair_loss(said, read, lines), pair_accuracy(said, lines) | {"read": meant}

    def validate(self, rows: np.ndarray) -> dict[str, float]:
        lines = ask_lines(self.val, rows, [list(FORMATS)] * len(rows), self.rng)
        decoded = forward(
            self.trainee, INSTRUCT_WORDS.prefix, whole(self.val_features[rows]), lines.text, False, READ_AT
        )
        return pair_accuracy(predictions(self.trainee, decoded, lines)[0], lines)
