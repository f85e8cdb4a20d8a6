"""Tiny random models of the families of `llava.hf.families`, and inputs as their processors give them."""

from collections.abc import Sequence
from functools import cache
from inspect import signature
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from llava.versions import minor

if "mm_encoder_outputs" not in signature(hf.Gemma3ForConditionalGeneration.forward).parameters:
    pytest.skip("the families need an argument for visual tokens", allow_module_level=True)
IMAGE, VIDEO, BREAK = 7, 8, 9
IDS: dict[str, Any] = {"image_token_id": IMAGE, "image_token_index": IMAGE}
TEXT: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "vocab_size": 300}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048, "pad_token_id": 0}
VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "patch_size": 14}
VISION |= {"num_attention_heads": 4, "image_size": 112}
SIGLIP, CLIP = ({**VISION, "model_type": kind} for kind in ("siglip_vision_model", "clip_vision_model"))
SMALL = {"image_size": 56}
LAST = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
PINPOINTS = {"image_grid_pinpoints": [[56, 56], [112, 56], [56, 112], [112, 112]]}
QWEN: dict[str, Any] = {"depth": 4, "num_heads": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
QWEN |= {"hidden_size": 32, "intermediate_size": 64, "patch_size": 14, "out_hidden_size": 64}
AXES = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}}
QWEN3 = QWEN | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1, 2]}
QWEN_IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": 5, "vision_end_token_id": 6}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
VISUAL_IDS = {"visual_indicator_token_ids": [20, 21, 22, 23, 24]}
LLAMA4 = {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32, "pixel_shuffle_ratio": 0.5}


def text(kind: str, **others: Any) -> dict[str, Any]:
    return {"model_type": kind, **TEXT, **others}


def turned(*section: int, part: float = 1.0) -> dict[str, Any]:
    """Positions with three axes."""
    axes = {"mrope_section": list(section), "mrope_interleaved": True, "partial_rotary_factor": part}
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **axes}}


def internvl(kind: str) -> dict[str, Any]:
    vision = {**VISION, "image_size": [112, 112], "patch_size": [14, 14]}
    words = text(kind, head_dim=16)
    return {"vision_config": vision, "text_config": words, "image_seq_length": 16, "downsample_ratio": 0.5}


# Name -> class without "ForConditionalGeneration", and its configuration.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_vl": (
        "Qwen2VL",
        {"vision_config": QWEN | {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}, "text_config": TEXT | AXES},
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VL",
        {
            "vision_config": QWEN | {"window_size": 56, "fullatt_block_indexes": [1, 3]},
            "text_config": TEXT | AXES,
        },
    ),
    "qwen3_vl": ("Qwen3VL", {"vision_config": QWEN3, "text_config": TEXT | {"head_dim": 16} | turned(4, 2, 2)}),
    "qwen3_vl_moe": (
        "Qwen3VLMoe",
        {"vision_config": QWEN3, "text_config": TEXT | {"head_dim": 16} | turned(4, 2, 2) | MOE},
    ),
    "qwen3_5": (
        "Qwen3_5",
        {
            "vision_config": QWEN | {"num_position_embeddings": 64},
            "text_config": TEXT
            | turned(2, 1, 1, part=0.25)
            | LINEAR
            | {"head_dim": 32, "layer_types": ["linear_attention", "full_attention"] * 2},
        },
    ),
    "glm4v": ("Glm4v", {"vision_config": QWEN | {"image_size": 112}, "text_config": TEXT | turned(2, 1, 1, part=0.5)}),
    "internvl3": ("InternVL", internvl("qwen2")),
    "internvl3_5": ("InternVL", internvl("qwen3")),
    "onevision": (
        "LlavaOnevision",
        {"vision_config": SIGLIP | SMALL, "text_config": text("qwen2"), **LAST, **PINPOINTS},
    ),
    "next_video": (
        "LlavaNextVideo",
        {"vision_config": CLIP | SMALL, "text_config": text("llama"), "video_token_index": VIDEO, **PINPOINTS},
    ),
    "gemma3": (
        "Gemma3",
        {
            "vision_config": SIGLIP,
            "mm_tokens_per_image": 16,
            "text_config": text("gemma3_text", head_dim=16, sliding_window=16, query_pre_attn_scalar=16),
        },
    ),
    "paligemma": (
        "PaliGemma",
        {
            "vision_config": SIGLIP | SMALL | {"projection_dim": 64},
            "text_config": text("gemma", head_dim=16),
            "projection_dim": 64,
            "hidden_size": 64,
        },
    ),
    "smolvlm": ("SmolVLM", {"vision_config": VISION, "text_config": text("llama"), "scale_factor": 2}),
    "idefics3": ("Idefics3", {"vision_config": VISION, "text_config": text("llama"), "scale_factor": 2}),
    "mistral3": (
        "Mistral3",
        {
            "vision_config": VISION | {"model_type": "pixtral", "head_dim": 8},
            "spatial_merge_size": 2,
            "text_config": text("mistral", head_dim=16, sliding_window=None),
            "vision_feature_layer": -1,
        },
    ),
    "ovis2": (
        "Ovis2",
        {
            "vision_config": VISION | {"vocab_size": 128, "num_visual_indicator_tokens": 5, "hidden_stride": 2},
            "text_config": text("qwen2"),
            "vocab_size": 300,
            "hidden_size": 64,
            **VISUAL_IDS,
        },
    ),
    "lfm2_vl": (
        "Lfm2Vl",
        {
            "vision_config": VISION | {"model_type": "siglip2_vision_model", "num_patches": 64},
            "downsample_factor": 2,
            "text_config": text("lfm2", layer_types=["conv", "full_attention"] * 2),
        },
    ),
    "aya_vision": (
        "AyaVision",
        {"vision_config": SIGLIP, "text_config": text("cohere2", sliding_window=16), "downsample_factor": 2, **LAST},
    ),
    "llama4": (
        "Llama4",
        {
            "vision_config": VISION | LLAMA4 | {"intermediate_size": 128},
            "text_config": TEXT
            | {"head_dim": 16, "intermediate_size_mlp": 64, "num_local_experts": 2, "attention_chunk_size": 64},
        },
    ),
}
# 5.20's SmolVLM divides image tokens into groups of its patch size.
VERSION = minor(hf.__version__)
OLD = VERSION < (5, 21)
# Llama 4 fails in transformers 5.24 itself, see docs/models/families.md.
BROKEN = {"smolvlm"} if OLD else {"llama4"} if VERSION == (5, 24) else set()
NAMES = tuple(name for name in MODELS if name not in BROKEN)
QWEN_LIKE, PACKED = NAMES[:6], ("onevision", "next_video")


def make(name: str, others: dict[str, int] | None = None) -> Any:
    """A model of the family with random weights.

    Args:
        others: ids of tokens in place of those above.
    """
    kind, options = MODELS[name]
    ids = QWEN_IDS if name in QWEN_LIKE else IDS
    settings = getattr(hf, f"{kind}Config")(**ids | (others or {}), **options)
    return getattr(hf, f"{kind}ForConditionalGeneration")(settings)


@cache
def tiny(name: str) -> Any:
    """The model, the same for all tests; none may change it."""
    torch.manual_seed(0)
    model = make(name).eval()
    generator = torch.Generator().manual_seed(1)
    for key, weight in model.named_parameters():
        if "q_norm" in key or "k_norm" in key:  # ones at first, which hide whether norms are applied
            weight.data.uniform_(0.5, 1.5, generator=generator)
        if "mm_input_projection_weight" in key or "image_newline" in key:  # zeros, with which pixels do not matter
            weight.data.normal_(0, 0.1, generator=generator)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 299
    return model


def call(name: str, images: Sequence[int] = (1,)) -> dict[str, Tensor]:
    """Arguments of forward and generate: prompts padded on the left, each with as many images as are given."""
    generator, total = torch.Generator().manual_seed(0), sum(images)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    pixels, run = {"pixel_values": noise(total, 3, 112, 112)}, [5, *[IMAGE] * 16, 6]
    if name in QWEN_LIKE:
        pixels = {"pixel_values": noise(total * 96, 3 * 2 * 14 * 14)}
        pixels["image_grid_thw"] = torch.tensor([[1, 8, 12]] * total)
        run = [5, *[IMAGE] * 24, 6]
    elif name in PACKED:  # without their padding, the four tiles have eight rows, and a newline token behind each
        pixels = {"pixel_values": noise(total, 5, 3, 56, 56), "image_sizes": torch.tensor([[112, 100]] * total)}
        run = [IMAGE] * (16 + 8 * 9)
    elif name == "paligemma":
        pixels, run = {"pixel_values": noise(total, 3, 56, 56)}, [IMAGE] * 16
    elif name in ("smolvlm", "idefics3"):
        pixels = {"pixel_values": noise(len(images), max(images), 3, 112, 112)}
        for row, own in enumerate(images):  # zeros stand for no image
            pixels["pixel_values"][row, own:] = 0
    elif name == "mistral3":
        pixels["image_sizes"] = torch.tensor([[112, 112]] * total)
        run = [IMAGE] * 4 + ([BREAK] + [IMAGE] * 4) * 3 + [6]
    elif name == "lfm2_vl":
        pixels = {"pixel_values": noise(total, 64, 588), "spatial_shapes": torch.tensor([[8, 8]] * total)}
        pixels["pixel_attention_mask"] = torch.ones(total, 64, dtype=torch.long)
    # Of unequal length also where all have one image.
    rows = [[1, 11, 25, *run * count, 21, 22, 23, 24, *[40] * (3 * row)] for row, count in enumerate(images)]
    ids = torch.tensor([[0] * (max(map(len, rows)) - len(row)) + row for row in rows])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long(), **pixels}
    if name in QWEN_LIKE:
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    if name in ("gemma3", "paligemma"):
        inputs["token_type_ids"] = (ids == IMAGE).long()
    return inputs


def count(name: str) -> int:
    """Visual tokens of one image."""
    return int((call(name)["input_ids"] == IMAGE).sum())
