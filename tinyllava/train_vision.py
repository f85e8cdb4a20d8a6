"""Stage 1: train the CLIP tower and its text tower on rendered scenes.

torchrun --nproc-per-node 2 -m tinyllava.train_vision --folder runs/tiny
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tinyllava import ranks, vision
from tinyllava.corpus import Corpus, render
from tinyllava.optimizer import MasterOptimizer
from tinyllava.tracking import start_tracking
from tinyllava.trainer import train

PATCH_LOSS = 0.1  # light: real CLIP aligns patches with words only weakly


class Trainee(nn.Module):
    """CLIP with the parts that only training needs."""

    def __init__(self):
        super().__init__()
        self.clip = vision.build_clip()
        self.heads = vision.DenseHeads(self.clip.config.vision_config.hidden_size)
        self.bias = nn.Parameter(torch.tensor([-3.0, -3.0]))


def keep_things_first(labels: Tensor, keep: int) -> Tensor:
    """[B, 576, 9] labels -> [B, keep] positions: askable things before panels before background."""
    kind = labels[..., vision.COLUMN["kind"]]
    first = torch.where(kind >= vision.SHAPE, 1.0, torch.where(kind == vision.PANEL, 0.3, 0.0))
    return (torch.rand(kind.shape) + first).topk(keep, 1).indices.sort(1).values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where corpus, checkpoints and logs go")
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--images", type=int, default=12000, help="training scenes")
    parser.add_argument("--batch", type=int, default=20, help="images per rank and step")
    parser.add_argument("--keep", type=int, default=184, help="patches the tower sees before the last tenth")
    args = parser.parse_args()
    ranks.start()
    torch.manual_seed(0)
    if ranks.RANK == 0:
        render(args.folder / "train", "train", args.images)
        render(args.folder / "val", "val", 200)
    ranks.wait()
    corpus, val = Corpus(args.folder / "train"), Corpus(args.folder / "val")
    model = Trainee()
    optimizer = MasterOptimizer(model, lambda name: ".layers." in name, lr=2e-3, adam_lr=1.5e-3, clip=2.0)

    def losses(data: Corpus, rows: np.ndarray, keep: int | None):
        labels, patches = torch.from_numpy(data.patch_labels(rows)), vision.patchify(data.images[rows])
        chosen = None
        if keep is not None:
            chosen = keep_things_first(labels, keep)
            labels = labels.gather(1, chosen[..., None].expand(-1, -1, labels.shape[-1]))
            patches = patches.gather(1, chosen[..., None].expand(-1, -1, patches.shape[-1]))
        penultimate, final = vision.vision_states(model.clip, patches, chosen)
        dense, numbers = vision.dense_loss(model.heads, penultimate[:, 1:], labels)
        whole, patch = vision.caption_losses(model.clip, model.bias, final, *vision.phrase_targets(data.things[rows]))
        return dense + whole + PATCH_LOSS * patch, {**numbers, "caption": whole.item(), "patch": patch.item()}

    def loss_of(step: int, rng: np.random.Generator):
        full = step >= 0.9 * args.steps  # the last tenth sees whole images
        rows = np.sort(rng.choice(len(corpus), args.batch // 2 if full else args.batch, replace=False))
        return losses(corpus, rows, None if full else args.keep)

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        parts = [losses(val, np.arange(start, start + 40), None)[1] for start in range(0, 200, 40)]
        return {name: float(np.mean([part[name] for part in parts])) for name in parts[0]}

    tracker = start_tracking("vision", args.folder, vars(args)) if ranks.RANK == 0 else None
    train("vision", args.folder, optimizer, args.steps, loss_of, evaluate, tracker=tracker)
    if ranks.RANK == 0:
        print({name: round(value, 4) for name, value in evaluate().items()})
        torch.save(optimizer.masters, args.folder / "vision.pt")
    ranks.stop()


if __name__ == "__main__":
    main()
