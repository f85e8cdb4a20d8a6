"""Wrappers around Hugging Face models, for images that their own processors have prepared.

The processor has resized, cropped and normalised the images. The wrappers take these pixels as they are and work out
only the token layout: which visual tokens an image becomes, in which order.

Read: transformers 5.23.0, processing and modeling of llava, llava_next, video_llava, qwen2_vl and qwen2_5_vl
"""

from collections.abc import Mapping
from collections.abc import Sequence as Samples
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llava.conversation import DEFAULT_MODE
from llava.errors import UserError
from llava.model.checkpoint.hf_model import HF_CLASSES, refuse_feature_layer
from llava.model.checkpoint.layouts import QWEN, Family, identify
from llava.model.checkpoint.load import Checkpoint
from llava.model.llava_arch import Llava
from llava.model.llava_next import LlavaNext
from llava.model.qwen_vl import QwenVL
from llava.model.video_llava import VideoLlava
from llava.processing.image import Grid, ImageProcessor, QwenImageProcessor
from llava.processing.prompt import Prompt
from llava.reduction.reducer import Reducer
from llava.reduction.token_layout import ModelSpec, PatchGrid, TokenLayout, frames, single, spec_of

ATTENTION = ("sdpa", "eager")
ONE_CALL = "take input_ids and pixels from one call of the model's own processor."


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """One image or video, as the processor returned it.

    Attributes:
        pixels: [C, 3, S, S]; for Qwen-VL [n, patch] flattened patches.
        arrangement: its token layout.
        grid: frames, rows and columns of patches, for Qwen-VL.
    """

    pixels: Tensor
    arrangement: TokenLayout
    grid: Grid | None = None


class HFWrapper(Llava):
    """What all families do with prepared images and prompts; comes before the family's own model wrapper.

    For LLaVA-1.5 it is all: one square of pixels per image, whether the processor cropped or padded it.
    """

    def prompt(self, sample: Any) -> Prompt:
        return sample.prompt

    def views(self, picture: PreparedImage) -> tuple[Tensor, TokenLayout]:
        return picture.pixels, picture.arrangement

    def ready(self, given: Mapping[str, Any]) -> dict[int, list[PreparedImage]]:
        """The images of a call in order, by the id of their placeholder token.

        Args:
            given: arguments of the model's forward, by name.

        Raises:
            UserError: the arguments are not what the model's processor returns.
        """
        pixels, run = _pixels(given, 4), single(self.layout.rows, self.layout.columns)
        return {self.hf_model.config.image_token_id: [PreparedImage(one[None], run) for one in pixels]}

    def candidates(self, reducer: Reducer) -> list[ModelSpec]:
        """Model spec for each kind of image or video that a budget can be meant for; one of them must allow it."""
        return [self.spec]


class WrappedNext(HFWrapper, LlavaNext):
    """LLaVA-NeXT: a base image and tiles, chosen as the processor does; `pixel_values` may be padded to a batch."""

    def ready(self, given: Mapping[str, Any]) -> dict[int, list[PreparedImage]]:
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
            raise UserError(f"{len(sizes)} images of {counts} tiles do not fit pixel_values of {shape}; {ONE_CALL}")
        runs = [self.anyres.arrange(size) for size in sizes]
        pictures = [PreparedImage(crop[: len(run.crops)], run) for crop, run in zip(crops, runs, strict=True)]
        return {self.hf_model.config.image_token_id: pictures}


class WrappedVideo(HFWrapper, VideoLlava):
    """Video-LLaVA: images, and videos whose frames keep their class tokens."""

    def ready(self, given: Mapping[str, Any]) -> dict[int, list[PreparedImage]]:
        config, pictures = self.hf_model.config, {}
        for name in ("pixel_values", "pixel_values_images"):  # two names of one argument
            if given.get(name) is not None:
                pictures = super().ready({"pixel_values": given[name]})
        if given.get("pixel_values_videos") is not None:
            videos = _pixels(given, 5, "pixel_values_videos")
            run = frames(videos.shape[1], self.layout.rows, self.layout.columns).with_cls
            pictures[config.video_token_id] = [PreparedImage(video, run) for video in videos]
        return pictures

    def candidates(self, reducer: Reducer) -> list[ModelSpec]:
        picture = spec_of(self.spec, single(self.layout.rows, self.layout.columns))
        return [self.spec, picture]


class WrappedQwen(HFWrapper, QwenVL):
    """Qwen-VL: patches of images of any shape, one image after another."""

    def ready(self, given: Mapping[str, Any]) -> dict[int, list[PreparedImage]]:
        if given.get("pixel_values_videos") is not None:
            raise UserError("reduce() does not support videos in Qwen-VL; give the frames as images.")
        if given.get("image_grid_thw") is None:
            raise UserError(f"Qwen-VL needs image_grid_thw beside pixel_values; {ONE_CALL}")
        self._require_token_types(given)
        pixels, merge = _pixels(given, 2), self.image_processor.merge
        grids = [tuple(grid) for grid in torch.as_tensor(given["image_grid_thw"]).tolist()]
        counts = [frames * rows * columns for frames, rows, columns in grids]
        if sum(counts) != len(pixels):
            raise UserError(f"image_grid_thw counts {sum(counts)} patches, got {len(pixels)}; {ONE_CALL}")
        runs = [single(rows // merge, columns // merge) for _, rows, columns in grids]
        parts = zip(pixels.split(counts), runs, grids, strict=True)
        return {self.hf_model.config.image_token_id: [PreparedImage(*part) for part in parts]}

    def _require_token_types(self, given: Mapping[str, Any]) -> None:
        """Without mm_token_type_ids transformers gives image tokens the positions of text, which nobody wants."""
        types, ids = given.get("mm_token_type_ids"), given["input_ids"]
        if types is None:
            raise UserError(f"Qwen-VL needs mm_token_type_ids, from which its positions follow; {ONE_CALL}")
        if types.shape != ids.shape or not torch.equal(types == 1, ids == self.hf_model.config.image_token_id):
            raise UserError(f"mm_token_type_ids must be 1 exactly where input_ids has the image token; {ONE_CALL}")

    def patches(self, pictures: Samples[PreparedImage]) -> tuple[Tensor, tuple[Grid, ...]]:
        grids = tuple(picture.grid for picture in pictures if picture.grid is not None)
        return torch.cat([picture.pixels for picture in pictures]), grids

    def candidates(self, reducer: Reducer) -> list[ModelSpec]:
        # Only the processor knows how large images are; the budget is checked for each image when it is encoded.
        tokens = reducer.budget
        return [replace(self.spec, visual_tokens=tokens, layout=PatchGrid(1, tokens))]


def _pixels(given: Mapping[str, Any], axes: int, name: str = "pixel_values") -> Tensor:
    pixels = given[name]
    if not isinstance(pixels, Tensor) or pixels.dim() != axes:
        given_as = tuple(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
        raise UserError(f"{name} must be a tensor with {axes} axes here, got {given_as}; {ONE_CALL}")
    return pixels


WRAPPERS: dict[Family, type[HFWrapper]] = {
    "llava": HFWrapper,
    "llava_next": WrappedNext,
    "video_llava": WrappedVideo,
    "qwen2_5_vl": WrappedQwen,
    "qwen2_vl": WrappedQwen,
}


def family_of(model: Any) -> Family:
    """The family of a Hugging Face model, by its class."""
    for family, container in HF_CLASSES.items():
        if isinstance(model, container):
            return family
    names = ", ".join(container.__name__ for container in HF_CLASSES.values())
    raise UserError(f"reduce() takes a Hugging Face model, one of {names}; got {type(model).__name__}.")


def wrap_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    text_tower: str | Path | None = None,
) -> HFWrapper:
    """The wrapper around a Hugging Face model.

    Raises:
        UserError: the staged forward does not support a part or the state of the model.
    """
    family = family_of(model)
    _refuse_unfit(model, family)
    config, vision, count = model.config, model.config.vision_config, 0
    conventions: dict[str, str] = {}
    processor: ImageProcessor | QwenImageProcessor
    if family in QWEN:
        edges = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        processor = QwenImageProcessor(patch=edges[0], merge=edges[1], temporal=edges[2])
    else:
        processor = ImageProcessor(size=vision.image_size, crop=vision.image_size)
    if family == "llava_next":
        conventions = {"reading": "transformers"}
    if family == "video_llava":
        count = max(1, config.video_seq_length // ((vision.image_size // vision.patch_size) ** 2 + 1))
    checkpoint = Checkpoint(
        model=model,
        tokenizer=tokenizer,  # type: ignore[arg-type]  # None where no question is searched for
        image_processor=processor,
        conversation=DEFAULT_MODE,
        name=type(model).__name__,
        layout="transformers",
        text_tower=text_tower,
        notes=(),
        vocabulary=config.get_text_config().vocab_size,
        family=family,
        frames=count,
    )
    return WRAPPERS[family](checkpoint, model.device, **conventions)


def state_of(model: Any) -> tuple[Any, ...]:
    """What a wrapper is built from."""
    inner, config = model.model, model.config
    parts = (inner, *model.children(), *inner.children(), *inner.parameters(recurse=False))
    features = [getattr(config, name, None) for name in ("vision_feature_layer", "vision_feature_select_strategy")]
    return (*map(id, parts), model.device, *features, inner.language_model.config._attn_implementation)


def refuse_training(*modules: nn.Module) -> None:
    """Raise UserError for a module in training mode, in which dropout is on."""
    for module in modules:
        if module.training:
            name = type(module).__name__
            raise UserError(f"The model ({name}) is in training mode; call model.eval(), reduction is for inference.")


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
        refuse_feature_layer(config, name)
    refuse_training(*model.modules())
    used = model.model.language_model.config._attn_implementation
    if used not in ATTENTION:
        raise UserError(f"Load the model with attn_implementation='sdpa' (or 'eager'), got {used!r}.")
    devices = {weight.device for weight in model.parameters()}
    if len(devices) > 1 or torch.device("meta") in devices:
        places = ", ".join(sorted(map(str, devices)))
        raise UserError(f"The model must be on one device as a whole, it is on {places}; load it without device_map.")
