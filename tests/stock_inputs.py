"""Tiny Hugging Face models and the inputs that their own processors return, for tests of `reduce`.

LLaVA and LLaVA-NeXT use the processors of transformers. Those of Video-LLaVA and Qwen-VL need torchvision, which is not
installed: their image processors are those of transformers, and the placeholder tokens are repeated here as they do it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2VLImageProcessorPil,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from tests.conftest import drawn_image
from tests.tiny_checkpoints import make_tiny_llava, make_tokenizer
from tests.tiny_checkpoints_families import (
    FRAMES,
    IMAGE,
    PINPOINTS,
    make_qwen_tokenizer,
    make_tiny_next,
    make_tiny_qwen,
    make_tiny_video,
)

FAMILIES = ("llava", "next", "video", "qwen2.5", "qwen2")
Inputs = dict[str, Tensor]

# Two images side by side, one in the middle, none, and one at the start; of different lengths and shapes.
TEXTS = (
    "USER: <image><image> what color is the small cat on the left of the tree? ASSISTANT:",
    "USER: is there <image> a star? ASSISTANT:",
    "USER: where is it ASSISTANT:",
    "<image> how many dog are in the image",
)
SIZES = ((60, 110), (120, 50), (112, 112), (40, 90))


@dataclass
class Stock:
    """A model and the function that prepares its inputs.

    Attributes:
        prepare: texts with "<image>" (and "<video>"), images, videos -> arguments of forward.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prepare: Callable[..., Inputs]

    def batch(self, texts: Sequence[str] = TEXTS, sizes: Sequence[tuple[int, int]] = SIZES) -> Inputs:
        """The four prompts, padded on the left."""
        count = sum(text.count("<image>") for text in texts)
        return self.prepare(texts, [drawn_image(seed, size) for seed, size in enumerate(sizes[:count])])

    def text_tokens(self, inputs: Inputs) -> list[int]:
        """The number of tokens of every row that are neither padding nor image tokens."""
        text = inputs["attention_mask"].bool() & (inputs["input_ids"] != self.model.config.image_token_id)
        return text.sum(1).tolist()

    def generate(self, inputs: Inputs, **options: Any) -> Tensor:
        """[B, new] generated ids, eight tokens per prompt whatever they are."""
        out = self.model.generate(**inputs, **{"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, **options})
        return out[:, inputs["input_ids"].shape[1] :]


def stock(family: str) -> Stock:
    """One of FAMILIES."""
    if family.startswith("qwen"):
        return _qwen(family.removeprefix("qwen"))
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<image>", "<video>"], special_tokens=True)  # the ids behind the words, as in the models
    tokenizer.padding_side = "left"
    sizes: dict[str, Any] = {"size": {"shortest_edge": IMAGE}, "crop_size": {"height": IMAGE, "width": IMAGE}}
    expanding = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    if family == "video":
        return _video(tokenizer, CLIPImageProcessorPil(**sizes))
    if family == "llava":
        model, processor = make_tiny_llava(), LlavaProcessor(CLIPImageProcessorPil(**sizes), tokenizer, **expanding)
    else:
        images = LlavaNextImageProcessorPil(**sizes, image_grid_pinpoints=PINPOINTS)
        model, processor = make_tiny_next(), LlavaNextProcessor(images, tokenizer, **expanding)

    def prepare(texts: Sequence[str], images: Sequence[Image.Image]) -> Inputs:
        return dict(processor(images=list(images) or None, text=list(texts), padding=True, return_tensors="pt"))

    return Stock(with_pad(model, tokenizer), tokenizer, prepare)


@cache
def shared(family: str) -> Stock:
    """The same one for all tests; none may change it. Its weights are ordinary tensors, also for a first caller in
    inference mode."""
    with torch.inference_mode(False):
        return stock(family)


def with_pad(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The same model with the padding and end token of the tokenizer in its generation config."""
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


def _video(tokenizer: PreTrainedTokenizerBase, processor: CLIPImageProcessorPil) -> Stock:
    def prepare(
        texts: Sequence[str], images: Sequence[Image.Image], videos: Sequence[Sequence[Image.Image]] = ()
    ) -> Inputs:
        patches = (IMAGE // 14) ** 2
        wide = [text.replace("<image>", "<image>" * patches) for text in texts]
        wide = [text.replace("<video>", "<video>" * (FRAMES * (patches + 1))) for text in wide]
        inputs = dict(tokenizer(wide, padding=True, return_tensors="pt", return_token_type_ids=False))
        if images:
            inputs["pixel_values_images"] = processor(list(images), return_tensors="pt")["pixel_values"]
        if videos:
            pixels = [processor(list(frames), return_tensors="pt")["pixel_values"] for frames in videos]
            inputs["pixel_values_videos"] = torch.stack(pixels)
        return inputs

    return Stock(with_pad(make_tiny_video(temporal=False), tokenizer), tokenizer, prepare)


def _qwen(version: str) -> Stock:
    tokenizer, model = make_qwen_tokenizer(), make_tiny_qwen(version)
    tokenizer.padding_side = "left"
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 16 * 28 * 28, "longest_edge": 64 * 28 * 28})

    def prepare(texts: Sequence[str], images: Sequence[Image.Image]) -> Inputs:
        inputs: Inputs = dict(processor(list(images), return_tensors="pt")) if images else {}
        counts = iter([int(grid.prod()) // 4 for grid in inputs.get("image_grid_thw", ())])
        wide = []
        for text in texts:
            pieces = text.split("<image>")
            runs = [f"<|vision_start|>{'<|image_pad|>' * next(counts)}<|vision_end|>" for _ in pieces[1:]]
            wide.append("".join(a + b for a, b in zip(pieces, [*runs, ""], strict=True)))
        inputs |= dict(tokenizer(wide, padding=True, return_tensors="pt", return_token_type_ids=False))
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).int()
        return inputs

    return Stock(with_pad(model, tokenizer), tokenizer, prepare)
