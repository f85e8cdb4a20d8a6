"""vLLM's LLaVA, LLaVA-NeXT, Qwen2.5-VL, Qwen3-VL, Qwen3.5 and InternVL3 with a method inside; for the engine alone.

The processor writes as many image tokens into a prompt as the method keeps, so scheduler, KV blocks and prefix cache
see K tokens. The model reduces the N tokens of its tower and projector to K. LLaVA's pixels are those of the benchmarks
(llava/processing/image.py). Without a method all this is vLLM's own.

Official code read: vLLM 0.26.0 and 0.32.0, model_executor/models (llava, llava_next, qwen2_5_vl, qwen3_vl, qwen3_5,
interns1, interfaces), v1/worker/gpu_model_runner.py, multimodal/processing and registry
"""

import importlib
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from inspect import signature
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature

from llava import transformers_names  # noqa: F401  # before vLLM, which misses names of transformers

# isort: split
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.model_executor.models.interns1 import InternS1ForConditionalGeneration
from vllm.model_executor.models.llava import LlavaForConditionalGeneration
from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from vllm.model_executor.models.qwen3_5 import Qwen3_5ForConditionalGeneration
from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import PromptReplacement, PromptUpdateDetails
from vllm.platforms import current_platform
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from llava.errors import UserError
from llava.processing.image import ImageProcessor, as_rgb
from llava.reduction.token_layout import TokenLayout
from llava.serving.engine_method import CLIP, EngineMethod, EngineTower, served_by

# Prompts


def prompt_updates(
    stock: Callable[..., Any], info: Any, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any
) -> Any:
    """The prompt updates of a vLLM processor, with K image tokens for each image instead of N."""
    served, updates = served_by(info.get_hf_config()), stock(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
    if served is None:
        return updates

    def shortened(update: Any, number: int) -> Any:
        written = update.replacement(number) if callable(update.replacement) else update.replacement
        details = written if isinstance(written, PromptUpdateDetails) else PromptUpdateDetails.from_seq(written)
        embed, ids = details.is_embed, details.full
        if isinstance(ids, str):  # before vLLM 0.32, for some families
            ids = info.get_tokenizer().encode(ids, add_special_tokens=False)
        if embed is not None and len(signature(embed).parameters) == 2:  # before 0.32
            embed = partial(embed, info.get_tokenizer())
        visual = [True] * len(ids) if embed is None else embed(ids).tolist()
        layout = layout_of_item(served, sum(visual), mm_items, out_mm_kwargs, number)
        if layout.tokens != sum(visual):
            raise UserError(f"The engine makes {sum(visual)} tokens of an image, and its layout has {layout.tokens}.")
        room, full = served.kept(layout), []
        for token, is_visual in zip(ids, visual, strict=True):
            if not is_visual or room > 0:
                full.append(token)
            room -= is_visual
        return PromptUpdateDetails(full=full, is_embed=details.is_embed)

    images = [update for update in updates if update.modality == "image"]
    others = [update for update in updates if update.modality != "image"]
    return [*(PromptReplacement("image", one.target, partial(shortened, one)) for one in images), *others]


def layout_of_item(served: EngineMethod, tokens: int, mm_items: Any, out: Any, number: int) -> TokenLayout:
    """The token layout of image `number` of a request.

    Args:
        tokens: number of tokens that the engine makes of the image.
    """
    if served.anyres is not None:
        size = mm_items["image"].get_image_size(number)
        return served.layout(tokens, (size.width, size.height))
    if served.side:
        return served.layout(tokens)
    _, rows, columns = out["image"][number]["image_grid_thw"].data.tolist()
    return served.layout(tokens, grid=(rows // served.merge, columns // served.merge))


def take_images_as_benchmarks_do(made: Any, info: Any, served: EngineMethod) -> None:
    """Have a processor of vLLM convert and prepare LLaVA's images by the code that prepares those of benchmarks.

    The engine would put clear images on white, and make grey of 16 bits white. Transformers' processor would crop the
    sides of an image of LLaVA-1.5, where benchmarks pad it to a square, and resizes tiles of LLaVA-NeXT by other code.
    """
    clip = ImageProcessor.from_config(info.get_hf_processor().image_processor.to_dict())
    anyres = served.anyres and replace(served.anyres, clip=clip)
    parser = info.data_parser
    # With a cache of processed images, vLLM parses what is not in it again, and then converts it. Before vLLM 0.32,
    # _apply_hf_processor_main processes text as well, and calls the other.
    step = "_apply_hf_processor_mm_only" if hasattr(made, "_apply_hf_processor_mm_only") else "_apply_hf_processor_main"
    parse, process = parser._parse_image_data, getattr(made, step)

    def converted(data: Any) -> Any:
        if isinstance(data, list):
            return parse([as_rgb(one) if isinstance(one, Image.Image) else one for one in data])
        return parse(as_rgb(data) if isinstance(data, Image.Image) else data)

    def prepared(*, mm_items: Any, **given: Any) -> Any:
        images = [image for items in mm_items.values() for image in items.get_processor_data().get("images", ())]
        if not images:
            return process(mm_items=mm_items, **given)
        options = given["hf_kwargs" if "hf_kwargs" in given else "hf_processor_mm_kwargs"]
        if changed := ", ".join(sorted(info.ctx.get_merged_mm_kwargs(options))):
            raise UserError(f"Images are processed as in benchmarks; leave {changed} out of mm_processor_kwargs.")
        if kinds := sorted({type(image).__name__ for image in images if not isinstance(image, Image.Image)}):
            raise UserError(f"Give images as files or PIL images, got {', '.join(kinds)}.")
        pixels = [clip(image)[None] if anyres is None else anyres(image)[0] for image in images]
        pixels = [own.to(info.ctx.model_config.dtype) for own in pixels]
        if anyres is None:
            return BatchFeature({"pixel_values": torch.cat(pixels)})
        return BatchFeature({"pixel_values": pixels, "image_sizes": torch.tensor([own.size[::-1] for own in images])})

    parser._parse_image_data = converted
    setattr(made, step, prepared)


def with_short_prompts(model: Any) -> Any:
    """A class decorator that registers the model's processor with `prompt_updates` in place of its own updates."""
    base = model._processor_factory

    def processor(info: Any, dummy_inputs: Any, **more: Any) -> Any:
        made = base.processor(info, dummy_inputs, **more)
        served = served_by(info.get_hf_config())  # wrong settings stop the engine here, at its start
        made._get_prompt_updates = partial(prompt_updates, made._get_prompt_updates, info)
        if served is not None and served.family is CLIP:
            take_images_as_benchmarks_do(made, info, served)
        return made

    return MULTIMODAL_REGISTRY.register_processor(processor, info=base.info, dummy_inputs=base.dummy_inputs)(model)


# Models


class ReducedModelMixin:
    """What all reduced models share; as a base class it stands before vLLM's class."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.served = served_by(vllm_config.model_config.hf_config)

    def attentions(self) -> list[Any]:
        """For each tower block, the module that projects queries and keys and passes them to its `attn`."""
        raise NotImplementedError

    @cached_property
    def engine_tower(self) -> EngineTower:
        assert self.served is not None
        built = self.attentions()
        missing = self.served.spec.tower_blocks - len(built)  # blocks after the layer that is projected
        group = get_tp_group()
        return EngineTower(self, self.served, [*built, *[None] * missing], group if group.world_size > 1 else None)


class ClipModel(ReducedModelMixin):
    # transformers 5 saves the tower's weights without the prefix "vision_model." that the engine's class has.
    hf_to_vllm_mapper = LlavaNextForConditionalGeneration.hf_to_vllm_mapper | WeightsMapper(
        orig_to_new_regex={re.compile(r"^(model\.)?vision_tower\.(?!vision_model\.)"): r"\1vision_tower.vision_model."}
    )

    def attentions(self) -> list[Any]:
        return [layer.self_attn for layer in self.vision_tower.vision_model.encoder.layers]  # type: ignore[attr-defined]


@with_short_prompts
class ReducedLlava(ClipModel, LlavaForConditionalGeneration):
    def _process_image_input(self, image_input: Any) -> Any:
        if self.served is None or image_input["type"] != "pixel_values":
            return super()._process_image_input(image_input)
        pixels = image_input["pixel_values"]
        return self.engine_tower.clip_images([one[None] for one in pixels], [(0, 0)] * len(pixels))


@with_short_prompts
class ReducedLlavaNext(ClipModel, LlavaNextForConditionalGeneration):
    def _process_image_input(self, image_input: Any) -> Any:
        if self.served is None or image_input["type"] != "pixel_values":
            return super()._process_image_input(image_input)
        sizes = [(int(width), int(height)) for height, width in image_input["image_sizes"].tolist()]
        return self.engine_tower.clip_images(list(image_input["pixel_values"]), sizes)


def ask_for_positions() -> None:
    """Make the CPU runner call `recompute_mrope_positions` as well, which its way of loading models leaves out."""
    runner = importlib.import_module("vllm.v1.worker.cpu_model_runner").CPUModelRunner
    gather = GPUModelRunner._gather_mm_embeddings

    def asking(self: Any, *args: Any, **more: Any) -> Any:
        self.is_multimodal_pruning_enabled = True
        return gather(self, *args, **more)

    runner._gather_mm_embeddings = asking


class QwenModel(ReducedModelMixin):
    """An image's tokens carry their positions in extra channels at the end, as in vLLM's own pruning of videos."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        if served_by(vllm_config.model_config.hf_config) is not None:
            settings = vllm_config.model_config.multimodal_config
            if settings.mm_encoder_tp_mode == "data":
                raise UserError(
                    "--mm-encoder-tp-mode data gives each rank some of the images, and a method must see all of them; "
                    "serve reduced prompts with --mm-encoder-tp-mode weights."
                )
            # With this setting, the runner calls recompute_mrope_positions.
            object.__setattr__(settings, "is_multimodal_pruning_enabled", lambda: True)
            if current_platform.is_cpu():
                ask_for_positions()
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def attentions(self) -> list[Any]:
        return [block.attn for block in self.visual.blocks]  # type: ignore[attr-defined]

    def _process_image_input(self, image_input: Any) -> Any:
        whole = super()._process_image_input  # type: ignore[misc]
        if self.served is None or image_input["type"] == "image_embeds":
            return whole(image_input)
        merge = self.served.merge
        grids = [(rows // merge, columns // merge) for _, rows, columns in image_input["image_grid_thw"].tolist()]

        def encode() -> Tensor:
            return torch.cat(whole(image_input))

        return tuple(self.engine_tower.merged_images(encode, grids, range(len(grids))))

    def _postprocess_image_embeds_evs(self, image_embeds_split: Any, image_input: Any) -> Any:
        if self.served is None:
            return super()._postprocess_image_embeds_evs(image_embeds_split, image_input)  # type: ignore[misc]
        return image_embeds_split

    def _postprocess_video_embeds_evs(self, video_embeds_split: Any, video_input: Any) -> Any:
        if self.served is None:
            return super()._postprocess_video_embeds_evs(video_embeds_split, video_input)  # type: ignore[misc]
        return video_embeds_split  # only the engine shows a video, to measure memory: no prompt may have one

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> Any:
        """Positions [3, L]; recompute_mrope_positions sets those of image tokens once the tower has run."""
        if self.served is None:
            return super().get_mrope_input_positions(input_tokens, mm_features)  # type: ignore[misc]
        positions, start, done = [], 0, 0
        for feature in sorted(mm_features, key=lambda one: one.mm_position.offset):
            if feature.modality != "image":
                raise UserError("Videos are not reduced here; serve them without a method, or give frames as images.")
            offset, kept = feature.mm_position.offset, feature.mm_position.length
            _, rows, columns = feature.data["image_grid_thw"].data.tolist()
            positions.append(torch.arange(start, start + offset - done))
            start += offset - done
            positions.append(torch.full((kept,), start))
            start, done = start + max(rows, columns) // self.served.merge, offset + kept
        positions.append(torch.arange(start, start + len(input_tokens) - done))
        flat = torch.cat(positions)
        return flat.expand(3, -1).clone(), int(flat.max()) + 1 - len(input_tokens)

    def recompute_mrope_positions(
        self, input_ids: Any, multimodal_embeddings: Any, mrope_positions: Tensor, num_computed_tokens: int
    ) -> Any:
        """Move the positions of an image's tokens from its start to the places of those that were kept."""
        if self.served is None:
            return super().recompute_mrope_positions(  # type: ignore[misc]
                input_ids, multimodal_embeddings, mrope_positions, num_computed_tokens
            )
        positions, ids = mrope_positions.clone(), torch.as_tensor(input_ids, device=mrope_positions.device)
        visual = ids == self.config.image_token_id  # type: ignore[attr-defined]
        before = torch.cat([visual.new_zeros(1), visual[:-1]])
        columns = torch.arange(len(ids), device=ids.device)
        # For every column in an image, the token before that image; a chat template always has one.
        front = torch.where(visual & ~before, columns - 1, -1).cummax(0).values
        places, done = columns[num_computed_tokens:][visual[num_computed_tokens:]], 0
        for own in multimodal_embeddings:
            now = places[done : done + len(own)]
            done += len(own)
            positions[:, now] = positions[:, front[now]] + 1 + own[:, -3:].T.round().to(positions)
        return [own[:, :-3] for own in multimodal_embeddings], positions, int(positions.max()) + 1 - len(ids)


@with_short_prompts
class ReducedQwen25(QwenModel, Qwen2_5_VLForConditionalGeneration):
    pass


@with_short_prompts
class ReducedQwen3(QwenModel, Qwen3VLForConditionalGeneration):
    pass


@with_short_prompts
class ReducedQwen35(QwenModel, Qwen3_5ForConditionalGeneration):
    pass


@with_short_prompts
class ReducedInternVL(ReducedModelMixin, InternS1ForConditionalGeneration):
    def attentions(self) -> list[Any]:
        return [layer.attention for layer in self.vision_tower.encoder.layer]

    def _process_vision_input(self, image_input: Any) -> Any:
        if self.served is None or image_input["type"] != "pixel_values":
            return super()._process_vision_input(image_input)
        counts, side = [int(count) for count in image_input["num_patches"]], self.served.side
        owners = [number for number, count in enumerate(counts) for _ in range(count)]
        whole = super()._process_vision_input

        def encode() -> Tensor:
            return torch.cat(whole(image_input))

        return tuple(self.engine_tower.merged_images(encode, [(side, side)] * len(owners), owners))
