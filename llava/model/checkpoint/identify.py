"""Identify the model of a config.json: its family, its layout, its decoder and its prompt template.

The fields of config.json decide. model_type alone is ambiguous: "llava" stands for LLaVA-1.5, LLaVA-NeXT and
Video-LLaVA in the original layout and for LLaVA-1.5 in the transformers layout.

Official code read: haotian-liu/LLaVA@c121f04, llava/model/builder.py; PKU-YuanGroup/Video-LLaVA@984e65b,
videollava/model/llava_arch.py
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from llava.errors import UserError

Family = Literal["llava", "llava_next", "video_llava", "qwen2_5_vl", "qwen2_vl"]
PatchGrid = Literal["transformers", "original"]
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

TOWERS = ("mm_vision_tower", "mm_image_tower", "mm_video_tower")
PARTS = ("text_config", "vision_config")
# Fields of vision_config that only one of the two Qwens has.
QWEN_FIELDS = {"qwen2_5_vl": ("fullatt_block_indexes", "window_size"), "qwen2_vl": ("embed_dim", "mlp_ratio")}

ORIGINAL_CLASSES: dict[str, Decoder] = {"LlavaLlamaForCausalLM": "llama", "LlavaMistralForCausalLM": "mistral"}
ORIGINAL_TYPES: dict[str, Decoder] = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}

CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
LLAMA_3_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


class Kind(NamedTuple):
    """Family, layout and decoder of a config.json."""

    family: Family
    layout: PatchGrid
    decoder: Decoder


def identify(config: Mapping[str, Any], where: Path) -> Kind:
    """Return family, layout and decoder.

    Args:
        config: config.json.
        where: its folder, for the error.

    Raises:
        UserError: the family is not supported, or the fields contradict one another.
    """
    original = [field for field in TOWERS if config.get(field) is not None]
    nested = [field for field in PARTS if isinstance(config.get(field), dict)]
    if original and nested:
        raise _contradiction(
            where, f"{original[0]}, a field of the original layout, and {nested[0]}, one of transformers'"
        )
    if original:
        return _original(config, original, where)
    if len(nested) == 2 or (nested == ["vision_config"] and _qwen(config)):
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
            other = next(field for field in TOWERS[1:] if field not in towers)
            raise UserError(
                f"{where} names only one tower ({towers[0]}); Video-LLaVA needs two, add {other} to config.json."
            )
        return Kind("video_llava", "original", decoder)
    tiled = "anyres" in str(config.get("image_aspect_ratio")) or (config.get("mm_patch_merge_type") or "flat") != "flat"
    return Kind("llava_next" if tiled else "llava", "original", decoder)


def _transformers(config: Mapping[str, Any], where: Path) -> Kind:
    family = config.get("model_type", "unknown")
    if _qwen(config):
        return Kind(_which_qwen(config, where), "transformers", "qwen2")
    text, vision = (config[part] for part in PARTS)
    parts = text.get("model_type", "llama"), vision.get("model_type", "clip_vision_model")
    if family not in ("llava", "llava_next", "video_llava"):
        raise _unsupported(where, family)
    if parts[0] not in ("llama", "mistral") or parts[1] != "clip_vision_model":
        raise _unsupported(where, f"{family} ({parts[1]} tower, {parts[0]} decoder)")
    tiled = config.get("image_grid_pinpoints") is not None
    filmed = config.get("video_token_index") is not None or config.get("video_seq_length") is not None
    for seen, owner, field in ((tiled, "llava_next", "image_grid_pinpoints"), (filmed, "video_llava", "video tokens")):
        if seen and family != owner:
            raise _contradiction(where, f"model_type {family} and {field}, which only {owner} has")
    return Kind(family, "transformers", parts[0])


def _qwen(config: Mapping[str, Any]) -> bool:
    """Whether this is a Qwen-VL. On the hub only vision_config is nested; token ids mark begin and end of an image."""
    return "vision_start_token_id" in config or config.get("model_type") in QWEN


def _which_qwen(config: Mapping[str, Any], where: Path) -> Family:
    name, vision = config.get("model_type"), config["vision_config"]
    found = [family for family, fields in QWEN_FIELDS.items() if any(field in vision for field in fields)]
    if name not in QWEN:
        raise _unsupported(where, name or "unknown")
    if found not in ([], [name]):
        raise _contradiction(where, f"model_type {name} and a vision_config of {' and '.join(found)}")
    return name


def _unsupported(where: Path, family: str) -> UserError:
    return UserError(f"{where} is a checkpoint of the family {family}, which is not supported: {SUPPORTED}.")


def _contradiction(where: Path, what: str) -> UserError:
    return UserError(f"{where}/config.json contradicts itself: it has {what}; take the config of one checkpoint.")
