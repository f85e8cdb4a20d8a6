"""LLaVA-NeXT (1.6): the tower sees an image as a base image and as tiles.

Official code read: haotian-liu/LLaVA@c121f04, llava/model/llava_arch.py and llava/mm_utils.py
Differs from it: patches that unpadding removes are not projected; the papers' convention "spatial" can be chosen.
"""

from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import torch
from accelerate.utils import align_module_device
from PIL import Image
from torch import Tensor

from llava.model.llava_arch import Llava
from llava.processing.image import AnyresProcessor
from llava.reduction.token_layout import Canvas, ModelSpec, TokenLayout, spec_of


class LlavaNext(Llava):
    """A LLaVA whose images become several crops.

    Args:
        merge: how tiles are joined, "spatial_unpad" or "spatial"; None takes the checkpoint's own rule.
        anyres_rule: how the resolution of an image is chosen, "original" or "transformers".
        force: (width, height) of the canvas for every image; None chooses the best for each. In the tables of most
            papers it is twice the tower's side with merge="spatial", which makes 2,880 tokens of every image.
    """

    def __init__(
        self,
        checkpoint: Any,
        device: torch.device,
        merge: Literal["spatial_unpad", "spatial"] | None = None,
        anyres_rule: Literal["original", "transformers"] = "original",
        force: tuple[int, int] | None = None,
    ):
        super().__init__(checkpoint, device)
        self.anyres = AnyresProcessor(
            checkpoint.image_processor,
            (self.layout.rows, self.layout.columns),
            checkpoint.model.config.image_grid_pinpoints,
            anyres_rule,
            merge or checkpoint.merge or "spatial_unpad",
            force,
        )
        with align_module_device(self.hf_model.model):  # weights that accelerate has offloaded
            self.newline: Tensor = self.hf_model.model.image_newline.to(device)

    @property
    def conventions(self) -> dict[str, Any]:
        anyres = self.anyres
        return {
            "merge": anyres.merge,
            "anyres_rule": anyres.anyres_rule,
            "tiles": "x".join(map(str, anyres.force)) if anyres.force else "best",
        }

    def views(self, image: Any) -> tuple[Tensor, TokenLayout]:
        return self.anyres(image)

    def canvas(self, image: Any) -> Canvas | None:
        return self.anyres.canvas(image.size) if isinstance(image, Image.Image) else None

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of the largest image before any reduction; most have fewer."""
        return self.largest.tokens

    @cached_property
    def largest(self) -> TokenLayout:
        """The layout with the most tokens that an image can become."""
        sizes = [self.anyres.force] if self.anyres.force else self.anyres.pinpoints
        return max((self.anyres.arrange(size) for size in sizes), key=lambda run: run.tokens)

    @cached_property
    def spec(self) -> ModelSpec:
        rows = self.anyres.force[1] if self.anyres.force else max(height for _, height in self.anyres.pinpoints)
        newline = self.anyres.merge == "spatial_unpad"
        most = newline * rows // self.anyres.tile * self.layout.rows
        return replace(spec_of(super().spec, self.largest), most_newlines=most)
