"""From a picture to the pixels of the vision tower: pad to a square, resize, crop, normalise.

The LLaVA-1.5 benchmark numbers are made with padding. The transformers processor crops the sides instead and gives
other answers (LLaVA issue 591), so "pad" is the default here for every checkpoint, those of the hub included.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil

from llava.errors import UserError, unknown

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

ASPECTS = ("pad", "crop")
STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")

MAX_SIDE = 65_535  # pixels, the longest that JPEG can hold
STRIP = 2**22  # pixels of the square canvas that exist at once


def open_image(path: str | Path | BinaryIO, name: str | None = None) -> Image.Image:
    """Read the whole picture as RGB. EXIF rotation is ignored, as in the official benchmark scripts.

    Args:
        path: or the file's bytes as an open file.
        name: what errors call it; its path if left out.
    """
    name = name or str(path)
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise UserError(f"No image at {name}; check the path and the image folder.") from error
    # Pillow reports a broken file with any of these, depending on the format and on where the damage is.
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise UserError(
            f"Cannot read the image {name} ({_first_line(error)}); the file is damaged or no image, fetch it again."
        ) from error


def as_rgb(image: Image.Image) -> Image.Image:
    """The picture as RGB, the way the official scripts convert it, which is Pillow's.

    Grey and palette take their colours, CMYK is converted without a profile, transparency is dropped (what is hidden
    under it shows), 16-bit grey is cut at 255. EXIF rotation stays ignored.

    Raises UserError without any pixel and above MAX_SIDE.
    """
    width, height = image.size
    if not 1 <= min(width, height) <= max(width, height) <= MAX_SIDE:
        raise UserError(
            f"An image must have 1 to {MAX_SIDE} pixels on each side, got {width} x {height}; resize it first."
        )
    return image.convert("RGB")


def pad_to_square(image: Image.Image, colour: tuple[int, int, int], size: int) -> Image.Image:
    """Centre an RGB image on a square canvas as large as its longer side, and resize that to `size` (bicubic).

    An odd remainder goes right or below. Pillow resizes rows first and columns then, with bytes in between; doing the
    same in two steps gives the same pixels, and the canvas (1.6 GB for 20000 x 10 pixels) never exists as a whole. It
    takes time still: some seconds for 10 x 20000 pixels, whose every row is as wide as the picture is high.
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
        columns.paste(rows.resize((size, stop - start), Image.Resampling.BICUBIC), (0, top + start))
    return columns.resize((size, size), Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class ImageProcessor:
    """RGB image -> [3, S, S] float32 pixels.

    Attributes:
        size: the shorter edge after resizing (bicubic, antialiased).
        crop: S, the side of the centred crop that the tower sees.
        mean, std: per channel, on pixels in 0..1.
        aspect: "pad" to a square of the mean colour first, or "crop": what sticks out of the square is lost.
    """

    size: int
    crop: int
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    aspect: Literal["pad", "crop"] = "pad"

    def __post_init__(self) -> None:
        if self.aspect not in ASPECTS:
            raise unknown("image aspect", self.aspect, ASPECTS)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], aspect: Literal["pad", "crop"] = "pad") -> "ImageProcessor":
        """Read a CLIP preprocessor_config.json. A step switched off there is refused: the tower expects all of them."""
        off = [step for step in STEPS if not config.get(step, True)]
        if off:
            raise UserError(
                f"The image preprocessor switches off {', '.join(off)}; only full CLIP preprocessing is known."
            )
        return cls(
            size=_side(config.get("size", 224), "shortest_edge", "size"),
            crop=_side(config.get("crop_size", 224), "height", "crop_size"),
            mean=tuple(config.get("image_mean", CLIP_MEAN)),
            std=tuple(config.get("image_std", CLIP_STD)),
            aspect=aspect,
        )

    def __call__(self, image: Image.Image) -> Tensor:
        image = as_rgb(image)
        if self.aspect == "pad":
            image = pad_to_square(image, self.padding_colour, self.size)
        elif self.size * max(image.size) > MAX_SIDE * min(image.size):
            # Only the centre of the long side would be kept, but all of it is resized first.
            raise UserError(
                f"An image of {image.width} x {image.height} pixels is too long to be cropped (over {MAX_SIDE} pixels "
                f"when its shorter side is resized to {self.size}); use padding."
            )
        return self.crops([image])[0]

    def crops(self, images: Sequence[Image.Image]) -> Tensor:
        """[n, 3, S, S] float32, one for each RGB image, which is cropped and never padded."""
        return self._clip(list(images), return_tensors="pt")["pixel_values"].to(torch.float32)

    @property
    def padding_colour(self) -> tuple[int, int, int]:
        """The mean, rounded down: (122, 116, 104) for CLIP. It is close to zero after normalisation."""
        red, green, blue = (int(255 * value) for value in self.mean)
        return red, green, blue

    # The Pil class by name: the torchvision one differs by up to 0.03 in a pixel, and which one "auto" takes
    # would depend on what else is installed.
    @cached_property
    def _clip(self) -> CLIPImageProcessorPil:
        return CLIPImageProcessorPil(
            size={"shortest_edge": self.size},
            crop_size={"height": self.crop, "width": self.crop},
            image_mean=list(self.mean),
            image_std=list(self.std),
        )


def _side(value: Any, key: str, field: str) -> int:
    """An edge length, written either as a number or as {"shortest_edge": n} / {"height": n, "width": n}."""
    if isinstance(value, Mapping):
        square = value.get("height") == value.get("width")
        value = value.get(key) if key in value and square else None
    if not isinstance(value, int):
        raise UserError(
            f"The image preprocessor has no {key} in its {field}; a CLIP preprocessor_config.json was expected."
        )
    return value


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
