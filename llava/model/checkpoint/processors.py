"""What lies beside a checkpoint's weights: the preprocessing of its images and its tokenizer."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer, LlamaConfig, PretrainedConfig, PreTrainedTokenizerBase

from llava.errors import UserError
from llava.model.checkpoint.files import read_json
from llava.model.checkpoint.identify import QWEN, Family
from llava.processing.clip_image import ImageProcessor
from llava.processing.qwen_image import QwenImageProcessor

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
SPACE = "\u2581"  # how sentencepiece writes a space


def read_image_processor(
    directory: Path | None, family: Family, vision: PretrainedConfig
) -> tuple[ImageProcessor | QwenImageProcessor, tuple[str, ...]]:
    """A folder's image preprocessing and notes about it; LLaVA's always pads."""
    config: dict[str, Any] = {}
    if directory is not None and (directory / "preprocessor_config.json").is_file():
        config = read_json(directory / "preprocessor_config.json")
    elif directory is not None and (directory / "processor_config.json").is_file():
        config = read_json(directory / "processor_config.json").get("image_processor", {})
    if family in QWEN:
        return _qwen_processor(config, vision, directory)
    size = vision.image_size
    if not config:
        note = f"No preprocessor_config.json: CLIP's mean and deviation at {size} pixels were assumed."
        return ImageProcessor(size=size, crop=size), (note,)
    processor = ImageProcessor.from_config(config)
    if processor.crop != size:
        raise UserError(f"{directory}: images are cut to {processor.crop} pixels, but the tower expects {size}.")
    return processor, ()


def _qwen_processor(
    config: Mapping[str, Any], vision: PretrainedConfig, directory: Path | None
) -> tuple[QwenImageProcessor, tuple[str, ...]]:
    expected = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
    edges = dict(zip(("patch_size", "merge_size", "temporal_patch_size"), expected, strict=True))
    processor = QwenImageProcessor.from_config({**edges, **config})
    found = processor.patch, processor.merge, processor.temporal
    if found != expected:
        raise UserError(
            f"{directory}: images are cut into patches, groups and frames of {found}, but the tower expects {expected}."
        )
    if not config:
        bounds = f"{processor.min_pixels} to {processor.max_pixels} pixels"
        return processor, (f"No preprocessor_config.json: CLIP's mean and deviation and {bounds} were assumed.",)
    return processor, ()


def read_tokenizer(directory: Path, config: PretrainedConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, whose ids are those of its sentencepiece model where it has one.

    Args:
        config: of the container.
    """
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"{directory} has no tokenizer ({' or '.join(TOKENIZER_FILES)}); copy it from the base model.")
    decoder = config.text_config
    # Where tokenizer_config.json leaves it open, the config decides on the class; the original config.json is of a type
    # that transformers does not know. Under Mistral's it drops the space that sentencepiece puts in front of a text.
    known = LlamaConfig() if decoder.model_type in ("llama", "mistral") else decoder
    try:
        return AutoTokenizer.from_pretrained(directory, config=known, trust_remote_code=False, **_spacing(directory))
    # tokenizers and sentencepiece raise bare Exceptions for files they cannot read.
    except Exception as error:
        raise UserError(
            f"Cannot read the tokenizer in {directory} ({' '.join(str(error).split())[:200]}); fetch its files again."
        ) from error


def _spacing(directory: Path) -> dict[str, bool]:
    """Tell the library's Llama tokenizer, which always puts a space in front of a text, where the files do not (Yi's).

    The sentencepiece model decides: tokenizer.json has been wrong about it (transformers issue 29774).
    """
    if (directory / "tokenizer.model").is_file():
        model = SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
        return {} if model.encode("a", out_type=str)[0].startswith(SPACE) else {"add_prefix_space": False}
    steps = _steps(json.loads((directory / "tokenizer.json").read_text(encoding="utf-8")))
    replaces = [step for step in steps if step.get("type") == "Replace" and step.get("content") == SPACE]
    metaspaces = [step for step in steps if step.get("type") == "Metaspace"]
    prefix = any(step.get("type") == "Prepend" for step in steps) or any(
        step.get("prepend_scheme", "always") != "never" and step.get("add_prefix_space", True) for step in metaspaces
    )
    return {"add_prefix_space": False} if (replaces or metaspaces) and not prefix else {}


def _steps(tokenizer: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What a tokenizer.json does to a text before it is cut into tokens."""
    steps = [tokenizer.get(part) or {} for part in ("normalizer", "pre_tokenizer")]
    inner = [step.get("normalizers") or step.get("pretokenizers") or () for step in steps]
    return [*steps, *(step for several in inner for step in several)]
