"""Stage "language": train projector and decoder on questions about frozen, cached vision features."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from toy.data.questions import FAMILIES
from toy.data.scenes import SIDE
from toy.data.vocabulary import COLOR_NAMES, DIGITS, EOS, SHAPES, SIZES, TOY_WORDS
from toy.model.clip import load_clip
from toy.model.clip_losses import COLUMN
from toy.model.decoder import answer_logits, forward
from toy.model.llava import Trainee, build_llava, fold_feature_scale
from toy.packing import accuracy, answer_loss, whole
from toy.stages.base import (
    Recipe,
    Settings,
    Stage,
    ask_questions,
    drawn_families,
    every_family,
    gather,
    load_features,
    part_of_image,
)

# At first natural scenes only, and mostly the families in which a word must find a thing and read it off. Everything
# else builds on that; with dense scenes and yes/no questions in between it comes several hundred steps later.
FIRST = 0.45  # share of the steps
FIRST_FAMILIES = [*FAMILIES, *["color", "shape", "relate"] * 2, "count", "digit"]
# Then all scenes, and mostly positions: where one thing is, where it is from another, which frame holds the digit.
POSITIONS = ["side", "side", *["choose"] * 4, *["verify"] * 3]
THEN_FAMILIES = [*FAMILIES, *POSITIONS, "count", "count", "exist", "digit", "relate"]
ALIGNMENT = 0.3  # weight at the start, half of it after the first part, gone for the last fifth of the steps


class Language(Stage):
    """Train projector and decoder on questions about scenes."""

    name = "language"
    defaults = Settings(
        2300, 9000, batch=20, validation=100, watched=100, final=100, keep=136, questions=10, whole=0.05
    )
    quick = Settings(4, 40, batch=4, validation=20, watched=20, final=20, keep=48, questions=3, whole=0.3)
    recipe = Recipe(lr=2e-3, adam_lr=1.5e-3, clip=1.0, decay=0.35, evaluate_every=300)
    at_once = 20

    def __init__(self, folder: Path, settings: Settings, model: Path):
        super().__init__(folder, settings, model)
        tower = load_clip(folder).bfloat16().vision_model
        self.corpus, self.features, self.val, self.val_features = load_features(folder, settings, tower)
        llava = build_llava(tower.config)
        fold_feature_scale(llava.model.multi_modal_projector, self.features[np.arange(8)])
        self.trainee = Trainee(llava)

    def loss(self, step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        settings, first = self.settings, step < FIRST * self.settings.steps
        full = self.is_whole(step) and rng.random() < 0.8
        batch, count = (settings.batch // 2, settings.questions + 4) if full else (settings.batch, settings.questions)
        pool = np.arange(0, len(self.corpus), 2 if first else 1)  # even rows are natural scenes
        rows = np.sort(rng.choice(pool, batch, replace=False))
        families = drawn_families(FIRST_FAMILIES if first else THEN_FAMILIES, count, rows, rng)
        questions = ask_questions(self.corpus, rows, families, rng)
        labels, visuals = torch.from_numpy(self.corpus.patch_labels(rows)), whole(self.features[rows])
        if not full:
            visuals = part_of_image(visuals.features, labels, settings.keep, guided_share=0.8)
            labels = gather(labels, visuals.positions)
        renumber = not full and rng.random() < 0.3
        decoded = forward(self.trainee, TOY_WORDS.prefix, visuals, questions.text, renumber)
        logits = answer_logits(self.trainee, decoded, questions)
        loss = answer_loss(logits, questions.answer, TOY_WORDS.ids[EOS])
        if step < 0.8 * settings.steps:
            weight = ALIGNMENT * max(0.5, 1 - step / (FIRST * settings.steps))
            table = self.trainee.language_model.embed_tokens.weight
            loss = loss + weight * alignment_loss(table, decoded.visual, labels)
        return loss, accuracy(logits, questions, FAMILIES)

    def validate(self, rows: np.ndarray) -> dict[str, float]:
        questions = ask_questions(self.val, rows, every_family(rows), self.rng)
        decoded = forward(self.trainee, TOY_WORDS.prefix, whole(self.val_features[rows]), questions.text)
        return accuracy(answer_logits(self.trainee, decoded, questions), questions, FAMILIES)


def alignment_loss(table: Tensor, visual: Tensor, labels: Tensor) -> Tensor:
    """Projected patches against the words for what they show and where, as LLaVA's caption stage aligns them.

    Shape, colour, digit and size; left or right half, top or bottom half. It favours methods that compare word
    embeddings with visual tokens, so it is light and ends early.
    """
    total, ids = visual.new_zeros((), dtype=torch.float32), TOY_WORDS.ids
    for column, names in (("shape", SHAPES), ("color", COLOR_NAMES), ("digit", DIGITS), ("big", SIZES)):
        label = labels[..., COLUMN[column]].long()
        known = (label >= 0) & (labels[..., 0] > 1)
        candidates = table[torch.tensor([ids[name] for name in names])]
        total = total + F.cross_entropy(0.5 * (visual[known] @ candidates.T).float(), label[known])
    askable = labels[..., 0] > 1
    for column, names in (("x", ("left", "right")), ("y", ("top", "bottom"))):
        half = (labels[..., COLUMN[column]] > SIDE / 2).long()
        candidates = table[torch.tensor([ids[name] for name in names])]
        total = total + F.cross_entropy(0.5 * (visual[askable] @ candidates.T).float(), half[askable])
    return total
