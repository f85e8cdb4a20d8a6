"""From a picture to the pixels of the vision tower: pad to a square, resize, crop, normalise.

The LLaVA-1.5 benchmark numbers are made with padding. The transformers processor crops the sides instead and gives
other answers (LLaVA issue 591), so "pad" is the default here for every checkpoint, those of the hub included.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil

from llava.errors import UserError, unknown

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

ASPECTS = ("pad", "crop")
STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")


def open_image(path: str | Path) -> Image.Image:
    """Read the whole picture as RGB. EXIF rotation is ignored, as in the official benchmark scripts."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise UserError(f"No image at {path}; check the path and the image folder.") from error
    # Pillow reports a broken file with any of these, depending on the format and on where the damage is.
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise UserError(
            f"Cannot read the image {path} ({_first_line(error)}); the file is damaged or no image, fetch it again."
        ) from error


def pad_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """Centre the image on a square canvas as large as its longer side; an odd remainder goes right or below."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    canvas = Image.new(image.mode, (side, side), colour)
    canvas.paste(image, ((side - width) // 2, (side - height) // 2))
    return canvas


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
        image = image.convert("RGB")
        if self.aspect == "pad":
            image = pad_to_square(image, self.padding_colour)
        pixels = self._clip(image, return_tensors="pt")["pixel_values"]
        return pixels[0].to(torch.float32)

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
