"""A large picture as LLaVA-NeXT sees it: crops of 192 x 192, and the position of every patch in the token sequence."""

import numpy as np
from PIL import Image

from llava.processing.anyres import best_resolution, cut, fitted, on_canvas, unpadded
from llava.reduction.token_layout import TokenLayout, stitched
from toy.data.scenes import GRID, SIDE

# (width, height), in the order of the official list.
PINPOINTS = ((SIDE, 2 * SIDE), (2 * SIDE, SIDE), (2 * SIDE, 2 * SIDE), (3 * SIDE, SIDE), (SIDE, 3 * SIDE))
MAX_CROPS = 5
PATCHES = GRID * GRID


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
