"""Stage "instruct": fine-tune the toy model on the answer formats of all benchmarks.

The vision tower stays as it is. Projector and decoder are trained on question-answer pairs about cached features.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from toy import ranks
from toy.data.corpus import render
from toy.data.formats import FORMATS
from toy.data.instruct_vocabulary import INSTRUCT_WORDS
from toy.model.decoder import forward
from toy.model.instruct import build_instruct
from toy.model.llava import Trainee
from toy.packing import whole
from toy.pair_packing import READ_AT, ask_lines, pair_accuracy, pair_loss, predictions
from toy.stages.base import Recipe, Settings, Stage, load_features, part_of_image

# How often a format is asked. What the toy model knows comes often enough not to be forgotten; letters are new.
SHARES = {
    "short": 4, "yes_no": 2, "single_word": 1, "bare": 1, "ocr": 0.5, "viz": 1.5,
    "letters": 8, "several": 1, "letters_cn": 5, "parens": 2, "mmstar": 3, "realworld": 2,
    "context": 4, "context_text": 1.5, "caption": 2, "describe": 2, "match": 1,
}  # fmt: skip
# At first more text without an image: what a letter stands for is learned there before it is in images.
FIRST = 0.6  # share of the steps
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
        if ranks.RANK == 0:
            render(folder / "train", "train", settings.images)
            render(folder / "val", "val", settings.validation)
        ranks.wait()
        tower = llava.model.vision_tower.bfloat16()
        self.corpus, self.features, self.val, self.val_features = load_features(folder, settings, tower)
        self.trainee = Trainee(llava)

    def loss(self, step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        settings = self.settings
        full = self.is_whole(step) and rng.random() < 0.8
        batch = settings.batch // 2 if full else settings.batch
        rows = np.sort(rng.choice(len(self.corpus), batch, replace=False))
        shares = FIRST_SHARES if step < FIRST * settings.steps else SHARES
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
