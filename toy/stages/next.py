"""Stage "next": fine-tune the toy model into a LLaVA-NeXT, with tiles, newline tokens and up to 2,928 visual tokens.

The vision tower stays as it is. Projector, decoder and newline vector are trained on questions about cached features.
"""

from pathlib import Path

import numpy as np
from torch import Tensor

from toy import ranks
from toy.data.large_corpus import LargeCorpus, encode_pictures
from toy.data.questions import FAMILIES
from toy.data.vocabulary import EOS, NEXT_WORDS
from toy.model.decoder import answer_logits, forward
from toy.model.llava import Trainee, load_toy
from toy.packing import accuracy, answer_loss
from toy.stages.base import Recipe, Settings, Stage, ask_questions, drawn_families, every_family
from toy.stages.large_tokens import Chosen, anywhere, centres, things_first, visuals, whole_sequence

POSITIONS = ["side", "side", "choose", "choose", "verify", "verify", "relate", "relate"]
SAMPLED = [*FAMILIES, *POSITIONS, "count", "count", "digit", "exist", "shape"]
# The first part of the steps sees few tokens of many pictures, the next most things of fewer: with things missing, what
# is there and how many cannot be told, and a model trained so to the end misjudges both in a whole sequence.
FEW_TOKENS, BLIND = 0.54, 0.2  # share of the steps; of the pictures in them whose tokens are drawn blindly
# Where in the picture a token lies is predicted from the decoder's states here: a tile's features only say where in the
# tile. Without this loss the questions about places are learned much later.
PROBE_AT, PROBE_LOSS = 3, 1.0


class Next(Stage):
    """Fine-tune the toy model on large pictures in tiles."""

    name = "next"
    defaults = Settings(
        460, 600, batch=12, validation=100, watched=12, final=40, keep=240, questions=10, keep_later=700, whole=0.02
    )
    quick = Settings(4, 4, batch=3, validation=2, watched=2, final=2, keep=200, questions=3, keep_later=300, whole=0.3)
    recipe = Recipe(lr=1.5e-3, adam_lr=1e-3, clip=1.0, decay=0.5, dtype="float32", save_every=25)
    at_once = 2

    def __init__(self, folder: Path, settings: Settings, model: Path):
        super().__init__(folder, settings, model)
        llava = load_toy(model)
        if ranks.RANK == 0:
            encode_pictures(folder / "val", "val", settings.validation, llava.model.vision_tower)
            encode_pictures(folder / "train", "train", settings.images, llava.model.vision_tower)
        ranks.wait()
        self.corpus, self.val = LargeCorpus(folder / "train", settings.images), LargeCorpus(folder / "val")
        self.trainee = Trainee(llava, newline=True, probe=2)

    def loss(self, step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        settings = self.settings
        few, full = step < FEW_TOKENS * settings.steps, self.is_whole(step)
        batch = settings.batch if few else 2 if full else settings.batch // 3
        rows = np.sort(rng.choice(len(self.corpus), batch, replace=False))
        families = drawn_families(SAMPLED, settings.questions if few else settings.questions + 4, rows, rng)
        questions = ask_questions(self.corpus, rows, families, rng)
        renumber, newlines = not full and rng.random() < 0.3, full or rng.random() < 0.8
        chosen = [whole_sequence(self.corpus, row) if full else self.choose(row, few, newlines, rng) for row in rows]
        seen = visuals(self.corpus, rows, chosen)
        # Renumbered, or with newlines missing, a token's state cannot tell where it lies.
        probed = newlines and not renumber
        decoded = forward(self.trainee, NEXT_WORDS.prefix, seen, questions.text, renumber, PROBE_AT if probed else None)
        logits = answer_logits(self.trainee, decoded, questions)
        loss, numbers = (
            answer_loss(logits, questions.answer, NEXT_WORDS.ids[EOS]),
            accuracy(logits, questions, FAMILIES),
        )
        if decoded.early is not None:
            where = centres(self.corpus, rows, seen)
            known = ~where.isnan()
            error = (decoded.early[known] - where[known]).square().mean()
            loss, numbers = loss + PROBE_LOSS * error, {**numbers, "centre": error.item()}
        return loss, numbers

    def choose(self, row: int, few: bool, newlines: bool, rng: np.random.Generator) -> Chosen:
        """The tokens of one picture that a step sees."""
        if not few:
            return things_first(self.corpus, row, self.settings.keep_later, rng, newlines)
        pick = anywhere if rng.random() < BLIND else things_first
        return pick(self.corpus, row, self.settings.keep, rng, newlines)

    def validate(self, rows: np.ndarray) -> dict[str, float]:
        questions = ask_questions(self.val, rows, every_family(rows), self.rng)
        seen = visuals(self.val, rows, [whole_sequence(self.val, row) for row in rows])
        decoded = forward(self.trainee, NEXT_WORDS.prefix, seen, questions.text)
        return accuracy(answer_logits(self.trainee, decoded, questions), questions, FAMILIES)
