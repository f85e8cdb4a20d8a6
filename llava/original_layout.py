"""The original LLaVA-1.5 layout (a flat Llama config, mm_* fields, LLaVA's own weight names) in transformers' terms.

Pure functions on names and dictionaries; llava/checkpoint.py reads the files.

Official code read: haotian-liu/LLaVA@c121f04, llava/model/builder.py, llava_arch.py, multimodal_projector/builder.py
Differs from it: a vision tower inside the shards is used; theirs is ignored for 1.5 and loaded from mm_vision_tower
(LLaVA issues 382 and 1694), the same weights wherever the tower was frozen.
"""

import re
from collections.abc import Mapping
from typing import Any

from llava.errors import UserError

TEXT_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "attention_bias",
    "mlp_bias",
    "attention_dropout",
    "tie_word_embeddings",
    "vocab_size",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
NEEDED_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")

SELECT_STRATEGY = {"patch": "default", "cls_patch": "full"}

# The tower of every official 1.5 checkpoint, so that shards that hold its weights need no second download.
CLIP_L_336_NAME = "openai/clip-vit-large-patch14-336"
CLIP_L_336 = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}

TOWER = "model.vision_tower.vision_tower."
# Where nothing matches the name stays as it is, and the loader reports it as unexpected.
KEY_MAP = (
    (re.compile(r"^model\.vision_tower\.vision_tower\.(?:vision_model\.)?"), "model.vision_tower."),
    (re.compile(r"^model\.mm_projector\.0\."), "model.multi_modal_projector.linear_1."),
    (re.compile(r"^model\.mm_projector\.2\."), "model.multi_modal_projector.linear_2."),
    (re.compile(r"^model\.(?=(?:embed_tokens|layers|norm)\.)"), "model.language_model."),
)
CLIP_VISION_KEY = re.compile(r"^(?:vision_model\.)?(?=(?:embeddings|pre_layrnorm|encoder|post_layernorm)\.)")


def to_transformers_key(key: str) -> str:
    """The name of an original weight inside LlavaForConditionalGeneration."""
    for pattern, replacement in KEY_MAP:
        if pattern.match(key):
            return pattern.sub(replacement, key, count=1)
    return key


def tower_to_transformers_key(key: str) -> str | None:
    """The name of a weight of a stand-alone CLIP checkpoint there; None for its text half."""
    return CLIP_VISION_KEY.sub("model.vision_tower.", key) if CLIP_VISION_KEY.match(key) else None


def to_transformers_config(config: Mapping[str, Any], vision_config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a LlavaConfig. `vision_config` is that of the tower, a CLIPVisionConfig as a dictionary."""
    missing = [field for field in NEEDED_FIELDS if field not in config]
    if missing:
        raise UserError(f"config.json lacks {', '.join(missing)}; an original LLaVA-1.5 config is a flat Llama config.")
    _refuse_unsupported(config)
    grid = vision_config["image_size"] // vision_config["patch_size"]
    text_config = {field: config[field] for field in TEXT_FIELDS if config.get(field) is not None}
    return {
        "text_config": {"model_type": "llama", **text_config},
        "vision_config": {**vision_config, "model_type": "clip_vision_model"},
        # The first id after the vocabulary, as in the checkpoints of the hub: there is no row for it here.
        "image_token_index": config["vocab_size"],
        "image_seq_length": grid * grid,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": config.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": SELECT_STRATEGY[config.get("mm_vision_select_feature", "patch")],
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
    }


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    projector = config.get("mm_projector_type", "linear")
    if projector != "mlp2x_gelu":
        raise UserError(
            f"The projector type {projector!r} is not supported: the transformers LLaVA class that holds the weights "
            "has exactly two linear layers with a GELU between, which is 'mlp2x_gelu'."
        )
    if config.get("mm_use_im_start_end", False):
        raise UserError("mm_use_im_start_end is set: image start and end tokens are not supported, only a bare image.")
    feature = config.get("mm_vision_select_feature", "patch")
    if feature not in SELECT_STRATEGY:
        raise UserError(
            f"mm_vision_select_feature is {feature!r}; expected one of {', '.join(sorted(SELECT_STRATEGY))}."
        )
