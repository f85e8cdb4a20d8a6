"""Images for the towers: CLIP's squares (padded, resized, cropped), and Qwen's patches of images of any shape.

LLaVA-1.5's benchmark numbers were made with padding. The transformers processor crops the sides instead and gives
other answers (LLaVA issue 591), so images of every checkpoint are padded, including those of the hub.

For Qwen an image keeps its aspect ratio. It is resized to whole merge groups (28 x 28 pixels, one visual token each)
with a number of pixels between two bounds, normalised, and split into patches of 14 x 14 pixels, which are flattened;
the patches of a group follow one another. The patch embedding takes two equal frames of an image.

Official code read: transformers 5.23.0, models/qwen2_vl/image_processing_pil_qwen2_vl.py, which is run as a library
Differs from it: images that it refuses are a UserError; the width is resized before the height whatever the Pillow
version. The torchvision variant differs by up to 0.03 per value.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from transformers import CLIPImageProcessorPil, Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from llava.errors import UserError
from llava.processing.config_schema import LARGEST_SIDE, PixelBounds, checked, checked_preprocessor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
# Raster formats only: for EPS, whatever the file's name, Pillow would start Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA", "ICO")

MAX_SIDE = 65_535  # pixels, the longest that JPEG can hold
STRIP = 2**22  # pixels of the square canvas that exist at once


def resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize an RGB image to (width, height): bicubic, the width first, then the height, 8 bits in between.

    Every image of a CLIP or Qwen tower is resized here. Pillow up to 12.3, with which the published results were made,
    always works in this order; Pillow 13 resizes some portraits the other way round, which moves 5 to 25 % of their
    values. Two calls fix the order for every version.
    """
    wide = image.resize((size[0], image.height), Image.Resampling.BICUBIC)
    return wide.resize(size, Image.Resampling.BICUBIC)


def open_image(path: str | Path | BinaryIO, name: str | None = None) -> Image.Image:
    """Read a whole image file as RGB. EXIF rotation is ignored, as in the official benchmark scripts.

    Args:
        path: or the file's bytes as an open file.
        name: how errors call the image; its path if left out.

    Raises:
        UserError: there is no such file, it is damaged, or it has none of FORMATS; or its values have no known range.
    """
    name = name or str(path)
    try:
        with Image.open(path, formats=FORMATS) as image:
            return _in_8_bits(image, f"The image {name}")
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
    # Pillow raises any of these for a broken file, depending on the format and on the place of the damage.
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise UserError(
            f"Cannot read the image {name} ({_first_line(error)}); the file is damaged or no image, fetch it again."
        ) from error


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB as Pillow does, which is what the official scripts do; grey of 16 bits is scaled to 8.

    CMYK is converted without a profile, an alpha channel is dropped (hidden colours become visible). EXIF rotation
    stays ignored.

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
    """RGB of 8 bits. Of 16 bits the upper 8 are taken, as Pillow does for colour; grey it would clip, to white."""
    # Pillow reads grey of 16 bits from these two as 32-bit integers up to 65535.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        image = Image.fromarray((np.asarray(image.convert("I")) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        kind = {"I": "32-bit integers", "F": "floating-point numbers"}[image.mode]
        raise UserError(f"{name} has {kind} for pixels, which have no known white; convert it to 8 or 16 bits first.")
    return image.convert("RGB")


def pad_to_square(image: Image.Image, colour: tuple[int, int, int], size: int) -> Image.Image:
    """Centre an RGB image on a square canvas as large as its longer side, and resize the canvas to `size`.

    An odd remainder goes right or below. The canvas is resized strip by strip in the order of `resize`, so that it
    never exists as a whole (1.6 GB for 20000 x 10 pixels). An image of 10 x 20000 pixels takes some seconds.
    """
    width, height = image.size
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    columns = Image.new("RGB", (size, side), colour)  # rows of one colour stay what they are
    step = max(1, STRIP // side)
    for start in range(0, height, step):
        stop = min(start + step, height)
        rows = Image.new("RGB", (side, stop - start), colour)
        rows.paste(image.crop((0, start, width, stop)), (left, 0))
        columns.paste(resize(rows, (size, stop - start)), (0, top + start))
    return resize(columns, (size, size))


@dataclass(frozen=True)
class ImageProcessor:
    """RGB image -> [3, S, S] float32 pixels; it is padded to a square of the mean colour first.

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
        """Read a CLIP preprocessor_config.json. What the tower does not allow is refused."""
        values = checked_preprocessor(config, STEPS, "CLIP")
        return cls(
            size=_side(config.get("size", 224), "shortest_edge", "size"),
            crop=_side(config.get("crop_size", 224), "height", "crop_size"),
            mean=values.image_mean or CLIP_MEAN,
            std=values.image_std or CLIP_STD,
        )

    def __call__(self, image: Image.Image) -> Tensor:
        return self.crops([pad_to_square(as_rgb(image), self.padding_colour, self.size)])[0]

    def crops(self, images: Sequence[Image.Image]) -> Tensor:
        """Resize RGB images by their shorter side and crop the centre, without padding: [n, 3, S, S] float32."""
        resized = []
        for image in images:
            (width, height), short = image.size, min(image.size)
            # The shorter side becomes `size`; the longer one is rounded down.
            resized.append(resize(image, (int(self.size * width / short), int(self.size * height / short))))
        return self._clip(resized, return_tensors="pt")["pixel_values"].to(torch.float32)

    @cached_property
    def padding_colour(self) -> tuple[int, int, int]:
        """The mean rounded down, (122, 116, 104) for CLIP, which is about zero after normalisation."""
        red, green, blue = (int(255 * value) for value in self.mean)
        return red, green, blue

    # The Pil class by name: the torchvision class differs by up to 0.03 per value, and the automatic choice depends on
    # the installed packages.
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


Grid = tuple[int, int, int]  # frames, rows and columns of patches

ELONGATION = 200  # largest ratio of the longer to the shorter side that the official code accepts
QWEN_STEPS = ("do_resize", "do_rescale", "do_normalize")


@dataclass(frozen=True)
class QwenImageProcessor:
    """RGB images -> flattened patches.

    Attributes:
        min_pixels, max_pixels: bounds of width * height after resizing. Smaller images are enlarged and larger ones
            reduced, with their aspect ratio as far as whole groups allow; no side is shorter than a group.
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
        """Read a Qwen2-VL preprocessor_config.json. What the tower does not allow is refused.

        The bounds are min_pixels and max_pixels or, in newer files, size: {shortest_edge, longest_edge}, which are
        numbers of pixels, too.
        """
        values = checked_preprocessor(config, QWEN_STEPS, "Qwen2-VL")
        size = checked(PixelBounds, config.get("size") or {}, "size of the image preprocessor's configuration")
        given: dict[str, Any] = {
            "min_pixels": values.min_pixels or size.min_pixels or size.shortest_edge,
            "max_pixels": values.max_pixels or size.max_pixels or size.longest_edge,
            "patch": values.patch_size,
            "merge": values.merge_size,
            "temporal": values.temporal_patch_size,
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
            [n, 3 * temporal * patch * patch] float32, the patches of all images in order: groups in raster order, and
            within a group its patches in raster order. And the grid of every image, as Python integers.
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
