"""Read a LLaVA-1.5 checkpoint, in the transformers or in the original layout, into one container.

The weights stay memory-mapped on disk until the container takes them over one by one, in the dtype and on the device
asked for, so that no second copy of the model exists. Nothing is unpickled and no code from a checkpoint is run.

Official code read: haotian-liu/LLaVA@c121f04, llava/model/builder.py
Differs from it: missing and unexpected weights are errors; one tokenizer class (transformers 5 has only one for Llama,
whose ids are those of sentencepiece, see tests/test_prompt.py).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
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
from llava.files import HUB_ID, listed, locate, read_json, read_weights
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
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


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
        text_tower: the CLIP text tower that belongs to the vision tower, if one is known: a folder, or the hub id of a
            whole CLIP. Nothing of it has been read or fetched; llava.clip_text does when a method first asks.
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
    text_tower: Path | str | None
    notes: tuple[str, ...]
    vocabulary: int


def load_checkpoint(
    source: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    text_tower: str | Path | None = None,
) -> Checkpoint:
    """Load a checkpoint from a folder or from the Hugging Face hub.

    Args:
        text_tower: folder or hub id of the whole CLIP model that the vision tower was taken from, for checkpoints that
            name none; needed only by methods that compare text and picture in CLIP's space.
    """
    directory = locate(source, "checkpoint")
    raw = read_json(directory / "config.json")
    layout = _layout(raw, directory)
    known_text_tower = _named_text_tower(text_tower)
    if layout == "transformers":
        config, weights = raw, read_weights(directory)
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
    return Checkpoint(
        model=model,
        tokenizer=tokenizer,
        image_processor=image_processor,
        conversation=mode,
        name=directory.resolve().name if Path(source).is_dir() else str(source),
        layout=layout,
        vision_tower_source=tower_source,
        text_tower=known_text_tower or _text_tower(directory, layout, vision),
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
    shards = read_weights(directory)
    inside = any(key.startswith(TOWER) for key in shards)
    weights = {to_transformers_key(key): tensor for key, tensor in shards.items()}
    notes = []
    aspect = config.get("image_aspect_ratio")
    if aspect != "pad":
        notes.append(f"The checkpoint asks for image_aspect_ratio {aspect!r}; images are padded all the same.")
    if inside and tower_name == CLIP_L_336_NAME and not (directory / tower_name).is_dir():
        tower, vision_config = None, CLIP_L_336
    else:
        tower = locate(directory / tower_name if (directory / tower_name).is_dir() else tower_name, "vision tower")
        vision_config = _vision_config(tower)
    if inside:
        notes.append(f"The vision tower comes from the checkpoint's own shards, not from {tower_name}.")
    else:
        named = ((tower_to_transformers_key(key), tensor) for key, tensor in read_weights(tower).items())
        weights.update((key, tensor) for key, tensor in named if key is not None)
    source = "the checkpoint's shards" if inside else f"mm_vision_tower {tower_name}"
    return to_transformers_config(config, vision_config), weights, tower, source, tuple(notes)


def _vision_config(tower: Path) -> dict[str, Any]:
    """The vision half of a CLIP folder, which may hold a whole CLIPModel or the vision model alone."""
    config = read_json(tower / "config.json")
    config = config.get("vision_config", config)
    family = config.get("model_type", "clip_vision_model")
    if family != "clip_vision_model":
        raise UserError(f"The vision tower {tower} is a {family}; only CLIP towers are supported.")
    return CLIPVisionConfig.from_dict(config).to_dict()


def _named_text_tower(source: str | Path | None) -> Path | str | None:
    """The CLIP a user names, checked as far as that costs nothing."""
    if source is None or Path(source).is_dir():
        return source and Path(source)
    if not HUB_ID.match(str(source)):
        raise UserError(f"There is no CLIP folder {source}; give a folder or a hub id such as owner/name.")
    return str(source)


def _text_tower(directory: Path, layout: Layout, tower: Path | None) -> Path | str | None:
    """Where the text half of the vision tower's CLIP is: beside the weights, or in the CLIP that the checkpoint names.

    Args:
        tower: in the original layout the folder of mm_vision_tower, or None for the official one, not fetched.
    """
    beside = directory / "text_tower"
    if beside.is_dir():
        return beside
    if layout == "transformers":
        return None  # its config describes the vision half only and does not say which CLIP it came from
    if tower is None:
        return CLIP_L_336_NAME
    return tower if "text_config" in read_json(tower / "config.json") else None


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
        config = read_json(directory / "preprocessor_config.json")
    elif directory is not None and (directory / "processor_config.json").is_file():
        config = read_json(directory / "processor_config.json").get("image_processor", {})
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
    with errors_only():
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
        f"{len(keys)} {kind}: {listed(keys)}"
        for kind, keys in (("missing", report["missing_keys"]), ("unexpected", report["unexpected_keys"]))
        if keys
    ]
    if report["mismatched_keys"]:
        shapes = [
            f"{key} {tuple(found)} instead of {tuple(wanted)}" for key, found, wanted in report["mismatched_keys"]
        ]
        problems.append(f"{len(shapes)} of another shape: {listed(shapes)}")
    if problems:
        raise UserError(f"The weights in {directory} do not fit its config.json, {'; '.join(problems)}.")
    return model.eval()


@contextmanager
def errors_only() -> Iterator[None]:
    """Keep the library's own report off the screen: the same facts are in our error, in one sentence."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
