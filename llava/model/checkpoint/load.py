"""Load a checkpoint, in the transformers or the original layout, into one transformers model (the HF model).

The weights stay memory-mapped on disk until they are copied into the HF model one by one, in the requested dtype and on
the requested device, so no second copy of the model exists. No pickle and no code of a checkpoint is executed.

Official code read: haotian-liu/LLaVA@c121f04, llava/model/builder.py; PKU-YuanGroup/Video-LLaVA@984e65b,
videollava/model/builder.py
Differs from it: missing and unexpected weights are errors; the tokenizer is transformers 5's, with the ids of the slow
Llama tokenizer (see tests/test_prompt.py).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import CLIPVisionConfig as HfClipVisionConfig
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llava.conversation import DEFAULT_MODE, conversation
from llava.errors import UserError
from llava.model.checkpoint.files import HUB_ID, locate, read_json, read_weights
from llava.model.checkpoint.fingerprint import files_of
from llava.model.checkpoint.hf_model import (
    container_config,
    fill,
    hub_to_container_key,
    refuse_missing_towers,
    refuse_other_names,
    video_frames,
)
from llava.model.checkpoint.identify import QWEN, Family, Kind, PatchGrid, default_mode, identify
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
from llava.model.parallel.choice import Parallel
from llava.processing.anyres import parse_pinpoints
from llava.processing.clip_image import ImageProcessor
from llava.processing.config_schema import ClipConfig, ClipVisionConfig, Identity, checked, schema_of
from llava.processing.qwen_image import QwenImageProcessor

# Fields that the two towers of Video-LLaVA share.
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
    """A loaded model with its tokenizer, its preprocessing and its prompt template.

    Attributes:
        model: the HF model of its family, in evaluation mode, with SDPA attention. LLaVA-NeXT's newline is
            model.model.image_newline; Video-LLaVA's towers are model.model.image_tower and model.model.video_tower.
        image_processor: pads to a square, whatever the checkpoint's own configuration says. LLaVA-NeXT applies it to
            every tile; Qwen's keeps the shape of the image.
        conversation: prompt template of images, a name of llava.conversation.MODES.
        name: hub id or folder name.
        layout: layout of the files.
        vision_tower_source: where the tower's weights came from, in words.
        text_tower: the CLIP text tower that belongs to the vision tower, if one is known: a folder, or the hub id of a
            whole CLIP. It is not read here; llava.model.multimodal_encoder.clip_text_encoder reads it when a method
            first needs it.
        notes: plain sentences about the loading that a reader of the results should know.
        vocabulary: number of tokens that can be answered. Logits above it are padding or placeholders; mask them.
        family: which model it is.
        pinpoints: resolutions of LLaVA-NeXT's tilings, pairs in the order of config.json; empty for other families.
        aspect: "anyres" if images are cut into tiles, "native" for Qwen, else "pad".
        merge: how the tiles of "anyres" are merged, one of llava.processing.anyres.MERGES; None for other families.
        video_conversation: prompt template of videos; None if the model takes no videos here.
        frames: frames per video; 0 if the model takes no videos here. The class token of every frame is a visual token.
        temporal: the video tower has attention over time.
        spread: the decoder is spread over the ranks of a process group.
        files: what was read, by names that do not depend on where the folder lies; empty for a model from elsewhere.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    image_processor: ImageProcessor | QwenImageProcessor
    conversation: str
    name: str
    layout: PatchGrid
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
    spread: bool = False
    files: Mapping[str, Path] = dataclasses.field(default_factory=dict)


def load_checkpoint(
    source: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    text_tower: str | Path | None = None,
    quantization: Quantization | None = None,
    parallel: Parallel | None = None,
) -> Checkpoint:
    """Load a checkpoint from a folder or from the Hugging Face hub.

    The prompt template is that of the benchmark scripts, unless config.json names another one as "conversation" (for
    videos "video_conversation").

    Args:
        text_tower: folder or hub id of the whole CLIP model that the vision tower comes from, for checkpoints that name
            none; only methods that compare text and image in CLIP's space need it.
        quantization: quantise the decoder to 8 or 4 bits; needs bitsandbytes.
        parallel: spread the decoder over the ranks of this process's replica.

    Raises:
        UserError: the checkpoint is incomplete, damaged, contradicts itself, or is of a family that is not supported.
    """
    check_quantization(quantization)
    directory = locate(source, "checkpoint")
    raw = read_json(directory / "config.json")
    checked(Identity, raw, directory / "config.json")
    kind = identify(raw, directory)
    schema = schema_of(raw, original=kind.layout == "original", qwen=kind.family in QWEN)
    checked(schema, raw, directory / "config.json")
    known_text_tower = _named_text_tower(text_tower)
    for field in ("conversation", "video_conversation"):
        conversation(raw.get(field) or DEFAULT_MODE)
    files = (_read_original if kind.layout == "original" else _read_transformers)(directory, raw, kind)
    config = container_config(files.config, kind.family, directory)
    refuse_missing_towers(files.weights, kind.family, directory)
    processor, image_notes = read_image_processor(files.images, kind.family, config.vision_config)
    # Before the weights, which may take a minute: a missing tokenizer is reported at once.
    tokenizer = read_tokenizer(directory, config)
    pinpoints = ()
    if files.aspect == "anyres":
        pinpoints = parse_pinpoints(config.image_grid_pinpoints, config.vision_config.image_size)
    video = _video(raw, kind, files.weights)
    model = fill(kind, config, files.weights, dtype, device, directory, quantization, parallel)
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
        spread=parallel is not None,
        files=files.paths,
        **video,
    )


def real_vocabulary(
    tokenizer: PreTrainedTokenizerBase, rows: int, image_token: int, video_token: int | None = None
) -> int:
    """Return how many of the embedding's `rows` are tokens that can be answered.

    The checkpoints of the hub have 32064 rows for 32000 tokens: one for "<image>", one for padding, one for "<video>"
    with videos, and the others round the size up. They are untrained and must never be chosen.
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
        name: folder or hub id in config.json.
        folder: its folder; None for an official tower that was not downloaded.
        config: a CLIPVisionConfig as a dictionary.
        inside: its weights are in the checkpoint's shards.
    """

    name: str
    folder: Path | None
    config: Mapping[str, Any]
    inside: bool


@dataclass(frozen=True)
class _Files:
    """The files of a checkpoint, translated to the transformers layout.

    Attributes:
        weights: memory-mapped, by their names in the HF model.
        images: folder of the image preprocessing.
        paths: see Checkpoint.files.
    """

    config: Mapping[str, Any]
    weights: dict[str, Tensor]
    images: Path | None
    tower_source: str
    paths: Mapping[str, Path]
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
    return _Files(config, weights, directory, "the checkpoint", files_of(directory), aspect=aspect, merge=merge)


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
    if merge == "spatial":  # only "spatial_unpad" has a newline token, but the HF model needs the weight
        weights.setdefault("model.image_newline", torch.zeros(config.get("hidden_size", 0)))
    fields = [field for field in TOWER_MODULES if config.get(field) is not None]
    towers = tuple(_tower(directory, field, config[field], weights, notes) for field in fields)
    first = towers[0]
    for other in towers[1:]:
        _refuse_different(first, other)
    sources = ["the checkpoint's shards" if t.inside else f"{f} {t.name}" for f, t in zip(fields, towers, strict=True)]
    translated = to_transformers_config(config, first.config, kind, video_frames(weights) or VIDEO_FRAMES)
    source = " and ".join(dict.fromkeys(sources))
    paths = files_of(directory)
    for name, tower in zip(fields, towers, strict=True):
        paths |= files_of(tower.folder, f"{name}/", weights=not tower.inside) if tower.folder is not None else {}
    return _Files(translated, weights, first.folder, source, paths, tuple(notes), towers, aspect, merge)


def _tower(directory: Path, field: str, name: str, weights: dict[str, Tensor], notes: list[str]) -> _Tower:
    """Find a tower. If the shards do not contain its weights, add those of its own folder to `weights`."""
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
    """Return the vision config of a CLIP folder, which may contain a whole CLIP or the vision tower alone."""
    whole = read_json(tower / "config.json")
    parts = checked(ClipConfig, whole, tower / "config.json")
    config = whole if parts.vision_config is None else whole["vision_config"]
    checked(ClipVisionConfig, config, tower / "config.json")
    family = config.get("model_type", "clip_vision_model")
    if family != "clip_vision_model":
        raise UserError(f"The vision tower {tower} is a {family}; only CLIP towers are supported.")
    return _complete(config, tower)


def _complete(config: Mapping[str, Any], tower: Path) -> dict[str, Any]:
    """Complete a tower's configuration with the library's defaults.

    Raises:
        UserError: the library refuses it.
    """
    try:
        return HfClipVisionConfig.from_dict(dict(config)).to_dict()
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise UserError(
            f"{tower}/config.json describes no CLIP vision tower: {' '.join(str(error).split())}"
        ) from error


def _refuse_different(one: _Tower, two: _Tower) -> None:
    configs = [HfClipVisionConfig.from_dict(dict(tower.config)) for tower in (one, two)]
    differ = [field for field in SHARED_FIELDS if len({getattr(config, field) for config in configs}) > 1]
    if differ:
        raise UserError(
            f"The towers {one.name} and {two.name} differ in {', '.join(differ)}; the two towers of "
            "Video-LLaVA have the same sizes."
        )


def _named_text_tower(source: str | Path | None) -> Path | str | None:
    """Return the CLIP that a user named, as a folder or a hub id."""
    if source is None or Path(source).is_dir():
        return source and Path(source)
    if not HUB_ID.match(str(source)):
        raise UserError(f"There is no CLIP folder {source}; give a folder or a hub id such as owner/name.")
    return str(source)


def _text_tower(directory: Path, towers: Sequence[_Tower]) -> Path | str | None:
    """Return the CLIP text tower beside the weights, or the CLIP that the checkpoint names; None if there is neither.

    Args:
        towers: empty for the transformers layout, whose config names no CLIP.
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
    """Return the fields of a Checkpoint that only a model for videos has."""
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
            f"The decoder's sliding window of {window} tokens is not applied: every token attends to all earlier ones."
        )
    if kind.family == "video_llava":
        notes.append(
            "The video tower has attention over time, as it was trained."
            if temporal
            else "The video tower has no attention over time, because the conversion to transformers drops it: answers "
            "about videos differ from those of the original checkpoint."
        )
        activation = config.vision_config.hidden_act
        if activation != LANGUAGEBIND["hidden_act"]:
            notes.append(
                f"The towers use the activation {activation}; LanguageBind's were trained with "
                f"{LANGUAGEBIND['hidden_act']}."
            )
    stored = stored_method(config)
    if stored is not None:
        notes.append(f"The files are quantised with {stored}.")
    if quantization is not None:
        notes.append(f"The decoder is quantised to {quantization[0]} bits by bitsandbytes.")
    return notes
