"""Load a checkpoint, in the transformers or the original layout, into one transformers model (the HF model).

The HF model is built without memory. Each weight is read from its mapped file in the requested dtype and on the
requested device, so there is never a second copy of the model. A weight that already has the right dtype stays mapped.
When 1.4 GB of float16 were loaded as bfloat16, anonymous memory peaked at 1.001 times the model, in both layouts and
from .safetensors and .bin; loaded as float16, at 0.001 times. No pickle and no code of a checkpoint is executed. A
checkpoint can also be outlined: its model then has shapes but no weights.

The decoder can be quantised to 8 or 4 bits while it is loaded, with bitsandbytes through transformers. Towers,
projector and head keep the requested dtype, because methods rank tokens by what the tower computes, and because the
tower is only a thirtieth of the weights.

Official code read: haotian-liu/LLaVA@c121f04, llava/model/builder.py (NF4 with double quantisation for 4 bits);
PKU-YuanGroup/Video-LLaVA@984e65b, videollava/model/builder.py
Differs from it: missing and unexpected weights are errors; the tokenizer is that of transformers 5, with the ids of the
slow Llama tokenizer (see tests/test_prompt.py); the projector is not quantised; computation is in the requested dtype,
not always in float16.
"""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import (
    BitsAndBytesConfig,
    CLIPVisionConfig,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.errors import UserError, unknown
from llava.file_state import FileState
from llava.model.checkpoint.config import (
    CLIP_L_336,
    CLIP_L_336_NAME,
    LANGUAGEBIND,
    LANGUAGEBIND_NAMES,
    NAMES,
    QWEN,
    TOWER_MODULES,
    CheckpointConfig,
    CheckpointLayout,
    Family,
    Kind,
    default_mode,
    hf_key,
    hf_tower_key,
    identify,
    library_config,
    merge_type,
    refuse_feature_layer,
    to_transformers_config,
)
from llava.model.checkpoint.files import (
    HUB_ID,
    about_snapshot,
    files_of,
    folder_of,
    listed,
    locate,
    name_of,
    read_weights,
    snapshot_of,
)
from llava.model.fused import fuse
from llava.model.parallel import Parallel, check_heads, join_alone, mapped_model, partition, split
from llava.model.video_llava import LanguageBindVideoTower
from llava.processing.image import ImageProcessor, QwenImageProcessor, read_image_processor
from llava.processing.json_files import checked, read_json
from llava.processing.prompt import read_tokenizer
from llava.processing.video import FRAMES
from llava.transformers_names import no_init_weights, set_kernel

HF_CLASSES: dict[Family, type[PreTrainedModel]] = {
    "llava": LlavaForConditionalGeneration,
    "llava_next": LlavaNextForConditionalGeneration,
    "video_llava": VideoLlavaForConditionalGeneration,
    "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
    "qwen2_vl": Qwen2VLForConditionalGeneration,
}
TEMPORAL = re.compile(r"^model\.video_tower\..*\.temporal_embedding$")
LAYERS = "model.language_model.layers."
CUT = (LAYERS, "lm_head.")  # weights that are cut if several ranks share a model

PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CHOICES = ("8bit", "4bit")  # of quantisation
# Modules of the HF model that are not quantised.
KEPT = (
    "model.vision_tower",
    "model.image_tower",
    "model.video_tower",
    "model.visual",
    "model.multi_modal_projector",
    "lm_head",
)
GIB = 2**30


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model with its tokenizer, its preprocessing and its prompt template.

    Attributes:
        model: the HF model of its family, in evaluation mode, with SDPA attention. LLaVA-NeXT's newline is
            model.model.image_newline; Video-LLaVA's towers are model.model.image_tower and model.model.video_tower.
        image_processor: pads to a square, whatever the checkpoint's own configuration says. LLaVA-NeXT applies it to
            every tile; Qwen's keeps the shape of the image.
        conversation: prompt template for images, a name of llava.conversation.MODES; for videos it is "llava_v1". "" if
            the caller of the model writes the prompts.
        name: hub id or folder name; see `llava.model.checkpoint.files.name_of`.
        layout: layout of the files.
        text_tower: the CLIP text tower that belongs to the vision tower, if one is known: a folder, or the hub id of a
            whole CLIP. It is not read here; llava.model.multimodal_encoder.clip_text_encoder reads it when a method
            first needs it.
        notes: sentences about the loading that a reader of the results should know.
        vocabulary: number of tokens that can be answered. Logits above it are padding or placeholders; mask them.
        family: the family of the model.
        merge: how the tiles of LLaVA-NeXT are merged, one of llava.processing.image.MERGES; None for other families.
        frames: frames per video; 0 if the model takes no videos here. The class token of every frame is a visual token.
        temporal: whether the video tower has attention over time.
        spread: whether the decoder is spread over the ranks of a process group.
        files: the files that were read, in their state before, by names that do not depend on where the folder lies;
            empty for a model that does not come from files.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    image_processor: ImageProcessor | QwenImageProcessor
    conversation: str
    name: str
    layout: CheckpointLayout
    text_tower: Path | str | None
    notes: tuple[str, ...]
    vocabulary: int
    family: Family = "llava"
    merge: str | None = None
    frames: int = 0
    temporal: bool = False
    spread: bool = False
    files: Mapping[str, FileState] = dataclasses.field(default_factory=dict)


def load_checkpoint(
    source: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    text_tower: str | Path | None = None,
    quantization: str | None = None,
    parallel: Parallel | None = None,
    decoder_layers: int | None = None,
) -> Checkpoint:
    """Load a checkpoint from a folder or from the Hugging Face hub.

    The prompt template is the one that benchmark scripts use.

    Args:
        text_tower: folder or hub id of the whole CLIP model that the vision tower comes from, for checkpoints that name
            none; only methods that compare text and image in CLIP's space need it.
        quantization: "8bit" or "4bit" to quantise the decoder; needs bitsandbytes.
        parallel: how to spread the decoder over the ranks of this process's replica; None to hold it whole.
        decoder_layers: how many of the first layers are loaded; the others are empty and cannot run. None for all.

    Raises:
        UserError: the checkpoint is incomplete or damaged, or is of a family that is not supported.
    """
    if quantization is not None and quantization not in CHOICES:
        raise unknown("quantization", quantization, CHOICES)
    if quantization is not None and find_spec("bitsandbytes") is None:
        raise UserError(
            f"quantization {quantization!r} needs the package bitsandbytes, which is not installed; pip install "
            "bitsandbytes."
        )
    files = _read(source, text_tower, with_weights=True)
    depth = files.config.text_config.num_hidden_layers
    if decoder_layers is not None:
        files.config.text_config.num_hidden_layers = decoder_layers
        left_out = tuple(f"{LAYERS}{number}." for number in range(decoder_layers, depth))
        weights = {name: weight for name, weight in files.weights.items() if not name.startswith(left_out)}
        files = dataclasses.replace(files, weights=weights)
    # Before the weights, which may take a minute: a missing tokenizer is reported at once.
    parts = _parts(files, source)
    model = _fill(files, dtype, torch.device(device), quantization, parallel)
    if decoder_layers is not None:
        model.model.language_model.layers.extend(nn.Identity() for _ in range(decoder_layers, depth))
    if quantization is not None:
        parts["notes"] += (f"The decoder is quantised to {quantization[0]} bits by bitsandbytes.",)
    return Checkpoint(model=model, spread=parallel is not None, files=files.read, **parts)


def outline_checkpoint(source: str | Path, text_tower: str | Path | None = None) -> Checkpoint:
    """Read a checkpoint as `load_checkpoint` does, without its weights.

    This tells bytes, operations and prompt lengths before a model is loaded. For a model on the hub, only the small
    files are downloaded. A video tower is assumed to have attention over time in the original layout, and not to have
    it in the transformers layout.

    Returns:
        A Checkpoint whose model has shapes but no memory (the meta device of torch), with parameters of torch's default
        dtype.

    Raises:
        UserError: as `load_checkpoint`, except about the weights.
    """
    files = _read(source, text_tower, with_weights=False)
    return Checkpoint(model=empty_model(files.config, files.kind, files.frames), **_parts(files, source))


# The files


@dataclass(frozen=True)
class _Tower:
    """A vision tower of the original layout.

    Attributes:
        field: the field of config.json that names it.
        name: folder or hub id in config.json.
        folder: its folder; None for an official tower that was not downloaded.
        config: a CLIPVisionConfig as a dictionary.
        inside: whether its weights are in the checkpoint's shards.
        read: its files, in their state before they were read.
    """

    field: str
    name: str
    folder: Path | None
    config: Mapping[str, Any]
    inside: bool
    read: Mapping[str, FileState] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class _Files:
    """What a checkpoint consists of, checked and translated to the transformers layout.

    Attributes:
        raw: config.json.
        config: configuration of the HF model.
        weights: memory-mapped, by their names in the HF model; none in an outline.
        frames: frames of a video tower with attention over time; None for a tower without it.
        towers: towers of the original layout.
        text_tower: see Checkpoint.
        read: the files of checkpoint and towers, in their state before they were read.
    """

    directory: Path
    raw: Mapping[str, Any]
    kind: Kind
    config: PretrainedConfig
    weights: dict[str, Tensor]
    frames: int | None
    towers: tuple[_Tower, ...]
    text_tower: Path | str | None
    read: Mapping[str, FileState]


def _read(source: str | Path, text_tower: str | Path | None, with_weights: bool) -> _Files:
    """Find, check and translate a checkpoint's files.

    Args:
        with_weights: False downloads and reads no weights.
    """
    if text_tower is not None and folder_of(text_tower) is None and not HUB_ID.match(str(text_tower)):
        raise UserError(f"There is no CLIP folder {text_tower}; give a folder or a hub id such as owner/name.")
    directory = locate(source, "checkpoint", weights=with_weights)
    read = files_of(directory, weights=False)
    raw = read_json(directory / "config.json")
    checked(CheckpointConfig, raw, directory / "config.json")
    kind = identify(raw, directory)
    for part in (raw, raw.get("text_config") or {}):
        if (stored := part.get("quantization_config")) is not None:
            method = stored.get("quant_method", "an unnamed method")
            raise UserError(f"{directory} is quantised with {method}, which is not supported; take it unquantised.")
    read = files_of(directory, weights=with_weights) | read  # with the state of small files from before they were read
    files = read_weights(directory) if with_weights else {}
    weights = {hf_key(key, kind): tensor for key, tensor in files.items()}
    fields: Mapping[str, Any] = raw
    towers: tuple[_Tower, ...] = ()
    if kind.layout == "original":
        if kind.family == "llava_next" and merge_type(raw) == "spatial":
            # Only "spatial_unpad" has a newline token, but the HF model needs the weight.
            weights.setdefault("model.image_newline", torch.zeros(raw.get("hidden_size", 0)))
        named = [field for field in TOWER_MODULES if raw.get(field) is not None]
        towers = tuple(_tower(directory, field, raw[field], weights, with_weights) for field in named)
    temporal = next((weights[key] for key in weights if TEMPORAL.match(key)), None)
    frames = None if temporal is None else temporal.shape[1]  # [1, frames, width]
    if kind.layout == "original":
        if kind.family == "video_llava" and not with_weights:
            frames = FRAMES
        fields = to_transformers_config(raw, towers[0].config, kind, frames or FRAMES)
    config = library_config(HF_CLASSES[kind.family].config_class, fields, directory, f"{NAMES[kind.family]} model")
    if kind.family not in QWEN:
        refuse_feature_layer(config, f"{directory}/config.json")
    clip = _text_tower(text_tower, directory, towers)
    for tower in towers:
        read |= tower.read
    return _Files(directory, raw, kind, config, weights, frames, towers, clip, read)


def _tower(directory: Path, field: str, name: str, weights: dict[str, Tensor], with_weights: bool) -> _Tower:
    """Find a tower. If the shards do not contain its weights, add those of its own folder to `weights`."""
    module = TOWER_MODULES[field]
    inside = any(key.startswith(f"model.{module}.") for key in weights)
    official = {CLIP_L_336_NAME: CLIP_L_336, **dict.fromkeys(LANGUAGEBIND_NAMES, LANGUAGEBIND)}
    here = folder_of(directory / Path(name).expanduser())
    needed = with_weights and not inside
    if name in official and here is None and not needed:
        return _Tower(field, name, None, official[name], inside)
    folder = here or locate(name, "vision tower", weights=needed)
    read = files_of(folder, f"{field}/", weights=needed)
    if (snapshot := snapshot_of(folder.resolve())) is not None:
        name = snapshot[0]
    if needed:
        named = ((hf_tower_key(key, module), tensor) for key, tensor in read_weights(folder).items())
        weights.update((key, tensor) for key, tensor in named if key is not None)
    # The folder may contain a whole CLIP or the vision tower alone.
    whole = read_json(folder / "config.json")
    config = whole.get("vision_config") or whole
    family = config.get("model_type", "clip_vision_model")
    if family != "clip_vision_model":
        raise UserError(f"The vision tower {folder} is a {family}; only CLIP towers are supported.")
    completed = library_config(CLIPVisionConfig, config, folder, "CLIP vision tower").to_dict()
    return _Tower(field, name, folder, completed, inside, read)


def _text_tower(chosen: str | Path | None, directory: Path, towers: Sequence[_Tower]) -> Path | str | None:
    """Return the CLIP text tower as a folder or a hub id; None if there is none.

    It is the one that a user chose, or the one beside the weights, or that of the CLIP that the checkpoint names.

    Args:
        towers: empty for the transformers layout, whose config names no CLIP.
    """
    if chosen is not None:
        return folder_of(chosen) or str(chosen)
    if (directory / "text_tower").is_dir():
        return directory / "text_tower"
    if not towers or towers[0].folder is None:
        return towers[0].name if towers else None
    return towers[0].folder if "text_config" in read_json(towers[0].folder / "config.json") else None


# What comes with the model


def _parts(files: _Files, source: str | Path) -> dict[str, Any]:
    """Return the fields of a Checkpoint that need no weights, by name."""
    (family, layout, _), config = files.kind, files.config
    images = files.towers[0].folder if files.towers else files.directory
    processor, about_images = read_image_processor(images, config.vision_config, qwen=family in QWEN)
    tokenizer = read_tokenizer(files.directory, config)
    rows = config.text_config.vocab_size
    # The original layout has no row for images, which the translated configuration adds.
    refuse_long_vocabulary(tokenizer, files.raw["vocab_size"] if layout == "original" else rows, source)
    merge = None
    if family == "llava_next":
        merge = merge_type(files.raw) if layout == "original" else "spatial_unpad"
    return {
        "tokenizer": tokenizer,
        "image_processor": processor,
        "conversation": default_mode(files.kind, tokenizer.get_vocab()),
        "name": name_of(source),
        "layout": layout,
        "text_tower": files.text_tower,
        "notes": _notes(files, about_images),
        "vocabulary": real_vocabulary(tokenizer, rows, config.image_token_id, getattr(config, "video_token_id", None)),
        "family": family,
        "merge": merge,
        "frames": (files.frames or FRAMES) if family == "video_llava" else 0,
        "temporal": files.frames is not None,
    }


def _notes(files: _Files, about_images: Sequence[str]) -> tuple[str, ...]:
    """Notes on what config.json asks for but is not done, and on what else a reader of the results should know."""
    (family, layout, _), config, notes = files.kind, files.config, []
    asked = files.raw.get("image_aspect_ratio")
    if layout == "original" and family != "llava_next" and asked != "pad":
        notes.append(f"The checkpoint asks for image_aspect_ratio {asked!r}; images are padded all the same.")
    for tower in files.towers:
        if tower.inside:
            module = TOWER_MODULES[tower.field].replace("_", " ")
            notes.append(f"The {module} comes from the checkpoint's own shards, not from {tower.name}.")
    notes += [*about_images, *about_snapshot(files.directory)]
    window = getattr(config.text_config, "sliding_window", None)
    if window is not None:
        notes.append(
            f"The decoder's sliding window of {window} tokens is not applied: every token attends to all earlier ones."
        )
    if family == "video_llava":
        notes.append(
            "The video tower has attention over time, as it was trained."
            if files.frames is not None
            else "The video tower has no attention over time, because the conversion to transformers drops it: answers "
            "about videos differ from those of the original checkpoint."
        )
        activation, trained = config.vision_config.hidden_act, LANGUAGEBIND["hidden_act"]
        if activation != trained:
            notes.append(f"The towers use the activation {activation}; LanguageBind's were trained with {trained}.")
    return tuple(notes)


def refuse_long_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int, source: str | Path) -> None:
    """Raise UserError for a tokenizer with ids above the embedding's `rows`, which a question might contain.

    Ids of placeholders for images and videos and of padding may be above, because their rows are never read.
    """
    unread = (DEFAULT_IMAGE_TOKEN, "<video>", tokenizer.pad_token)
    above = {n: token for token, n in tokenizer.get_vocab().items() if n >= rows and token not in unread}
    if extra := sorted(above):
        raise UserError(
            f"The tokenizer of {source} has ids up to {extra[-1]} ({above[extra[-1]]!r}), but the embedding has "
            f"{rows} rows, 0 to {rows - 1}: they do not belong together; take the tokenizer files of this checkpoint."
        )


def real_vocabulary(
    tokenizer: PreTrainedTokenizerBase, rows: int, image_token: int, video_token: int | None = None
) -> int:
    """Return how many of the embedding's `rows` are tokens that can be answered.

    The checkpoints of the hub have 32064 rows for 32000 tokens: one for "<image>", one for padding, one for "<video>"
    if there are videos, and the others round the size up. These rows are untrained and must never be chosen.
    """
    count = min(rows, len(tokenizer))
    placeholders = {image_token, video_token, tokenizer.pad_token_id} - {tokenizer.eos_token_id}
    while count - 1 in placeholders:
        count -= 1
    return count


# The HF model


class VideoLlavaWithTime(VideoLlavaForConditionalGeneration):
    """Video-LLaVA as it was trained, with the video tower's attention over time, which transformers leaves out."""

    def __init__(self, config: VideoLlavaConfig, frames: int):
        super().__init__(config)
        vision: Any = config.vision_config
        self.model.video_tower = LanguageBindVideoTower(vision, frames)


def hf_class(family: Family, frames: int | None) -> tuple[type[PreTrainedModel], tuple[int, ...]]:
    """Return the HF model's class, and its arguments after the configuration.

    Args:
        frames: frames of a video tower with attention over time; None for a tower without it.
    """
    return (HF_CLASSES[family], ()) if frames is None else (VideoLlavaWithTime, (frames,))


def empty_model(config: PretrainedConfig, kind: Kind, frames: int | None = None) -> PreTrainedModel:
    """The HF model of a configuration on the meta device; for `frames` see `hf_class`."""
    set_kernel(config, "sdpa")
    build, extra = hf_class(kind.family, frames)
    with torch.device("meta"), no_init_weights():
        model: PreTrainedModel = build(config, *extra)
        model.tie_weights()
    model.eval()
    return model


def _fill(
    files: _Files, dtype: torch.dtype, device: torch.device, quantization: str | None, parallel: Parallel | None
) -> PreTrainedModel:
    """Build the HF model and load exactly these weights into it.

    Args:
        quantization: "8bit" or "4bit" to quantise the decoder while it is loaded.
        parallel: how the decoder is spread over ranks; this process loads its part. None to hold it whole.

    Raises:
        UserError: weights and configuration do not fit, or the memory is too small.
    """
    config, weights, directory = files.config, files.weights, files.directory
    build, extra = hf_class(files.kind.family, files.frames)
    _refuse_misfits(files)
    if parallel is not None:
        check_heads(config, parallel.tensor, directory.name)
        if parallel.offload is not None:
            join_alone(device)
        check_memory(weights, dtype, device, directory, parallel)
        model: PreTrainedModel = mapped_model(build, extra, config, weights, dtype)
        fuse(model, dtype, device)
        if parallel.offload is None:
            split(model, parallel.tensor, dtype, device)
        else:
            partition(model, parallel, dtype, device)
        model.eval()
        return model
    quantiser = None
    if quantization is None:
        check_memory(weights, dtype, device, directory)
    else:
        quantiser = BitsAndBytesConfig(
            load_in_8bit=quantization == "8bit",
            load_in_4bit=quantization == "4bit",
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_quant_type="nf4",
            llm_int8_skip_modules=list(KEPT),
        )
    read: Any = build.from_pretrained
    try:
        model = read(
            None,
            *extra,
            config=config,
            state_dict=dict(weights),
            dtype=dtype,
            attn_implementation="sdpa",
            device_map=None if device.type == "cpu" and not quantization else {"": device},
            quantization_config=quantiser,
        )
    except (ImportError, RuntimeError, ValueError) as error:
        if quantization is None:
            raise
        raise UserError(f"Cannot load {directory} quantised here: {' '.join(str(error).split())}") from error
    fuse(model, dtype, device)
    model.eval()
    return model


def _refuse_misfits(files: _Files) -> None:
    """Raise UserError for weights that do not fit the model: missing, unexpected, of another shape, or quantised."""
    weights, directory = files.weights, files.directory
    model = empty_model(files.config, files.kind, files.frames)
    shapes = {name: weight.shape for name, weight in model.state_dict().items()}
    needed = dict(model.named_parameters())  # without those that share another's weight
    problems = {
        "missing": [name for name in needed if name not in weights],
        "unexpected": [name for name in weights if name not in shapes],
        "of another shape": [
            f"{name} {tuple(weight.shape)} instead of {tuple(shapes[name])}"
            for name, weight in weights.items()
            if name in shapes and weight.shape != shapes[name]
        ],
        "of a quantised type": [
            f"{name} {str(weight.dtype).removeprefix('torch.')}"
            for name, weight in weights.items()
            if weight.dtype not in PLAIN
        ],
    }
    found = [f"{len(names)} {fault}: {listed(names)}" for fault, names in problems.items() if names]
    if found:
        raise UserError(f"The weights in {directory} do not fit its config.json, {'; '.join(found)}.")


def check_memory(
    weights: Mapping[str, Tensor],
    dtype: torch.dtype,
    device: torch.device,
    directory: Path,
    parallel: Parallel | None = None,
) -> None:
    """Raise UserError if what this process loads of the model does not fit into the free memory.

    On the CPU, weights that have the right dtype stay mapped to their files and need no memory, unless ranks cut them.
    Decoder layers and head are cut into about equal parts, one per rank; everything else is whole. Ranks on one CPU
    share its memory.
    """
    sizes = {name: tensor.numel() for name, tensor in weights.items()}
    on_cpu = device.type == "cpu"
    cut = {name for name in weights if parallel is not None and name.startswith(CUT)}
    mapped = {name for name, tensor in weights.items() if on_cpu and tensor.dtype == dtype}
    whole = sum(sizes[name] for name in sizes.keys() - mapped - cut)
    part = -(-sum(sizes[name] for name in cut) // parallel.ranks) if parallel is not None else 0
    here = int(os.environ.get("LOCAL_SIZE", "1")) if parallel is not None else 1
    numbers = {device: (whole + part) * (here if on_cpu else 1)}
    if parallel is not None and parallel.offload == "cpu" and not on_cpu:
        numbers = {device: whole, torch.device("cpu"): part * here}
    for place, count in numbers.items():
        needed, free = count * dtype.itemsize, free_memory(place)
        if needed > free:
            name = str(dtype).removeprefix("torch.")
            raise UserError(
                f"The model in {directory} needs about {needed / GIB:.1f} GiB of memory on {place} in {name}, "
                f"{free / GIB:.1f} GiB are free; use a smaller dtype, a quantization or another device."
            )


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on a device now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    else:
        free = psutil.virtual_memory().available + psutil.swap_memory().free
    return free
