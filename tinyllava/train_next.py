"""Fine-tune the embedded model into a LLaVA-NeXT: large pictures in tiles, newline tokens, runs of up to 2,928 tokens.

    python -m tinyllava.train_next --folder runs/next

The vision tower stays as it is. Projector, decoder and newline vector are trained on questions about cached features.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from eval.config import DEFAULT_MODEL
from tinyllava import ranks
from tinyllava.language import Questions, prefix_ids
from tinyllava.large_batches import Chosen, anywhere, standing, things_first, visuals, whole_run
from tinyllava.large_corpus import LargeCorpus, encode_pictures
from tinyllava.longer import Trainee, answer_loss, forward, load_embedded
from tinyllava.optimizer import MasterOptimizer
from tinyllava.questions import FAMILIES
from tinyllava.tracking import start_tracking
from tinyllava.train_language import accuracy
from tinyllava.trainer import train
from tinyllava.vocabulary import EOS, ids

POSITIONS = ["side", "side", "choose", "choose", "verify", "verify", "relate", "relate"]
SAMPLED = [*FAMILIES, *POSITIONS, "count", "count", "digit", "exist", "shape"]
# The first part of the steps sees few tokens of many pictures, the next most things of fewer: with things missing, what
# is there and how many cannot be told, and a model trained so to the end misjudges both in a whole run.
FEW_TOKENS, BLIND = 0.54, 0.2  # share of the steps; of the pictures in them whose tokens are drawn blindly
WHOLE_RUNS = 0.02  # share of the steps, at the end, that see all tokens
# Where in the picture a token stands is read off the decoder's states, here, and pulled towards the truth: a tile's
# features only say where in the tile. Without it the questions about places are learned much later.
PROBE_AT, PROBE_LOSS = 3, 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where features, checkpoints and logs go")
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="the embedded model to start from")
    parser.add_argument("--steps", type=int, default=460)
    parser.add_argument("--images", type=int, default=600, help="training pictures")
    parser.add_argument("--batch", type=int, default=12, help="pictures per step")
    parser.add_argument("--questions", type=int, default=10, help="questions per picture")
    parser.add_argument("--keep", type=int, default=240, help="visual tokens per picture in the first part")
    parser.add_argument("--keep-later", type=int, default=700, help="visual tokens per picture after it")
    args = parser.parse_args()
    torch.manual_seed(0)
    llava = load_embedded(args.model)
    tower = llava.model.vision_tower
    encode_pictures(args.folder / "val", "val", 100, tower)
    encode_pictures(args.folder / "train", "train", args.images, tower)
    corpus, val = LargeCorpus(args.folder / "train", args.images), LargeCorpus(args.folder / "val")
    trainee = Trainee(llava, newline=True, probe=2)
    optimizer = MasterOptimizer(trainee, lambda name: ".layers." in name, 1.5e-3, 1e-3, clip=1.0, dtype=torch.float32)
    end = ids()[EOS]

    def choose(row: int, few: bool, newlines: bool, rng: np.random.Generator) -> Chosen:
        if few:
            pick = anywhere if rng.random() < BLIND else things_first
            return pick(corpus, row, args.keep, rng, newlines)
        return things_first(corpus, row, args.keep_later, rng, newlines)

    def loss_of(step: int, rng: np.random.Generator):
        few, whole = step < FEW_TOKENS * args.steps, step >= (1 - WHOLE_RUNS) * args.steps
        batch = args.batch if few else 2 if whole else args.batch // 3
        count = args.questions if few else args.questions + 4
        rows = np.sort(rng.choice(len(corpus), batch, replace=False))
        families = [[SAMPLED[k] for k in rng.integers(0, len(SAMPLED), count)] for _ in rows]
        questions = Questions(corpus, rows, families, rng)
        renumber, newlines = not whole and rng.random() < 0.3, whole or rng.random() < 0.8
        chosen = [whole_run(corpus, row) if whole else choose(row, few, newlines, rng) for row in rows]
        seen = visuals(corpus, rows, chosen)
        # Renumbered, or with newlines missing, a token's state cannot tell where it stands.
        told = newlines and not renumber
        logits, read = forward(trainee, prefix_ids(), seen, questions, renumber, PROBE_AT if told else None)
        loss, numbers = answer_loss(logits, questions.answer, end), accuracy(logits, questions)
        if told:
            where = standing(corpus, rows, seen)
            known = ~where.isnan()
            error = (read[known] - where[known]).square().mean()
            loss, numbers = loss + PROBE_LOSS * error, {**numbers, "standing": error.item()}
        return loss, numbers

    @torch.no_grad()
    def evaluate(scenes: int = 12) -> dict[str, float]:
        rng, parts = np.random.default_rng(5), []
        for start in range(0, scenes, 2):
            rows = np.arange(start, start + 2)
            questions = Questions(val, rows, [list(FAMILIES)] * 2, rng)
            seen = visuals(val, rows, [whole_run(val, row) for row in rows])
            parts.append(accuracy(forward(trainee, prefix_ids(), seen, questions)[0], questions))
        return {name: float(np.nanmean([part.get(name, np.nan) for part in parts])) for name in ["all", *FAMILIES]}

    tracker = start_tracking("next", args.folder, vars(args)) if ranks.RANK == 0 else None
    train("next", args.folder, optimizer, args.steps, loss_of, evaluate, 100, 25, decay=0.5, tracker=tracker)
    torch.save(optimizer.masters, args.folder / "next.pt")
    print({name: round(value, 4) for name, value in evaluate(40).items()})


if __name__ == "__main__":
    main()
