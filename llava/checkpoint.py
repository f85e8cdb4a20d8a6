"""Read a LLaVA-1.5 checkpoint, in the transformers or in the original layout, into one container.

The weights stay memory-mapped on disk until the container takes them over one by one, in the dtype and on the device
asked for, so that no second copy of the model exists. Nothing is unpickled and no code from a checkpoint is run.

Official code read: haotian-liu/LLaVA@c121f04, llava/model/builder.py
Differs from it: missing and unexpected weights are errors; one tokenizer class (transformers 5 has only one for Llama,
whose ids are those of sentencepiece, see tests/test_prompt.py).
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from llava.conversation import DEFAULT_MODE, conversation
from llava.errors import UserError
from llava.image import ImageProcessor
from llava.original_layout import (
    CLIP_L_336,
    CLIP_L_336_NAME,
    TOWER,
    to_transformers_config,
    to_transformers_key,
    tower_to_transformers_key,
)

Layout = Literal["transformers", "original"]

SUPPORTED = (
    "this version reads LLaVA-1.5 (a CLIP tower, an mlp2x_gelu projector, a Llama decoder) in the transformers `llava` "
    "and in the original liuhaotian layout"
)
HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
SMALL_FILES = ("*.json", "tokenizer.model", "text_tower/*")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # in the order of preference, each also with an index

# Tables that the modules compute for themselves; old checkpoints store them, to no effect.
IGNORED_KEYS = (".inv_freq", ".position_ids")
NAMED = 5  # keys spelled out in an error, the rest is counted


@dataclass(frozen=True)
class Checkpoint:
    """A model with all that is needed to ask it questions.

    Attributes:
        model: in evaluation mode, attention by SDPA.
        image_processor: pads to a square, whatever the checkpoint's own configuration says.
        conversation: prompt template, a name of llava.conversation.MODES.
        name: hub id or folder name.
        layout: how the files were written.
        vision_tower_source: where the tower's weights came from, in words.
        text_tower: folder of the CLIP text tower that belongs to the vision tower, if the checkpoint has one.
        notes: what a reader of the results should know about the loading.
        vocabulary: tokens that can be answered. Rows above are padding or the image placeholder; mask their logits.
    """

    model: LlavaForConditionalGeneration
    tokenizer: PreTrainedTokenizerBase
    image_processor: ImageProcessor
    conversation: str
    name: str
    layout: Layout
    vision_tower_source: str
    text_tower: Path | None
    notes: tuple[str, ...]
    vocabulary: int


def load_checkpoint(
    source: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> Checkpoint:
    """Load a checkpoint from a folder or from the Hugging Face hub."""
    directory = _locate(source, "checkpoint")
    raw = _read_json(directory / "config.json")
    layout = _layout(raw, directory)
    if layout == "transformers":
        config, weights = raw, _read_weights(directory)
        vision, tower_source, notes = directory, "the checkpoint", ()
    else:
        config, weights, vision, tower_source, notes = _read_original(directory, raw)

    mode = raw.get("conversation", DEFAULT_MODE)
    conversation(mode)
    llava_config = _llava_config(config, directory)
    image_processor, image_notes = _image_processor(vision, llava_config.vision_config.image_size)
    # Before the weights: a missing tokenizer should not cost a minute of loading.
    tokenizer = _load_tokenizer(directory, llava_config)
    model = _fill(llava_config, weights, dtype, device, directory)
    text_tower = directory / "text_tower"
    return Checkpoint(
        model=model,
        tokenizer=tokenizer,
        image_processor=image_processor,
        conversation=mode,
        name=directory.resolve().name if Path(source).is_dir() else str(source),
        layout=layout,
        vision_tower_source=tower_source,
        text_tower=text_tower if text_tower.is_dir() else None,
        notes=(*notes, *image_notes),
        vocabulary=real_vocabulary(tokenizer, llava_config.text_config.vocab_size, llava_config.image_token_index),
    )


def real_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int, image_token: int) -> int:
    """How many of the `rows` of the embedding are tokens that can be answered.

    The checkpoints of the hub have 32064 rows for 32000 tokens: one for "<image>", one for padding, the others to round
    the size up. None of them was trained, so none may ever win an argmax.
    """
    count = min(rows, len(tokenizer))
    placeholders = {image_token, tokenizer.pad_token_id} - {tokenizer.eos_token_id}
    while count - 1 in placeholders:
        count -= 1
    return count


# Files


def _locate(source: str | Path, what: str) -> Path:
    """The folder of a model; one of the hub is fetched, small files first, then only the weights that are used."""
    if Path(source).is_dir():
        return Path(source)
    if not HUB_ID.match(str(source)):
        raise UserError(f"There is no {what} folder {source}; give a folder or a hub id such as owner/name.")
    directory = _download(str(source), SMALL_FILES, what)
    for name in WEIGHT_FILES:
        index = directory / f"{name}.index.json"
        shards = _index_shards(index) if index.is_file() else [name]
        directory = _download(str(source), shards, what)
        if all((directory / shard).is_file() for shard in shards):
            break
    return directory


def _download(hub_id: str, patterns: Iterable[str], what: str) -> Path:
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(patterns)))
    # The hub's client passes on the errors of several layers (its own, HTTP, sockets); all mean the same to the user.
    except Exception as error:
        raise UserError(
            f"The {what} {hub_id!r} is no folder here and could not be fetched from the Hugging Face hub "
            f"({type(error).__name__}); check the name and the network, or download it and give its folder."
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path.parent} has no {path.name}; is it the folder of a checkpoint?") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); fetch it again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; fetch it again.")
    return content


def _index_shards(index: Path) -> list[str]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map; fetch it again.")
    return sorted(set(weight_map.values()))


def _weight_files(directory: Path) -> list[Path]:
    for name in WEIGHT_FILES:
        index = directory / f"{name}.index.json"
        if index.is_file():
            shards = [directory / shard for shard in _index_shards(index)]
            missing = [shard.name for shard in shards if not shard.is_file()]
            if missing:
                raise UserError(
                    f"{directory} lacks {len(missing)} of {len(shards)} weight files named in {index.name}: "
                    f"{_listed(missing)}; fetch them."
                )
            return shards
        if (directory / name).is_file():
            return [directory / name]
    partial = [
        n for n in ("adapter_config.json", "mm_projector.bin", "non_lora_trainables.bin") if (directory / n).is_file()
    ]
    hint = f" It has {partial[0]}: merge LoRA or projector-only weights into their base model first." if partial else ""
    raise UserError(f"{directory} has no weights ({' or '.join(WEIGHT_FILES)}, whole or with an index).{hint}")


def _read_weights(directory: Path) -> dict[str, Tensor]:
    """All weights of a folder as memory-mapped tensors under the names in the files."""
    weights: dict[str, Tensor] = {}
    for path in _weight_files(directory):
        weights.update(_open_weights(path))
    return {key: tensor for key, tensor in weights.items() if not key.endswith(IGNORED_KEYS)}


def _open_weights(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError as error:
        raise UserError(f"{path} holds more than weights and was not unpickled; convert it to safetensors.") from error
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError) as error:
        raise UserError(
            f"Cannot read the weights in {path}; the file is damaged or incomplete, fetch it again."
        ) from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{path} holds no table of weights; a state dict was expected.")
    return weights


# The two layouts


def _layout(config: Mapping[str, Any], directory: Path) -> Layout:
    """By what the config contains: the name "llava" is used by both layouts and by other families."""
    family = config.get("model_type", "unknown")
    text, vision = (config.get(part) for part in ("text_config", "vision_config"))
    if isinstance(text, dict) and isinstance(vision, dict) and family == "llava":
        parts = text.get("model_type", "llama"), vision.get("model_type", "clip_vision_model")
        if parts == ("llama", "clip_vision_model"):
            return "transformers"
        family = f"llava ({parts[1]} tower, {parts[0]} decoder)"
    elif "mm_image_tower" in config or "mm_video_tower" in config:
        family = "Video-LLaVA"
    elif "mm_vision_tower" in config and family in ("llava", "llava_llama"):
        if (
            "anyres" not in str(config.get("image_aspect_ratio"))
            and config.get("mm_patch_merge_type", "flat") == "flat"
        ):
            return "original"
        family = "LLaVA-NeXT"
    raise UserError(f"{directory} is a checkpoint of the family {family}, which is not supported yet: {SUPPORTED}.")


def _read_original(
    directory: Path, config: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor], Path | None, str, tuple[str, ...]]:
    """Original layout -> (LlavaConfig arguments, weights, folder of the tower, where the tower came from, notes)."""
    tower_name = config["mm_vision_tower"]
    shards = _read_weights(directory)
    inside = any(key.startswith(TOWER) for key in shards)
    weights = {to_transformers_key(key): tensor for key, tensor in shards.items()}
    notes = []
    aspect = config.get("image_aspect_ratio")
    if aspect != "pad":
        notes.append(f"The checkpoint asks for image_aspect_ratio {aspect!r}; images are padded all the same.")
    if inside and tower_name == CLIP_L_336_NAME and not (directory / tower_name).is_dir():
        tower, vision_config = None, CLIP_L_336
    else:
        tower = _locate(directory / tower_name if (directory / tower_name).is_dir() else tower_name, "vision tower")
        vision_config = _vision_config(tower)
    if inside:
        notes.append(f"The vision tower comes from the checkpoint's own shards, not from {tower_name}.")
    else:
        named = ((tower_to_transformers_key(key), tensor) for key, tensor in _read_weights(tower).items())
        weights.update((key, tensor) for key, tensor in named if key is not None)
    source = "the checkpoint's shards" if inside else f"mm_vision_tower {tower_name}"
    return to_transformers_config(config, vision_config), weights, tower, source, tuple(notes)


def _vision_config(tower: Path) -> dict[str, Any]:
    """The vision half of a CLIP folder, which may hold a whole CLIPModel or the vision model alone."""
    config = _read_json(tower / "config.json")
    config = config.get("vision_config", config)
    family = config.get("model_type", "clip_vision_model")
    if family != "clip_vision_model":
        raise UserError(f"The vision tower {tower} is a {family}; only CLIP towers are supported.")
    return CLIPVisionConfig.from_dict(config).to_dict()


# The parts


def _llava_config(config: dict[str, Any], directory: Path) -> LlavaConfig:
    if "quantization_config" in config:
        raise UserError(f"{directory} is quantised; give the checkpoint in float16, bfloat16 or float32.")
    try:
        return LlavaConfig.from_dict(config)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise UserError(f"{directory}/config.json describes no LLaVA model: {' '.join(str(error).split())}") from error


def _image_processor(directory: Path | None, image_size: int) -> tuple[ImageProcessor, tuple[str, ...]]:
    """Size, mean and standard deviation of a folder's image preprocessing, always with padding."""
    config: dict[str, Any] = {}
    if directory is not None and (directory / "preprocessor_config.json").is_file():
        config = _read_json(directory / "preprocessor_config.json")
    elif directory is not None and (directory / "processor_config.json").is_file():
        config = _read_json(directory / "processor_config.json").get("image_processor", {})
    if not config:
        note = f"No preprocessor_config.json: CLIP's mean and deviation at {image_size} pixels were assumed."
        return ImageProcessor(size=image_size, crop=image_size), (note,)
    processor = ImageProcessor.from_config(config)
    if processor.crop != image_size:
        raise UserError(f"{directory}: images are cut to {processor.crop} pixels, but the tower expects {image_size}.")
    return processor, ()


def _load_tokenizer(directory: Path, config: LlavaConfig) -> PreTrainedTokenizerBase:
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"{directory} has no tokenizer ({' or '.join(TOKENIZER_FILES)}); copy it from the base model.")
    try:
        # The text config decides where tokenizer_config.json names no class: the original config.json is of a
        # type that transformers does not know.
        return AutoTokenizer.from_pretrained(directory, config=config.text_config, trust_remote_code=False)
    # tokenizers and sentencepiece raise bare Exceptions for files they cannot read.
    except Exception as error:
        raise UserError(
            f"Cannot read the tokenizer in {directory} ({' '.join(str(error).split())[:200]}); fetch its files again."
        ) from error


def _fill(
    config: LlavaConfig, weights: dict[str, Tensor], dtype: torch.dtype, device: str | torch.device, directory: Path
) -> LlavaForConditionalGeneration:
    """Build the container and give it every weight, no more and no less."""
    device = torch.device(device)
    with _errors_only():
        model, report = LlavaForConditionalGeneration.from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype=dtype,
            attn_implementation="sdpa",
            device_map=None if device.type == "cpu" else {"": device},
            # Reported like missing ones below, with names; the library would stop at a table of all.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    problems = [
        f"{len(keys)} {kind}: {_listed(keys)}"
        for kind, keys in (("missing", report["missing_keys"]), ("unexpected", report["unexpected_keys"]))
        if keys
    ]
    if report["mismatched_keys"]:
        shapes = [
            f"{key} {tuple(found)} instead of {tuple(wanted)}" for key, found, wanted in report["mismatched_keys"]
        ]
        problems.append(f"{len(shapes)} of another shape: {_listed(shapes)}")
    if problems:
        raise UserError(f"The weights in {directory} do not fit its config.json, {'; '.join(problems)}.")
    return model.eval()


@contextmanager
def _errors_only() -> Iterator[None]:
    """Keep the library's own report off the screen: the same facts are in our error, in one sentence."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
