"""Training scenes on disk: rendered once, memory-mapped by every rank, resumable.

Natural and dense scenes take turns. A corpus folder holds `images.npy`, `owners.npy` and `things.npy`; `done.npy`
counts what is finished, so an interrupted rendering goes on where it stopped.
"""

from pathlib import Path

import numpy as np
from tqdm import tqdm

from tinyllava.scenes import GRID, SIDE, Thing, scene

MAX_THINGS = 20
FIELDS = ("kind", "x", "y", "side", "shape", "color", "big", "digit", "pattern")
KINDS = ("", "panel", "shape", "frame")  # 0 marks an unused row


def render(folder: Path, split: str, size: int) -> None:
    """Draw the first `size` scenes of a split into `folder`, continuing an earlier call."""
    folder.mkdir(parents=True, exist_ok=True)
    images = memory_map(folder / "images.npy", (size, SIDE, SIDE, 3), np.uint8)
    owners = memory_map(folder / "owners.npy", (size, GRID, GRID), np.int8)
    things = memory_map(folder / "things.npy", (size, MAX_THINGS, len(FIELDS)), np.float32)
    done = memory_map(folder / "done.npy", (1,), np.int64)
    for row in tqdm(range(int(done[0]), size), desc=f"render {split}", initial=int(done[0]), total=size):
        drawn = scene(split, row, dense=row % 2 == 1)
        images[row], owners[row], things[row] = drawn.image, drawn.owner, thing_table(drawn.things, MAX_THINGS)
        if row % 200 == 199 or row == size - 1:
            done[0] = row + 1


class Corpus:
    """Rendered scenes.

    Attributes:
        images: [n, 192, 192, 3] uint8.
        owners: [n, 24, 24] int8, row of `things` that covers a patch, -1 for background.
        things: [n, 20, 9] float32, columns as in FIELDS.
    """

    def __init__(self, folder: Path, limit: int | None = None):
        self.images, self.owners, self.things = (
            np.load(folder / f"{name}.npy", mmap_mode="r")[:limit] for name in ("images", "owners", "things")
        )

    def __len__(self) -> int:
        return len(self.images)

    def list_things(self, row: int) -> tuple[Thing, ...]:
        """The things of one scene as objects, for the question writer."""
        return list_things(self.things[row])

    def patch_labels(self, rows: np.ndarray) -> np.ndarray:
        """[B, 576, 9] float32: the fields of the thing under each patch, zeros (kind 0) on background."""
        owners = self.owners[rows].reshape(len(rows), -1).astype(np.int64)
        padded = np.concatenate([self.things[rows], np.zeros((len(rows), 1, len(FIELDS)), np.float32)], 1)
        return padded[np.arange(len(rows))[:, None], np.where(owners < 0, MAX_THINGS, owners)]


def thing_table(things: tuple[Thing, ...], rows: int) -> np.ndarray:
    """[rows, 9] float32: one thing per row, zeros behind them."""
    table = np.zeros((rows, len(FIELDS)), np.float32)
    for row, thing in enumerate(things):
        table[row] = (KINDS.index(thing.kind), *(getattr(thing, field) for field in FIELDS[1:]))
    return table


def list_things(table: np.ndarray) -> tuple[Thing, ...]:
    """The things of a table as `thing_table` makes it."""
    return tuple(
        Thing(KINDS[int(kind)], float(x), float(y), int(side), *(int(value) for value in rest))
        for kind, x, y, side, *rest in table[table[:, 0] > 0]
    )


def memory_map(path: Path, shape: tuple[int, ...], dtype) -> np.ndarray:
    """An array on disk: the one that is there if it has the shape, else a new one of zeros."""
    if path.exists():
        existing = np.lib.format.open_memmap(path, mode="r+")
        if existing.shape == shape:
            return existing
    return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
