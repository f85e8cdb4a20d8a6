"""Stage "vision": train the CLIP tower and its text tower on rendered scenes."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from toy import ranks
from toy.data.corpus import Corpus, render
from toy.model import clip, clip_losses
from toy.stages.base import Recipe, Settings, Stage, gather, keep_things_first

PATCH_LOSS = 0.1  # light: real CLIP aligns patches with words only weakly


class VisionTrainee(nn.Module):
    """CLIP with the parts that only training needs."""

    def __init__(self):
        super().__init__()
        self.clip = clip.build_clip()
        self.heads = clip_losses.DenseHeads(self.clip.config.vision_config.hidden_size)
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
        if ranks.RANK == 0:
            render(folder / "train", "train", settings.images)
            render(folder / "val", "val", settings.validation)
        ranks.wait()
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
        dense, numbers = clip_losses.dense_loss(model.heads, penultimate[:, 1:], labels)
        targets = clip_losses.phrase_targets(corpus.things[rows])
        whole, patch = clip_losses.caption_losses(model.clip, model.bias, final, *targets)
        return dense + whole + PATCH_LOSS * patch, {**numbers, "caption": whole.item(), "patch": patch.item()}
