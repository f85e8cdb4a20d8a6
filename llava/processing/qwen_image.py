"""From pictures to the patches of Qwen's vision transformer: every picture keeps its shape and gives its own number.

A picture is resized to whole merge groups (28 x 28 pixels, one visual token each) and to a number of pixels between two
bounds, normalised, and cut into patches of 14 x 14 pixels that are flattened, the patches of a group one behind
another. A picture is a film of two equal frames to the patch embedding.

Official code read: transformers 5.23.0, models/qwen2_vl/image_processing_pil_qwen2_vl.py, which is run as a library.
Differs from it: a picture that it refuses is a UserError. The torchvision variant differs by up to 0.03 in a pixel.
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
from llava.processing.clip_image import CLIP_MEAN, CLIP_STD

Grid = tuple[int, int, int]  # frames, rows and columns of patches

ELONGATION = 200  # longer over shorter edge that the official code still takes
STEPS = ("do_resize", "do_rescale", "do_normalize")


@dataclass(frozen=True)
class QwenImageProcessor:
    """RGB pictures -> flattened patches.

    Attributes:
        min_pixels, max_pixels: bounds of width * height after resizing. A smaller picture is enlarged and a larger one
            shrunk, its shape kept as far as whole groups allow; no edge is shorter than a group.
        mean, std: per channel, on pixels in 0..1.
        patch: edge of a patch in pixels.
        merge: edge of a merge group in patches.
        temporal: frames that the patch embedding takes at once.
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
        """Read a Qwen2-VL preprocessor_config.json. A step switched off there is refused: the tower expects all.

        The bounds are written as min_pixels and max_pixels, in newer files as size: {shortest_edge, longest_edge},
        which are numbers of pixels all the same.
        """
        off = [step for step in STEPS if not config.get(step, True)]
        if off:
            raise UserError(
                f"The image preprocessor switches off {', '.join(off)}; only full Qwen2-VL preprocessing is known."
            )
        size = config.get("size") or {}
        bounds = {
            "min_pixels": config.get("min_pixels") or size.get("min_pixels") or size.get("shortest_edge"),
            "max_pixels": config.get("max_pixels") or size.get("max_pixels") or size.get("longest_edge"),
        }
        edges = {"patch": "patch_size", "merge": "merge_size", "temporal": "temporal_patch_size"}
        return cls(
            mean=tuple(config.get("image_mean") or CLIP_MEAN),
            std=tuple(config.get("image_std") or CLIP_STD),
            **{name: value for name, value in bounds.items() if value is not None},
            **{name: config[key] for name, key in edges.items() if key in config},
        )

    def grid(self, size: tuple[int, int]) -> Grid:
        """The grid of a picture of so many pixels (width, height), without reading any.

        Raises:
            UserError: the picture is more than 200 times as long as wide.
        """
        width, height = size
        if max(size) > ELONGATION * min(size):
            raise UserError(
                f"Qwen takes pictures up to {ELONGATION} times as long as wide, this one has {width} x {height} "
                "pixels; cut it."
            )
        rows, columns = smart_resize(height, width, self.patch * self.merge, self.min_pixels, self.max_pixels)
        return 1, rows // self.patch, columns // self.patch

    def __call__(self, images: Sequence[Image.Image]) -> tuple[Tensor, tuple[Grid, ...]]:
        """Pictures of any sizes, one behind another.

        Returns:
            [n, 3 * temporal * patch * patch] float32, the patches of all pictures: group after group in raster order,
            in each its patches in raster order. And the grid of every picture, as host integers.
        """
        grids = tuple(self.grid(image.size) for image in images)
        return self._official(images=list(images), return_tensors="pt")["pixel_values"], grids

    @cached_property
    def _official(self) -> Qwen2VLImageProcessorPil:
        return Qwen2VLImageProcessorPil(
            size={"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels},
            image_mean=list(self.mean),
            image_std=list(self.std),
            patch_size=self.patch,
            merge_size=self.merge,
            temporal_patch_size=self.temporal,
        )
