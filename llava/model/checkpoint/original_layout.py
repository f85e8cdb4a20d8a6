"""Translate the original layout (flat decoder config, mm_* fields, LLaVA's own weight names) to transformers'.

Pure functions on names and dictionaries; llava/model/checkpoint/load.py reads the files.

Official code read: haotian-liu/LLaVA@c121f04, llava/model/builder.py, llava_arch.py, multimodal_projector/builder.py;
PKU-YuanGroup/Video-LLaVA@984e65b, videollava/model/multimodal_encoder
Differs from it: a vision tower in the shards is used. The official code ignores it for LLaVA-1.5 and Video-LLaVA and
loads mm_vision_tower instead (LLaVA issues 382 and 1694); the weights are the same if the tower was frozen.
"""

import re
from collections.abc import Mapping
from typing import Any

from llava.errors import UserError
from llava.model.checkpoint.identify import Kind
from llava.model.multimodal_encoder.languagebind import VIDEO_FRAMES
from llava.processing.anyres import MERGES, parse_pinpoints

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
# Null has a meaning for these fields: no sliding window, where the library's default is 4096.
NULLABLE_FIELDS = {"mistral": ("sliding_window",)}
NEEDED_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")

# The towers of the official checkpoints: shards that contain their weights need no second download.
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
LANGUAGEBIND_NAMES = ("LanguageBind/LanguageBind_Image", "LanguageBind/LanguageBind_Video_merge")
# Trained from OpenCLIP's ViT-L/14, which has the exact GELU, unlike OpenAI's.
LANGUAGEBIND = {**CLIP_L_336, "image_size": 224, "hidden_act": "gelu"}
LLAVA = Kind("llava", "original", "llama")

# Field of config.json -> module of the HF model. The shards repeat the module's name: model.<module>.<module>.
TOWER_MODULES = {
    "mm_vision_tower": "vision_tower",
    "mm_image_tower": "image_tower",
    "mm_video_tower": "video_tower",
}
# A name that nothing matches does not change, and the loader reports it as unexpected.
KEY_MAP = (
    (re.compile(r"^model\.(vision|image|video)_tower\.\1_tower\.(?:vision_model\.)?"), r"model.\1_tower."),
    (re.compile(r"^model\.mm_projector\.0\."), "model.multi_modal_projector.linear_1."),
    (re.compile(r"^model\.mm_projector\.2\."), "model.multi_modal_projector.linear_2."),
    (re.compile(r"^model\.(?=(?:embed_tokens|layers|norm)\.)"), "model.language_model."),
)
CLIP_VISION_KEY = re.compile(r"^(?:vision_model\.)?(?=(?:embeddings|pre_layrnorm|encoder|post_layernorm)\.)")


def to_transformers_key(key: str) -> str:
    """Return the name in the HF model of a weight of the original layout."""
    for pattern, replacement in KEY_MAP:
        if pattern.match(key):
            return pattern.sub(replacement, key, count=1)
    return key


def tower_to_transformers_key(key: str, module: str = "vision_tower") -> str | None:
    """Return the name in the HF model of a weight of a stand-alone CLIP; None for weights of its text tower."""
    return CLIP_VISION_KEY.sub(f"model.{module}.", key) if CLIP_VISION_KEY.match(key) else None


def to_transformers_config(
    config: Mapping[str, Any],
    vision_config: Mapping[str, Any],
    kind: Kind = LLAVA,
    frames: int = VIDEO_FRAMES,
) -> dict[str, Any]:
    """Return the fields of a LlavaConfig, LlavaNextConfig or VideoLlavaConfig.

    Args:
        vision_config: a CLIPVisionConfig as a dictionary, for one or both towers.
        frames: of a video.
    """
    missing = [field for field in NEEDED_FIELDS if config.get(field) is None]
    if missing:
        raise UserError(f"config.json lacks {', '.join(missing)}; an original LLaVA config is a flat decoder config.")
    _refuse_unsupported(config)
    layer = config.get("mm_vision_select_layer")
    patches = (vision_config["image_size"] // vision_config["patch_size"]) ** 2
    text_config = {field: config[field] for field in TEXT_FIELDS if config.get(field) is not None}
    nullable = {field: config[field] for field in NULLABLE_FIELDS.get(kind.decoder, ()) if field in config}
    quantised = {field: config[field] for field in ("quantization_config",) if config.get(field) is not None}
    return {
        "text_config": {"model_type": kind.decoder, **text_config, **nullable},
        "vision_config": {**vision_config, "model_type": "clip_vision_model"},
        # The first id after the vocabulary, as in the checkpoints of the hub; the embedding has no row for it here.
        "image_token_index": config["vocab_size"],
        "image_seq_length": patches,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": -2 if layer is None else layer,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
        **_of_family(config, vision_config, kind, (patches + 1) * frames),
        **quantised,
    }


def _of_family(
    config: Mapping[str, Any], vision_config: Mapping[str, Any], kind: Kind, video_tokens: int
) -> dict[str, Any]:
    """Return the fields that only one family has."""
    if kind.family == "llava_next":
        points = parse_pinpoints(config.get("image_grid_pinpoints"), vision_config["image_size"])
        return {"image_grid_pinpoints": [list(pair) for pair in points]}
    if kind.family == "video_llava":
        return {"video_token_index": config["vocab_size"] + 1, "video_seq_length": video_tokens}
    return {}


def merge_type(config: Mapping[str, Any]) -> str:
    """Return how an original LLaVA-NeXT checkpoint merges the tiles of an image.

    Raises:
        UserError: its tiling or merging is not supported.
    """
    aspect = config.get("image_aspect_ratio")
    merge = config.get("mm_patch_merge_type") or "flat"
    if aspect != "anyres" or merge not in MERGES:
        raise UserError(
            f"image_aspect_ratio {aspect!r} with mm_patch_merge_type {merge!r} is not supported; expected "
            f"'anyres' with {' or '.join(map(repr, MERGES))}, as in the LLaVA-1.6 checkpoints."
        )
    return merge


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    projector = config.get("mm_projector_type", "linear")
    if projector != "mlp2x_gelu":
        raise UserError(
            f"The projector type {projector!r} is not supported: the transformers LLaVA class has exactly two linear "
            "layers with a GELU in between, which is 'mlp2x_gelu'."
        )
    if config.get("mm_use_im_start_end", False):
        raise UserError("mm_use_im_start_end is set; image start and end tokens are not supported.")
