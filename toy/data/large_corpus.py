"""Large training pictures on disk: the features of their tiles, and what the tiles show.

The vision tower stays frozen, so every tile goes through it once.
"""

from pathlib import Path

import numpy as np
import torch

from toy.data.corpus import FIELDS, feature_bits, list_things, patch_owners, thing_table, tower_states, write_rows
from toy.data.large_scenes import centred, large_scene
from toy.data.paint import Thing
from toy.data.tiles import MAX_CROPS, PATCHES, arrange, crops, owner_crops

MAX_THINGS = 28


def encode_pictures(folder: Path, split: str, size: int, tower: torch.nn.Module) -> None:
    """Draw and encode the first `size` large scenes of a split; natural and dense scenes take turns."""

    def draw(row: int) -> dict[str, np.ndarray]:
        drawn = large_scene(split, row, dense=row % 2 == 1)
        height, width = drawn.image.shape[:2]
        return {
            "features": feature_bits(tower_states(tower, crops(drawn.image))[:, 1:]),
            "owners": patch_owners(owner_crops(drawn.owner)),
            "things": thing_table(centred(drawn.things, width, height), MAX_THINGS),
            "sizes": np.array([width, height]),
        }

    arrays = {
        "features": (np.int16, (MAX_CROPS, PATCHES, tower.config.hidden_size)),
        "owners": (np.int8, (MAX_CROPS, PATCHES)),
        "things": (np.float32, (MAX_THINGS, len(FIELDS))),
        "sizes": (np.int64, (2,)),
    }
    write_rows(folder, size, arrays, draw, f"pictures {split}")


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
        """The token layout of one picture."""
        return arrange(tuple(self.sizes[row].tolist()))
