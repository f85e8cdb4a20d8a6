"""Training data on disk: scenes, large pictures and videos, drawn once, and what the frozen vision tower makes of them.

A corpus is a folder of arrays with one row per scene, memory-mapped. `done.npy` marks the finished rows, so an
interrupted drawing goes on where it stopped. Where the tower stays frozen its features are stored in place of the
pixels; frames are read back from the encoded file, so that training sees what a reader of the file sees.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from lab.toy.clip import MEAN, patchify, vision_states
from lab.toy.data.scenes import (
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
from lab.toy.data.videos import SEEN, VIDEO_SIDE, Plan, draw_video, encode_video, plan_video
from llava.processing.image import best_resolution, cut, fitted, on_canvas, unpadded
from llava.processing.video import frame_indices, read_video
from llava.reduction.token_layout import TokenLayout, stitched

PADDING_COLOUR = tuple(int(255 * value) for value in MEAN)
MAX_THINGS, MAX_LARGE_THINGS = 20, 28
# Of videos; a CLS stands before the patches of a frame, as in Video-LLaVA.
FRAME_PATCHES = (VIDEO_SIDE // PATCH) ** 2
FRAME_TOKENS = FRAME_PATCHES + 1
RUN = SEEN * FRAME_TOKENS
# Of large pictures: (width, height) in the order of the official list.
PINPOINTS = ((SIDE, 2 * SIDE), (2 * SIDE, SIDE), (2 * SIDE, 2 * SIDE), (3 * SIDE, SIDE), (SIDE, 3 * SIDE))

Row = Mapping[str, np.ndarray]


class Corpus:
    """The rows that `write_rows` left in a folder, which has some of these arrays.

    Attributes:
        split: the plans of its videos follow from it.
        images: [n, 192, 192, 3] uint8.
        features: int16, the bits of bfloat16 features: [n, 576, D] of scenes, [n, 5, 576, D] of a picture's crops, the
            thumbnail first, [n, 8, 257, D] of a video's frames, CLS first.
        owners: int8, row of `things` or number of the actor that covers a patch, -1 for background: [n, 24, 24] of
            scenes, [n, 5, 576] of crops, [n, 8, 256] of frames.
        things: [n, 20 or 28, 9] float32, columns as in FIELDS; a large picture's centre is at (96, 96).
        boxes: [n, 20, 4] float32, edges of the things of scenes, where they were asked for; zeros for a thing of which
            a part is not in the picture.
        sizes: [n, 2] int64, width and height of large pictures.
    """

    images: np.ndarray
    features: np.ndarray
    owners: np.ndarray
    things: np.ndarray
    boxes: np.ndarray
    sizes: np.ndarray

    def __init__(self, folder: Path, split: str = ""):
        self.split = split
        for file in folder.glob("*.npy"):
            setattr(self, file.stem, np.load(file, mmap_mode="r"))

    def __len__(self) -> int:
        return len(self.owners)

    def list_things(self, row: int) -> tuple[Thing, ...]:
        """The things of one scene as objects, for the question writer."""
        return list_things(self.things[row])

    def patch_labels(self, rows: np.ndarray) -> np.ndarray:
        """[B, 576, 9] float32: the fields of the thing under each patch, zeros (kind 0) on background."""
        owners = self.owners[rows].reshape(len(rows), -1).astype(np.int64)
        padded = np.concatenate([self.things[rows], np.zeros((len(rows), 1, len(FIELDS)), np.float32)], 1)
        return padded[np.arange(len(rows))[:, None], np.where(owners < 0, MAX_THINGS, owners)]

    def tokens(self, row: int, places: np.ndarray | slice = slice(None)) -> Tensor:
        """[K, D] bfloat16 features at these places of one row, all crops or frames after one another."""
        # One read of the row's slice of the file; a fancy index into the file would read token by token.
        table = np.asarray(self.features[row]).reshape(-1, self.features.shape[-1])
        return torch.from_numpy(np.array(table[places])).view(torch.bfloat16)

    def layout(self, row: int) -> TokenLayout:
        """The token layout of one large picture."""
        return arrange(tuple(self.sizes[row].tolist()))

    def plan(self, row: int) -> Plan:
        """What happens in one video."""
        return plan_video(self.split, row)


def write_rows(folder: Path, size: int, draw: Callable[[int], Row], title: str) -> None:
    """Write rows 0 .. `size` of a corpus, continuing an earlier call.

    Args:
        draw: makes the row of every array; all rows have the same shapes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    first = {**draw(0), "done": np.uint8(0)}  # one mark per row: made anew when the arrays are
    for name, value in first.items():
        file, shape = folder / f"{name}.npy", (size, *value.shape)
        if not file.exists() or np.load(file, mmap_mode="r").shape != shape:
            np.lib.format.open_memmap(file, mode="w+", dtype=value.dtype, shape=shape)
    maps = {name: np.load(folder / f"{name}.npy", mmap_mode="r+") for name in first}
    for row in tqdm(np.flatnonzero(maps["done"] == 0).tolist(), desc=title):
        for name, value in draw(row).items():
            maps[name][row] = value
        maps["done"][row] = 1


def write_scenes(folder: Path, split: str, size: int, tower: nn.Module | None = None) -> None:
    """The first `size` scenes of a split, natural and dense ones in turns; features where a tower is given."""

    def draw(row: int) -> Row:
        drawn = scene(split, row, dense=row % 2 == 1)
        seen = {"images": drawn.image} if tower is None else {"features": features(tower, drawn.image[None])[0]}
        return {**seen, "owners": drawn.owner, "things": thing_table(drawn.things, MAX_THINGS)}

    write_rows(folder, size, draw, f"scenes {split}")


def write_boxed_scenes(folder: Path, split: str, size: int, tower: nn.Module) -> None:
    """As `write_scenes`, with boxes; of every fourth pair of scenes only a strip is shown, padded as LLaVA pads."""

    def draw(row: int) -> Row:
        drawn = scene(split, row, dense=row % 2 == 1)
        shown = strip(row) if is_strip(row) else (0, 0, SIDE, SIDE)
        image = padded(drawn.image, shown)
        boxes = np.zeros((MAX_THINGS, 4), np.float32)
        boxes[: len(drawn.boxes)] = [box if inside(box, shown) else (0, 0, 0, 0) for box in drawn.boxes]
        table = thing_table(drawn.things, MAX_THINGS)
        return {"features": features(tower, image[None])[0], "owners": drawn.owner, "things": table, "boxes": boxes}

    write_rows(folder, size, draw, f"scenes {split}")


def is_strip(row: int) -> bool:
    """Whether `write_boxed_scenes` shows a strip of the scene; half of those are natural scenes."""
    return row % 8 in (2, 3)


def strip(row: int) -> tuple[int, int, int, int]:
    """Left, top, right and bottom edge of the middle strip of scene number `row`, lying or upright, 96 to 160 wide."""
    rng = np.random.default_rng([row, 4])
    margin = int(rng.integers(SIDE // 12, SIDE // 4 + 1))
    return (0, margin, SIDE, SIDE - margin) if rng.random() < 0.5 else (margin, 0, SIDE - margin, SIDE)


def padded(image: np.ndarray, shown: tuple[int, int, int, int]) -> np.ndarray:
    """A scene of which only a rectangle is shown, as LLaVA pads the picture of that rectangle."""
    left, top, right, bottom = shown
    canvas = np.full_like(image, PADDING_COLOUR)
    canvas[top:bottom, left:right] = image[top:bottom, left:right]
    return canvas


def inside(box: Sequence[float], shown: Sequence[float]) -> bool:
    """Whether a box lies in a rectangle."""
    return box[0] >= shown[0] and box[1] >= shown[1] and box[2] <= shown[2] and box[3] <= shown[3]


def write_pictures(folder: Path, split: str, size: int, tower: nn.Module) -> None:
    """The first `size` large scenes of a split, natural and dense ones in turns."""

    def draw(row: int) -> Row:
        drawn = large_scene(split, row, dense=row % 2 == 1)
        height, width = drawn.image.shape[:2]
        return {
            "features": five_crops(features(tower, crops(drawn.image))),
            "owners": five_crops(patch_owners(owner_crops(drawn.owner))),
            "things": thing_table(centred(drawn.things, width, height), MAX_LARGE_THINGS),
            "sizes": np.array([width, height]),
        }

    write_rows(folder, size, draw, f"pictures {split}")


def write_videos(folder: Path, split: str, size: int, tower: nn.Module) -> None:
    """The first `size` videos of a split: drawn, encoded, read back and seen by the tower."""

    def draw(row: int) -> Row:
        plan = plan_video(split, row)
        video, owners = draw_video(plan)
        path = folder / f"{row}.mp4"
        path.write_bytes(encode_video(video))
        frames = np.stack([np.asarray(frame) for frame in read_video(path, SEEN).frames])
        path.unlink()
        shown = owners[frame_indices(plan.frames, SEEN)]
        return {"features": features(tower, frames, first=0), "owners": patch_owners(shown)}

    write_rows(folder, size, draw, f"videos {split}")


@torch.inference_mode()
def tower_states(tower: nn.Module, images: np.ndarray) -> Tensor:
    """[n, S, S, 3] uint8 -> [n, 1 + P, D] penultimate states of a CLIP vision tower, CLS first."""
    patches = patchify(images).to(next(tower.parameters()).dtype)
    return vision_states(tower, patches, last=False)[0]


def features(tower: nn.Module, images: np.ndarray, first: int = 1) -> np.ndarray:
    """The states from token `first` on as the int16 bits of bfloat16, which numpy does not have."""
    return tower_states(tower, images)[:, first:].bfloat16().contiguous().view(torch.int16).numpy()


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


# Large pictures as LLaVA-NeXT sees them: crops of 192 x 192, and the position of every patch in the token sequence.


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


def five_crops(values: np.ndarray) -> np.ndarray:
    """[crops, ...] -> [5, ...], zeros for the tiles that a picture does not have."""
    return np.pad(values, [(0, 5 - len(values)), *[(0, 0)] * (values.ndim - 1)])


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


def run_sources(layout: TokenLayout) -> np.ndarray:
    """[N] int64: crop * 576 + patch of every token of the run, -1 for a newline."""
    sources = np.full(layout.tokens, -1)
    for number, crop in enumerate(layout.crops):
        sources[crop.indices.numpy()] = number * PATCHES + crop.patches.numpy()
    return sources
