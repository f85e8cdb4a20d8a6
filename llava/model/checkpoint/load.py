"""Load a checkpoint, in the transformers or the original layout, into one transformers model (the HF model).

The weights stay memory-mapped on disk until they are copied into the HF model one by one, in the requested dtype and on
the requested device, so no second copy of the model exists. No pickle and no code of a checkpoint is executed. A
checkpoint can also be outlined: its model then has shapes and no weights.

Official code read: haotian-liu/LLaVA@c121f04, llava/model/builder.py; PKU-YuanGroup/Video-LLaVA@984e65b,
videollava/model/builder.py
Differs from it: missing and unexpected weights are errors; the tokenizer is transformers 5's, with the ids of the slow
Llama tokenizer (see tests/test_prompt.py).
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from sentencepiece import SentencePieceProcessor
from torch import Tensor
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llava.errors import UserError
from llava.model.checkpoint.files import HUB_ID, files_of, locate, read_json, read_weights
from llava.model.checkpoint.hf_model import (
    check_quantization,
    container_config,
    empty_model,
    fill,
    refuse_missing_towers,
    refuse_quantised,
    video_frames,
)
from llava.model.checkpoint.layouts import (
    CLIP_L_336,
    CLIP_L_336_NAME,
    LANGUAGEBIND,
    LANGUAGEBIND_NAMES,
    QWEN,
    TOWER_MODULES,
    CheckpointLayout,
    Family,
    Kind,
    default_mode,
    hf_key,
    hf_tower_key,
    identify,
    merge_type,
    refuse_other_names,
    to_transformers_config,
)
from llava.model.parallel import Parallel
from llava.processing.config_schema import (
    ClipConfig,
    Identity,
    NestedConfig,
    OriginalConfig,
    QwenFlatConfig,
    VisionConfig,
    checked,
)
from llava.processing.image import ImageProcessor, QwenImageProcessor
from llava.processing.video import FRAMES

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
SPACE = "\u2581"  # sentencepiece's character for a space


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model with its tokenizer, its preprocessing and its prompt template.

    Attributes:
        model: the HF model of its family, in evaluation mode, with SDPA attention. LLaVA-NeXT's newline is
            model.model.image_newline; Video-LLaVA's towers are model.model.image_tower and model.model.video_tower.
        image_processor: pads to a square, whatever the checkpoint's own configuration says. LLaVA-NeXT applies it to
            every tile; Qwen's keeps the shape of the image.
        conversation: prompt template of images, a name of llava.conversation.MODES; that of videos is "llava_v1".
        name: hub id or folder name.
        layout: layout of the files.
        text_tower: the CLIP text tower that belongs to the vision tower, if one is known: a folder, or the hub id of a
            whole CLIP. It is not read here; llava.model.multimodal_encoder.clip_text_encoder reads it when a method
            first needs it.
        notes: plain sentences about the loading that a reader of the results should know.
        vocabulary: number of tokens that can be answered. Logits above it are padding or placeholders; mask them.
        family: which model it is.
        merge: how the tiles of LLaVA-NeXT are merged, one of llava.processing.anyres.MERGES; None for other families.
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
    layout: CheckpointLayout
    text_tower: Path | str | None
    notes: tuple[str, ...]
    vocabulary: int
    family: Family = "llava"
    merge: str | None = None
    frames: int = 0
    temporal: bool = False
    spread: bool = False
    files: Mapping[str, Path] = dataclasses.field(default_factory=dict)


def load_checkpoint(
    source: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    text_tower: str | Path | None = None,
    quantization: str | None = None,
    parallel: Parallel | None = None,
) -> Checkpoint:
    """Load a checkpoint from a folder or from the Hugging Face hub.

    The prompt template is that of the benchmark scripts.

    Args:
        text_tower: folder or hub id of the whole CLIP model that the vision tower comes from, for checkpoints that name
            none; only methods that compare text and image in CLIP's space need it.
        quantization: "8bit" or "4bit" to quantise the decoder; needs bitsandbytes.
        parallel: spread the decoder over the ranks of this process's replica.

    Raises:
        UserError: the checkpoint is incomplete, damaged, contradicts itself, or is of a family that is not supported.
    """
    check_quantization(quantization)
    files = _read(source, text_tower, with_weights=True)
    refuse_missing_towers(files.weights, files.kind.family, files.directory)
    # Before the weights, which may take a minute: a missing tokenizer is reported at once.
    parts = _parts(files)
    model = fill(files.kind, files.config, files.weights, dtype, device, files.directory, quantization, parallel)
    if quantization is not None:
        parts["notes"] += (f"The decoder is quantised to {quantization[0]} bits by bitsandbytes.",)
    return Checkpoint(model=model, spread=parallel is not None, files=_paths(files), **parts)


def outline_checkpoint(source: str | Path, text_tower: str | Path | None = None) -> Checkpoint:
    """Read a checkpoint as `load_checkpoint` does, without its weights.

    For what must be known before a model is loaded: bytes, operations, prompt lengths. Of a model on the hub only the
    small files are downloaded. Whether the video tower has attention over time follows from the layout: the original
    one has it and the transformers layout has not.

    Returns:
        A Checkpoint whose model has shapes and no memory (the meta device of torch), with parameters of torch's default
        dtype.

    Raises:
        UserError: as `load_checkpoint` for anything but the weights.
    """
    files = _read(source, text_tower, with_weights=False)
    return Checkpoint(model=empty_model(files.config, files.kind, files.frames), **_parts(files))


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


# The files


@dataclass(frozen=True)
class _Tower:
    """A vision tower of the original layout.

    Attributes:
        field: of config.json that names it.
        name: folder or hub id in config.json.
        folder: its folder; None for an official tower that was not downloaded.
        config: a CLIPVisionConfig as a dictionary.
        inside: its weights are in the checkpoint's shards.
    """

    field: str
    name: str
    folder: Path | None
    config: Mapping[str, Any]
    inside: bool


@dataclass(frozen=True)
class _Files:
    """The files of a checkpoint, translated to the transformers layout.

    Attributes:
        source: folder or hub id.
        raw: config.json.
        config: of the HF model.
        weights: memory-mapped, by their names in the HF model; none in an outline.
        frames: of a video tower with attention over time; None for a tower without.
        images: folder of the image preprocessing.
        towers: of the original layout.
        text_tower: see Checkpoint.
        notes: about what config.json asks for and is not done.
    """

    source: str | Path
    directory: Path
    raw: Mapping[str, Any]
    kind: Kind
    config: PretrainedConfig
    weights: Mapping[str, Tensor]
    frames: int | None
    images: Path | None
    towers: tuple[_Tower, ...]
    text_tower: Path | str | None
    notes: tuple[str, ...]


def _read(source: str | Path, text_tower: str | Path | None, with_weights: bool) -> _Files:
    """Find, check and translate a checkpoint's files.

    Args:
        with_weights: False downloads and reads none.
    """
    if text_tower is not None and not Path(text_tower).is_dir() and not HUB_ID.match(str(text_tower)):
        raise UserError(f"There is no CLIP folder {text_tower}; give a folder or a hub id such as owner/name.")
    directory = locate(source, "checkpoint", weights=with_weights)
    raw = read_json(directory / "config.json")
    checked(Identity, raw, directory / "config.json")
    kind = identify(raw, directory)
    refuse_quantised(raw, directory)
    schema = OriginalConfig if kind.layout == "original" else NestedConfig if raw.get("text_config") else QwenFlatConfig
    checked(schema, raw, directory / "config.json")
    stored = read_weights(directory) if with_weights else {}
    refuse_other_names(stored, kind, directory)
    weights = {hf_key(key, kind): tensor for key, tensor in stored.items()}
    if kind.layout == "transformers":
        config, named = container_config(raw, kind.family, directory), _text_tower(text_tower, directory, ())
        return _Files(source, directory, raw, kind, config, weights, video_frames(weights), directory, (), named, ())
    if kind.family == "llava_next" and merge_type(raw) == "spatial":
        # Only "spatial_unpad" has a newline token, but the HF model needs the weight.
        weights.setdefault("model.image_newline", torch.zeros(raw.get("hidden_size", 0)))
    towers = tuple(
        _tower(directory, field, raw[field], weights, with_weights)
        for field in TOWER_MODULES
        if raw.get(field) is not None
    )
    _refuse_different(towers)
    notes = [
        f"The {TOWER_MODULES[tower.field].replace('_', ' ')} comes from the checkpoint's own shards, not from "
        f"{tower.name}."
        for tower in towers
        if tower.inside
    ]
    asked = raw.get("image_aspect_ratio")
    if kind.family != "llava_next" and asked != "pad":
        notes.insert(0, f"The checkpoint asks for image_aspect_ratio {asked!r}; images are padded all the same.")
    filmed = any(key.startswith("model.video_tower.") for key in weights)
    frames = video_frames(weights) if filmed or kind.family != "video_llava" else FRAMES
    fields = to_transformers_config(raw, towers[0].config, kind, frames or FRAMES)
    config, named = container_config(fields, kind.family, directory), _text_tower(text_tower, directory, towers)
    return _Files(source, directory, raw, kind, config, weights, frames, towers[0].folder, towers, named, tuple(notes))


def _tower(directory: Path, field: str, name: str, weights: dict[str, Tensor], with_weights: bool) -> _Tower:
    """Find a tower. If the shards do not contain its weights, add those of its own folder to `weights`."""
    module = TOWER_MODULES[field]
    inside = any(key.startswith(f"model.{module}.") for key in weights)
    official = {CLIP_L_336_NAME: CLIP_L_336, **dict.fromkeys(LANGUAGEBIND_NAMES, LANGUAGEBIND)}
    beside = (directory / name).is_dir()
    needed = with_weights and not inside
    if name in official and not beside and not needed:
        return _Tower(field, name, None, official[name], inside)
    folder = locate(directory / name if beside else name, "vision tower", weights=needed)
    if needed:
        named = ((hf_tower_key(key, module), tensor) for key, tensor in read_weights(folder).items())
        weights.update((key, tensor) for key, tensor in named if key is not None)
    return _Tower(field, name, folder, _vision_config(folder), inside)


def _vision_config(tower: Path) -> dict[str, Any]:
    """Return the vision config of a CLIP folder, which may contain a whole CLIP or the vision tower alone, completed
    with the library's defaults."""
    whole = read_json(tower / "config.json")
    parts = checked(ClipConfig, whole, tower / "config.json")
    config = whole if parts.vision_config is None else whole["vision_config"]
    checked(VisionConfig, config, tower / "config.json")
    family = config.get("model_type", "clip_vision_model")
    if family != "clip_vision_model":
        raise UserError(f"The vision tower {tower} is a {family}; only CLIP towers are supported.")
    try:
        return CLIPVisionConfig.from_dict(dict(config)).to_dict()
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise UserError(
            f"{tower}/config.json describes no CLIP vision tower: {' '.join(str(error).split())}"
        ) from error


def _refuse_different(towers: Sequence[_Tower]) -> None:
    """Raise UserError if the two towers of a Video-LLaVA differ."""
    first, *others = (CLIPVisionConfig.from_dict(dict(tower.config)) for tower in towers)
    for other in others:
        shared = (field for field in LANGUAGEBIND if field not in ("model_type", "projection_dim"))
        differ = [field for field in shared if getattr(first, field) != getattr(other, field)]
        if differ:
            raise UserError(
                f"The towers {towers[0].name} and {towers[1].name} differ in {', '.join(differ)}; the two towers of "
                "Video-LLaVA have the same sizes."
            )


def _text_tower(chosen: str | Path | None, directory: Path, towers: Sequence[_Tower]) -> Path | str | None:
    """Return the CLIP text tower as a folder or a hub id: the one that a user chose, the one beside the weights, or
    that of the CLIP which the checkpoint names; None if there is none.

    Args:
        towers: empty for the transformers layout, whose config names no CLIP.
    """
    if chosen is not None:
        return Path(chosen) if Path(chosen).is_dir() else str(chosen)
    beside = directory / "text_tower"
    if beside.is_dir() or not towers:
        return beside if beside.is_dir() else None
    if towers[0].folder is None:
        return towers[0].name
    return towers[0].folder if "text_config" in read_json(towers[0].folder / "config.json") else None


def _paths(files: _Files) -> dict[str, Path]:
    """Return what was read, by names that do not depend on where the folder lies."""
    paths = files_of(files.directory)
    for tower in files.towers:
        if tower.folder is not None:
            paths |= files_of(tower.folder, f"{tower.field}/", weights=not tower.inside)
    return paths


# What comes with the model


def _parts(files: _Files) -> dict[str, Any]:
    """Return the fields of a Checkpoint that need no weights, by name."""
    family, raw, config = files.kind.family, files.raw, files.config
    processor, image_notes = read_image_processor(files.images, family, config.vision_config)
    tokenizer = read_tokenizer(files.directory, config)
    parts: dict[str, Any] = {
        "tokenizer": tokenizer,
        "image_processor": processor,
        "conversation": default_mode(files.kind, tokenizer.get_vocab()),
        "name": files.directory.resolve().name if Path(files.source).is_dir() else str(files.source),
        "layout": files.kind.layout,
        "text_tower": files.text_tower,
        "notes": (*files.notes, *image_notes, *_notes(files)),
        "vocabulary": real_vocabulary(
            tokenizer, config.text_config.vocab_size, config.image_token_id, getattr(config, "video_token_id", None)
        ),
        "family": family,
    }
    if family == "llava_next":
        parts["merge"] = merge_type(raw) if files.kind.layout == "original" else "spatial_unpad"
    elif family == "video_llava":
        parts |= {"frames": files.frames or FRAMES, "temporal": files.frames is not None}
    return parts


def _notes(files: _Files) -> list[str]:
    config, notes = files.config, []
    window = getattr(config.text_config, "sliding_window", None)
    if window is not None:
        notes.append(
            f"The decoder's sliding window of {window} tokens is not applied: every token attends to all earlier ones."
        )
    if files.kind.family == "video_llava":
        notes.append(
            "The video tower has attention over time, as it was trained."
            if files.frames is not None
            else "The video tower has no attention over time, because the conversion to transformers drops it: answers "
            "about videos differ from those of the original checkpoint."
        )
        activation = config.vision_config.hidden_act
        if activation != LANGUAGEBIND["hidden_act"]:
            notes.append(
                f"The towers use the activation {activation}; LanguageBind's were trained with "
                f"{LANGUAGEBIND['hidden_act']}."
            )
    return notes


# Image preprocessing and tokenizer


def read_image_processor(
    directory: Path | None, family: Family, vision: PretrainedConfig
) -> tuple[ImageProcessor | QwenImageProcessor, tuple[str, ...]]:
    """Return a folder's image preprocessing and notes about it. LLaVA's always pads, whatever the files say."""
    config: dict[str, Any] = {}
    if directory is not None and (directory / "preprocessor_config.json").is_file():
        config = read_json(directory / "preprocessor_config.json")
    elif directory is not None and (directory / "processor_config.json").is_file():
        config = read_json(directory / "processor_config.json").get("image_processor") or {}
        if not isinstance(config, dict):
            raise UserError(f"image_processor in {directory}/processor_config.json is no JSON object; fetch it again.")
    if family in QWEN:
        return _qwen_processor(config, vision, directory)
    size = vision.image_size
    if not config:
        note = f"No preprocessor_config.json: CLIP's mean and deviation at {size} pixels were assumed."
        return ImageProcessor(size=size, crop=size), (note,)
    processor = ImageProcessor.from_config(config)
    if processor.crop != size:
        raise UserError(f"{directory}: images are cropped to {processor.crop} pixels, but the tower expects {size}.")
    return processor, ()


def _qwen_processor(
    config: Mapping[str, Any], vision: PretrainedConfig, directory: Path | None
) -> tuple[QwenImageProcessor, tuple[str, ...]]:
    expected = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
    edges = dict(zip(("patch_size", "merge_size", "temporal_patch_size"), expected, strict=True))
    processor = QwenImageProcessor.from_config({**edges, **config})
    stated = processor.patch, processor.merge, processor.temporal
    if stated != expected:
        raise UserError(
            f"{directory}: images are split into patches, groups and frames of {stated}, but the tower expects "
            f"{expected}; take both from one checkpoint."
        )
    if not config:
        bounds = f"{processor.min_pixels} to {processor.max_pixels} pixels"
        return processor, (f"No preprocessor_config.json: CLIP's mean and deviation and {bounds} were assumed.",)
    return processor, ()


def read_tokenizer(directory: Path, config: PretrainedConfig) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a checkpoint. If it has a sentencepiece model, the ids are that model's.

    Args:
        config: of the HF model.
    """
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"{directory} has no tokenizer ({' or '.join(TOKENIZER_FILES)}); copy it from the base model.")
    decoder = config.text_config
    # If tokenizer_config.json names no class, the config decides; transformers does not know the original config.json's
    # type. Under Mistral's config it leaves out the space that sentencepiece puts before a text.
    known = LlamaConfig() if decoder.model_type in ("llama", "mistral") else decoder
    try:
        return AutoTokenizer.from_pretrained(directory, config=known, trust_remote_code=False, **_spacing(directory))
    # tokenizers and sentencepiece raise bare Exceptions for files they cannot read.
    except Exception as error:
        raise UserError(
            f"Cannot read the tokenizer in {directory} ({' '.join(str(error).split())[:200]}); fetch its files again."
        ) from error


def _spacing(directory: Path) -> dict[str, bool]:
    """Return the arguments of the library's Llama tokenizer that place its dummy spaces as the slow tokenizer did.

    add_prefix_space: the library always puts a space before a text; some models do not (Yi's). The sentencepiece
    model decides: tokenizer.json has been wrong about it (transformers issue 29774).

    legacy: a dummy space also follows every special token. If tokenizer_config.json does not say, transformers 4 took
    True and transformers 5 takes False.
    """
    settings = directory / "tokenizer_config.json"
    stated = read_json(settings).get("legacy") if settings.is_file() else None
    if (directory / "tokenizer.model").is_file():
        model = SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
        if not model.encode("a", out_type=str)[0].startswith(SPACE):
            return {"add_prefix_space": False}
        return {"legacy": True} if stated is None else {}
    steps = _steps(json.loads((directory / "tokenizer.json").read_text(encoding="utf-8")))
    replaces = [step for step in steps if step.get("type") == "Replace" and step.get("content") == SPACE]
    metaspaces = [step for step in steps if step.get("type") == "Metaspace"]
    prefix = any(step.get("type") == "Prepend" for step in steps) or any(
        step.get("prepend_scheme", "always") != "never" and step.get("add_prefix_space", True) for step in metaspaces
    )
    if not (replaces or metaspaces):
        return {}
    if not prefix:
        return {"add_prefix_space": False}
    first = any(step.get("prepend_scheme") == "first" for step in metaspaces)
    return {"legacy": True} if stated is None and not first else {}


def _steps(tokenizer: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the normalisation and pre-tokenisation steps of a tokenizer.json."""
    steps = [tokenizer.get(part) or {} for part in ("normalizer", "pre_tokenizer")]
    inner = [step.get("normalizers") or step.get("pretokenizers") or () for step in steps]
    return [*steps, *(step for several in inner for step in several)]
