"""Qwen-VL's preprocessing: images keep their aspect ratio and become flattened patches, as many as their size gives.

An image is resized to whole merge groups (28 x 28 pixels, one visual token each) with a number of pixels between two
bounds, normalised, and split into patches of 14 x 14 pixels, which are flattened; the patches of a group follow one
another. The patch embedding takes two equal frames of an image.

Official code read: transformers 5.23.0, models/qwen2_vl/image_processing_pil_qwen2_vl.py, which is run as a library
Differs from it: images that it refuses are a UserError; the width is resized before the height whatever the Pillow
version. The torchvision variant differs by up to 0.03 per value.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from PIL import Image
from torch import Tensor
from transformers import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from llava.errors import UserError
from llava.processing.clip_image import CLIP_MEAN, CLIP_STD, as_rgb, resize
from llava.processing.config_schema import PixelBounds, checked, checked_preprocessor

Grid = tuple[int, int, int]  # frames, rows and columns of patches

ELONGATION = 200  # largest ratio of the longer to the shorter side that the official code accepts
STEPS = ("do_resize", "do_rescale", "do_normalize")


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
        values = checked_preprocessor(config, STEPS, "Qwen2-VL")
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
