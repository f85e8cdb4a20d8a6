"""The original layout (a flat decoder config, mm_* fields, LLaVA's own weight names) in transformers' terms.

Pure functions on names and dictionaries; llava/model/checkpoint/load.py reads the files.

Official code read: haotian-liu/LLaVA@c121f04, llava/model/builder.py, llava_arch.py, multimodal_projector/builder.py;
PKU-YuanGroup/Video-LLaVA@984e65b, videollava/model/multimodal_encoder
Differs from it: a vision tower inside the shards is used; theirs is ignored for LLaVA-1.5 and Video-LLaVA and loaded
from mm_vision_tower (LLaVA issues 382 and 1694), the same weights wherever the tower was frozen.
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
# Null means something for these: no window, where the library would assume one of 4096.
NULLABLE_FIELDS = {"mistral": ("sliding_window",)}
NEEDED_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")

SELECT_STRATEGY = {"patch": "default", "cls_patch": "full"}

# The towers of the official checkpoints, so that shards that hold their weights need no second download.
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
# From OpenCLIP's ViT-L/14, whose activation is the exact GELU, unlike OpenAI's.
LANGUAGEBIND = {**CLIP_L_336, "image_size": 224, "hidden_act": "gelu"}
LLAVA = Kind("llava", "original", "llama")

# Field of config.json -> module of the container. The shards repeat the module's name: model.<module>.<module>.
TOWER_MODULES = {
    "mm_vision_tower": "vision_tower",
    "mm_image_tower": "image_tower",
    "mm_video_tower": "video_tower",
}
# Where nothing matches the name stays as it is, and the loader reports it as unexpected.
KEY_MAP = (
    (re.compile(r"^model\.(vision|image|video)_tower\.\1_tower\.(?:vision_model\.)?"), r"model.\1_tower."),
    (re.compile(r"^model\.mm_projector\.0\."), "model.multi_modal_projector.linear_1."),
    (re.compile(r"^model\.mm_projector\.2\."), "model.multi_modal_projector.linear_2."),
    (re.compile(r"^model\.(?=(?:embed_tokens|layers|norm)\.)"), "model.language_model."),
)
CLIP_VISION_KEY = re.compile(r"^(?:vision_model\.)?(?=(?:embeddings|pre_layrnorm|encoder|post_layernorm)\.)")


def to_transformers_key(key: str) -> str:
    """The path of an original weight inside its transformers container."""
    for pattern, replacement in KEY_MAP:
        if pattern.match(key):
            return pattern.sub(replacement, key, count=1)
    return key


def tower_to_transformers_key(key: str, module: str = "vision_tower") -> str | None:
    """The path of a weight of a stand-alone CLIP checkpoint there; None for its text half."""
    return CLIP_VISION_KEY.sub(f"model.{module}.", key) if CLIP_VISION_KEY.match(key) else None


def to_transformers_config(
    config: Mapping[str, Any],
    vision_config: Mapping[str, Any],
    kind: Kind = LLAVA,
    frames: int = VIDEO_FRAMES,
) -> dict[str, Any]:
    """The arguments of a LlavaConfig, LlavaNextConfig or VideoLlavaConfig.

    Args:
        vision_config: of the tower, or of both towers: a CLIPVisionConfig as a dictionary.
        frames: of a video.
    """
    missing = [field for field in NEEDED_FIELDS if field not in config]
    if missing:
        raise UserError(f"config.json lacks {', '.join(missing)}; an original LLaVA config is a flat decoder config.")
    _refuse_unsupported(config)
    patches = (vision_config["image_size"] // vision_config["patch_size"]) ** 2
    text_config = {field: config[field] for field in TEXT_FIELDS if config.get(field) is not None}
    nullable = {field: config[field] for field in NULLABLE_FIELDS.get(kind.decoder, ()) if field in config}
    quantised = {field: config[field] for field in ("quantization_config",) if config.get(field) is not None}
    return {
        "text_config": {"model_type": kind.decoder, **text_config, **nullable},
        "vision_config": {**vision_config, "model_type": "clip_vision_model"},
        # The first id after the vocabulary, as in the checkpoints of the hub: there is no row for it here.
        "image_token_index": config["vocab_size"],
        "image_seq_length": patches,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": config.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": SELECT_STRATEGY[config.get("mm_vision_select_feature", "patch")],
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
        **_of_family(config, vision_config, kind, (patches + 1) * frames),
        **quantised,
    }


def _of_family(
    config: Mapping[str, Any], vision_config: Mapping[str, Any], kind: Kind, video_tokens: int
) -> dict[str, Any]:
    """What only one family's config has."""
    if kind.family == "llava_next":
        points = parse_pinpoints(config.get("image_grid_pinpoints"), vision_config["image_size"])
        return {"image_grid_pinpoints": [list(pair) for pair in points]}
    if kind.family == "video_llava":
        return {"video_token_index": config["vocab_size"] + 1, "video_seq_length": video_tokens}
    return {}


def merge_type(config: Mapping[str, Any]) -> str:
    """How an original LLaVA-NeXT puts its crops together.

    Raises:
        UserError: pictures are cut or put together in a way that is not known here.
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
