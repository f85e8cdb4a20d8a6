"""LLaVA-NeXT's anyres preprocessing: the base image (the whole image, small) and the tiles of the best resolution.

Official code read: haotian-liu/LLaVA@c121f04, mm_utils.process_anyres_image and llava_arch;
LLaVA-VL/LLaVA-NeXT@df17966; transformers 5.23, models/llava_next; Theia-4869/CDPruner@9541616 for the resolution that
papers force
Differs from it: tiles whose patches are all removed by unpadding are not computed.

There are two anyres conventions for one configuration. The original takes the resolutions ("pinpoints") as (width,
height), transformers as (height, width) in the same order; small images, for which several are equally good, therefore
get other tiles. And transformers rounds to seven decimals where the original truncates, which can leave one more row or
column. Sizes are (width, height), grids (rows, columns).
"""

import ast
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

from PIL import Image
from torch import Tensor

from llava.errors import UserError, unknown
from llava.processing.image import ImageProcessor, as_rgb, resize
from llava.reduction.token_layout import TokenLayout, stitched

READINGS = ("original", "transformers")
MERGES = ("spatial_unpad", "spatial")

Size = tuple[int, int]


def parse_pinpoints(pinpoints: Any, tile: int) -> tuple[Size, ...]:
    """Return the resolutions of a configuration, in their order.

    Args:
        pinpoints: pairs of pixels, or the same as text ("[[336, 672], ...]").
        tile: side of a tile; every resolution must be a multiple of it.
    """
    pairs = pinpoints
    if isinstance(pinpoints, str):
        with suppress(ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            pairs = ast.literal_eval(pinpoints)
    if not isinstance(pairs, Sequence) or not pairs or not all(_is_resolution(pair, tile) for pair in pairs):
        got = repr(pinpoints)
        raise UserError(
            f"image_grid_pinpoints must be pairs of positive multiples of the tile side {tile}, such as "
            f"[[{tile}, {2 * tile}], [{2 * tile}, {tile}]], got {got if len(got) <= 200 else got[:197] + '...'}; take "
            "those of the checkpoint's config.json."
        )
    return tuple((first, second) for first, second in pairs)


def best_resolution(size: Size, pinpoints: Sequence[Size], reading: str = "original") -> Size:
    """Return the (width, height) that keeps most of the image's pixels; of equals the smallest, then the first.

    Args:
        size: width and height of the image.
        pinpoints: resolutions to choose from, (width, height) pairs for the convention "original" and (height, width)
            for "transformers".
    """
    width, height = size

    def kept_and_wasted(resolution: Size) -> tuple[int, int]:
        scale = min(resolution[0] / width, resolution[1] / height)
        # Enlarging adds no pixels: no more than the image has can be kept.
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - resolution[0] * resolution[1]

    candidates = pinpoints if reading == "original" else [(second, first) for first, second in pinpoints]
    return max(candidates, key=kept_and_wasted)


def fitted(size: Size, resolution: Size) -> Size:
    """Return the largest width and height within `resolution` that keep the image's aspect ratio."""
    across, down = resolution[0] / size[0], resolution[1] / size[1]
    if across < down:
        return resolution[0], min(math.ceil(size[1] * across), resolution[1])
    return min(math.ceil(size[0] * down), resolution[0]), resolution[1]


def on_canvas(image: Image.Image, resolution: Size) -> Image.Image:
    """Resize and centre on a black canvas; an odd remainder goes right or below."""
    inner = fitted(image.size, resolution)
    canvas = Image.new("RGB", resolution)
    canvas.paste(resize(image, inner), ((resolution[0] - inner[0]) // 2, (resolution[1] - inner[1]) // 2))
    return canvas


def cut(canvas: Image.Image, tile: int) -> list[Image.Image]:
    """Split a canvas into square tiles, row by row."""
    width, height = canvas.size
    corners = [(left, top) for top in range(0, height, tile) for left in range(0, width, tile)]
    return [canvas.crop((left, top, left + tile, top + tile)) for left, top in corners]


def unpadded(
    size: Size, tiles: tuple[int, int], grid: tuple[int, int], reading: str = "original"
) -> tuple[int, int, int, int]:
    """Return the rows (from, to) and columns (from, to) of stitched patches that are not padding.

    Both sides lose the same number, so an odd remainder keeps one row or column of padding. No patch is kept of a very
    long image that fills no row or column of patches (300 x 10 pixels on 336 x 672).

    Args:
        size: width and height of the original image.
        tiles: rows and columns of tiles.
        grid: rows and columns of patches of a tile.
    """
    (width, height), rows, columns = size, tiles[0] * grid[0], tiles[1] * grid[1]
    # The quotient first, then the product: another order of these floats gives one row more or less on exact ties.
    if width / height > columns / rows:
        margin = (rows - _whole(height * (columns / width), reading)) // 2
        return margin, rows - margin, 0, columns
    margin = (columns - _whole(width * (rows / height), reading)) // 2
    return 0, rows, margin, columns - margin


@dataclass(frozen=True)
class AnyresProcessor:
    """Image -> pixels of its base image and tiles, and the token layout of their patches.

    Attributes:
        clip: size, mean and deviation of a tile; its padding is not used, since every tile is square.
        grid: rows and columns of patches of a tile.
        pinpoints: resolutions to choose from, in any form that `parse_pinpoints` reads.
        reading: the anyres convention, "original" or "transformers", see the head of this file.
        merge: "spatial_unpad", the checkpoints' own: padding is removed and a newline token ends every row of stitched
            patches. "spatial": neither, all patches of every tile, as in the tables of most papers.
        force: (width, height) for every image whatever its shape, with padding. Papers with 2,880 tokens take
            672 x 672 and "spatial": always the base image and four tiles.
    """

    clip: ImageProcessor
    grid: tuple[int, int]
    pinpoints: Any
    reading: Literal["original", "transformers"] = "original"
    merge: Literal["spatial_unpad", "spatial"] = "spatial_unpad"
    force: Size | None = None

    def __post_init__(self) -> None:
        if self.reading not in READINGS:
            raise unknown("reading of the resolutions", self.reading, READINGS)
        if self.merge not in MERGES:
            raise unknown("merge of the tiles", self.merge, MERGES)
        if self.force is not None and not _is_resolution(self.force, self.tile):
            raise UserError(
                f"A forced resolution must be (width, height), positive multiples of the tile side {self.tile}, got "
                f"{self.force!r}; give ({2 * self.tile}, {2 * self.tile}) for two by two tiles."
            )
        object.__setattr__(self, "pinpoints", parse_pinpoints(self.pinpoints, self.tile))

    @property
    def tile(self) -> int:
        """Side of a tile and of the base image, in pixels."""
        return self.clip.crop

    def resolution(self, size: Size) -> Size:
        """Return (width, height) of the canvas for an image of this size."""
        return self.force or best_resolution(size, self.pinpoints, self.reading)

    def arrange(self, size: Size) -> TokenLayout:
        """Return the token layout of an image of this (width, height).

        If unpadding leaves no stitched patch, only the base image is computed; the original also runs the tower on the
        tiles and keeps nothing of them. Newline tokens stay: an image so narrow that no column is left still has one
        for each of its empty rows, as in the original.
        """
        width, height = self.resolution(size)
        tiles = height // self.tile, width // self.tile
        if self.merge == "spatial":
            return stitched(tiles, self.grid, newline=False)
        run = stitched(tiles, self.grid, unpadded(size, tiles, self.grid, self.reading))
        empty = run.patches == len(run.crops[0].patches)
        return replace(run, crops=run.crops[:1], tiles=None) if empty else run

    def __call__(self, image: Image.Image) -> tuple[Tensor, TokenLayout]:
        """Return [1 + tiles, 3, S, S] float32 pixels, the base image first, and the token layout.

        The image may have any mode; EXIF rotation is ignored, as in `llava.processing.image.open_image`.
        """
        image = as_rgb(image)
        arrangement = self.arrange(image.size)
        crops = [resize(image, (self.clip.size, self.clip.size))]
        if arrangement.tiles:
            crops += cut(on_canvas(image, self.resolution(image.size)), self.tile)
        return self.clip.crops(crops), arrangement


def _whole(value: float, reading: str) -> int:
    return int(value) if reading == "original" else int(round(value, 7))


def _is_resolution(pair: Any, tile: int) -> bool:
    if not isinstance(pair, Sequence) or len(pair) != 2:
        return False
    return all(type(side) is int and side > 0 and side % tile == 0 for side in pair)
