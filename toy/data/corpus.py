"""Training scenes on disk: drawn once, memory-mapped by every rank, resumable; and their vision features.

A corpus is a folder of arrays with one row per scene. `done.npy` marks the finished rows, so an interrupted drawing
goes on where it stopped.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from toy.data.paint import Thing
from toy.data.scenes import GRID, PATCH, SIDE, scene
from toy.model.clip import patchify, vision_states

MAX_THINGS = 20
FIELDS = ("kind", "x", "y", "side", "shape", "color", "big", "digit", "pattern")
KINDS = ("", "panel", "shape", "frame")  # 0 marks an unused row
TOGETHER = 40  # scenes that go through the tower at once

Arrays = Mapping[str, tuple[type, tuple[int, ...]]]


def write_rows(
    folder: Path, size: int, arrays: Arrays, draw: Callable[[int], Mapping[str, np.ndarray]], title: str
) -> None:
    """Write rows 0 .. `size` of a corpus, continuing an earlier call.

    Args:
        arrays: name -> dtype and shape of one row.
        draw: makes the row of every array; a row that is shorter than its shape is padded with zeros.
    """
    folder.mkdir(parents=True, exist_ok=True)
    maps = {name: memory_map(folder / f"{name}.npy", (size, *shape), dtype) for name, (dtype, shape) in arrays.items()}
    done = memory_map(folder / "done.npy", (size,), np.uint8)  # one mark per row: made anew when the arrays are
    first = int(done.sum())
    for row in tqdm(range(first, size), desc=title, initial=first, total=size):
        for name, value in draw(row).items():
            maps[name][row, : len(value)] = value
        done[row] = 1


def memory_map(path: Path, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """An array on disk: the existing one if it has this shape, else a new one of zeros."""
    if path.exists():
        existing = np.lib.format.open_memmap(path, mode="r+")
        if existing.shape == shape:
            return existing
    return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)


def render(folder: Path, split: str, size: int) -> None:
    """Draw the first `size` scenes of a split into `folder`; natural and dense scenes take turns."""

    def draw(row: int) -> dict[str, np.ndarray]:
        drawn = scene(split, row, dense=row % 2 == 1)
        return {"images": drawn.image, "owners": drawn.owner, "things": thing_table(drawn.things, MAX_THINGS)}

    arrays = {
        "images": (np.uint8, (SIDE, SIDE, 3)),
        "owners": (np.int8, (GRID, GRID)),
        "things": (np.float32, (MAX_THINGS, len(FIELDS))),
    }
    write_rows(folder, size, arrays, draw, f"scenes {split}")


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
    """[rows, 9] float32: one thing per row, zeros after them."""
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


def patch_owners(planes: np.ndarray) -> np.ndarray:
    """[n, S, S] integers, the thing of every pixel or -1 -> [n, P] int8: the thing that covers an eighth of a patch.

    The most covering one where there are several, the lower number of equals, -1 where there is none.
    """
    planes, grid = np.asarray(planes, np.int64) + 1, planes.shape[-1] // PATCH
    patches = planes.reshape(-1, grid, PATCH, grid, PATCH).transpose(0, 1, 3, 2, 4).reshape(-1, PATCH * PATCH)
    kinds = max(2, int(planes.max()) + 1)
    keys = np.arange(len(patches))[:, None] * kinds + patches
    covered = np.bincount(keys.ravel(), minlength=len(patches) * kinds).reshape(-1, kinds)[:, 1:]
    best = np.where(covered.max(1) >= PATCH * PATCH // 8, covered.argmax(1), -1)
    return best.astype(np.int8).reshape(len(planes), grid * grid)


@torch.inference_mode()
def tower_states(tower: nn.Module, images: np.ndarray) -> Tensor:
    """[n, S, S, 3] uint8 -> [n, 1 + P, D] penultimate states of a CLIP vision tower, CLS first."""
    patches = patchify(images).to(next(tower.parameters()).dtype)
    return vision_states(tower, patches, last=False)[0]


def feature_bits(states: Tensor) -> np.ndarray:
    """States as the int16 bits of bfloat16, which numpy does not have."""
    return states.bfloat16().contiguous().view(torch.int16).numpy()


class Features:
    """[n, 576, D] bfloat16 features of a corpus on disk, computed by all ranks together, resumable."""

    def __init__(self, path: Path, corpus: Corpus, tower: nn.Module, ranks: tuple[int, int] = (0, 1)):
        """`ranks` is (rank, number of ranks); each computes every so many-th chunk. The caller waits for all."""
        self.bits = _shared(path, np.int16, (len(corpus), GRID * GRID, tower.config.hidden_size))
        done = _shared(path.with_suffix(".done"), np.uint8, (-(-len(corpus) // TOGETHER),))
        rank, count = ranks
        for chunk in tqdm(range(rank, len(done), count), desc="features", disable=rank > 0):
            if not done[chunk]:
                rows = np.arange(chunk * TOGETHER, min((chunk + 1) * TOGETHER, len(corpus)))
                self.bits[rows] = feature_bits(tower_states(tower, corpus.images[rows])[:, 1:])
                done[chunk] = 1

    def __getitem__(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(self.bits[rows])).view(torch.bfloat16)


def _shared(path: Path, dtype: type, shape: tuple[int, ...]) -> np.memmap:
    """A file of zeros that several processes map; making it twice is harmless."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    with open(path, "ab") as file:
        file.truncate(size)
    return np.memmap(path, dtype, "r+", shape=shape)
