"""Read a checkpoint, in the transformers or in the original layout, into one container.

The weights stay memory-mapped on disk until the container takes them over one by one, in the dtype and on the device
asked for, so that no second copy of the model exists. Nothing is unpickled and no code from a checkpoint is run.

Official code read: haotian-liu/LLaVA@c121f04, llava/model/builder.py; PKU-YuanGroup/Video-LLaVA@984e65b,
videollava/model/builder.py
Differs from it: missing and unexpected weights are errors; one tokenizer class (transformers 5 has only one for Llama,
whose ids are those of sentencepiece, see tests/test_prompt.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llava.conversation import DEFAULT_MODE, conversation
from llava.errors import UserError
from llava.model.checkpoint.files import HUB_ID, locate, read_json, read_weights
from llava.model.checkpoint.hf_model import (
    container_config,
    fill,
    hub_to_container_key,
    refuse_missing_towers,
    refuse_other_names,
    video_frames,
)
from llava.model.checkpoint.identify import QWEN, Family, Kind, Layout, default_mode, identify
from llava.model.checkpoint.original_layout import (
    CLIP_L_336,
    CLIP_L_336_NAME,
    LANGUAGEBIND,
    LANGUAGEBIND_NAMES,
    TOWER_MODULES,
    merge_type,
    to_transformers_config,
    to_transformers_key,
    tower_to_transformers_key,
)
from llava.model.checkpoint.processors import read_image_processor, read_tokenizer
from llava.model.checkpoint.quantization import Quantization, check_quantization, stored_method
from llava.model.multimodal_encoder.languagebind import VIDEO_FRAMES
from llava.processing.anyres import parse_pinpoints
from llava.processing.clip_image import ImageProcessor
from llava.processing.qwen_image import QwenImageProcessor

# What two towers in one container have in common.
SHARED_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
)


@dataclass(frozen=True)
class Checkpoint:
    """A model with all that is needed to ask it questions.

    Attributes:
        model: the transformers container of its family, in evaluation mode, attention by SDPA. LLaVA-NeXT's newline is
            model.model.image_newline, Video-LLaVA's towers are model.model.image_tower and model.model.video_tower.
        image_processor: pads to a square, whatever the checkpoint's own configuration says. Of LLaVA-NeXT it is what
            every crop goes through; of Qwen it keeps the picture's shape.
        conversation: prompt template of pictures, a name of llava.conversation.MODES.
        name: hub id or folder name.
        layout: how the files were written.
        vision_tower_source: where the tower's weights came from, in words.
        text_tower: the CLIP text tower that belongs to the vision tower, if one is known: a folder, or the hub id of a
            whole CLIP. Nothing of it has been read or fetched; llava.model.multimodal_encoder.clip_text_encoder does
            when a method first asks.
        notes: what a reader of the results should know about the loading.
        vocabulary: tokens that can be answered. Rows above are padding or the image placeholder; mask their logits.
        family: which model it is.
        pinpoints: resolutions that LLaVA-NeXT chooses from, pairs in the order of config.json; empty for others.
        aspect: "anyres" where pictures are cut into crops, "native" for Qwen, else "pad".
        merge: how the crops of "anyres" are put together, one of llava.processing.anyres.MERGES; None for others.
        video_conversation: prompt template of videos; None for a model that takes none here.
        frames: of a video; 0 for a model that takes none here. The class token of every frame is a visual token.
        temporal: the video tower has its attention over time.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    image_processor: ImageProcessor | QwenImageProcessor
    conversation: str
    name: str
    layout: Layout
    vision_tower_source: str
    text_tower: Path | str | None
    notes: tuple[str, ...]
    vocabulary: int
    family: Family = "llava"
    pinpoints: tuple[tuple[int, int], ...] = ()
    aspect: str = "pad"
    merge: str | None = None
    video_conversation: str | None = None
    frames: int = 0
    temporal: bool = False


def load_checkpoint(
    source: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    text_tower: str | Path | None = None,
    quantization: Quantization | None = None,
) -> Checkpoint:
    """Load a checkpoint from a folder or from the Hugging Face hub.

    The prompt template is the one of the benchmark scripts unless config.json names another as "conversation" (and for
    videos "video_conversation").

    Args:
        text_tower: folder or hub id of the whole CLIP model that the vision tower was taken from, for checkpoints that
            name none; needed only by methods that compare text and picture in CLIP's space.
        quantization: hold the decoder in 8 or 4 bits; needs bitsandbytes.

    Raises:
        UserError: the checkpoint is incomplete, damaged, contradicts itself, or is of a family that is not supported.
    """
    check_quantization(quantization)
    directory = locate(source, "checkpoint")
    raw = read_json(directory / "config.json")
    kind = identify(raw, directory)
    known_text_tower = _named_text_tower(text_tower)
    for field in ("conversation", "video_conversation"):
        conversation(raw.get(field) or DEFAULT_MODE)
    files = (_read_original if kind.layout == "original" else _read_transformers)(directory, raw, kind)
    config = container_config(files.config, kind.family, directory)
    refuse_missing_towers(files.weights, kind.family, directory)
    processor, image_notes = read_image_processor(files.images, kind.family, config.vision_config)
    # Before the weights: a missing tokenizer should not cost a minute of loading.
    tokenizer = read_tokenizer(directory, config)
    pinpoints = ()
    if files.aspect == "anyres":
        pinpoints = parse_pinpoints(config.image_grid_pinpoints, config.vision_config.image_size)
    video = _video(raw, kind, files.weights)
    model = fill(kind, config, files.weights, dtype, device, directory, quantization)
    return Checkpoint(
        model=model,
        tokenizer=tokenizer,
        image_processor=processor,
        conversation=raw.get("conversation") or default_mode(kind, tokenizer.get_vocab()),
        name=directory.resolve().name if Path(source).is_dir() else str(source),
        layout=kind.layout,
        vision_tower_source=files.tower_source,
        text_tower=known_text_tower or _text_tower(directory, files.towers),
        notes=(*files.notes, *image_notes, *_notes(kind, config, video.get("temporal", False), quantization)),
        vocabulary=real_vocabulary(
            tokenizer, config.text_config.vocab_size, config.image_token_id, getattr(config, "video_token_id", None)
        ),
        family=kind.family,
        pinpoints=pinpoints,
        aspect=files.aspect,
        merge=files.merge,
        **video,
    )


def real_vocabulary(
    tokenizer: PreTrainedTokenizerBase, rows: int, image_token: int, video_token: int | None = None
) -> int:
    """How many of the `rows` of the embedding are tokens that can be answered.

    The checkpoints of the hub have 32064 rows for 32000 tokens: one for "<image>", one for padding, with videos one
    for "<video>", the others to round the size up. None of them was trained, so none may ever win an argmax.
    """
    count = min(rows, len(tokenizer))
    placeholders = {image_token, video_token, tokenizer.pad_token_id} - {tokenizer.eos_token_id}
    while count - 1 in placeholders:
        count -= 1
    return count


# The two layouts


@dataclass(frozen=True)
class _Tower:
    """A vision tower of the original layout.

    Attributes:
        name: as config.json names it, a folder or a hub id.
        folder: where it was found, or None for an official one that was not fetched.
        config: a CLIPVisionConfig as a dictionary.
        inside: its weights are in the checkpoint's shards.
    """

    name: str
    folder: Path | None
    config: Mapping[str, Any]
    inside: bool


@dataclass(frozen=True)
class _Files:
    """What was read of a checkpoint, in transformers' terms.

    Attributes:
        weights: memory-mapped, by path in the container.
        images: folder of the image preprocessing.
    """

    config: Mapping[str, Any]
    weights: dict[str, Tensor]
    images: Path | None
    tower_source: str
    notes: tuple[str, ...] = ()
    towers: tuple[_Tower, ...] = ()
    aspect: str = "pad"
    merge: str | None = None


def _read_transformers(directory: Path, config: Mapping[str, Any], kind: Kind) -> _Files:
    shards = read_weights(directory)
    refuse_other_names(shards, kind, directory)
    weights = {hub_to_container_key(key, kind.family): tensor for key, tensor in shards.items()}
    aspect, merge = ("anyres", "spatial_unpad") if kind.family == "llava_next" else ("pad", None)
    if kind.family in QWEN:
        aspect = "native"
    return _Files(config, weights, directory, "the checkpoint", aspect=aspect, merge=merge)


def _read_original(directory: Path, config: Mapping[str, Any], kind: Kind) -> _Files:
    shards = read_weights(directory)
    refuse_other_names(shards, kind, directory)
    weights = {to_transformers_key(key): tensor for key, tensor in shards.items()}
    aspect, merge, notes = "pad", None, []
    asked = config.get("image_aspect_ratio")
    if kind.family == "llava_next":
        aspect, merge = "anyres", merge_type(config)
    elif asked != "pad":
        notes.append(f"The checkpoint asks for image_aspect_ratio {asked!r}; images are padded all the same.")
    if merge == "spatial":  # only "unpad" has a newline token; the container has a place for one all the same
        weights.setdefault("model.image_newline", torch.zeros(config.get("hidden_size", 0)))
    fields = [field for field in TOWER_MODULES if config.get(field) is not None]
    towers = tuple(_tower(directory, field, config[field], weights, notes) for field in fields)
    first = towers[0]
    for other in towers[1:]:
        _refuse_different(first, other)
    sources = ["the checkpoint's shards" if t.inside else f"{f} {t.name}" for f, t in zip(fields, towers, strict=True)]
    translated = to_transformers_config(config, first.config, kind, video_frames(weights) or VIDEO_FRAMES)
    source = " and ".join(dict.fromkeys(sources))
    return _Files(translated, weights, first.folder, source, tuple(notes), towers, aspect, merge)


def _tower(directory: Path, field: str, name: str, weights: dict[str, Tensor], notes: list[str]) -> _Tower:
    """Find a tower; where the shards do not hold its weights, add those of its own folder to `weights`."""
    module = TOWER_MODULES[field]
    inside = any(key.startswith(f"model.{module}.") for key in weights)
    official = {CLIP_L_336_NAME: CLIP_L_336, **dict.fromkeys(LANGUAGEBIND_NAMES, LANGUAGEBIND)}
    beside = (directory / name).is_dir()
    folder = None
    if not (inside and name in official and not beside):
        folder = locate(directory / name if beside else name, "vision tower", weights=not inside)
    if inside:
        words = module.replace("_", " ")
        notes.append(f"The {words} comes from the checkpoint's own shards, not from {name}.")
    else:
        named = ((tower_to_transformers_key(key, module), tensor) for key, tensor in read_weights(folder).items())
        weights.update((key, tensor) for key, tensor in named if key is not None)
    return _Tower(name, folder, official[name] if folder is None else _vision_config(folder), inside)


def _vision_config(tower: Path) -> dict[str, Any]:
    """The vision half of a CLIP folder, which may hold a whole CLIPModel or the vision model alone."""
    config = read_json(tower / "config.json")
    config = config.get("vision_config", config)
    family = config.get("model_type", "clip_vision_model")
    if family != "clip_vision_model":
        raise UserError(f"The vision tower {tower} is a {family}; only CLIP towers are supported.")
    return CLIPVisionConfig.from_dict(config).to_dict()


def _refuse_different(one: _Tower, two: _Tower) -> None:
    configs = [CLIPVisionConfig.from_dict(dict(tower.config)) for tower in (one, two)]
    differ = [field for field in SHARED_FIELDS if len({getattr(config, field) for config in configs}) > 1]
    if differ:
        raise UserError(
            f"The towers {one.name} and {two.name} differ in {', '.join(differ)}; Video-LLaVA's are alike but for time."
        )


def _named_text_tower(source: str | Path | None) -> Path | str | None:
    """The CLIP a user names, checked as far as that costs nothing."""
    if source is None or Path(source).is_dir():
        return source and Path(source)
    if not HUB_ID.match(str(source)):
        raise UserError(f"There is no CLIP folder {source}; give a folder or a hub id such as owner/name.")
    return str(source)


def _text_tower(directory: Path, towers: Sequence[_Tower]) -> Path | str | None:
    """Where the text half of the vision tower's CLIP is: beside the weights, or in the CLIP that the checkpoint names.

    Args:
        towers: none in the transformers layout, whose config describes the vision half only and names no CLIP.
    """
    beside = directory / "text_tower"
    if beside.is_dir():
        return beside
    if not towers:
        return None
    tower = towers[0]
    if tower.folder is None:
        return tower.name
    return tower.folder if "text_config" in read_json(tower.folder / "config.json") else None


# What comes with them


def _video(config: Mapping[str, Any], kind: Kind, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of a Checkpoint that only a model for videos has."""
    if kind.family != "video_llava":
        return {}
    frames = video_frames(weights)
    mode = config.get("video_conversation") or config.get("conversation") or "llava_v1"
    return {"video_conversation": mode, "frames": frames or VIDEO_FRAMES, "temporal": frames is not None}


def _notes(kind: Kind, config: PretrainedConfig, temporal: bool, quantization: str | None) -> list[str]:
    notes = []
    window = getattr(config.text_config, "sliding_window", None)
    if window is not None:
        notes.append(
            f"The decoder's sliding window of {window} tokens is not applied: longer prompts are attended as a whole."
        )
    if kind.family == "video_llava":
        notes.append(
            "The video tower attends over time, as it was trained."
            if temporal
            else "The video tower has no attention over time, which is missing in conversions to transformers: answers "
            "about videos differ from those of the original checkpoint."
        )
        activation = config.vision_config.hidden_act
        if activation != LANGUAGEBIND["hidden_act"]:
            notes.append(
                f"The towers run with {activation}; LanguageBind's were trained with {LANGUAGEBIND['hidden_act']}."
            )
    stored = stored_method(config)
    if stored is not None:
        notes.append(f"The files are quantised with {stored}.")
    if quantization is not None:
        notes.append(f"The decoder is quantised to {quantization[0]} bits by bitsandbytes.")
    return notes
