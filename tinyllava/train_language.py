"""Stage 2: train projector and decoder on questions about frozen, cached vision features.

torchrun --nproc-per-node 2 -m tinyllava.train_language --folder runs/tiny
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tinyllava import ranks, vision
from tinyllava.corpus import Corpus
from tinyllava.features import Features
from tinyllava.language import PATCHES, Questions, alignment_loss, answer_loss, build_llava, fold_feature_scale, forward
from tinyllava.optimizer import MasterOptimizer
from tinyllava.questions import FAMILIES
from tinyllava.tracking import start_tracking
from tinyllava.train_vision import keep_things_first
from tinyllava.trainer import train

# At first natural scenes only, and mostly the families in which a word must find a thing and read it off. Everything
# else builds on that, and it comes several hundred steps later when dense scenes and yes/no questions dilute it.
FIRST = 0.45  # share of the steps
FIRST_FAMILIES = [*FAMILIES, *["color", "shape", "relate"] * 2, "count", "digit"]
# Then all scenes, and mostly positions: where one thing is, where it is from another, which frame holds the digit.
POSITIONS = ["side", "side", *["choose"] * 4, *["verify"] * 3]
THEN_FAMILIES = [*FAMILIES, *POSITIONS, "count", "count", "exist", "digit", "relate"]
ALIGNMENT = 0.3  # weight at the start, half of it after the first part, gone for the last fifth of the steps
WHOLE_IMAGES = 0.05  # share of the steps, at the end, that see all visual tokens


class Trainee(nn.Module):
    """The trained parts of a LLaVA."""

    def __init__(self, llava):
        super().__init__()
        self.language_model, self.projector = (
            llava.model.language_model,
            llava.model.multi_modal_projector,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="the folder that stage 1 wrote")
    parser.add_argument("--steps", type=int, default=2300)
    parser.add_argument("--images", type=int, default=9000, help="training scenes")
    parser.add_argument("--batch", type=int, default=20, help="images per rank and step")
    parser.add_argument("--questions", type=int, default=10, help="questions per image")
    parser.add_argument("--keep", type=int, default=136, help="visual tokens per image before the end")
    args = parser.parse_args()
    ranks.start()
    torch.manual_seed(0)
    clip = vision.load_clip(args.folder).bfloat16()
    corpus, val = Corpus(args.folder / "train", args.images), Corpus(args.folder / "val", 100)
    share = (ranks.RANK, ranks.WORLD)
    features = Features(args.folder / "features.bin", corpus, clip, share)
    val_features = Features(args.folder / "features_val.bin", val, clip, share)
    ranks.wait()
    model = build_llava(clip.config.vision_config)
    fold_feature_scale(model.model.multi_modal_projector, features[np.arange(8)])
    trainee = Trainee(model)
    optimizer = MasterOptimizer(trainee, lambda name: ".layers." in name, lr=2e-3, adam_lr=1.5e-3, clip=1.0)
    table = trainee.language_model.embed_tokens.weight

    def loss_of(step: int, rng: np.random.Generator):
        full = step >= (1 - WHOLE_IMAGES) * args.steps and rng.random() < 0.8
        batch, count = (args.batch // 2, args.questions + 4) if full else (args.batch, args.questions)
        first = step < FIRST * args.steps
        sampled = FIRST_FAMILIES if first else THEN_FAMILIES
        pool = np.arange(0, len(corpus), 2 if first else 1)  # even rows are natural scenes
        rows = np.sort(rng.choice(pool, batch, replace=False))
        families = [[sampled[k] for k in rng.integers(0, len(sampled), count)] for _ in rows]
        questions = Questions(corpus, rows, families, rng)
        labels, inputs = torch.from_numpy(corpus.patch_labels(rows)), features[rows]
        kept = torch.arange(PATCHES).expand(batch, -1)
        if not full:
            guided = keep_things_first(labels, args.keep)
            anywhere = torch.rand(batch, PATCHES).topk(args.keep, 1).indices.sort(1).values
            kept = torch.where(torch.rand(batch, 1) < 0.8, guided, anywhere)
            inputs = inputs.gather(1, kept[..., None].expand(-1, -1, inputs.shape[-1]))
            labels = labels.gather(1, kept[..., None].expand(-1, -1, labels.shape[-1]))
        renumber = not full and rng.random() < 0.3
        logits, visual = forward(trainee, inputs, kept, questions, renumber)
        loss = answer_loss(logits, questions.answer)
        light = ALIGNMENT * max(0.5, 1 - step / (FIRST * args.steps)) if step < 0.8 * args.steps else 0.0
        if light > 0:
            loss = loss + light * alignment_loss(table, visual, labels)
        return loss, accuracy(logits, questions)

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        rng, parts = np.random.default_rng(5), []
        for start in range(0, 100, 20):
            rows = np.arange(start, start + 20)
            questions = Questions(val, rows, [list(FAMILIES)] * 20, rng)
            kept = torch.arange(PATCHES).expand(20, -1)
            logits, _ = forward(trainee, val_features[rows], kept, questions, False)
            parts.append(accuracy(logits, questions))
        return {name: float(np.nanmean([part.get(name, np.nan) for part in parts])) for name in ["all", *FAMILIES]}

    tracker = start_tracking("language", args.folder, vars(args)) if ranks.RANK == 0 else None
    train("language", args.folder, optimizer, args.steps, loss_of, evaluate, 300, 100, decay=0.35, tracker=tracker)
    if ranks.RANK == 0:
        print({name: round(value, 4) for name, value in evaluate().items()})
        torch.save(optimizer.masters, args.folder / "language.pt")
    ranks.stop()


def accuracy(logits, questions: Questions, families: Iterable[str] = FAMILIES) -> dict[str, float]:
    """Share of right first words, over all and by family."""
    right, asked = (logits[:, :, 0].argmax(-1) == questions.answer).numpy(), (questions.answer != -100).numpy()
    numbers = {"all": right[asked].mean().item()}
    for family in families:
        mine = asked & (questions.family == family)
        if mine.any():
            numbers[family] = right[mine].mean().item()
    return numbers


if __name__ == "__main__":
    main()
