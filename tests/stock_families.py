"""Tiny random models of the families of `llava.hf.families`, and inputs as their processors give them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers as hf
from torch import Tensor

IMAGE, VIDEO, BREAK = 7, 8, 9
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 2048,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "patch_size": 14,
}
IDS = {"image_token_id": IMAGE, "image_token_index": IMAGE}


def rotary(*section: int, part: float = 1.0) -> dict[str, Any]:
    own = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": part}
    return own | ({"mrope_section": list(section), "mrope_interleaved": True} if section else {})


def qwen(model: str, config: str, text: dict[str, Any], deepstack: bool = True, **vision: Any) -> Any:
    tower = {
        "depth": 4,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 4,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 64,
    } | vision
    if deepstack:
        tower["deepstack_visual_indexes"] = [0, 1, 2]
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": 5, "vision_end_token_id": 6}
    ids |= {"image_start_token_id": 5, "image_end_token_id": 6, "video_start_token_id": 10, "video_end_token_id": 11}
    settings = getattr(hf, config)(vision_config=tower, text_config=TEXT | text, **ids)
    return getattr(hf, model)(settings)


def make(name: str) -> Any:
    """A model of the family with random weights."""
    siglip, clip = hf.SiglipVisionConfig, hf.CLIPVisionConfig
    square = {"image_size": 112, **VISION}
    packed = {"image_grid_pinpoints": [[56, 56], [112, 56], [56, 112], [112, 112]], **IDS}
    heads = {"head_dim": 16, "rope_parameters": rotary(4, 2, 2)}
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
    mixed = ["linear_attention", "full_attention"] * 2
    linear = {
        f"linear_{part}": size
        for part, size in (("num_key_heads", 2), ("num_value_heads", 4), ("key_head_dim", 16), ("value_head_dim", 16))
    }
    if name.startswith("internvl"):
        text = hf.Qwen2Config(**TEXT) if name == "internvl3" else hf.Qwen3Config(**TEXT, head_dim=16)
        vision = {**VISION, "image_size": [112, 112], "patch_size": [14, 14]}
        config = hf.InternVLConfig(
            vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=16, downsample_ratio=0.5
        )
        return hf.InternVLForConditionalGeneration(config)
    makers: dict[str, Callable[[], Any]] = {
        "qwen3_vl": lambda: qwen("Qwen3VLForConditionalGeneration", "Qwen3VLConfig", heads, num_position_embeddings=64),
        "qwen3_vl_moe": lambda: qwen(
            "Qwen3VLMoeForConditionalGeneration", "Qwen3VLMoeConfig", heads | moe, num_position_embeddings=64
        ),
        "qwen3_5": lambda: qwen(
            "Qwen3_5ForConditionalGeneration",
            "Qwen3_5Config",
            {"head_dim": 32, "layer_types": mixed, "rope_parameters": rotary(2, 1, 1, part=0.25), **linear},
            deepstack=False,
            num_position_embeddings=64,
        ),
        "glm4v": lambda: qwen(
            "Glm4vForConditionalGeneration",
            "Glm4vConfig",
            {"rope_parameters": rotary(2, 1, 1, part=0.5)},
            deepstack=False,
            image_size=112,
        ),
        "onevision": lambda: hf.LlavaOnevisionForConditionalGeneration(
            hf.LlavaOnevisionConfig(
                vision_config=siglip(**VISION, image_size=56),
                text_config=hf.Qwen2Config(**TEXT),
                vision_feature_layer=-1,
                vision_feature_select_strategy="full",
                **packed,
            )
        ),
        "next_video": lambda: hf.LlavaNextVideoForConditionalGeneration(
            hf.LlavaNextVideoConfig(
                vision_config=clip(**VISION, image_size=56),
                text_config=hf.LlamaConfig(**TEXT),
                video_token_index=VIDEO,
                **packed,
            )
        ),
        "gemma3": lambda: hf.Gemma3ForConditionalGeneration(
            hf.Gemma3Config(
                vision_config=siglip(**square),
                mm_tokens_per_image=16,
                **IDS,
                text_config=hf.Gemma3TextConfig(**TEXT, head_dim=16, sliding_window=16, query_pre_attn_scalar=16),
            )
        ),
        "paligemma": lambda: hf.PaliGemmaForConditionalGeneration(
            hf.PaliGemmaConfig(
                vision_config={"model_type": "siglip_vision_model", "projection_dim": 64, **VISION, "image_size": 56},
                text_config={"model_type": "gemma", "head_dim": 16, **TEXT},
                projection_dim=64,
                hidden_size=64,
                **IDS,
            )
        ),
        "smolvlm": lambda: hf.SmolVLMForConditionalGeneration(
            hf.SmolVLMConfig(
                vision_config=square,
                text_config=hf.LlamaConfig(**TEXT, pad_token_id=0),
                scale_factor=2,
                pad_token_id=0,
                image_token_id=IMAGE,
            )
        ),
        "idefics3": lambda: hf.Idefics3ForConditionalGeneration(
            hf.Idefics3Config(
                vision_config=square,
                text_config=hf.LlamaConfig(**TEXT, pad_token_id=0),
                scale_factor=2,
                pad_token_id=0,
                image_token_id=IMAGE,
            )
        ),
        "mistral3": lambda: hf.Mistral3ForConditionalGeneration(
            hf.Mistral3Config(
                vision_config=hf.PixtralVisionConfig(**square, head_dim=8),
                spatial_merge_size=2,
                vision_feature_layer=-1,
                text_config=hf.MistralConfig(**TEXT, head_dim=16, sliding_window=None),
                **IDS,
            )
        ),
        "ovis2": lambda: hf.Ovis2ForConditionalGeneration(
            hf.Ovis2Config(
                vision_config={**square, "vocab_size": 128, "num_visual_indicator_tokens": 5, "hidden_stride": 2},
                text_config=hf.Qwen2Config(**TEXT),
                image_token_id=IMAGE,
                visual_indicator_token_ids=[20, 21, 22, 23, 24],
                vocab_size=300,
                hidden_size=64,
            )
        ),
        "lfm2_vl": lambda: hf.Lfm2VlForConditionalGeneration(
            hf.Lfm2VlConfig(
                vision_config={"model_type": "siglip2_vision_model", "num_patches": 64, **VISION},
                downsample_factor=2,
                text_config={"model_type": "lfm2", "layer_types": ["conv", "full_attention"] * 2, **TEXT},
                image_token_id=IMAGE,
            )
        ),
        "aya_vision": lambda: hf.AyaVisionForConditionalGeneration(
            hf.AyaVisionConfig(
                vision_config=siglip(**square),
                text_config={"model_type": "cohere2", "sliding_window": 16, **TEXT},
                downsample_factor=2,
                vision_feature_layer=-1,
                vision_feature_select_strategy="full",
                **IDS,
            )
        ),
        "llama4": lambda: hf.Llama4ForConditionalGeneration(
            hf.Llama4Config(
                vision_config={
                    **square,
                    "intermediate_size": 128,
                    "vision_output_dim": 32,
                    "projector_input_dim": 32,
                    "projector_output_dim": 32,
                    "pixel_shuffle_ratio": 0.5,
                },
                text_config={
                    **TEXT,
                    "head_dim": 16,
                    "intermediate_size_mlp": 64,
                    "num_local_experts": 2,
                    "attention_chunk_size": 64,
                },
                **IDS,
            )
        ),
    }
    return makers[name]()


NAMES = (
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen3_5",
    "glm4v",
    "internvl3",
    "internvl3_5",
    "onevision",
    "next_video",
    "gemma3",
    "paligemma",
    "smolvlm",
    "idefics3",
    "mistral3",
    "ovis2",
    "lfm2_vl",
    "aya_vision",
    "llama4",
)
QWEN_LIKE = NAMES[:4]
PACKED = ("onevision", "next_video")


@cache
def tiny(name: str) -> Any:
    """The model, the same for all tests; none may change it."""
    torch.manual_seed(0)
    model = make(name).eval()
    generator = torch.Generator().manual_seed(1)
    for key, weight in model.named_parameters():
        if "q_norm" in key or "k_norm" in key:  # ones at first, which hide whether norms are applied
            weight.data.uniform_(0.5, 1.5, generator=generator)
        if "mm_input_projection_weight" in key:  # zeros at first, with which pixels do not matter
            weight.data.normal_(0, 0.1, generator=generator)
        if "image_newline" in key:
            weight.data.normal_(0, 0.1, generator=generator)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 299
    return model


@dataclass(frozen=True)
class Call:
    """Arguments of forward and generate, and of each image its visual tokens."""

    inputs: dict[str, Tensor]
    counts: tuple[int, ...]


def call(name: str, images: Sequence[int] = (1,), seed: int = 0, small: bool = False) -> Call:
    """A batch of prompts, padded on the left, with some images each.

    Args:
        images: the number of images of each prompt.
        small: fewer patches per image, where the family takes images of any size.
    """
    generator, total = torch.Generator().manual_seed(seed), sum(images)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    pixels: dict[str, Tensor] = {"pixel_values": noise(total, 3, 112, 112)}
    run = [IMAGE] * 16
    if name in QWEN_LIKE:
        rows, columns = (4, 8) if small else (8, 12)
        pixels = {"pixel_values": noise(total * rows * columns, 3 * 2 * 14 * 14)}
        pixels["image_grid_thw"] = torch.tensor([[1, rows, columns]] * total)
        run = [5, *[IMAGE] * (rows * columns // 4), 6]
    elif name in PACKED:
        size = (56, 112) if small else (112, 100)
        tiles = 3 if small else 5
        pixels = {"pixel_values": noise(total, tiles, 3, 56, 56), "image_sizes": torch.tensor([size] * total)}
        # Unpadding leaves 8 rows of 8 columns, of 7 and of 4 rows; a newline token behind each.
        run = [IMAGE] * (16 + (4 * 9 if small else 8 * 9))
    elif name == "paligemma":
        pixels = {"pixel_values": noise(total, 3, 56, 56)}
    elif name in ("smolvlm", "idefics3"):
        pixels = {"pixel_values": noise(1, total, 3, 112, 112)}
        run = [5, *run, 6]
    elif name == "mistral3":
        pixels["image_sizes"] = torch.tensor([[112, 112]] * total)
        run = [IMAGE] * 4 + ([BREAK] + [IMAGE] * 4) * 3 + [6]
    elif name == "lfm2_vl":
        pixels = {"pixel_values": noise(total, 64, 588), "spatial_shapes": torch.tensor([[8, 8]] * total)}
        pixels["pixel_attention_mask"] = torch.ones(total, 64, dtype=torch.long)
    elif name.startswith("internvl"):
        run = [5, *run, 6]
    rows = [[1, 11 + row, 25, *(run + [30 + row]) * count, 21, 22, 23][:None] for row, count in enumerate(images)]
    rows = [row + [40] * (3 * number) for number, row in enumerate(rows)]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long(), **pixels}
    if name in QWEN_LIKE:
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    if name in ("gemma3", "paligemma"):
        inputs["token_type_ids"] = (ids == IMAGE).long()
    return Call(inputs, (run.count(IMAGE),) * total)
