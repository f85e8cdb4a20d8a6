"""The runtimes around model objects of transformers, whose pictures their own processors have prepared.

Pixels that are resized, cut and normalised enter the tower as they are; only how they become a run of visual tokens is
worked out again.

Read: transformers 5.23.0, processing and modeling of llava, llava_next, video_llava, qwen2_vl and qwen2_5_vl
"""

from collections.abc import Mapping
from collections.abc import Sequence as Samples
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llava.conversation import DEFAULT_MODE
from llava.errors import UserError
from llava.model.checkpoint.hf_model import CONTAINERS
from llava.model.checkpoint.identify import QWEN, Family, identify
from llava.model.checkpoint.load import Checkpoint
from llava.model.llava_arch import Llava
from llava.model.llava_next import LlavaNext
from llava.model.qwen_vl import QwenVL
from llava.model.video_llava import VideoLlava
from llava.processing.clip_image import ImageProcessor
from llava.processing.prompt import Prompt
from llava.processing.qwen_image import Grid, QwenImageProcessor
from llava.reduction.model_spec import ModelFacts, facts_of
from llava.reduction.patch_grid import Layout
from llava.reduction.reducer import Reducer
from llava.reduction.token_layout import Arrangement, frames, single

ATTENTION = ("sdpa", "eager")
ONE_CALL = "take input_ids and pixels from one call of the model's own processor."


@dataclass(frozen=True, eq=False)
class Ready:
    """One picture or video as a processor left it.

    Attributes:
        pixels: [C, 3, S, S]; of Qwen [n, patch] flattened patches.
        arrangement: the run of visual tokens that it becomes.
        grid: frames, rows and columns of patches, of Qwen.
    """

    pixels: Tensor
    arrangement: Arrangement
    grid: Grid | None = None


class Stock:
    """What a family's runtime does with prepared pictures and prompts."""

    def prompt(self, sample) -> Prompt:
        return sample.prompt

    def views(self, picture: Ready) -> tuple[Tensor, Arrangement]:
        return picture.pixels, picture.arrangement

    def ready(self, given: Mapping[str, Any]) -> dict[int, list[Ready]]:
        """Pictures in order, by the token that stands for them.

        Args:
            given: arguments of the model's forward, by name.

        Raises:
            UserError: they are not what the model's processor makes.
        """
        pixels, run = _pixels(given, 4), single(self.layout.rows, self.layout.columns)
        return {self.container.config.image_token_id: [Ready(one[None], run) for one in pixels]}

    def candidates(self, reducer: Reducer) -> list[ModelFacts]:
        """The facts of pictures that a budget may be meant for; it must be possible for one of them."""
        return [self.facts]


class StockLlava(Stock, Llava):
    """LLaVA-1.5: one crop per picture, however the processor cut or padded it."""


class StockNext(Stock, LlavaNext):
    """LLaVA-NeXT: crops chosen by the processor's reading, filled up to as many as the batch's largest picture has."""

    def ready(self, given: Mapping[str, Any]) -> dict[int, list[Ready]]:
        if given.get("image_sizes") is None:
            raise UserError(f"LLaVA-NeXT needs image_sizes beside pixel_values; {ONE_CALL}")
        sizes = [(width, height) for height, width in torch.as_tensor(given["image_sizes"]).tolist()]
        canvases, tile = [self.anyres.resolution(size) for size in sizes], self.anyres.tile
        counts = [1 + (width // tile) * (height // tile) for width, height in canvases]
        pixels = given["pixel_values"]
        if pixels.dim() == 4 and len(pixels) == sum(counts):
            crops = list(pixels.split(counts))
        elif pixels.dim() == 5 and len(pixels) == len(sizes) and pixels.shape[1] >= max(counts):
            crops = list(pixels)
        else:
            shape = tuple(pixels.shape)
            raise UserError(f"{len(sizes)} pictures of {counts} crops do not fit pixel_values of {shape}; {ONE_CALL}")
        runs = [self.anyres.arrange(size) for size in sizes]
        pictures = [Ready(crop[: len(run.crops)], run) for crop, run in zip(crops, runs, strict=True)]
        return {self.container.config.image_token_id: pictures}


class StockVideo(Stock, VideoLlava):
    """Video-LLaVA: pictures, and videos whose frames keep their class tokens."""

    def ready(self, given: Mapping[str, Any]) -> dict[int, list[Ready]]:
        config, found = self.container.config, {}
        for name in ("pixel_values", "pixel_values_images"):  # two names of the same
            if given.get(name) is not None:
                found = super().ready({"pixel_values": given[name]})
        if given.get("pixel_values_videos") is not None:
            videos = _pixels(given, 5, "pixel_values_videos")
            run = frames(videos.shape[1], self.layout.rows, self.layout.columns).with_cls()
            found[config.video_token_id] = [Ready(video, run) for video in videos]
        return found

    def candidates(self, reducer: Reducer) -> list[ModelFacts]:
        picture = facts_of(self.facts, single(self.layout.rows, self.layout.columns))
        return [self.facts, picture]


class StockQwen(Stock, QwenVL):
    """Qwen-VL: patches of pictures of any shape, one picture behind another."""

    def ready(self, given: Mapping[str, Any]) -> dict[int, list[Ready]]:
        if given.get("pixel_values_videos") is not None:
            raise UserError("Videos are not reduced in Qwen-VL; give its frames as pictures.")
        if given.get("image_grid_thw") is None:
            raise UserError(f"Qwen-VL needs image_grid_thw beside pixel_values; {ONE_CALL}")
        pixels, merge = _pixels(given, 2), self.image_processor.merge
        grids = [tuple(grid) for grid in torch.as_tensor(given["image_grid_thw"]).tolist()]
        counts = [frames * rows * columns for frames, rows, columns in grids]
        if sum(counts) != len(pixels):
            raise UserError(f"image_grid_thw counts {sum(counts)} patches, got {len(pixels)}; {ONE_CALL}")
        runs = [single(rows // merge, columns // merge) for _, rows, columns in grids]
        parts = zip(pixels.split(counts), runs, grids, strict=True)
        return {self.container.config.image_token_id: [Ready(*part) for part in parts]}

    def patches(self, pictures: Samples[Ready]) -> tuple[Tensor, tuple[Grid, ...]]:
        return torch.cat([picture.pixels for picture in pictures]), tuple(picture.grid for picture in pictures)

    def candidates(self, reducer: Reducer) -> list[ModelFacts]:
        # The processor alone knows how large pictures are: each is held against the budget when it comes.
        tokens = reducer.budget
        return [replace(self.facts, visual_tokens=tokens, layout=Layout(1, tokens))]


def _pixels(given: Mapping[str, Any], axes: int, name: str = "pixel_values") -> Tensor:
    pixels = given[name]
    if not isinstance(pixels, Tensor) or pixels.dim() != axes:
        found = tuple(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
        raise UserError(f"{name} must be a tensor with {axes} axes here, got {found}; {ONE_CALL}")
    return pixels


# Around a model object

RUNTIMES: dict[Family, type[Stock]] = {
    "llava": StockLlava,
    "llava_next": StockNext,
    "video_llava": StockVideo,
    "qwen2_5_vl": StockQwen,
    "qwen2_vl": StockQwen,
}


def family_of(model: Any) -> Family:
    """The family of a model object, by its class."""
    for family, container in CONTAINERS.items():
        if isinstance(model, container):
            return family
    names = ", ".join(container.__name__ for container in CONTAINERS.values())
    raise UserError(f"reduce() takes a model object of transformers, one of {names}; got {type(model).__name__}.")


def stock_runtime(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    text_tower: str | Path | None = None,
) -> Stock:
    """The runtime of its family around a model object.

    Raises:
        UserError: the staged forward does not know a part of the model, or its state.
    """
    family = family_of(model)
    _refuse_unfit(model, family)
    config, vision, conventions, pinpoints, count = model.config, model.config.vision_config, {}, (), 0
    if family in QWEN:
        edges = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        processor = QwenImageProcessor(patch=edges[0], merge=edges[1], temporal=edges[2])
    else:
        processor = ImageProcessor(size=vision.image_size, crop=vision.image_size)
    if family == "llava_next":
        pinpoints, conventions = tuple(map(tuple, config.image_grid_pinpoints)), {"reading": "transformers"}
    if family == "video_llava":
        count = max(1, config.video_seq_length // ((vision.image_size // vision.patch_size) ** 2 + 1))
    checkpoint = Checkpoint(
        model=model,
        tokenizer=tokenizer,
        image_processor=processor,
        conversation=DEFAULT_MODE,
        name=type(model).__name__,
        layout="transformers",
        vision_tower_source="the model",
        text_tower=text_tower,
        notes=(),
        vocabulary=config.get_text_config().vocab_size,
        family=family,
        pinpoints=pinpoints,
        frames=count,
    )
    return RUNTIMES[family](checkpoint, model.device, **conventions)


def _refuse_unfit(model: PreTrainedModel, family: Family) -> None:
    config, name = model.config, type(model).__name__
    identify(config.to_dict(), Path(name))
    if family not in QWEN:
        layer, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
        if not isinstance(layer, int) or strategy != "default":
            raise UserError(
                f"{name} must take its features from one tower layer, without the class token; this one has "
                f"vision_feature_layer {layer} and vision_feature_select_strategy {strategy!r}."
            )
    if model.training:
        raise UserError("The model is in training mode; call model.eval() first, reduction is for inference.")
    used = model.model.language_model.config._attn_implementation
    if used not in ATTENTION:
        raise UserError(f"Load the model with attn_implementation='sdpa' (or 'eager'), got {used!r}.")
    devices = {weight.device for weight in model.parameters()}
    if len(devices) > 1 or torch.device("meta") in devices:
        places = ", ".join(sorted(map(str, devices)))
        raise UserError(f"The model must lie on one device as a whole, it is on {places}; load it without device_map.")
