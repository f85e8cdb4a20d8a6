"""Read the image preprocessing and the tokenizer of a checkpoint."""

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
SPACE = "\u2581"  # sentencepiece's character for a space


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
    found = processor.patch, processor.merge, processor.temporal
    if found != expected:
        raise UserError(
            f"{directory}: images are split into patches, groups and frames of {found}, but the tower expects "
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
