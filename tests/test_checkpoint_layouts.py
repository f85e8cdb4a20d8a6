"""The model that a config.json describes, and the names of its weights against the lists of the real models."""

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from llava.errors import UserError
from llava.model.checkpoint.config import (
    CLIP_L_336,
    CLIP_L_336_NAME,
    LANGUAGEBIND,
    Kind,
    hf_key,
    identify,
    to_transformers_config,
)
from llava.model.checkpoint.load import HF_CLASSES
from tests.tiny_checkpoints import to_original_layout
from tests.tiny_checkpoints_families import hub_name, make_tiny_qwen, qwen_name

HERE = Path("folder")
ORIGINAL = {"model_type": "llava", "mm_vision_tower": "openai/clip-vit-large-patch14-336"}
NEXT = {**ORIGINAL, "image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
VIDEO = {
    "model_type": "llava",
    "mm_image_tower": "LanguageBind/LanguageBind_Image",
    "mm_video_tower": "LanguageBind/LanguageBind_Video_merge",
    "image_grid_pinpoints": None,
}
NESTED = {"text_config": {"model_type": "llama"}, "vision_config": {"model_type": "clip_vision_model"}}
MISTRAL_NESTED = {**NESTED, "text_config": {"model_type": "mistral"}}
QWEN = {"vision_start_token_id": 1, "hidden_size": 64}


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (ORIGINAL, ("llava", "original", "llama")),
        ({**ORIGINAL, "model_type": "llava_llama"}, ("llava", "original", "llama")),
        ({**ORIGINAL, "image_aspect_ratio": "pad", "mm_patch_merge_type": None}, ("llava", "original", "llama")),
        ({**ORIGINAL, "model_type": "llava_mistral"}, ("llava", "original", "mistral")),
        (NEXT, ("llava_next", "original", "llama")),
        ({**ORIGINAL, "image_aspect_ratio": "anyres"}, ("llava_next", "original", "llama")),
        ({**ORIGINAL, "mm_patch_merge_type": "spatial"}, ("llava_next", "original", "llama")),
        # The class is more than the type, which "llava" hides.
        ({**NEXT, "architectures": ["LlavaMistralForCausalLM"]}, ("llava_next", "original", "mistral")),
        (VIDEO, ("video_llava", "original", "llama")),
        ({**NESTED, "model_type": "llava"}, ("llava", "transformers", "llama")),
        ({**MISTRAL_NESTED, "model_type": "llava"}, ("llava", "transformers", "mistral")),
        (
            {**NESTED, "model_type": "llava_next", "image_grid_pinpoints": [[1]]},
            ("llava_next", "transformers", "llama"),
        ),
        ({**MISTRAL_NESTED, "model_type": "llava_next"}, ("llava_next", "transformers", "mistral")),
        ({**NESTED, "model_type": "video_llava", "video_token_index": 9}, ("video_llava", "transformers", "llama")),
        ({**QWEN, "model_type": "qwen2_vl", "vision_config": {"embed_dim": 8}}, ("qwen2_vl", "transformers", "qwen2")),
        (
            {**QWEN, "model_type": "qwen2_5_vl", "vision_config": {"window_size": 112}},
            ("qwen2_5_vl", "transformers", "qwen2"),
        ),
    ],
)
def test_what_a_config_says(config, kind):
    assert identify(config, HERE) == Kind(*kind)


SIGLIP = {"text_config": {"model_type": "qwen2"}, "vision_config": {"model_type": "siglip"}}


@pytest.mark.parametrize(
    ("config", "family"),
    [
        ({}, "unknown"),
        ({**NESTED, "model_type": "llava_next_video", "image_grid_pinpoints": [[1]]}, "llava_next_video"),
        ({**ORIGINAL, "model_type": "llava_qwen"}, "llava_qwen"),
        ({**ORIGINAL, "architectures": ["LlavaMptForCausalLM"]}, "LlavaMptForCausalLM"),
        ({**QWEN, "model_type": "qwen3_vl", "vision_config": {}}, "qwen3_vl"),
        ({"model_type": "llava", "vision_config": {}}, "llava"),
        ({"model_type": "llava", **SIGLIP}, r"llava \(siglip tower, qwen2 decoder\)"),
    ],
)
def test_other_families_are_refused(config, family):
    with pytest.raises(UserError, match=f"^folder is a checkpoint of the family {family}, which is not supported: "):
        identify(config, HERE)


DATA = Path(__file__).parent / "data" / "llava_keys"

# config.json of liuhaotian/llava-v1.5-7b, the fields that say something about the model.
LLAVA_7B = {
    "model_type": "llava_llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": CLIP_L_336_NAME,
}
# What the other checkpoints' config.json have besides.
MISTRAL = {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "max_position_embeddings": 32768,
}
YI = {
    "hidden_size": 7168,
    "intermediate_size": 20480,
    "num_hidden_layers": 60,
    "num_attention_heads": 56,
    "num_key_value_heads": 8,
    "rope_theta": 5000000.0,
    "vocab_size": 64000,
}
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]

MODELS = {
    "llava-v1.5-7b": (Kind("llava", "original", "llama"), CLIP_L_336, 686),
    "llava-v1.6-vicuna-7b": (Kind("llava_next", "original", "llama"), CLIP_L_336, 687),
    "video-llava-7b": (Kind("video_llava", "original", "llama"), LANGUAGEBIND, 1077),
}


def keys_of(model: str) -> list[dict]:
    return json.loads((DATA / f"{model}.json").read_text())


def container_of(kind: Kind, vision: dict, **config) -> PreTrainedModel:
    """Built without memory."""
    build = HF_CLASSES[kind.family]
    config = to_transformers_config({**LLAVA_7B, "image_grid_pinpoints": PINPOINTS, **config}, vision, kind)
    with torch.device("meta"):
        return build(build.config_class.from_dict(config))


def shapes_of(weights: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    return {name: list(weight.shape) for name, weight in weights.items()}


@pytest.mark.parametrize("model", MODELS)
def test_every_original_key_has_its_place_and_the_way_back(model):
    """None missing, none left, every shape equal. The tests' own writers give the real names, so that what they write
    is what the loader meets."""
    (kind, vision, count), rows = MODELS[model], keys_of(model)
    container, shapes = container_of(kind, vision), {row["original"]: row["shape"] for row in rows}
    assert len(rows) == count
    assert {hf_key(name): shape for name, shape in shapes.items()} == shapes_of(container.state_dict())
    assert all(hf_key(row["original"]) == row["hf_v5"] for row in rows)
    original = to_original_layout(container, 32000, tower=True)
    del original["model.layers.0.self_attn.rotary_emb.inv_freq"]
    assert shapes_of(original) == shapes
    assert all(hub_name(row["hf_v5"]) == row["hf_hub"] for row in rows)


@pytest.mark.parametrize("model", MODELS)
def test_every_key_of_the_hub_has_its_place(model):
    """Under the names of old files, under today's, and under those of 4.52, which kept "vision_model." inside."""
    kind = MODELS[model][0]._replace(layout="transformers")
    for row in keys_of(model):
        for name in (row["hf_hub"], row["hf_v5"]):
            assert hf_key(name, kind) == row["hf_v5"]
        module, _, rest = row["hf_v5"].partition("_tower.")
        if rest:
            assert hf_key(f"{module}_tower.vision_model.{rest}", kind) == row["hf_v5"]


@pytest.mark.parametrize("version", ["2", "2.5"])
def test_qwen_keys_there_and_back(version):
    model = make_tiny_qwen(version)
    short = [qwen_name(key) for key in model.state_dict()]
    assert {"visual.patch_embed.proj.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"} <= set(short)
    kind = Kind(model.config.model_type, "transformers", "qwen2")
    for names in (short, model.state_dict()):
        assert [hf_key(name, kind) for name in names] == list(model.state_dict())


# The translated configs


def test_the_configs_of_llava_1_5_and_video_llava_say_what_the_hub_says():
    """LanguageBind's towers have the exact GELU, which conversions to transformers have lost."""
    config = container_of(*MODELS["llava-v1.5-7b"][:2]).config
    assert (config.image_token_index, config.image_seq_length, config.vision_feature_layer) == (32000, 576, -2)
    assert (config.vision_feature_select_strategy, config.projector_hidden_act) == ("default", "gelu")
    assert config.text_config.rope_parameters["rope_theta"] == 10000
    assert config.text_config.rms_norm_eps == 1e-5
    assert config.vision_config.hidden_act == "quick_gelu"
    config = container_of(*MODELS["video-llava-7b"][:2]).config
    assert (config.image_token_index, config.video_token_index) == (32000, 32001)
    assert (config.image_seq_length, config.video_seq_length) == (256, 2056)
    assert (config.vision_config.image_size, config.vision_config.hidden_act) == (224, "gelu")


def test_the_config_of_llava_1_6_mistral():
    """A null window stays null: the library would assume one of 4096."""
    kind = Kind("llava_next", "original", "mistral")
    config = container_of(kind, CLIP_L_336, **MISTRAL).config
    assert config.image_grid_pinpoints == PINPOINTS
    text = config.text_config
    assert (text.model_type, text.sliding_window, text.num_key_value_heads) == ("mistral", None, 8)
    assert text.rope_parameters["rope_theta"] == 1000000
    windowed = container_of(kind, CLIP_L_336, **{**MISTRAL, "sliding_window": 4096})
    assert windowed.config.text_config.sliding_window == 4096


def test_the_config_of_llava_1_6_34b():
    config = container_of(Kind("llava_next", "original", "llama"), CLIP_L_336, **YI).config
    text = config.text_config
    assert (text.num_attention_heads, text.num_key_value_heads, text.head_dim) == (56, 8, 128)
    assert text.rope_parameters["rope_theta"] == 5000000
    assert config.image_token_index == 64000
