"""A checkpoint without its weights: the modules have shapes and no memory (the meta device of torch).

For what must be known before a model is loaded: bytes, operations, prompt lengths. Reads config.json, the tokenizer,
the image preprocessing, and the names of the weights where an index or the files are there; never a weight.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from llava.conversation import DEFAULT_MODE, conversation
from llava.errors import UserError
from llava.model.checkpoint.files import WEIGHT_FILES, locate, read_json
from llava.model.checkpoint.hf_model import HF_CLASSES, VideoLlavaWithTime, container_config, hub_to_container_key
from llava.model.checkpoint.identify import QWEN, Kind, default_mode, identify
from llava.model.checkpoint.load import (
    Checkpoint,
    _named_text_tower,
    _text_tower,
    _Tower,
    _vision_config,
    real_vocabulary,
)
from llava.model.checkpoint.original_layout import (
    CLIP_L_336,
    CLIP_L_336_NAME,
    LANGUAGEBIND,
    LANGUAGEBIND_NAMES,
    TOWER_MODULES,
    merge_type,
    to_transformers_config,
    to_transformers_key,
)
from llava.model.checkpoint.processors import read_image_processor, read_tokenizer
from llava.model.multimodal_encoder.languagebind import VIDEO_FRAMES
from llava.processing.anyres import parse_pinpoints
from llava.processing.config_schema import Identity, WeightIndex, checked, schema_of

OFFICIAL_TOWERS = {CLIP_L_336_NAME: CLIP_L_336, **dict.fromkeys(LANGUAGEBIND_NAMES, LANGUAGEBIND)}
TEMPORAL = re.compile(r"video_tower\..*\.temporal_embedding$|^(?:vision_model\.)?encoder\..*\.temporal_embedding$")


def outline_checkpoint(source: str | Path, text_tower: str | Path | None = None) -> Checkpoint:
    """Read a checkpoint as `llava.model.checkpoint.load.load_checkpoint` does, without its weights.

    Of a model on the hub only the small files are downloaded. Where neither an index nor weight files say whether the
    video tower has attention over time, the original layout has it and the transformers layout has not.

    Returns:
        A Checkpoint whose model is on the meta device, with parameters of torch's default dtype.

    Raises:
        UserError: as `load_checkpoint` for anything but the weights.
    """
    directory = locate(source, "checkpoint", weights=False)
    raw = read_json(directory / "config.json")
    checked(Identity, raw, directory / "config.json")
    kind = identify(raw, directory)
    schema = schema_of(raw, original=kind.layout == "original", qwen=kind.family in QWEN)
    checked(schema, raw, directory / "config.json")
    for field in ("conversation", "video_conversation"):
        conversation(raw.get(field) or DEFAULT_MODE)
    stored = stored_names(directory)
    fields, towers, images, frames = _translated(directory, raw, kind, stored)
    config = container_config(fields, kind.family, directory)
    processor, notes = read_image_processor(images, kind.family, config.vision_config)
    tokenizer = read_tokenizer(directory, config)
    tiled = kind.family == "llava_next"
    merge = (merge_type(raw) if kind.layout == "original" else "spatial_unpad") if tiled else None
    video: dict[str, Any] = {}
    if kind.family == "video_llava":
        mode = raw.get("video_conversation") or raw.get("conversation") or "llava_v1"
        video = {"video_conversation": mode, "frames": frames or VIDEO_FRAMES, "temporal": frames is not None}
    return Checkpoint(
        model=empty_model(config, kind, frames),
        tokenizer=tokenizer,
        image_processor=processor,
        conversation=raw.get("conversation") or default_mode(kind, tokenizer.get_vocab()),
        name=directory.resolve().name if Path(source).is_dir() else str(source),
        layout=kind.layout,
        vision_tower_source="not read",
        text_tower=_named_text_tower(text_tower) or _text_tower(directory, towers),
        notes=notes,
        vocabulary=real_vocabulary(
            tokenizer, config.text_config.vocab_size, config.image_token_id, getattr(config, "video_token_id", None)
        ),
        family=kind.family,
        pinpoints=parse_pinpoints(config.image_grid_pinpoints, config.vision_config.image_size) if tiled else (),
        aspect="anyres" if tiled else "native" if kind.family in QWEN else "pad",
        merge=merge,
        **video,
    )


def empty_model(config: PretrainedConfig, kind: Kind, frames: int | None = None) -> PreTrainedModel:
    """The HF model of a configuration on the meta device.

    Args:
        frames: of a video tower with attention over time; None for a tower without.
    """
    config._attn_implementation = "sdpa"
    with torch.device("meta"), no_init_weights():
        if frames is not None:
            model: PreTrainedModel = VideoLlavaWithTime(config, frames)
        else:
            model = HF_CLASSES[kind.family](config)
        model.tie_weights()
    return model.eval()


def stored_names(directory: Path) -> dict[str, tuple[int, ...] | None]:
    """Names of the weights in a folder, with their shapes where the files say them; empty where nothing is known.

    An index or the header of a safetensors file is read. A single .bin without an index is not opened.
    """
    for name in WEIGHT_FILES:
        index = directory / f"{name}.index.json"
        files = [directory / name]
        found: dict[str, tuple[int, ...] | None] = {}
        if index.is_file():
            weight_map = checked(WeightIndex, read_json(index), index).weight_map
            found = dict.fromkeys(weight_map)
            files = [directory / shard for shard in sorted(set(weight_map.values()))]
        for path in files:
            if path.suffix == ".safetensors" and path.is_file():
                with safe_open(path, "pt") as file:
                    found |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        if found:
            return found
    return {}


def _translated(
    directory: Path, raw: Mapping[str, Any], kind: Kind, stored: Mapping[str, tuple[int, ...] | None]
) -> tuple[Mapping[str, Any], tuple[_Tower, ...], Path | None, int | None]:
    """Fields of the HF configuration, the towers of the original layout, the folder of the image preprocessing, and the
    frames of a video tower with attention over time."""
    if kind.layout != "original":
        names = {hub_to_container_key(key, kind.family): shape for key, shape in stored.items()}
        return raw, (), directory, _frames(names)
    names = {to_transformers_key(key): shape for key, shape in stored.items()}
    towers, frames = [], _frames(names)
    for field in (field for field in TOWER_MODULES if raw.get(field) is not None):
        module, name = TOWER_MODULES[field], raw[field]
        inside = any(key.startswith(f"model.{module}.") for key in names)
        beside = (directory / name).is_dir()
        folder = None
        if beside or name not in OFFICIAL_TOWERS:
            folder = locate(directory / name if beside else name, "vision tower", weights=False)
        config = OFFICIAL_TOWERS[name] if folder is None else _vision_config(folder)
        towers.append(_Tower(name, folder, config, inside))
        if module == "video_tower" and not inside:
            apart = stored_names(folder) if folder is not None else {}
            frames = _frames(apart) if apart else VIDEO_FRAMES
    if not towers:
        raise UserError(f"{directory}/config.json names no vision tower.")
    fields = to_transformers_config(raw, towers[0].config, kind, frames or VIDEO_FRAMES)
    return fields, tuple(towers), towers[0].folder, frames


def _frames(names: Mapping[str, tuple[int, ...] | None]) -> int | None:
    """Frames of a video tower with attention over time; None for a tower without."""
    name = next((key for key in names if TEMPORAL.search(key)), None)
    if name is None:
        return None
    shape = names[name]
    return VIDEO_FRAMES if shape is None else shape[1]
