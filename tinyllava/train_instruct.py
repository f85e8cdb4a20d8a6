"""Fine-tune the embedded model on the answer formats of all benchmarks.

    torchrun --nproc-per-node 2 -m tinyllava.train_instruct --folder runs/instruct

The vision tower stays as it is. Projector and decoder are trained on exchanges about cached features.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from eval.config import DEFAULT_MODEL
from tinyllava import ranks
from tinyllava.corpus import Corpus, render
from tinyllava.features import Features
from tinyllava.formats import FORMATS
from tinyllava.instruct_batches import accuracy, answer_loss, ask_lines, forward
from tinyllava.instruct_model import as_clip, build_instruct
from tinyllava.language import PATCHES
from tinyllava.optimizer import MasterOptimizer
from tinyllava.tracking import start_tracking
from tinyllava.train_language import Trainee
from tinyllava.train_vision import keep_things_first
from tinyllava.trainer import train

# How often a format is asked. What the embedded model knows comes often enough not to be forgotten; letters are new.
SHARES = {
    "short": 4, "yes_no": 2, "single_word": 1, "bare": 1, "ocr": 0.5, "viz": 1.5,
    "letters": 8, "several": 1, "letters_cn": 5, "parens": 2, "mmstar": 3, "realworld": 2,
    "context": 4, "context_text": 1.5, "caption": 2, "describe": 2, "match": 1,
}  # fmt: skip
# At first more text without a picture: what a letter stands for is learned there before it is in pictures.
FIRST = 0.6  # share of the steps
FIRST_SHARES = SHARES | {"letters": 6, "letters_cn": 4, "context_text": 3, "match": 5, "recite": 2}
LMMS = 0.2  # share of the exchanges that are worded as lmms-eval does, where it has words of its own
WHOLE_IMAGES = 0.06  # share of the steps, at the end, that see all visual tokens
WATCHED = 60  # validation scenes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where scenes, features, checkpoints and logs go")
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="the embedded model to start from")
    parser.add_argument("--steps", type=int, default=1300)
    parser.add_argument("--images", type=int, default=9000, help="training scenes")
    parser.add_argument("--batch", type=int, default=8, help="images per rank and step")
    parser.add_argument("--questions", type=int, default=16, help="exchanges per image")
    parser.add_argument("--keep", type=int, default=136, help="visual tokens per image before the end")
    args = parser.parse_args()
    ranks.start()
    torch.manual_seed(0)
    llava = build_instruct(args.model)
    corpus, features, val, val_features = load_data(args.folder, args.images, llava.model.vision_tower)
    trainee = Trainee(llava)
    optimizer = MasterOptimizer(trainee, lambda name: ".layers." in name, lr=2.5e-3, adam_lr=1.5e-3, clip=1.0)

    def loss_of(step: int, rng: np.random.Generator):
        whole = step >= (1 - WHOLE_IMAGES) * args.steps and rng.random() < 0.8
        batch = args.batch // 2 if whole else args.batch
        rows = np.sort(rng.choice(len(corpus), batch, replace=False))
        shares = FIRST_SHARES if step < FIRST * args.steps else SHARES
        chances = np.array(list(shares.values())) / sum(shares.values())
        wanted = rng.choice(list(shares), (batch, args.questions), p=chances)
        lines = ask_lines(corpus, rows, wanted, rng, LMMS)
        inputs, kept = features[rows], torch.arange(PATCHES).expand(batch, -1)
        if not whole:
            guided = keep_things_first(torch.from_numpy(corpus.patch_labels(rows)), args.keep)
            anywhere = torch.rand(batch, PATCHES).topk(args.keep, 1).indices.sort(1).values
            kept = torch.where(torch.rand(batch, 1) < 0.85, guided, anywhere)
            inputs = inputs.gather(1, kept[..., None].expand(-1, -1, inputs.shape[-1]))
        said, read = forward(trainee, inputs, kept, lines, renumber=not whole and rng.random() < 0.3)
        meant = (read.argmax(-1) == lines.meant[lines.meant != -100]).float().mean().item()
        return answer_loss(said, read, lines), accuracy(said, lines) | {"read": meant}

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        rng, parts = np.random.default_rng(5), []
        for start in range(0, WATCHED, 10):
            rows = np.arange(start, start + 10)
            lines = ask_lines(val, rows, [list(FORMATS)] * 10, rng)
            said, _ = forward(trainee, val_features[rows], torch.arange(PATCHES).expand(10, -1), lines)
            parts.append(accuracy(said, lines))
        return {name: float(np.nanmean([part.get(name, np.nan) for part in parts])) for name in ["all", *FORMATS]}

    tracker = start_tracking("instruct", args.folder, vars(args)) if ranks.RANK == 0 else None
    train("instruct", args.folder, optimizer, args.steps, loss_of, evaluate, 100, 50, decay=0.35, tracker=tracker)
    if ranks.RANK == 0:
        torch.save(optimizer.masters, args.folder / "instruct.pt")
    ranks.stop()


def load_data(folder: Path, images: int, tower: torch.nn.Module) -> tuple[Corpus, Features, Corpus, Features]:
    """Scenes and features for training and validation, drawn and computed by all ranks together where they lack."""
    if ranks.RANK == 0:
        render(folder / "train", "train", images)
        render(folder / "val", "val", 400)
    ranks.wait()
    clip, share = as_clip(tower.bfloat16()), (ranks.RANK, ranks.WORLD)
    corpus, val = Corpus(folder / "train", images), Corpus(folder / "val", 400)
    features = Features(folder / "features.bin", corpus, clip, share)
    val_features = Features(folder / "features_val.bin", val, clip, share)
    ranks.wait()
    return corpus, features, val, val_features


if __name__ == "__main__":
    main()
