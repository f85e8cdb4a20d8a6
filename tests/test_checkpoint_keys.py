"""The maps of weight names against the lists of the real models: each name, each shape, there and back."""

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from llava.model.checkpoint.hf_model import HF_CLASSES, VideoLlavaWithTime, hub_to_container_key, video_frames
from llava.model.checkpoint.identify import Kind
from llava.model.checkpoint.original_layout import (
    CLIP_L_336,
    CLIP_L_336_NAME,
    LANGUAGEBIND,
    to_transformers_config,
    to_transformers_key,
    tower_to_transformers_key,
)
from tests.tiny_checkpoints import to_original_layout
from tests.tiny_checkpoints_families import hub_name, make_tiny_qwen, qwen_name

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


def shapes_of(model: PreTrainedModel) -> dict[str, list[int]]:
    return {name: list(weight.shape) for name, weight in model.state_dict().items()}


@pytest.mark.parametrize("model", MODELS)
def test_every_original_key_has_its_place(model):
    """None missing, none left, every shape equal."""
    (kind, vision, count), rows = MODELS[model], keys_of(model)
    assert len(rows) == count
    assert {to_transformers_key(row["original"]): row["shape"] for row in rows} == shapes_of(container_of(kind, vision))
    assert all(to_transformers_key(row["original"]) == row["hf_v5"] for row in rows)


@pytest.mark.parametrize("model", MODELS)
def test_every_key_of_the_hub_has_its_place(model):
    """Under the names of old files, under today's, and under those of 4.52, which kept "vision_model." inside."""
    family = MODELS[model][0].family
    for row in keys_of(model):
        for name in (row["hf_hub"], row["hf_v5"]):
            assert hub_to_container_key(name, family) == row["hf_v5"]
        module, _, rest = row["hf_v5"].partition("_tower.")
        if rest:
            assert hub_to_container_key(f"{module}_tower.vision_model.{rest}", family) == row["hf_v5"]


@pytest.mark.parametrize("model", MODELS)
def test_the_way_back(model):
    """The tests' own writers give the real names, so that what they write is what the loader meets."""
    (kind, vision, _), rows = MODELS[model], keys_of(model)
    original = to_original_layout(container_of(kind, vision), 32000, tower=True)
    del original["model.layers.0.self_attn.rotary_emb.inv_freq"]
    assert {name: list(weight.shape) for name, weight in original.items()} == {r["original"]: r["shape"] for r in rows}
    assert all(hub_name(row["hf_v5"]) == row["hf_hub"] for row in rows)


@pytest.mark.parametrize("version", ["2", "2.5"])
def test_qwen_keys_there_and_back(version):
    model = make_tiny_qwen(version)
    short = [qwen_name(key) for key in model.state_dict()]
    assert {"visual.patch_embed.proj.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"} <= set(short)
    for names in (short, model.state_dict()):
        assert [hub_to_container_key(name, model.config.model_type) for name in names] == list(model.state_dict())


def test_time_adds_eleven_weights_to_a_block():
    """Beyond the list, which was made from a tower without time: 264 weights in 24 blocks."""
    kind, vision, count = MODELS["video-llava-7b"]
    plain = container_of(kind, vision)
    with torch.device("meta"):
        timed = VideoLlavaWithTime(plain.config, 8)
    added = shapes_of(timed).keys() - shapes_of(plain).keys()
    assert len(shapes_of(timed)) == count + 264
    block = "model.video_tower.encoder.layers.3."
    original = "model.video_tower.video_tower.encoder.layers.3."
    assert sorted(name for name in added if name.startswith(block)) == sorted(
        to_transformers_key(original + name)
        for name in (
            "temporal_embedding",
            *(f"temporal_attn.{part}_proj.{kind}" for part in "qkv" for kind in ("weight", "bias")),
            *(f"temporal_attn.out_proj.{kind}" for kind in ("weight", "bias")),
            *(f"temporal_layer_norm1.{kind}" for kind in ("weight", "bias")),
        )
    )
    assert video_frames(timed.state_dict()) == 8
    assert video_frames(plain.state_dict()) is None


def test_weights_of_a_stand_alone_tower():
    assert tower_to_transformers_key("vision_model.embeddings.class_embedding") == (
        "model.vision_tower.embeddings.class_embedding"
    )
    assert tower_to_transformers_key("encoder.layers.0.temporal_embedding", "video_tower") == (
        "model.video_tower.encoder.layers.0.temporal_embedding"
    )
    assert tower_to_transformers_key("text_model.encoder.layers.0.layer_norm1.bias") is None


# The translated configs


def test_the_config_of_llava_1_5_says_what_the_hub_says():
    config = container_of(*MODELS["llava-v1.5-7b"][:2]).config
    assert (config.image_token_index, config.image_seq_length, config.vision_feature_layer) == (32000, 576, -2)
    assert (config.vision_feature_select_strategy, config.projector_hidden_act) == ("default", "gelu")
    assert config.text_config.rope_parameters["rope_theta"] == 10000
    assert config.text_config.rms_norm_eps == 1e-5
    assert config.vision_config.hidden_act == "quick_gelu"


@pytest.mark.parametrize("pinpoints", [PINPOINTS, str(PINPOINTS)])
def test_the_config_of_llava_1_6_mistral(pinpoints):
    """A null window stays null: the library would assume one of 4096."""
    kind = Kind("llava_next", "original", "mistral")
    config = container_of(kind, CLIP_L_336, **MISTRAL, image_grid_pinpoints=pinpoints).config
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


def test_the_config_of_video_llava():
    """LanguageBind's towers have the exact GELU, which conversions to transformers have lost."""
    config = container_of(*MODELS["video-llava-7b"][:2]).config
    assert (config.image_token_index, config.video_token_index) == (32000, 32001)
    assert (config.image_seq_length, config.video_seq_length) == (256, 2056)
    assert (config.vision_config.image_size, config.vision_config.hidden_act) == (224, "gelu")
