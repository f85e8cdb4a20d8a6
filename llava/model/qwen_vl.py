"""Qwen2.5-VL and Qwen2-VL in benchmarks: images keep their shape, and the positions of tokens are rows and columns.

The tower and its merger are those of transformers, unchanged. Tower scores are read as in other families that run their
own forward (llava/model/multimodal_encoder/stock_tower.py). Tokens are reduced after the merger, which makes one token
from 2 x 2 patches, so a method's "features" are projected tokens here, as in `reduce`. The tower has no class token, so
the attention that a patch receives replaces class attention.

Paper: https://arxiv.org/abs/2502.13923, https://arxiv.org/abs/2409.12191
Official code read: transformers 5.23.0, models/qwen2_5_vl and models/qwen2_vl
Differs from it: videos are not supported here; benchmarks of videos run these models as llava.hf.families does.
    Features, prompts and positions are the same.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llava.errors import MethodError
from llava.model.llava_arch import EncodedImage, Llava, encoded_image_of
from llava.model.multimodal_encoder.clip_encoder import Encoded
from llava.model.multimodal_encoder.stock_tower import StockTower
from llava.processing.image import Grid, QwenImageProcessor, as_rgb
from llava.reduction.modules import linear_flops, projector_flops
from llava.reduction.reducer import Reducer
from llava.reduction.token_layout import WITHOUT_PADDING, Canvas, ModelSpec, PatchGrid, TokenLayout, single
from llava.transformers_names import vision_arguments

if TYPE_CHECKING:
    from llava.pipeline.accounting import Operations, Timer


class QwenVL(Llava):
    """Qwen2.5-VL or Qwen2-VL.

    Args:
        min_pixels, max_pixels: bounds for the pixels of an image after resizing; None takes the checkpoint's bounds.
    """

    axes = True
    image_processor: QwenImageProcessor

    def __init__(
        self, checkpoint: Any, device: torch.device, min_pixels: int | None = None, max_pixels: int | None = None
    ):
        super().__init__(checkpoint, device)
        bounds = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        chosen: dict[str, Any] = {name: value for name, value in bounds.items() if value is not None}
        self.image_processor = replace(self.image_processor, **chosen)

    @property
    def conventions(self) -> dict[str, Any]:
        return {"min_pixels": self.image_processor.min_pixels, "max_pixels": self.image_processor.max_pixels}

    def _read_tower(self) -> None:
        self.tower = self.hf_model.model.visual
        # Methods read the last block but one by default. Here that becomes the next block that attends within whole
        # images. In Qwen2.5-VL this is the last block, whose output is projected, like that of LLaVA's default block.
        self.stock_tower = StockTower(self.tower.blocks, self.tower.config, cls=None, runs=True, last=-2)
        self.projector = nn.Identity()
        # The patch grid is that of the largest square image.
        side = max(1, int(self.image_processor.max_pixels**0.5) // self._edge)
        self.layout = PatchGrid(side, side)

    @property
    def _edge(self) -> int:
        """Pixels along the edge of a visual token."""
        return self.image_processor.patch * self.image_processor.merge

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of the largest image before any reduction."""
        return self.image_processor.max_pixels // self._edge**2

    @cached_property
    def spec(self) -> ModelSpec:
        layers, blocks, known = len(self.llm.layers), len(self.tower.blocks), self.text_tower is not None
        return ModelSpec(self.visual_tokens, layers, self.layout, blocks, has_cls=False, has_text_tower=known)

    def patches(self, images: Sequence[Any]) -> tuple[Tensor, tuple[Grid, ...]]:
        """Flattened patches of all images, one image after another, and the grid of each image."""
        return self.image_processor([as_rgb(image) for image in images])

    def layout_of(self, image: Any) -> TokenLayout:
        _, ((_, rows, columns),) = self.patches([image])
        return single(rows // self.image_processor.merge, columns // self.image_processor.merge)

    def canvas(self, image: Any) -> Canvas | None:
        return WITHOUT_PADDING

    def encode_images(
        self, images: Sequence[Any], keys: Sequence[object], reducer: Reducer, timer: "Timer"
    ) -> list[EncodedImage]:
        if "tower" in reducer.acts_in or "input_grid" in reducer.acts_in:
            raise MethodError(
                f"{reducer.name} acts on pixels or inside a CLIP tower; {self.name} has a tower of another kind. "
                "Choose a method that acts behind the tower."
            )
        patches, grids = self.patches(images)
        timer.mark("preprocess")
        return [
            encoded_image_of(one, single(*one.grid), keep_cls=False) for one in self.encode(patches, grids, reducer)
        ]

    def encode(self, patches: Tensor, grids: Sequence[Grid], reducer: Reducer) -> list[Encoded]:
        """Run tower and merger on images of any sizes.

        Args:
            patches: [sum of frames * rows * columns, 3 * temporal * patch * patch], as QwenImageProcessor gives them.
            grids: for each image, its frames (1 here), rows and columns of patches.

        Returns:
            For each image, its visual tokens [1, n, D] as features, scores [1, n, ...], and rows and columns of tokens.
        """
        merge, sides = self.image_processor.merge, [(rows, columns) for _, rows, columns in grids]
        shapes = [(rows // merge, columns // merge) for rows, columns in sides]
        given = patches.to(self.device, self.tower.dtype, non_blocking=True)
        with self.stock_tower.recording(reducer.tower_scores(tiled=False)) as calls:
            output = self.tower(given, **vision_arguments(self.tower, grids, self.device))
        tokens = output.pooler_output.split([rows * columns for rows, columns in shapes])
        scores = self.stock_tower.scores_of_tokens(calls, sides, merge, self.device)
        return [
            Encoded(
                tokens[i][None],
                {score: values[i][None] for score, values in scores.items()},
                shape,
                spent=self.stock_tower.score_flops(calls, sides[i][0] * sides[i][1]),
            )
            for i, shape in enumerate(shapes)
        ]

    def count_tower(self, operations: "Operations", image: EncodedImage, images: int) -> None:
        merge = self.image_processor.merge
        rows, columns = image.encoded.grid
        operations.add("tower", tower_flops, self.tower, (rows * merge, columns * merge), images=images)
        operations.add("projector", projector_flops, self.tower.merger, rows * columns, images=images)
        if image.encoded.spent:
            operations.add("selection", int, image.encoded.spent, images=images)


def tower_flops(visual: Any, sides: tuple[int, int]) -> int:
    """Operations of the patch embedding and the blocks for one image.

    Args:
        sides: rows and columns of patches.
    """
    patches, config = sides[0] * sides[1], visual.config
    whole = getattr(config, "fullatt_block_indexes", range(len(visual.blocks)))
    total: int = 2 * patches * visual.patch_embed.proj.weight.numel()
    for index, block in enumerate(visual.blocks):
        # Each side is cut into pieces of at most `edge` patches; a window is a piece of rows by a piece of columns.
        edge = max(sides) if index in whole else config.window_size // config.patch_size
        pairs = squares(sides[0], edge) * squares(sides[1], edge)
        total += sum(linear_flops(part, patches) for part in block.modules() if isinstance(part, nn.Linear))
        total += 4 * pairs * block.attn.proj.in_features
    return total


def squares(length: int, edge: int) -> int:
    """Cut `length` into pieces of `edge` and a rest, and return the sum of the squared lengths of the pieces."""
    return length // edge * edge**2 + (length % edge) ** 2
