"""Which model a config.json describes, and how its fields and the names of its weights read in transformers' layout.

The fields of config.json decide on family, layout, decoder and prompt template. model_type alone is ambiguous: "llava"
stands for LLaVA-1.5, LLaVA-NeXT and Video-LLaVA in the original layout and for LLaVA-1.5 in the transformers layout.
The original layout (flat decoder config, mm_* fields, LLaVA's own weight names) is translated to transformers'.

Pure functions on names and dictionaries; llava/model/checkpoint/load.py reads the files.

Official code read: haotian-liu/LLaVA@c121f04, llava/model/builder.py, llava_arch.py, multimodal_projector/builder.py;
PKU-YuanGroup/Video-LLaVA@984e65b, videollava/model/llava_arch.py and multimodal_encoder
Differs from it: a vision tower in the shards is used. The official code ignores it for LLaVA-1.5 and Video-LLaVA and
loads mm_vision_tower instead (LLaVA issues 382 and 1694); the weights are the same if the tower was frozen.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from llava.errors import UserError
from llava.processing.anyres import MERGES, parse_pinpoints
from llava.processing.config_schema import DecoderConfig
from llava.processing.video import FRAMES

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
    "layout"
)
QWEN: tuple[Family, ...] = ("qwen2_5_vl", "qwen2_vl")

PARTS = ("text_config", "vision_config")
# Fields of vision_config that only one of the two Qwens has.
QWEN_FIELDS = {"qwen2_5_vl": ("fullatt_block_indexes", "window_size"), "qwen2_vl": ("embed_dim", "mlp_ratio")}

ORIGINAL_CLASSES: dict[str, Decoder] = {"LlavaLlamaForCausalLM": "llama", "LlavaMistralForCausalLM": "mistral"}
ORIGINAL_TYPES: dict[str, Decoder] = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}

CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
LLAMA_3_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

TEXT_FIELDS = tuple(field for field in DecoderConfig.model_fields if field != "sliding_window")
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

# Field of config.json -> module of the HF model. The shards repeat the module's name: model.<module>.<module>.
TOWER_MODULES = {
    "mm_vision_tower": "vision_tower",
    "mm_image_tower": "image_tower",
    "mm_video_tower": "video_tower",
}
# Names of weights -> names in the HF model of transformers 5, for the original layout, the files of the hub and Qwen's.
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
ORIGINAL_NAMES = re.compile(r"^model\.(?:mm_projector|(vision|image|video)_tower\.\1_tower)\.")
HUB_NAMES = re.compile(rf"^(?:(?:model\.)?(?:language_model|multi_modal_projector)|{_TOWER})\.")
CLIP_VISION_KEY = re.compile(r"^(?:vision_model\.)?(?=(?:embeddings|pre_layrnorm|encoder|post_layernorm)\.)")


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
        UserError: the family is not supported, or the fields contradict one another.
    """
    original = [field for field in TOWER_MODULES if config.get(field) is not None]
    nested = [field for field in PARTS if isinstance(config.get(field), dict)]
    if original and nested:
        raise _contradiction(
            where, f"{original[0]}, a field of the original layout, and {nested[0]}, one of transformers'"
        )
    if original:
        return _original(config, original, where)
    if "vision_config" in nested:  # on the hub it is the only nested part of a Qwen-VL
        return _transformers(config, where)
    raise _unsupported(where, config.get("model_type", "unknown"))


def default_mode(kind: Kind, vocabulary: Mapping[str, int]) -> str:
    """Return the prompt template that benchmark scripts use for a checkpoint's images.

    Args:
        vocabulary: of the tokenizer. ChatML's tokens are in the one of LLaVA-1.6-34B (Nous-Hermes-2-Yi), Llama-3's in
            those of LLaVA-NeXT with a Llama-3 decoder; Vicuna's and Mistral's have neither.
    """
    if kind.family in QWEN:
        return "qwen2_vl"
    if all(token in vocabulary for token in CHATML_TOKENS):
        return "chatml_direct"
    if all(token in vocabulary for token in LLAMA_3_TOKENS):
        return "llava_llama_3"
    return "mistral_instruct" if kind.decoder == "mistral" else "vicuna_v1"


def _original(config: Mapping[str, Any], towers: list[str], where: Path) -> Kind:
    classes = [name for name in config.get("architectures") or () if name]
    table, names = (ORIGINAL_CLASSES, classes) if classes else (ORIGINAL_TYPES, [config.get("model_type", "unknown")])
    if len(names) != 1 or names[0] not in table:
        raise _unsupported(where, ", ".join(names))
    decoder = table[names[0]]
    if towers != ["mm_vision_tower"]:
        if "mm_vision_tower" in towers:
            raise _contradiction(where, f"mm_vision_tower and {towers[1]}, which are of different families")
        if len(towers) == 1:
            other = next(field for field in TOWER_MODULES if field != "mm_vision_tower" and field not in towers)
            raise UserError(
                f"{where} names only one tower ({towers[0]}); Video-LLaVA needs two, add {other} to config.json."
            )
        return Kind("video_llava", "original", decoder)
    tiled = "anyres" in str(config.get("image_aspect_ratio")) or (config.get("mm_patch_merge_type") or "flat") != "flat"
    return Kind("llava_next" if tiled else "llava", "original", decoder)


def _transformers(config: Mapping[str, Any], where: Path) -> Kind:
    family, vision = config.get("model_type", "unknown"), config["vision_config"]
    if family in QWEN:
        owners = [owner for owner, fields in QWEN_FIELDS.items() if any(field in vision for field in fields)]
        if owners not in ([], [family]):
            raise _contradiction(where, f"model_type {family} and a vision_config of {' and '.join(owners)}")
        return Kind(family, "transformers", "qwen2")
    if family not in ("llava", "llava_next", "video_llava") or not isinstance(config.get("text_config"), dict):
        raise _unsupported(where, family)
    text = config["text_config"].get("model_type", "llama")
    tower = vision.get("model_type", "clip_vision_model")
    if text not in ("llama", "mistral") or tower != "clip_vision_model":
        raise _unsupported(where, f"{family} ({tower} tower, {text} decoder)")
    tiled = config.get("image_grid_pinpoints") is not None
    filmed = config.get("video_token_index") is not None or config.get("video_seq_length") is not None
    for seen, owner, field in ((tiled, "llava_next", "image_grid_pinpoints"), (filmed, "video_llava", "video tokens")):
        if seen and family != owner:
            raise _contradiction(where, f"model_type {family} and {field}, which only {owner} has")
    return Kind(family, "transformers", text)


def _unsupported(where: Path, family: str) -> UserError:
    return UserError(f"{where} is a checkpoint of the family {family}, which is not supported: {SUPPORTED}.")


def _contradiction(where: Path, what: str) -> UserError:
    return UserError(f"{where}/config.json contradicts itself: it has {what}; take the config of one checkpoint.")


# Names of weights


def hf_key(key: str, kind: Kind = LLAVA) -> str:
    """Return the name in the HF model of a weight. One that no rule matches is kept, and `fill` finds it unexpected."""
    rules = ORIGINAL_KEYS if kind.layout == "original" else QWEN_KEYS if kind.family in QWEN else HUB_KEYS
    for pattern, replacement in rules:
        if pattern.match(key):
            return pattern.sub(replacement, key, count=1)
    return key


def hf_tower_key(key: str, module: str = "vision_tower") -> str | None:
    """Return the name in the HF model of a weight of a stand-alone CLIP; None for weights of its text tower."""
    return CLIP_VISION_KEY.sub(f"model.{module}.", key) if CLIP_VISION_KEY.match(key) else None


def refuse_other_names(keys: Mapping[str, Any], kind: Kind, directory: Path) -> None:
    """Raise UserError if weights are named as in the other layout than config.json."""
    other, foreign = ("transformers", HUB_NAMES) if kind.layout == "original" else ("original", ORIGINAL_NAMES)
    misnamed = next((key for key in keys if foreign.match(key)), None)
    if misnamed is not None:
        raise UserError(
            f"{directory} mixes two layouts: config.json is of the {kind.layout} layout, but the weight {misnamed} has "
            f"a name of the {other} one; take both from one checkpoint."
        )


# Fields


def to_transformers_config(
    config: Mapping[str, Any],
    vision_config: Mapping[str, Any],
    kind: Kind = LLAVA,
    frames: int = FRAMES,
) -> dict[str, Any]:
    """Return the fields of a LlavaConfig, LlavaNextConfig or VideoLlavaConfig.

    Args:
        vision_config: a CLIPVisionConfig as a dictionary, for one or both towers.
        frames: of a video.
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
    if config.get("mm_use_im_start_end", False):
        raise UserError("mm_use_im_start_end is set; image start and end tokens are not supported.")
    layer = config.get("mm_vision_select_layer")
    patches = (vision_config["image_size"] // vision_config["patch_size"]) ** 2
    text_config = {field: config[field] for field in TEXT_FIELDS if config.get(field) is not None}
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
        points = parse_pinpoints(config.get("image_grid_pinpoints"), vision_config["image_size"])
        fields["image_grid_pinpoints"] = [list(pair) for pair in points]
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
