"""LLaVA-NeXT's picture: a small copy of the whole and the tiles of the resolution that suits it best.

Read: haotian-liu/LLaVA@c121f04, mm_utils.process_anyres_image and llava_arch; LLaVA-VL/LLaVA-NeXT@df17966; transformers
5.23, models/llava_next. Theia-4869/CDPruner@9541616 for the resolution that papers force.

Two readings of the same configuration exist. The original takes the resolutions ("pinpoints") as (width, height),
transformers as (height, width) in the same order, so small pictures, for which several are equally good, get other
tiles; and transformers rounds to seven decimals where the original cuts, which can leave one more row or column.
Sizes are (width, height) throughout, grids (rows, columns).
"""

import ast
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from PIL import Image
from torch import Tensor

from llava.errors import UserError, unknown
from llava.processing.clip_image import ImageProcessor, as_rgb
from llava.reduction.token_layout import Arrangement, stitched

READINGS = ("original", "transformers")
MERGES = ("spatial_unpad", "spatial")
SHAPES = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))  # pinpoints of the LLaVA-1.6 checkpoints, in tiles

Size = tuple[int, int]


def parse_pinpoints(pinpoints: Any, tile: int) -> tuple[Size, ...]:
    """The resolutions of a configuration, in their order.

    Args:
        pinpoints: pairs of pixels, the same as text ("[[336, 672], ...]"), or a range of tiles "(1x1),...,(6x6)", which
            means every count from the first pair to the last.
        tile: side of a tile; every resolution must be a multiple of it.
    """
    pairs = pinpoints
    if isinstance(pinpoints, str):
        counts = [(int(first), int(second)) for first, second in re.findall(r"\((\d+)x(\d+)\)", pinpoints)]
        if counts:
            (low, left), (high, right) = counts[0], counts[-1]
            pairs = [(i * tile, j * tile) for i in range(low, high + 1) for j in range(left, right + 1)]
        else:
            pairs = _literal(pinpoints)
    if not isinstance(pairs, Sequence) or not pairs or not all(_is_resolution(pair, tile) for pair in pairs):
        raise UserError(
            f"image_grid_pinpoints must be pairs of positive multiples of the tile side {tile}, such as "
            f"[[{tile}, {2 * tile}], [{2 * tile}, {tile}]], got {pinpoints!r}; take those of the checkpoint's config."
        )
    return tuple((first, second) for first, second in pairs)


def best_resolution(size: Size, pinpoints: Sequence[Size], reading: str = "original") -> Size:
    """The (width, height) that keeps most of the picture's pixels; of equals the smallest, of these the first.

    Args:
        size: width and height of the picture.
        pinpoints: resolutions to choose from, (width, height) pairs under reading "original" and (height, width) under
            "transformers".
    """
    if reading not in READINGS:
        raise unknown("reading of the resolutions", reading, READINGS)
    width, height = size

    def kept_and_wasted(resolution: Size) -> tuple[int, int]:
        scale = min(resolution[0] / width, resolution[1] / height)
        # Enlarging adds no pixels: more than the picture has cannot be kept.
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - resolution[0] * resolution[1]

    candidates = pinpoints if reading == "original" else [(second, first) for first, second in pinpoints]
    return max(candidates, key=kept_and_wasted)


def fitted(size: Size, resolution: Size) -> Size:
    """Width and height of the picture once it is as large as `resolution` allows, its shape kept."""
    across, down = resolution[0] / size[0], resolution[1] / size[1]
    if across < down:
        return resolution[0], min(math.ceil(size[1] * across), resolution[1])
    return min(math.ceil(size[0] * down), resolution[0]), resolution[1]


def on_canvas(image: Image.Image, resolution: Size) -> Image.Image:
    """Resize (bicubic) and centre on black; an odd remainder goes right or below."""
    inner = fitted(image.size, resolution)
    canvas = Image.new("RGB", resolution)
    canvas.paste(
        image.resize(inner, Image.Resampling.BICUBIC),
        ((resolution[0] - inner[0]) // 2, (resolution[1] - inner[1]) // 2),
    )
    return canvas


def cut(canvas: Image.Image, tile: int) -> list[Image.Image]:
    """Square tiles, row by row."""
    width, height = canvas.size
    corners = [(left, top) for top in range(0, height, tile) for left in range(0, width, tile)]
    return [canvas.crop((left, top, left + tile, top + tile)) for left, top in corners]


def unpadded(
    size: Size, tiles: tuple[int, int], grid: tuple[int, int], reading: str = "original"
) -> tuple[int, int, int, int]:
    """Which stitched patches show the picture and not the canvas: rows from, to and columns from, to.

    As much goes on both sides, so an odd remainder keeps one row or column of padding. Of a picture so long that it
    fills no row or column of patches (300 x 10 pixels on 336 x 672) none is kept.

    Args:
        size: width and height of the picture as it was.
        tiles: rows and columns of tiles.
        grid: rows and columns of patches of a tile.
    """
    if reading not in READINGS:
        raise unknown("reading of the resolutions", reading, READINGS)
    (width, height), rows, columns = size, tiles[0] * grid[0], tiles[1] * grid[1]
    # Factor first, then product: another order of the same floats ends one row off on exact ties.
    if width / height > columns / rows:
        margin = (rows - _whole(height * (columns / width), reading)) // 2
        return margin, rows - margin, 0, columns
    margin = (columns - _whole(width * (rows / height), reading)) // 2
    return 0, rows, margin, columns - margin


@dataclass(frozen=True)
class AnyresProcessor:
    """Picture -> pixels of its crops and the arrangement of their patches.

    Attributes:
        clip: size, mean and deviation of the crops; its padding is not used, each crop being square.
        grid: rows and columns of patches of a crop.
        pinpoints: resolutions to choose from, in any form that `parse_pinpoints` reads; None takes SHAPES.
        reading: "original" or "transformers", see the head of this file.
        merge: "spatial_unpad", the checkpoints' own: padding is taken off and a newline token ends every row of
            stitched patches. "spatial": neither, all patches of every crop; the tables of most papers are made so.
        force: (width, height) for every picture whatever its shape, padded to it like any other. Papers that print
            2,880 tokens take 672 x 672 and "spatial": always five crops.
    """

    clip: ImageProcessor
    grid: tuple[int, int]
    pinpoints: Any = None
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
                f"A forced resolution must be (width, height) in positive multiples of the tile side {self.tile}, got "
                f"{self.force!r}; give ({2 * self.tile}, {2 * self.tile}) for two by two tiles."
            )
        pinpoints = self.pinpoints
        if pinpoints is None:
            pinpoints = [(first * self.tile, second * self.tile) for first, second in SHAPES]
        object.__setattr__(self, "pinpoints", parse_pinpoints(pinpoints, self.tile))

    @property
    def tile(self) -> int:
        """Side of a tile and of the small copy, in pixels: what the tower sees."""
        return self.clip.crop

    def resolution(self, size: Size) -> Size:
        """(width, height) of the canvas for a picture of this size."""
        return self.force or best_resolution(size, self.pinpoints, self.reading)

    def arrange(self, size: Size) -> Arrangement:
        """The run of visual tokens of a picture of this (width, height).

        Where unpadding leaves no stitched patch there is the small copy alone and no tile is cut: the original runs the
        tower on tiles too and keeps nothing of them. Newlines stay: a picture so narrow that no column is left still
        has one for each of its empty rows, as in the original.
        """
        width, height = self.resolution(size)
        tiles = height // self.tile, width // self.tile
        if self.merge == "spatial":
            return stitched(tiles, self.grid, newline=False)
        run = stitched(tiles, self.grid, unpadded(size, tiles, self.grid, self.reading))
        empty = run.patches == len(run.crops[0].patches)
        return replace(run, crops=run.crops[:1], tiles=None) if empty else run

    def __call__(self, image: Image.Image) -> tuple[Tensor, Arrangement]:
        """[1 + tiles, 3, S, S] float32 pixels, the small copy first, and how the patches make up the run.

        Any mode of picture; EXIF rotation is ignored, as in `llava.processing.clip_image.open_image`.
        """
        image = as_rgb(image)
        arrangement = self.arrange(image.size)
        crops = [image.resize((self.clip.size, self.clip.size), Image.Resampling.BICUBIC)]
        if arrangement.tiles:
            crops += cut(on_canvas(image, self.resolution(image.size)), self.tile)
        return self.clip.crops(crops), arrangement


def _whole(value: float, reading: str) -> int:
    return int(value) if reading == "original" else int(round(value, 7))


def _is_resolution(pair: Any, tile: int) -> bool:
    if not isinstance(pair, Sequence) or len(pair) != 2:
        return False
    return all(type(side) is int and side > 0 and side % tile == 0 for side in pair)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        return None
