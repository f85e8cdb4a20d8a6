"""Models of real size with random weights, to measure latency. Their answers are meaningless."""

import copy
from functools import cached_property
from typing import Any, cast

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPTextConfig, LlamaModel, PreTrainedModel, PreTrainedTokenizerFast
from transformers.initialization import no_init_weights
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from llava.model.builder import DTYPES
from llava.model.checkpoint.hf_model import HF_CLASSES, VideoLlavaWithTime
from llava.model.checkpoint.identify import Family
from llava.model.checkpoint.load import Checkpoint
from llava.model.checkpoint.original_layout import CLIP_L_336, LANGUAGEBIND
from llava.model.llava_arch import Llava
from llava.model.llava_next import LlavaNext
from llava.model.multimodal_encoder.clip_text_encoder import ClipText
from llava.model.multimodal_encoder.languagebind import VIDEO_FRAMES
from llava.model.qwen_vl import QwenVL
from llava.model.video_llava import VideoLlava
from llava.processing.clip_image import ImageProcessor
from llava.processing.qwen_image import QwenImageProcessor


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


def random_llava(
    shape: str,
    distinct: int | None = None,
    dtype: str = "bfloat16",
    layers: int | None = None,
    device: torch.device | None = None,
    **conventions: Any,
) -> Llava:
    """A LLaVA of a known shape with random weights.

    Args:
        distinct: decoder layers with their own weights; the other layers reuse them in turn, so that a model of full
            depth needs little memory and computes the same number of operations. None gives every layer its own.
        layers: decoder layers; None for the full depth.
        device: None for the CPU.
        conventions: of llava.model.llava_next.LlavaNext.
    """
    device = device or torch.device("cpu")
    sizes = SHAPES[shape]
    family, vision = sizes["family"], sizes.get("vision", CLIP_L_336)
    layers = layers or sizes["text"]["num_hidden_layers"]
    text = {**sizes["text"], "num_hidden_layers": min(distinct or layers, layers)}
    model = hf_model(family, {"text_config": text, "vision_config": vision}, DTYPES[dtype], device)
    share_layers(model.model.language_model, layers)
    video, qwen = family == "video_llava", family == "qwen2_5_vl"
    checkpoint = Checkpoint(
        model=model,
        tokenizer=_letters(),
        image_processor=QwenImageProcessor() if qwen else ImageProcessor(vision["image_size"], vision["image_size"]),
        conversation="qwen2_vl" if qwen else "vicuna_v1",
        name=f"random {shape}",
        layout="original",
        vision_tower_source="random weights",
        text_tower=None if qwen else "random weights",
        notes=(),
        vocabulary=min(sizes["text"]["vocab_size"], 152000 if qwen else 32000),
        family=family,
        video_conversation="llava_v1" if video else None,
        frames=VIDEO_FRAMES if video else 0,
        temporal=video,
    )
    return RUNTIME[family](checkpoint, device, **conventions)


def hf_model(family: Family, parts: dict[str, Any], dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The HF model of a family with random weights.

    Args:
        parts: "text_config" and "vision_config", fields of config.json.
    """
    placeholder: dict[str, Any] = {} if family == "qwen2_5_vl" else {"image_token_index": 32000}
    config_class: Any = HF_CLASSES[family].config_class
    config = config_class(**parts, **placeholder)
    config._attn_implementation = "sdpa"
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with no_init_weights(), torch.device(device):
            if family == "video_llava":
                made: PreTrainedModel = VideoLlavaWithTime(config, VIDEO_FRAMES)
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
