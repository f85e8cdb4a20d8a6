"""Qwen2.5-VL and Qwen2-VL at run time: images keep their shape, tokens stand at rows and columns.

The tower has no class token: methods that rank by CLS refuse to run, those with a choice take received attention. A
image's tokens are merge groups of 2 x 2 patches; the merger is the projector.

Paper: https://arxiv.org/abs/2502.13923, https://arxiv.org/abs/2409.12191
Official code read: transformers 5.23.0, models/qwen2_5_vl and models/qwen2_vl
Differs from it: the same prompts and positions; videos are not read.
"""

from collections.abc import Sequence as Samples
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llava.errors import UserError
from llava.model.llava_arch import EncodedImage, Llava, encoded_image_of
from llava.model.multimodal_encoder.qwen_encoder import Merger, encode_qwen, score_flops, tower_flops
from llava.processing.image import Grid, as_rgb
from llava.reduction.reducer import Reducer
from llava.reduction.token_layout import ModelSpec, PatchGrid, single

if TYPE_CHECKING:
    from llava.pipeline.accounting import Operations, Timer


class QwenVL(Llava):
    """Qwen2.5-VL or Qwen2-VL.

    Args:
        min_pixels, max_pixels: bounds of an image after resizing; None takes the checkpoint's.
    """

    axes = True

    def __init__(
        self, checkpoint: Any, device: torch.device, min_pixels: int | None = None, max_pixels: int | None = None
    ):
        super().__init__(checkpoint, device)
        bounds = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        chosen = {name: value for name, value in bounds.items() if value is not None}
        self.image_processor = replace(self.image_processor, **chosen)

    @property
    def conventions(self) -> dict[str, Any]:
        return {"min_pixels": self.image_processor.min_pixels, "max_pixels": self.image_processor.max_pixels}

    def _read_tower(self) -> None:
        self.tower = self.hf_model.model.visual
        self.projector = Merger(self.tower)
        self.select_layer = -1
        # The largest square image.
        side = max(1, int(self.image_processor.max_pixels**0.5) // self._edge)
        self.layout = PatchGrid(side, side)

    @property
    def _edge(self) -> int:
        """Pixels along the edge of a merge group."""
        return self.image_processor.patch * self.image_processor.merge

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of the largest image before any reduction."""
        return self.image_processor.max_pixels // self._edge**2

    @cached_property
    def spec(self) -> ModelSpec:
        layers, blocks, known = len(self.llm.layers), len(self.tower.blocks), self.text_tower is not None
        return ModelSpec(self.visual_tokens, layers, self.layout, blocks, has_cls=False, has_text_tower=known)

    def patches(self, pictures: Samples[Any]) -> tuple[Tensor, tuple[Grid, ...]]:
        """Flattened patches of all images, one after another, and the grid of each."""
        return self.image_processor([as_rgb(picture) for picture in pictures])

    def encode_images(
        self, pictures: Samples[Any], keys: Samples[object], reducer: Reducer, timer: "Timer"
    ) -> list[EncodedImage]:
        if "tower" in reducer.acts_in or "input_grid" in reducer.acts_in:
            raise UserError(
                f"{reducer.name} acts on pixels or inside a CLIP tower; {self.name} has a tower of another kind. "
                "Choose a method that acts behind the tower."
            )
        patches, grids = self.patches(pictures)
        timer.mark("preprocess")
        encoded = encode_qwen(self.tower, patches.to(self.device), grids, reducer.tower_scores(tiled=False))
        return [encoded_image_of(one, single(*one.grid), keep_cls=False) for one in encoded]

    def count_tower(self, operations: "Operations", picture: EncodedImage, images: int) -> None:
        merge = self.image_processor.merge
        grid = 1, picture.encoded.grid[0] * merge, picture.encoded.grid[1] * merge
        operations.add("tower", tower_flops, self.tower, grid, images=images)
        for score in picture.encoded.scores:
            operations.add("selection", score_flops, self.tower, score, grid, images=images)

    def groups(self, picture: EncodedImage) -> tuple[int, int, int]:
        """Frames, rows and columns of an image's tokens, from which their positions follow."""
        return 1, *picture.encoded.grid
