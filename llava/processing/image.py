"""Images for the towers: CLIP's squares (padded, resized, cropped), LLaVA-NeXT's tiles, and Qwen's patches.

LLaVA-1.5's benchmark numbers were made with padding. The transformers processor crops the sides instead, which leads to
other answers (LLaVA issue 591). Images are therefore padded for every checkpoint, including those of the hub.

LLaVA-NeXT's anyres preprocessing makes the base image (the whole image, small) and the tiles of the best resolution.
One configuration can be read by two anyres conventions. The original reads the resolutions ("pinpoints") as (width,
height), and transformers reads them as (height, width) in the same order; small images, for which several resolutions
are equally good, therefore get other tiles. Also, transformers rounds to seven decimals where the original truncates,
which can leave one more row or column. Sizes are (width, height), grids (rows, columns).

For Qwen an image keeps its aspect ratio. It is resized to whole merge groups (28 x 28 pixels, one visual token each)
with a number of pixels between two bounds, normalised, and split into flattened patches of 14 x 14 pixels. The patches
of a group are consecutive. The patch embedding takes two equal frames of an image.

Official code read: transformers 5.23.0, models/qwen2_vl/image_processing_pil_qwen2_vl.py, which is run as a library,
and models/llava_next; haotian-liu/LLaVA@c121f04, mm_utils.process_anyres_image and llava_arch;
LLaVA-VL/LLaVA-NeXT@df17966; Theia-4869/CDPruner@9541616 for the resolution that papers force
Differs from it: images that it refuses raise a UserError; the width is resized before the height with any version of
Pillow. The torchvision variant differs by up to 0.03 per value. Tiles whose patches are all removed by unpadding are
not computed.
"""

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor
from transformers import CLIPImageProcessorPil, PretrainedConfig, Qwen2VLImageProcessorPil

from llava.errors import UserError, unknown
from llava.processing.json_files import Schema, checked, read_json, shortened
from llava.reduction.token_layout import WITHOUT_PADDING, Canvas, TokenLayout, stitched
from llava.transformers_names import smart_resize

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

QWEN_STEPS = ("do_resize", "do_rescale", "do_normalize")
STEPS = (*QWEN_STEPS, "do_center_crop")
# Raster formats only: for EPS, also under another file name, Pillow would start Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA", "ICO")

ANYRES_RULES = ("original", "transformers")
MERGES = ("spatial_unpad", "spatial")

LARGEST_SIDE = 2**14  # pixels, in a preprocessor's configuration
BICUBIC = 3  # of PIL.Image.Resampling
MAX_SIDE = 65_535  # pixels, the longest side that JPEG can hold


# EXIF orientation -> how the image is turned upright; 1 is upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Size = tuple[int, int]
Grid = tuple[int, int, int]  # frames, rows and columns of patches
Side = Annotated[int, Field(ge=1, le=LARGEST_SIDE)]


def resize(image: Image.Image, size: Size) -> Image.Image:
    """Resize an RGB image to (width, height): bicubic, first the width, then the height, with 8 bits in between.

    Every image of a CLIP or Qwen tower is resized here. Pillow up to 12.3, which made the published results, always
    works in this order. Pillow 13 resizes the height of some portraits first, which changes 5 to 25 % of their values.
    Two calls fix the order for every version.
    """
    wide = image.resize((size[0], image.height), Image.Resampling.BICUBIC)
    return wide.resize(size, Image.Resampling.BICUBIC)


def open_image(path: str | Path | BinaryIO, name: str | None = None, upright: bool = False) -> Image.Image:
    """Read a whole image file as RGB (the first frame of an animation); for modes see `as_rgb`.

    Args:
        path: a path, or an open file with the image's bytes.
        name: how errors call the image; its path if left out.
        upright: turn the image as its EXIF data say, as a person expects to see it. Phones store images as the sensor
            was held. The official benchmark scripts do not turn them, so benchmarks do not either. Pillow itself always
            turns TIFF files.

    Raises:
        UserError: there is no such file, it is damaged, it has none of FORMATS, or its values have no known range.
    """
    name = name or str(path)
    try:
        with Image.open(path, formats=FORMATS) as image:
            rgb = _in_8_bits(image, f"The image {name}")
            # Not ImageOps.exif_transpose, which rewrites the other EXIF data and fails if they are odd.
            turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1)) if upright else None
            return rgb if turn is None else rgb.transpose(turn)
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(
            f"Cannot read the image {name} (expected one of {', '.join(FORMATS)}); the file is damaged, empty or of "
            "another format, fetch it again or convert it."
        ) from error
    except FileNotFoundError as error:
        raise UserError(f"No image at {name}; check the path and the image folder.") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"The image {name} is too large ({_first_line(error)}); make it smaller.") from error
    # Pillow raises any of these for a broken file, depending on the format and where the damage is.
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise UserError(
            f"Cannot read the image {name} ({_first_line(error)}); the file is damaged or no image, fetch it again."
        ) from error


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB with Pillow, as the official scripts do; grey of 16 bits is scaled to 8.

    CMYK is converted without a profile, and an alpha channel is dropped (hidden colours become visible). EXIF rotation
    is ignored; `open_image` can apply it.

    Raises:
        UserError: a side has no pixel or more than MAX_SIDE, or values have no known range.
    """
    width, height = image.size
    if not 1 <= min(width, height) <= max(width, height) <= MAX_SIDE:
        raise UserError(
            f"An image must have 1 to {MAX_SIDE} pixels on each side, got {width} x {height}; resize it first."
        )
    return _in_8_bits(image, "An image")


def _in_8_bits(image: Image.Image, name: str) -> Image.Image:
    """RGB of 8 bits: the upper 8 of 16, as Pillow takes them for colour. Pillow itself would clip grey to white."""
    # Pillow reads grey of 16 bits from these two as 32-bit integers up to 65535.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        image = Image.fromarray((np.asarray(image.convert("I")) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        kind = {"I": "32-bit integers", "F": "floating-point numbers"}[image.mode]
        raise UserError(f"{name} has {kind} for pixels, which have no known white; convert it to 8 or 16 bits first.")
    return image.convert("RGB")


def centred(size: Size, canvas: Size) -> Canvas:
    """An image of this size in the middle of a canvas; an odd pixel of the remainder is on the right or below."""
    left, top = ((outer - inner) // 2 for outer, inner in zip(canvas, size, strict=True))
    return Canvas(canvas, (left, top, left + size[0], top + size[1]))


def pad_to_square(image: Image.Image, colour: tuple[int, int, int], size: int) -> Image.Image:
    """Centre an RGB image on a square canvas as large as its longer side, and resize the canvas to `size`.

    Only the image's rows are resized to the new width, because rows of one colour do not change. The canvas of a wide
    image (1.6 GB for 20000 x 10 pixels) therefore never exists as a whole.
    """
    width, height = image.size
    side = max(width, height)
    left, top, *_ = centred(image.size, (side, side)).box
    rows = Image.new("RGB", (side, height), colour)
    rows.paste(image, (left, 0))
    columns = Image.new("RGB", (size, side), colour)
    columns.paste(resize(rows, (size, height)), (0, top))
    return resize(columns, (size, size))


@dataclass(frozen=True)
class ImageProcessor:
    """RGB image -> [3, S, S] float32 pixels, padded to a square with the mean colour first.

    Attributes:
        size: the shorter side after resizing (see `resize`).
        crop: S, the side of the centre crop that is the tower's input.
        mean, std: per channel, on pixels in 0..1.
    """

    size: int
    crop: int
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ImageProcessor":
        """Read a CLIP preprocessor_config.json. Raises UserError for what the tower does not allow."""
        values = checked_preprocessor(config, STEPS, "CLIP")
        return cls(
            size=_side(config.get("size", 224), "shortest_edge", "size"),
            crop=_side(config.get("crop_size", 224), "height", "crop_size"),
            mean=values.image_mean or CLIP_MEAN,
            std=values.image_std or CLIP_STD,
        )

    def __call__(self, image: Image.Image) -> Tensor:
        return self.crops([pad_to_square(as_rgb(image), self.padding_colour, self.size)])[0]

    def canvas(self, size: Size) -> Canvas:
        """Where an image of this (width, height) lies on the tower's input, in pixels divided by the resized side."""
        side, cut = max(size), (self.size - self.crop) // 2  # the centre crop removes `cut` pixels on the left and top
        left, top, right, bottom = (edge * self.size - side * cut for edge in centred(size, (side, side)).box)
        return Canvas((side * self.crop, side * self.crop), (left, top, right, bottom))

    def crops(self, images: Sequence[Image.Image]) -> Tensor:
        """Resize RGB images by their shorter side and crop the centre, without padding: [n, 3, S, S] float32."""
        resized = []
        for image in images:
            (width, height), short = image.size, min(image.size)
            # The shorter side becomes `size`; the longer one is rounded down.
            resized.append(resize(image, (int(self.size * width / short), int(self.size * height / short))))
        pixels: Tensor = self._clip(resized, return_tensors="pt")["pixel_values"].to(torch.float32)
        return pixels

    @cached_property
    def padding_colour(self) -> tuple[int, int, int]:
        """The mean colour, rounded down: (122, 116, 104) for CLIP, which is about zero after normalisation."""
        red, green, blue = (int(255 * value) for value in self.mean)
        return red, green, blue

    # The Pil class is named, because the automatic choice depends on the installed packages, and the torchvision class
    # differs by up to 0.03 per value.
    @cached_property
    def _clip(self) -> CLIPImageProcessorPil:
        return CLIPImageProcessorPil(
            do_resize=False,
            crop_size={"height": self.crop, "width": self.crop},
            image_mean=list(self.mean),
            image_std=list(self.std),
        )


def _side(value: Any, key: str, field: str) -> int:
    """A side length, written as a number or as {"shortest_edge": n} / {"height": n, "width": n}."""
    if isinstance(value, Mapping):
        square = value.get("height") == value.get("width")
        value = value.get(key) if key in value and square else None
    if type(value) is not int or not 1 <= value <= LARGEST_SIDE:
        raise UserError(
            f"The image preprocessor has no {key} of 1 to {LARGEST_SIDE} pixels in its {field}; a CLIP "
            "preprocessor_config.json was expected."
        )
    return value


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


# LLaVA-NeXT: a base image and tiles


def parse_pinpoints(pinpoints: Any, tile: int) -> tuple[Size, ...]:
    """Return the resolutions of a configuration, in their order.

    Args:
        pinpoints: pairs of numbers of pixels.
        tile: side of a tile; every side of a resolution must be a multiple of it.
    """
    is_list = isinstance(pinpoints, Sequence) and len(pinpoints) > 0
    if not is_list or not all(_is_resolution(pair, tile) for pair in pinpoints):
        raise UserError(
            f"image_grid_pinpoints must be pairs of positive multiples of the tile side {tile}, such as "
            f"[[{tile}, {2 * tile}], [{2 * tile}, {tile}]], got {shortened(pinpoints, 200)}; take those of the "
            "checkpoint's config.json."
        )
    return tuple((first, second) for first, second in pinpoints)


def best_resolution(size: Size, pinpoints: Sequence[Size], anyres_rule: str = "original") -> Size:
    """Return the (width, height) that keeps most of the image's pixels; on a tie the smallest, then the first.

    Args:
        size: width and height of the image.
        pinpoints: resolutions to choose from, (width, height) pairs for the convention "original" and (height, width)
            for "transformers".
    """
    width, height = size

    def kept_and_wasted(resolution: Size) -> tuple[int, int]:
        scale = min(resolution[0] / width, resolution[1] / height)
        # Enlarging adds no pixels: at most all pixels of the image can be kept.
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - resolution[0] * resolution[1]

    candidates = pinpoints if anyres_rule == "original" else [(second, first) for first, second in pinpoints]
    return max(candidates, key=kept_and_wasted)


def fitted(size: Size, resolution: Size) -> Size:
    """Return the largest width and height within `resolution` that keep the image's aspect ratio."""
    across, down = resolution[0] / size[0], resolution[1] / size[1]
    if across < down:
        return resolution[0], min(math.ceil(size[1] * across), resolution[1])
    return min(math.ceil(size[0] * down), resolution[0]), resolution[1]


def on_canvas(image: Image.Image, resolution: Size) -> Image.Image:
    """Resize and centre on a black canvas."""
    inner = fitted(image.size, resolution)
    canvas = Image.new("RGB", resolution)
    canvas.paste(resize(image, inner), centred(inner, resolution).box[:2])
    return canvas


def cut(canvas: Image.Image, tile: int) -> list[Image.Image]:
    """Split a canvas into square tiles, row by row."""
    width, height = canvas.size
    corners = [(left, top) for top in range(0, height, tile) for left in range(0, width, tile)]
    return [canvas.crop((left, top, left + tile, top + tile)) for left, top in corners]


def unpadded(
    size: Size, tiles: tuple[int, int], grid: tuple[int, int], anyres_rule: str = "original"
) -> tuple[int, int, int, int]:
    """Return the rows (from, to) and columns (from, to) of stitched patches that are not padding.

    Both sides lose the same number, so an odd remainder keeps one row or column of padding. No patch is kept of a very
    thin image that fills no row or column of patches (300 x 10 pixels on 336 x 672).

    Args:
        size: width and height of the original image.
        tiles: rows and columns of tiles.
        grid: rows and columns of patches of a tile.
    """
    (width, height), rows, columns = size, tiles[0] * grid[0], tiles[1] * grid[1]
    # The quotient first, then the product: in another order, rounding gives one row more or less on exact ties.
    if width / height > columns / rows:
        margin = (rows - _whole(height * (columns / width), anyres_rule)) // 2
        return margin, rows - margin, 0, columns
    margin = (columns - _whole(width * (rows / height), anyres_rule)) // 2
    return 0, rows, margin, columns - margin


@dataclass(frozen=True)
class AnyresProcessor:
    """Image -> pixels of its base image and tiles, and the token layout of their patches.

    Attributes:
        clip: size, mean and deviation of a tile; it never pads, because every tile is square.
        grid: rows and columns of patches of a tile.
        pinpoints: resolutions to choose from, in any form that `parse_pinpoints` reads.
        anyres_rule: the anyres convention, "original" or "transformers", see the head of this file.
        merge: "spatial_unpad", as the checkpoints were trained, removes padding and ends every row of stitched patches
            with a newline token. "spatial" keeps all patches of every tile without newline tokens, as in the tables of
            most papers.
        force: (width, height) for images of every shape, with padding. Papers with 2,880 tokens use 672 x 672 and
            "spatial": always the base image and four tiles.
    """

    clip: ImageProcessor
    grid: tuple[int, int]
    pinpoints: Any
    anyres_rule: Literal["original", "transformers"] = "original"
    merge: Literal["spatial_unpad", "spatial"] = "spatial_unpad"
    force: Size | None = None

    def __post_init__(self) -> None:
        if self.anyres_rule not in ANYRES_RULES:
            raise unknown("anyres_rule", self.anyres_rule, ANYRES_RULES)
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
        return self.force or best_resolution(size, self.pinpoints, self.anyres_rule)

    def arrange(self, size: Size) -> TokenLayout:
        """Return the token layout of an image of this (width, height).

        If unpadding leaves no stitched patch, only the base image is computed (the original also runs the tower on the
        tiles, and keeps nothing of them). Newline tokens stay, as in the original: an image that is so narrow that no
        column is left has one for each of its empty rows.
        """
        width, height = self.resolution(size)
        tiles = height // self.tile, width // self.tile
        if self.merge == "spatial":
            return stitched(tiles, self.grid, newline=False)
        run = stitched(tiles, self.grid, unpadded(size, tiles, self.grid, self.anyres_rule))
        empty = run.patches == len(run.crops[0].patches)
        return replace(run, crops=run.crops[:1], tiles=None) if empty else run

    def canvas(self, size: Size) -> Canvas:
        """Where an image of this (width, height) lies on its tiles; the base image has no padding."""
        resolution = self.resolution(size)
        return centred(fitted(size, resolution), resolution) if self.arrange(size).tiles else WITHOUT_PADDING

    def __call__(self, image: Image.Image) -> tuple[Tensor, TokenLayout]:
        """Return [1 + tiles, 3, S, S] float32 pixels, the base image first, and the token layout.

        The image may have any mode; EXIF rotation is ignored, as in `open_image`.
        """
        image = as_rgb(image)
        layout = self.arrange(image.size)
        crops = [resize(image, (self.clip.size, self.clip.size))]
        if layout.tiles:
            crops += cut(on_canvas(image, self.resolution(image.size)), self.tile)
        return self.clip.crops(crops), layout


def _whole(value: float, anyres_rule: str) -> int:
    return int(value) if anyres_rule == "original" else int(round(value, 7))


def _is_resolution(pair: Any, tile: int) -> bool:
    if not isinstance(pair, Sequence) or len(pair) != 2:
        return False
    return all(type(side) is int and side > 0 and side % tile == 0 for side in pair)


# Qwen: flattened patches


ELONGATION = 200  # largest ratio of the longer to the shorter side that the official code accepts


@dataclass(frozen=True)
class QwenImageProcessor:
    """RGB images -> flattened patches.

    Attributes:
        min_pixels, max_pixels: bounds of width * height after resizing. Smaller images are enlarged and larger ones
            reduced. They keep their aspect ratio as far as whole groups allow; no side is shorter than a group.
        mean, std: per channel, on pixels in 0..1.
        patch: side of a patch in pixels.
        merge: side of a merge group in patches.
        temporal: frames of one patch embedding.
    """

    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    patch: int = 14
    merge: int = 2
    temporal: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.min_pixels <= self.max_pixels:
            raise UserError(
                f"min_pixels must be at least 1 and at most max_pixels, got {self.min_pixels} and {self.max_pixels}."
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "QwenImageProcessor":
        """Read a Qwen2-VL preprocessor_config.json. Raises UserError for what the tower does not allow.

        The bounds are min_pixels and max_pixels or, in newer files, size: {shortest_edge, longest_edge}, which are
        numbers of pixels, too.
        """
        values = checked_preprocessor(config, QWEN_STEPS, "Qwen2-VL")
        size = checked(PixelBounds, config.get("size") or {}, "size of the image preprocessor's configuration")
        given: dict[str, Any] = {
            "min_pixels": values.min_pixels or size.min_pixels or size.shortest_edge,
            "max_pixels": values.max_pixels or size.max_pixels or size.longest_edge,
            "mean": values.image_mean,
            "std": values.image_std,
        }
        return cls(**{name: value for name, value in given.items() if value is not None})

    def grid(self, size: tuple[int, int]) -> Grid:
        """Return the grid of an image of this (width, height).

        Raises:
            UserError: a side is more than 200 times as long as the other.
        """
        width, height = size
        if max(size) > ELONGATION * min(size):
            raise UserError(
                f"Qwen takes images up to {ELONGATION} times as long as wide, this one has {width} x {height} pixels; "
                "crop it."
            )
        rows, columns = smart_resize(height, width, self.patch * self.merge, self.min_pixels, self.max_pixels)
        return 1, rows // self.patch, columns // self.patch

    def __call__(self, images: Sequence[Image.Image]) -> tuple[Tensor, tuple[Grid, ...]]:
        """Preprocess images of any sizes.

        Returns:
            The patches of all images, [n, 3 * temporal * patch * patch] float32, with groups in raster order, and the
            patches of a group in raster order; and the grid of every image, as Python integers.
        """
        grids = tuple(self.grid(image.size) for image in images)
        resized = [
            resize(as_rgb(image), (columns * self.patch, rows * self.patch))
            for image, (_, rows, columns) in zip(images, grids, strict=True)
        ]
        return self._official(images=resized, return_tensors="pt")["pixel_values"], grids

    @cached_property
    def _official(self) -> Qwen2VLImageProcessorPil:
        return Qwen2VLImageProcessorPil(
            do_resize=False,
            image_mean=list(self.mean),
            image_std=list(self.std),
            patch_size=self.patch,
            merge_size=self.merge,
            temporal_patch_size=self.temporal,
        )


# preprocessor_config.json

Mean = Annotated[tuple[float, float, float] | None, Field(strict=False)]
Deviation = Annotated[tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None, Field(strict=False)]


class PreprocessorConfig(Schema):
    """The fields of preprocessor_config.json that CLIP's and Qwen's image processors share."""

    image_mean: Mean = None
    image_std: Deviation = None
    do_resize: bool | None = None
    do_center_crop: bool | None = None
    do_rescale: bool | None = None
    do_normalize: bool | None = None
    rescale_factor: PositiveFloat | None = None
    resample: int | None = None
    min_pixels: PositiveInt | None = None
    max_pixels: PositiveInt | None = None


def checked_preprocessor(config: Mapping[str, Any], steps: Sequence[str], name: str) -> PreprocessorConfig:
    """Validate an image preprocessor's configuration.

    Args:
        steps: fields of the steps that the tower needs, such as "do_resize".
        name: name of the preprocessing, for errors.

    Raises:
        UserError: a value is impossible, or asks for something that is not done here.
    """
    values = checked(PreprocessorConfig, config, "The image preprocessor's configuration")
    off = [step for step in steps if not config.get(step, True)]
    if off:
        raise UserError(
            f"The image preprocessor switches off {', '.join(off)}; only full {name} preprocessing is supported."
        )
    if values.resample not in (None, BICUBIC):
        raise UserError(
            f"The image preprocessor asks for resample={values.resample}; images are resized with {BICUBIC}, bicubic."
        )
    if values.rescale_factor is not None and not math.isclose(values.rescale_factor, 1 / 255, rel_tol=1e-6):
        raise UserError(
            f"The image preprocessor asks for rescale_factor={values.rescale_factor:g}; pixels are divided by 255 here."
        )
    return values


class PixelBounds(Schema):
    """The field `size` of a Qwen preprocessor_config.json: numbers of pixels, although newer files call them edges."""

    min_pixels: PositiveInt | None = None
    max_pixels: PositiveInt | None = None
    shortest_edge: PositiveInt | None = None
    longest_edge: PositiveInt | None = None


def read_image_processor(
    directory: Path | None, vision: PretrainedConfig, qwen: bool
) -> tuple[ImageProcessor | QwenImageProcessor, tuple[str, ...]]:
    """Return a folder's image preprocessing, and notes about it. LLaVA's always pads, whatever the files say.

    Args:
        vision: configuration of the tower.
        qwen: the tower is Qwen's, not CLIP's.
    """
    config: dict[str, Any] = {}
    if directory is not None and (directory / "preprocessor_config.json").is_file():
        config = read_json(directory / "preprocessor_config.json")
    elif directory is not None and (directory / "processor_config.json").is_file():
        config = read_json(directory / "processor_config.json").get("image_processor") or {}
        if not isinstance(config, dict):
            raise UserError(f"image_processor in {directory}/processor_config.json is no JSON object; fetch it again.")
    processor: ImageProcessor | QwenImageProcessor
    if qwen:
        processor = replace(
            QwenImageProcessor.from_config(config),
            patch=vision.patch_size,
            merge=vision.spatial_merge_size,
            temporal=vision.temporal_patch_size,
        )
        assumed = f"and {processor.min_pixels} to {processor.max_pixels} pixels"
    else:
        size = vision.image_size
        processor = ImageProcessor.from_config(config) if config else ImageProcessor(size, size)
        if processor.crop != size:
            raise UserError(
                f"{directory}: images are cropped to {processor.crop} pixels, but the tower expects {size}."
            )
        assumed = f"at {size} pixels"
    note = f"No preprocessor_config.json: CLIP's mean and deviation {assumed} were assumed."
    return processor, () if config else (note,)
