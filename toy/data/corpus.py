"""Training data on disk: scenes, large pictures and videos, drawn once, and what the frozen vision tower makes of them.

A corpus is a folder of arrays with one row per scene, memory-mapped by every rank. `done.npy` marks the finished rows,
so an interrupted drawing goes on where it stopped. Of large pictures and videos the features are stored in place of the
pixels, because the tower stays frozen; frames are read back from the encoded file, so that training sees what a reader
of the file sees.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from llava.processing.image import best_resolution, cut, fitted, on_canvas, unpadded
from llava.processing.video import frame_indices, read_video
from llava.reduction.token_layout import TokenLayout, stitched
from toy.clip import patchify, vision_states
from toy.data.scenes import (
    FIELDS,
    GRID,
    PATCH,
    PATCHES,
    SIDE,
    Thing,
    centred,
    large_scene,
    list_things,
    scene,
    thing_table,
)
from toy.data.videos import SEEN, VIDEO_SIDE, Plan, draw_video, encode_video, plan_video

MAX_THINGS = 20
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


class StoredRows:
    """The rows that `write_rows` left in a folder, memory-mapped, or the first `limit` of them.

    A subclass annotates its arrays; the first one has a row for each scene, as all have.
    """

    def __init__(self, folder: Path, limit: int | None = None):
        for name in type(self).__annotations__:
            setattr(self, name, np.load(folder / f"{name}.npy", mmap_mode="r")[:limit])

    def __len__(self) -> int:
        return len(getattr(self, next(iter(type(self).__annotations__))))


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


class Corpus(StoredRows):
    """Rendered scenes.

    Attributes:
        images: [n, 192, 192, 3] uint8.
        owners: [n, 24, 24] int8, row of `things` that covers a patch, -1 for background.
        things: [n, 20, 9] float32, columns as in FIELDS.
    """

    images: np.ndarray
    owners: np.ndarray
    things: np.ndarray

    def list_things(self, row: int) -> tuple[Thing, ...]:
        """The things of one scene as objects, for the question writer."""
        return list_things(self.things[row])

    def patch_labels(self, rows: np.ndarray) -> np.ndarray:
        """[B, 576, 9] float32: the fields of the thing under each patch, zeros (kind 0) on background."""
        owners = self.owners[rows].reshape(len(rows), -1).astype(np.int64)
        padded = np.concatenate([self.things[rows], np.zeros((len(rows), 1, len(FIELDS)), np.float32)], 1)
        return padded[np.arange(len(rows))[:, None], np.where(owners < 0, MAX_THINGS, owners)]


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


# Large pictures as LLaVA-NeXT sees them: crops of 192 x 192, and the position of every patch in the token sequence.

# (width, height), in the order of the official list.
PINPOINTS = ((SIDE, 2 * SIDE), (2 * SIDE, SIDE), (2 * SIDE, 2 * SIDE), (3 * SIDE, SIDE), (SIDE, 3 * SIDE))
MAX_CROPS = 5


def arrange(size: tuple[int, int]) -> TokenLayout:
    """The token layout of a picture of this (width, height)."""
    width, height = best_resolution(size, PINPOINTS)
    tiles = height // SIDE, width // SIDE
    return stitched(tiles, (GRID, GRID), unpadded(size, tiles, (GRID, GRID)))


def crops(image: np.ndarray) -> np.ndarray:
    """[height, width, 3] uint8 -> [1 + tiles, 192, 192, 3] uint8, the thumbnail first."""
    picture = Image.fromarray(image)
    small = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    tiles = cut(on_canvas(picture, best_resolution(picture.size, PINPOINTS)), SIDE)
    return np.stack([np.asarray(crop) for crop in (small, *tiles)])


def owner_crops(owner: np.ndarray) -> np.ndarray:
    """[height, width] int8 of pixels -> [1 + tiles, 192, 192] int16: the same for every crop, -1 on padding."""
    plane = Image.fromarray((owner + 1).astype(np.uint8))
    resolution = best_resolution(plane.size, PINPOINTS)
    inner = fitted(plane.size, resolution)
    canvas = Image.new("L", resolution)
    corner = (resolution[0] - inner[0]) // 2, (resolution[1] - inner[1]) // 2
    canvas.paste(plane.resize(inner, Image.Resampling.NEAREST), corner)
    small = plane.resize((SIDE, SIDE), Image.Resampling.NEAREST)
    return np.stack([np.asarray(crop, np.int16) for crop in (small, *cut(canvas, SIDE))]) - 1


def run_sources(arrangement: TokenLayout) -> np.ndarray:
    """[N] int64: crop * 576 + patch of every token of the run, -1 for a newline."""
    sources = np.full(arrangement.tokens, -1)
    for number, crop in enumerate(arrangement.crops):
        sources[crop.indices.numpy()] = number * PATCHES + crop.patches.numpy()
    return sources


MAX_LARGE_THINGS = 28


def encode_pictures(folder: Path, split: str, size: int, tower: torch.nn.Module) -> None:
    """Draw and encode the first `size` large scenes of a split; natural and dense scenes take turns."""

    def draw(row: int) -> dict[str, np.ndarray]:
        drawn = large_scene(split, row, dense=row % 2 == 1)
        height, width = drawn.image.shape[:2]
        return {
            "features": feature_bits(tower_states(tower, crops(drawn.image))[:, 1:]),
            "owners": patch_owners(owner_crops(drawn.owner)),
            "things": thing_table(centred(drawn.things, width, height), MAX_LARGE_THINGS),
            "sizes": np.array([width, height]),
        }

    arrays = {
        "features": (np.int16, (MAX_CROPS, PATCHES, tower.config.hidden_size)),
        "owners": (np.int8, (MAX_CROPS, PATCHES)),
        "things": (np.float32, (MAX_LARGE_THINGS, len(FIELDS))),
        "sizes": (np.int64, (2,)),
    }
    write_rows(folder, size, arrays, draw, f"pictures {split}")


class LargeCorpus(StoredRows):
    """Encoded pictures.

    Attributes:
        features: [n, 5, 576, D] int16, the bits of bfloat16 features of the crops, thumbnail first.
        owners: [n, 5, 576] int8, row of `things` that covers a patch, -1 for background.
        things: [n, 28, 9] float32, columns as in FIELDS, with the picture's centre at (96, 96).
        sizes: [n, 2] int64, width and height.
    """

    features: np.ndarray
    owners: np.ndarray
    things: np.ndarray
    sizes: np.ndarray

    def list_things(self, row: int) -> tuple[Thing, ...]:
        """The things of one picture as objects, for the question writer."""
        return list_things(self.things[row])

    def arrangement(self, row: int):
        """The token layout of one picture."""
        return arrange(tuple(self.sizes[row].tolist()))


# Videos.

FRAME_PATCHES = (VIDEO_SIDE // PATCH) ** 2
FRAME_TOKENS = FRAME_PATCHES + 1  # CLS before the patches of a frame, as in Video-LLaVA
RUN = SEEN * FRAME_TOKENS


def encode_videos(folder: Path, split: str, size: int, tower: torch.nn.Module) -> None:
    """Draw, write, read back and encode the first `size` videos of a split."""

    def draw(row: int) -> dict[str, np.ndarray]:
        plan = plan_video(split, row)
        video, owners = draw_video(plan)
        path = folder / "one.mp4"
        path.write_bytes(encode_video(video))
        frames = np.stack([np.asarray(frame) for frame in read_video(path, SEEN).frames])
        shown = owners[frame_indices(plan.frames, SEEN)]
        return {"features": feature_bits(tower_states(tower, frames)), "owners": patch_owners(shown)}

    arrays = {
        "features": (np.int16, (SEEN, FRAME_TOKENS, tower.config.hidden_size)),
        "owners": (np.int8, (SEEN, FRAME_PATCHES)),
    }
    write_rows(folder, size, arrays, draw, f"videos {split}")


class VideoCorpus(StoredRows):
    """Encoded videos.

    Attributes:
        split: the plans of its videos follow from it.
        features: [n, 8, 257, D] int16, the bits of bfloat16 features, CLS first.
        owners: [n, 8, 256] int8, number of the actor that covers a patch, -1 for background.
    """

    features: np.ndarray
    owners: np.ndarray

    def __init__(self, folder: Path, split: str, limit: int | None = None):
        super().__init__(folder, limit)
        self.split = split

    def plan(self, row: int) -> Plan:
        """What happens in one video."""
        return plan_video(self.split, row)
