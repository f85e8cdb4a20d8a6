"""Models in the shapes of official ones, with random weights or none, and questions about noise to ask them.

random_llava("llava-1.5-7b")    computes what the official model computes; its answers are meaningless
official("LLaVA-1.5-7B")        the sizes alone, on the meta device
noise_batches(model, 8, True)   batches of questions that any model can be measured with
"""

import copy
from collections.abc import Callable, Mapping
from functools import cache, cached_property
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPTextConfig, LlamaModel, PreTrainedModel, PreTrainedTokenizerFast
from transformers.initialization import no_init_weights
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from llava.model.builder import DTYPES, FAMILIES
from llava.model.checkpoint.config import CLIP_L_336, LANGUAGEBIND, Family, Kind
from llava.model.checkpoint.load import HF_CLASSES, Checkpoint, VideoLlavaWithTime, empty_model
from llava.model.llava_arch import Llava
from llava.model.llava_next import LlavaNext
from llava.model.multimodal_encoder.clip_text_encoder import ClipText
from llava.model.qwen_vl import QwenVL
from llava.model.video_llava import VideoLlava
from llava.processing.image import ImageProcessor, QwenImageProcessor
from llava.processing.prompt import Sample
from llava.processing.video import FRAMES, Video


def _llama(hidden: int, inner: int, layers: int, heads: int, keys: int, words: int = 32064) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "vocab_size": words,
    }


VICUNA_7B = _llama(4096, 11008, 32, 32, 32)
VICUNA_13B = _llama(5120, 13824, 40, 40, 40)
MISTRAL_7B = _llama(4096, 14336, 32, 32, 8)
YI_34B = _llama(7168, 20480, 60, 56, 8, 64064)

QWEN_25_7B: dict[str, Any] = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 128000,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
}
QWEN_25_VISION: dict[str, Any] = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 3584,
    "patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}

# Sizes from the official config.json files. Mistral's decoder is Llama's with fewer key heads.
SHAPES: dict[str, dict[str, Any]] = {
    "llava-1.5-7b": {"family": "llava", "text": VICUNA_7B},
    "llava-1.5-13b": {"family": "llava", "text": VICUNA_13B},
    "llava-next-7b": {"family": "llava_next", "text": VICUNA_7B},
    "llava-next-mistral-7b": {"family": "llava_next", "text": MISTRAL_7B},
    "llava-next-13b": {"family": "llava_next", "text": VICUNA_13B},
    "llava-next-34b": {"family": "llava_next", "text": YI_34B},
    "video-llava-7b": {"family": "video_llava", "text": VICUNA_7B, "vision": LANGUAGEBIND},
    "qwen2.5-vl-7b": {"family": "qwen2_5_vl", "text": QWEN_25_7B, "vision": QWEN_25_VISION},
}
# The official models of the tables of memory and costs; SHAPES has their names in lower case.
MODELS = (
    "LLaVA-1.5-7B", "LLaVA-1.5-13B", "LLaVA-NeXT-7B", "LLaVA-NeXT-13B", "LLaVA-NeXT-34B", "Video-LLaVA-7B",
    "Qwen2.5-VL-7B",
)  # fmt: skip

CLIP_L_TEXT: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "projection_dim": 768,
    "vocab_size": 49408,
    "eos_token_id": 49407,
}


def narrow(shape: str, width: int, layers: int, blocks: int = 3, side: int = 336) -> dict[str, Any]:
    """A shape of LLaVA at a fraction of its width: as many tokens and layers as wanted, few weights.

    What grows with the number of tokens grows the same way, and a CPU needs seconds in place of minutes.

    Args:
        shape: a name of SHAPES.
        width: channels of decoder and tower, a multiple of 64, those of an attention head; the MLPs keep their
            proportion to it.
        layers: of the decoder.
        blocks: of the tower.
        side: of an image or tile in pixels, a multiple of 14.
    """
    text, heads = SHAPES[shape]["text"], width // 64
    return {
        **SHAPES[shape],
        "text": {
            **text,
            "hidden_size": width,
            "intermediate_size": width * text["intermediate_size"] // text["hidden_size"],
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            # Tokens beyond the position ids of the official model are computed alike.
            "max_position_embeddings": 1 << 15,
        },
        "vision": {
            **SHAPES[shape].get("vision", CLIP_L_336),
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_attention_heads": heads,
            "num_hidden_layers": blocks,
            "image_size": side,
        },
    }


@cache
def official(name: str) -> Llava:
    """An official model on the meta device, without tokenizer. LLaVA-NeXT reads images as the tables of papers do, with
    2,880 visual tokens for each; Qwen takes images of at most 1,280 visual tokens.

    Args:
        name: one of MODELS.
    """
    sizes = SHAPES[name.lower()]
    family: Family = sizes["family"]
    config_class: Any = HF_CLASSES[family].config_class
    config = config_class(text_config=sizes["text"], vision_config=sizes.get("vision", CLIP_L_336))
    frames = FRAMES if family == "video_llava" else None
    options: dict[str, Any] = {}
    if family == "llava_next":
        side = config.vision_config.image_size
        options = {"merge": "spatial", "force": (2 * side, 2 * side)}
    checkpoint = _checkpoint(
        empty_model(config, Kind(family, "original", "llama"), frames),
        family,
        tokenizer=None,
        name=name,
        text_tower=None,
        vocabulary=config.get_text_config().vocab_size,
    )
    return FAMILIES[family](checkpoint, torch.device("meta"), **options)


def random_llava(
    shape: str | Mapping[str, Any],
    distinct: int | None = None,
    dtype: str = "bfloat16",
    layers: int | None = None,
    device: torch.device | None = None,
    **conventions: Any,
) -> Llava:
    """A LLaVA of a known shape with random weights.

    Args:
        shape: a name of SHAPES, or what `narrow` returns.
        distinct: decoder layers with their own weights; the other layers reuse them in turn, so that a model of full
            depth needs little memory and computes the same number of operations. None gives every layer its own.
        layers: decoder layers; None for the full depth.
        device: None for the CPU.
        conventions: of llava.model.llava_next.LlavaNext.
    """
    device = device or torch.device("cpu")
    sizes = SHAPES[shape] if isinstance(shape, str) else shape
    family: Family = sizes["family"]
    layers = layers or sizes["text"]["num_hidden_layers"]
    text = {**sizes["text"], "num_hidden_layers": min(distinct or layers, layers)}
    parts = {"text_config": text, "vision_config": sizes.get("vision", CLIP_L_336)}
    model = hf_model(family, parts, DTYPES[dtype], device)
    share_layers(model.model.language_model, layers)
    qwen = family == "qwen2_5_vl"
    checkpoint = _checkpoint(
        model,
        family,
        tokenizer=_letters(),
        name=f"random {shape if isinstance(shape, str) else family}",
        text_tower=None if qwen else "random weights",
        vocabulary=min(sizes["text"]["vocab_size"], 152000 if qwen else 32000),
    )
    return RUNTIME[family](checkpoint, device, **conventions)


def _checkpoint(model: PreTrainedModel, family: Family, **fields: Any) -> Checkpoint:
    """A checkpoint with the processor and the templates of its family.

    Args:
        fields: further fields of Checkpoint.
    """
    video, qwen = family == "video_llava", family == "qwen2_5_vl"
    side = None if qwen else model.config.vision_config.image_size
    return Checkpoint(
        model=model,
        image_processor=QwenImageProcessor() if side is None else ImageProcessor(side, side),
        conversation="qwen2_vl" if qwen else "vicuna_v1",
        layout="original",
        notes=(),
        family=family,
        frames=FRAMES if video else 0,
        temporal=video,
        **fields,
    )


def hf_model(family: Family, parts: dict[str, Any], dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The HF model of a family with random weights.

    Args:
        parts: "text_config" and "vision_config", fields of config.json.
    """
    config_class: Any = HF_CLASSES[family].config_class
    config = config_class(**parts)
    if family == "llava_next":  # the library's resolutions are of tiles of 336 pixels
        side = config.vision_config.image_size
        config.image_grid_pinpoints = [[side * a, side * b] for a, b in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
    config._attn_implementation = "sdpa"
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with no_init_weights(), torch.device(device):
            if family == "video_llava":
                made: PreTrainedModel = VideoLlavaWithTime(config, FRAMES)
            else:
                made = HF_CLASSES[family](config)
    finally:
        torch.set_default_dtype(before)
    # One repeated block of noise: drawing a billion weights takes a minute.
    block = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(device, dtype)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if weight.dim() == 1 and name.endswith("weight"):
                weight.fill_(1.0)
                continue
            flat = weight.view(-1)
            for start in range(0, flat.numel(), block.numel()):
                part = flat[start : start + block.numel()]
                part.copy_(block[: part.numel()])
    return made.eval()


class RandomClip(Llava):
    """Adds a CLIP text tower of CLIP-L's shape with random weights."""

    @cached_property
    def clip(self) -> ClipText:
        def words(text: str) -> list[int]:
            return [1 + place for place, _ in enumerate(text.split())]

        vision: Any = self.tower
        config = CLIPTextConfig(**CLIP_L_TEXT)
        last = config.vocab_size - 1
        with torch.device(self.device):
            tower = ClipText(config, vision.config.hidden_size, vision.post_layernorm, words, last - 1, last)
        return tower.eval().requires_grad_(False)


class RandomLlava(RandomClip):
    pass


class RandomNext(RandomClip, LlavaNext):
    pass


class RandomVideo(RandomClip, VideoLlava):
    pass


RUNTIME: dict[str, type[Llava]] = {
    "llava": RandomLlava,
    "llava_next": RandomNext,
    "video_llava": RandomVideo,
    "qwen2_5_vl": QwenVL,
}


def share_layers(llm: LlamaModel, layers: int) -> None:
    """Add layers to a decoder that share the weights of its layers, each with its own index."""
    own = len(llm.layers)
    for index in range(own, layers):
        source = cast(LlamaDecoderLayer, llm.layers[index % own])
        # What is in the memo is shared, everything else is copied. A copied configuration would keep its attention
        # kernel when the model is given another.
        memo: dict[int, Any] = {id(weight): weight for weight in source.parameters()}
        shared = copy.deepcopy(source, memo | {id(llm.config): llm.config})
        shared.self_attn.layer_idx = index
        llm.layers.append(shared)
    llm.config.num_hidden_layers = layers


def _letters() -> PreTrainedTokenizerFast:
    """A tokenizer with one unknown token per word, about as many tokens as a real prompt has."""
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


QUESTION = "What is the color of the small object on the left side of the image?"
SUFFIX = "Answer the question using a single word or phrase."
SIDE = 336


def noise(seed: int, width: int = SIDE, height: int = SIDE) -> Image.Image:
    """An image without meaning: the time of most methods does not depend on what is in it."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def visual(model: Llava, seed: int) -> Image.Image | Video:
    """An image or a video of noise with as many visual tokens as the model's budget is counted against."""
    if isinstance(model, VideoLlava):
        return Video(tuple(noise(1000 * seed + frame) for frame in range(model.frames)))
    if isinstance(model, QwenVL):
        # As square as whole merge groups allow.
        groups, edge = model.visual_tokens, model.image_processor.patch * model.image_processor.merge
        rows = next(rows for rows in range(int(groups**0.5), 0, -1) if groups % rows == 0)
        return noise(seed, groups // rows * edge, rows * edge)
    return noise(seed)


def noise_batches(model: Llava, size: int, differ: bool) -> Callable[[int], list[Sample]]:
    """Turn -> a batch of one question about `size` images of noise; other images in every turn where they `differ`."""
    known: dict[int, list[Sample]] = {}

    def ask(turn: int) -> list[Sample]:
        first = turn * size if differ else 0
        if first not in known:
            known.clear()
            seeds = range(first, first + size)
            known[first] = [Sample(f"s{seed}", QUESTION, SUFFIX, visual(model, seed)) for seed in seeds]
        return known[first]

    return ask
