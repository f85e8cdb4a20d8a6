"""config.json: what its fields may be, which model they describe, and what they and weights are called in transformers.

The types of the fields that this code relies on are checked once, where config.json is read. Unknown fields are
allowed, because config.json files hold many. Absent and null fields take the library's defaults.

Family, layout, decoder and prompt template follow from several fields. model_type alone is ambiguous: "llava" can be
LLaVA-1.5, LLaVA-NeXT or Video-LLaVA in the original layout, and is LLaVA-1.5 in the transformers layout. The original
layout (flat decoder config, mm_* fields, LLaVA's own weight names) is translated to the transformers layout.

All functions here are pure, on names and dictionaries; llava/model/checkpoint/load.py reads the files.

Official code read: haotian-liu/LLaVA@c121f04, llava/model/builder.py, llava_arch.py, multimodal_projector/builder.py;
PKU-YuanGroup/Video-LLaVA@984e65b, videollava/model/llava_arch.py and multimodal_encoder
Differs from it: a vision tower in the shards is used. The official code ignores it for LLaVA-1.5 and Video-LLaVA, and
loads mm_vision_tower instead (LLaVA issues 382 and 1694); the weights are the same if the tower was frozen in training.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from huggingface_hub.errors import StrictDataclassError
from pydantic import PositiveInt
from transformers import LlamaConfig, PretrainedConfig

from llava.errors import UserError, unknown
from llava.processing.image import MERGES
from llava.processing.json_files import Schema
from llava.processing.video import FRAMES
from llava.transformers_names import ACT2FN

Family = Literal["llava", "llava_next", "video_llava", "qwen2_5_vl", "qwen2_vl"]
CheckpointLayout = Literal["transformers", "original"]
Decoder = Literal["llama", "mistral", "qwen2"]

NAMES: dict[Family, str] = {
    "llava": "LLaVA",
    "llava_next": "LLaVA-NeXT",
    "video_llava": "Video-LLaVA",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen2_vl": "Qwen2-VL",
}
SUPPORTED = (
    "this version reads LLaVA-1.5, LLaVA-NeXT and Video-LLaVA (CLIP towers, an mlp2x_gelu projector, a Llama or "
    "Mistral decoder) in the transformers and the original layout, and Qwen2-VL and Qwen2.5-VL in the transformers "
    "layout; benchmarks and reduce() take the families of `vtr show models`, too"
)
QWEN: tuple[Family, ...] = ("qwen2_5_vl", "qwen2_vl")

# Fields that say what happens to a tower's class token -> the only value that is supported.
CLASS_TOKEN = {"vision_feature_select_strategy": "default", "mm_vision_select_feature": "patch"}
# Decoders of the original layout, by the class in `architectures` or else by model_type.
DECODERS: dict[str, Decoder] = {
    "LlavaLlamaForCausalLM": "llama",
    "LlavaMistralForCausalLM": "mistral",
    "llava": "llama",
    "llava_llama": "llama",
    "llava_mistral": "mistral",
}

CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
LLAMA_3_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

LLAMA_FIELDS = {field.name for field in dataclasses.fields(LlamaConfig)} - {
    field.name for field in dataclasses.fields(PretrainedConfig)
}
NEEDED_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")

# The towers of the official checkpoints. With their configurations here, shards that hold them need no second download.
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
# Trained from OpenCLIP's ViT-L/14, which has the exact GELU; OpenAI's has an approximation.
LANGUAGEBIND = {**CLIP_L_336, "image_size": 224, "hidden_act": "gelu"}

# Field of config.json -> module of the HF model. The shards repeat the module's name: model.<module>.<module>.
TOWER_MODULES = {"mm_vision_tower": "vision_tower", "mm_image_tower": "image_tower", "mm_video_tower": "video_tower"}
# Names of weights -> names in the HF model of transformers 5; for the original layout, the hub's files and Qwen's.
_TOWER = r"(vision_tower|image_tower|video_tower)"
ORIGINAL_KEYS = (
    (re.compile(r"^model\.(vision|image|video)_tower\.\1_tower\.(?:vision_model\.)?"), r"model.\1_tower."),
    (re.compile(r"^model\.mm_projector\.0\."), "model.multi_modal_projector.linear_1."),
    (re.compile(r"^model\.mm_projector\.2\."), "model.multi_modal_projector.linear_2."),
    (re.compile(r"^model\.(?=(?:embed_tokens|layers|norm)\.)"), "model.language_model."),
)
HUB_KEYS = (
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^language_model\.model\."), "model.language_model."),
    (re.compile(rf"^(?:model\.)?{_TOWER}\.(?:vision_model\.)?"), r"model.\1."),
    (re.compile(r"^(?=multi_modal_projector\.|image_newline$)"), "model."),
)
QWEN_KEYS = (
    (re.compile(r"^(?=visual\.)"), "model."),
    (re.compile(r"^model\.(?=(?:embed_tokens|layers|norm)\.)"), "model.language_model."),
)
CLIP_VISION_KEY = re.compile(r"^(?:vision_model\.)?(?=(?:embeddings|pre_layrnorm|encoder|post_layernorm)\.)")


# The fields that this code reads itself; transformers' own configurations check the others (`library_config`)


class _Part(Schema):
    model_type: str | None = None
    quantization_config: dict[str, Any] | None = None


class CheckpointConfig(_Part):
    """The fields of any config.json that are read here: those that tell family and layout, and LLaVA's mm_* fields."""

    architectures: list[str] | None = None
    text_config: _Part | None = None
    vision_config: _Part | None = None
    hidden_size: PositiveInt | None = None
    mm_vision_tower: str | None = None
    mm_image_tower: str | None = None
    mm_video_tower: str | None = None
    mm_projector_type: str | None = None
    mm_patch_merge_type: str | None = None
    image_aspect_ratio: str | None = None


# Which model they describe


class Kind(NamedTuple):
    """Family, layout and decoder of a config.json."""

    family: Family
    layout: CheckpointLayout
    decoder: Decoder


LLAVA = Kind("llava", "original", "llama")


def identify(config: Mapping[str, Any], where: Path) -> Kind:
    """Return family, layout and decoder.

    Args:
        config: config.json.
        where: its folder, for the error.

    Raises:
        UserError: the model is not supported.
    """
    towers = [field for field in TOWER_MODULES if config.get(field) is not None]
    vision = config.get("vision_config")
    family: Any = config.get("model_type", "unknown")
    if towers:
        # The class says more than the type, which "llava" hides.
        names = config.get("architectures") or [family]
        if len(names) != 1 or names[0] not in DECODERS:
            raise _unsupported(where, ", ".join(names))
        merge = config.get("mm_patch_merge_type") or "flat"
        tiled = "anyres" in str(config.get("image_aspect_ratio")) or merge != "flat"
        family = "llava_next" if tiled else "llava"
        kind = Kind(family if towers == ["mm_vision_tower"] else "video_llava", "original", DECODERS[names[0]])
    elif family in QWEN and vision is not None:  # on the hub it is the only nested part of a Qwen-VL
        kind = Kind(family, "transformers", "qwen2")
    else:
        if family not in NAMES or config.get("text_config") is None or vision is None:
            raise _unsupported(where, family)
        text = config["text_config"].get("model_type", "llama")
        tower = vision.get("model_type", "clip_vision_model")
        if text not in ("llama", "mistral") or tower != "clip_vision_model":
            raise _unsupported(where, f"{family} ({tower} tower, {text} decoder)")
        kind = Kind(family, "transformers", text)
    for field, only in CLASS_TOKEN.items():
        if config.get(field) not in (None, only):
            raise UserError(
                f"{where}: {field} is {config[field]!r}; only {only!r} is supported, which drops the class token."
            )
    return kind


def refuse_feature_layer(config: PretrainedConfig, where: str) -> None:
    """Raise UserError for features of several layers, or of a layer that the tower does not have."""
    # hidden_states of a tower with n blocks has n + 1 entries, so -n-1 to n are possible.
    layer, depth = config.vision_feature_layer, config.vision_config.num_hidden_layers
    if not isinstance(layer, int) or not -depth - 1 <= layer <= depth:
        raise UserError(
            f"{where} takes image features from layer {layer} of a vision tower with {depth} blocks; "
            f"expected one layer from {-depth - 1} to {depth}, LLaVA uses -2."
        )


def default_mode(kind: Kind, vocabulary: Mapping[str, int]) -> str:
    """Return the prompt template that benchmark scripts use for a checkpoint's images.

    Args:
        vocabulary: the tokenizer's. LLaVA-1.6-34B (Nous-Hermes-2-Yi) has ChatML's tokens in it, LLaVA-NeXT with a
            Llama-3 decoder has Llama-3's; Vicuna's and Mistral's vocabularies have neither.
    """
    if kind.family in QWEN:
        return "qwen2_vl"
    if all(token in vocabulary for token in CHATML_TOKENS):
        return "chatml_direct"
    if all(token in vocabulary for token in LLAMA_3_TOKENS):
        return "llava_llama_3"
    return "mistral_instruct" if kind.decoder == "mistral" else "vicuna_v1"


def _unsupported(where: Path, family: str) -> UserError:
    return UserError(f"{where} is a checkpoint of the family {family}, which is not supported: {SUPPORTED}.")


def library_config(build: Any, fields: Mapping[str, Any], directory: Path, what: str) -> Any:
    """Build the library's configuration from the fields of a config.json, whose types it checks.

    Args:
        build: a configuration class of transformers.
        directory: the folder of the config.json.
        what: what the fields describe, in words.

    Raises:
        UserError: transformers refuses the fields.
    """
    try:
        config = build.from_dict(dict(fields))
    except (StrictDataclassError, TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{directory}/config.json describes no {what}: {' '.join(str(error).split())}") from error
    refuse_activations(config.to_dict(), directory)
    return config


def refuse_activations(fields: Mapping[str, Any], directory: Path) -> None:
    """Raise UserError for an activation that transformers does not know, also in nested configurations."""
    for name, value in fields.items():
        if isinstance(value, dict):
            refuse_activations(value, directory)
        elif str(name).endswith(("hidden_act", "hidden_activation")) and isinstance(value, str) and value not in ACT2FN:
            raise unknown(f"{name} in {directory}/config.json", value, ACT2FN)


# Names of weights


def hf_key(key: str, kind: Kind = LLAVA) -> str:
    """Return a weight's name in the HF model. A name that no rule matches is kept; loading finds it unexpected."""
    rules = ORIGINAL_KEYS if kind.layout == "original" else QWEN_KEYS if kind.family in QWEN else HUB_KEYS
    for pattern, replacement in rules:
        if pattern.match(key):
            return pattern.sub(replacement, key, count=1)
    return key


def hf_tower_key(key: str, module: str = "vision_tower") -> str | None:
    """Return the HF model's name of a weight of a stand-alone CLIP; None for weights of its text tower."""
    return CLIP_VISION_KEY.sub(f"model.{module}.", key) if CLIP_VISION_KEY.match(key) else None


# Fields


def to_transformers_config(
    config: Mapping[str, Any], vision_config: Mapping[str, Any], kind: Kind = LLAVA, frames: int = FRAMES
) -> dict[str, Any]:
    """Return the fields of a LlavaConfig, LlavaNextConfig or VideoLlavaConfig.

    Args:
        vision_config: a CLIPVisionConfig as a dictionary, for one or both towers.
        frames: number of frames of a video.
    """
    missing = [field for field in NEEDED_FIELDS if config.get(field) is None]
    if missing:
        raise UserError(f"config.json lacks {', '.join(missing)}; an original LLaVA config is a flat decoder config.")
    projector = config.get("mm_projector_type", "linear")
    if projector != "mlp2x_gelu":
        raise UserError(
            f"The projector type {projector!r} is not supported: the transformers LLaVA class has exactly two linear "
            "layers with a GELU in between, which is 'mlp2x_gelu'."
        )
    layer = config.get("mm_vision_select_layer")
    patches = (vision_config["image_size"] // vision_config["patch_size"]) ** 2
    copied = {*LLAMA_FIELDS, "rope_theta", "rope_scaling"}  # both are part of rope_parameters since transformers 5
    text_config = {field: value for field, value in config.items() if field in copied and value is not None}
    if kind.decoder == "mistral" and "sliding_window" in config:
        text_config["sliding_window"] = config["sliding_window"]  # null is no window; the library's default is 4096
    fields: dict[str, Any] = {
        "text_config": {"model_type": kind.decoder, **text_config},
        "vision_config": {**vision_config, "model_type": "clip_vision_model"},
        # The first id after the vocabulary, as in the checkpoints of the hub; the embedding has no row for it here.
        "image_token_index": config["vocab_size"],
        "image_seq_length": patches,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": -2 if layer is None else layer,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
    }
    if kind.family == "llava_next":
        fields["image_grid_pinpoints"] = config.get("image_grid_pinpoints")
    elif kind.family == "video_llava":
        fields["video_token_index"] = config["vocab_size"] + 1
        fields["video_seq_length"] = (patches + 1) * frames
    return fields


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
