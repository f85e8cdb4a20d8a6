"""Models of real size with random weights, for timing. Their answers mean nothing."""

import copy
from functools import cached_property
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import CLIPTextConfig, LlavaConfig, LlavaForConditionalGeneration, PreTrainedTokenizerFast
from transformers.initialization import no_init_weights

from llava.checkpoint import Checkpoint
from llava.clip_text import ClipText
from llava.image import ImageProcessor
from llava.model import DTYPES, Llava
from llava.original_layout import CLIP_L_336

# Sizes from the official config.json files.
SHAPES: dict[str, dict[str, Any]] = {
    "llava-1.5-7b": {
        "vision": CLIP_L_336,
        "text": {
            "model_type": "llama",
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "vocab_size": 32064,
        },
    },
    "llava-1.5-13b": {
        "vision": CLIP_L_336,
        "text": {
            "model_type": "llama",
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
            "num_key_value_heads": 40,
            "vocab_size": 32064,
        },
    },
}


CLIP_L_TEXT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "projection_dim": 768,
    "vocab_size": 49408,
    "eos_token_id": 49407,
}


def random_llava(shape: str, distinct: int | None = None, dtype: str = "bfloat16") -> Llava:
    """A LLaVA of a known shape and its full depth with random weights, on the CPU.

    Args:
        distinct: decoder layers with weights of their own; the others take turns in sharing them, so that a model of
            full depth fits into a small memory and still does all its work. None gives every layer its own.
    """
    sizes = SHAPES[shape]
    layers = sizes["text"]["num_hidden_layers"]
    config = LlavaConfig(
        text_config={**sizes["text"], "num_hidden_layers": distinct or layers},
        vision_config=sizes["vision"],
        image_token_index=32000,
    )
    config._attn_implementation = "sdpa"
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[dtype])
    try:
        with no_init_weights():
            model = LlavaForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)
    # One block of noise, tiled: filling a billion weights one by one takes a minute.
    block = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(DTYPES[dtype])
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1 and name.endswith("weight"):
                weight.fill_(1.0)
                continue
            flat = weight.view(-1)
            for start in range(0, flat.numel(), block.numel()):
                part = flat[start : start + block.numel()]
                part.copy_(block[: part.numel()])
    share_layers(model.model.language_model, layers)
    checkpoint = Checkpoint(
        model=model,
        tokenizer=_letters(),
        image_processor=ImageProcessor(336, 336),
        conversation="vicuna_v1",
        name=f"random {shape}",
        layout="transformers",
        vision_tower_source="random weights",
        text_tower="random weights",
        notes=(),
        vocabulary=32000,
    )
    return RandomLlava(checkpoint, torch.device("cpu"))


class RandomLlava(Llava):
    """Its CLIP text tower has the shape of CLIP-L's and random weights."""

    @cached_property
    def clip(self) -> ClipText:
        words = lambda text: [1 + place for place, _ in enumerate(text.split())]  # noqa: E731
        config = CLIPTextConfig(**CLIP_L_TEXT)
        last = config.vocab_size - 1
        tower = ClipText(config, self.tower.config.hidden_size, self.tower.post_layernorm, words, last - 1, last)
        return tower.to(self.device).eval().requires_grad_(False)


def share_layers(llm: nn.Module, layers: int) -> None:
    """Lengthen a decoder by layers that share the weights of those it has, each with an index of its own."""
    own = len(llm.layers)
    for index in range(own, layers):
        source = llm.layers[index % own]
        # Parameters are put into the memo, so that everything is copied but them.
        shared = copy.deepcopy(source, {id(weight): weight for weight in source.parameters()})
        shared.self_attn.layer_idx = index
        llm.layers.append(shared)
    llm.config.num_hidden_layers = layers


def _letters() -> PreTrainedTokenizerFast:
    """A tokenizer of single words that knows none: every word is one token, about what a real prompt needs."""
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
