"""Large training pictures on disk as what the decoder is trained on: features of their crops, and what the crops show.

The vision tower stays frozen, so every crop goes through it once. Drawing and encoding go picture by picture and can be
interrupted: `done.npy` marks what is finished.
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

from tinyllava.corpus import FIELDS, list_things, memory_map, thing_table
from tinyllava.coverage import patch_owners
from tinyllava.large_scenes import centred, large_scene
from tinyllava.scenes import Thing
from tinyllava.tiles import MAX_CROPS, PATCHES, arrange, crops, owner_crops
from tinyllava.vision import patchify, vision_states

MAX_THINGS = 28


def encode_pictures(folder: Path, split: str, size: int, tower: torch.nn.Module) -> None:
    """Draw and encode the first `size` large scenes of a split, natural and dense ones in turns."""
    folder.mkdir(parents=True, exist_ok=True)
    width = tower.config.hidden_size
    features = memory_map(folder / "features.npy", (size, MAX_CROPS, PATCHES, width), np.int16)
    owners = memory_map(folder / "owners.npy", (size, MAX_CROPS, PATCHES), np.int8)
    things = memory_map(folder / "things.npy", (size, MAX_THINGS, len(FIELDS)), np.float32)
    sizes = memory_map(folder / "sizes.npy", (size, 2), np.int64)
    done = memory_map(folder / "done.npy", (size,), np.uint8)  # as long as the rest: made anew with it
    dtype = next(tower.parameters()).dtype
    for row in tqdm(range(int(done.sum()), size), desc=f"pictures {split}", initial=int(done.sum()), total=size):
        drawn = large_scene(split, row, dense=row % 2 == 1)
        seen = patch_owners(owner_crops(drawn.owner))
        with torch.inference_mode():
            patches = patchify(crops(drawn.image)).to(dtype)
            penultimate, _ = vision_states(SimpleNamespace(vision_model=tower), patches, last=False)
        bits = penultimate[:, 1:].bfloat16().contiguous().view(torch.int16).numpy()
        features[row, : len(bits)], owners[row, : len(seen)] = bits, seen
        sizes[row] = drawn.image.shape[1], drawn.image.shape[0]
        things[row] = thing_table(centred(drawn.things, *sizes[row].tolist()), MAX_THINGS)
        done[row] = 1


class LargeCorpus:
    """Encoded pictures.

    Attributes:
        features: [n, 5, 576, D] int16, the bits of bfloat16 features of the crops, thumbnail first.
        owners: [n, 5, 576] int8, row of `things` that covers a patch, -1 for background.
        things: [n, 28, 9] float32, columns as in FIELDS, with the picture's centre at (96, 96).
        sizes: [n, 2] int64, width and height.
    """

    def __init__(self, folder: Path, limit: int | None = None):
        names = ("features", "owners", "things", "sizes")
        self.features, self.owners, self.things, self.sizes = (
            np.load(folder / f"{name}.npy", mmap_mode="r")[:limit] for name in names
        )

    def __len__(self) -> int:
        return len(self.sizes)

    def list_things(self, row: int) -> tuple[Thing, ...]:
        """The things of one picture as objects, for the question writer."""
        return list_things(self.things[row])

    def arrangement(self, row: int):
        """How the patches of one picture make up its run."""
        return arrange(tuple(self.sizes[row].tolist()))
