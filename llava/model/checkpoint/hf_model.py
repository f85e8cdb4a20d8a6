"""The transformers model (HF model) of a checkpoint, and how it is filled with the weights.

The model is built without memory. Each weight is read from its mapped file in the requested dtype and on the requested
device, so there is never a second copy of the model; a weight that has the right dtype already stays mapped. Loading
1.4 GB of float16 as bfloat16, anonymous memory peaked at 1.001 times the model, in both layouts and from .safetensors
and .bin; loading it as float16, at 0.001 times.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import (
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)
from transformers.utils import logging

from llava.errors import UserError
from llava.model.checkpoint.files import listed
from llava.model.checkpoint.identify import NAMES, Family, Kind
from llava.model.checkpoint.limits import check_depth, check_feature_layer, check_memory, check_part
from llava.model.checkpoint.quantization import quantised_loading, stored_method
from llava.model.multimodal_encoder.languagebind import LanguageBindVideoTower
from llava.model.parallel import group
from llava.model.parallel.choice import Parallel, check_heads

HF_CLASSES: dict[Family, type[PreTrainedModel]] = {
    "llava": LlavaForConditionalGeneration,
    "llava_next": LlavaNextForConditionalGeneration,
    "video_llava": VideoLlavaForConditionalGeneration,
    "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
    "qwen2_vl": Qwen2VLForConditionalGeneration,
}

# Weights of other types are quantised.
PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Parts that the weights must contain. They are checked first: a list of 391 missing keys explains nothing.
TOWERS: dict[Family, dict[str, str]] = {
    "llava": {"model.vision_tower.": "the vision tower"},
    "llava_next": {"model.vision_tower.": "the vision tower", "model.image_newline": "image_newline"},
    "video_llava": {"model.image_tower.": "the image tower", "model.video_tower.": "the video tower"},
    "qwen2_5_vl": {"model.visual.": "the vision tower"},
    "qwen2_vl": {"model.visual.": "the vision tower"},
}

# Names in the files of the hub -> names in the HF model of transformers 5. Names that fit already do not change.
_TOWER = r"(vision_tower|image_tower|video_tower)"
HUB_KEYS = (
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^language_model\.model\."), "model.language_model."),
    (re.compile(rf"^(?:model\.)?{_TOWER}\.(?:vision_model\.)?"), r"model.\1."),
    (re.compile(r"^(?=multi_modal_projector\.|image_newline$)"), "model."),
)
QWEN_KEYS = (
    (re.compile(r"^(?=visual\.)"), "model."),
    (re.compile(r"^model\.(?=(?:embed_tokens|layers|norm)\.)"), "model.language_model."),
)
ORIGINAL_NAMES = re.compile(r"^model\.(?:mm_projector|(vision|image|video)_tower\.\1_tower)\.")
HUB_NAMES = re.compile(rf"^(?:(?:model\.)?(?:language_model|multi_modal_projector)|{_TOWER})\.")


class VideoLlavaWithTime(VideoLlavaForConditionalGeneration):
    """Video-LLaVA as it was trained: with the video tower's attention over time, which transformers leaves out."""

    def __init__(self, config: VideoLlavaConfig, frames: int):
        super().__init__(config)
        self.model.video_tower = LanguageBindVideoTower(config.vision_config, frames)


def hub_to_container_key(key: str, family: Family) -> str:
    """Return the name in the HF model of a weight of a transformers checkpoint, old or new."""
    for pattern, replacement in QWEN_KEYS if family.startswith("qwen") else HUB_KEYS:
        if pattern.match(key):
            return pattern.sub(replacement, key, count=1)
    return key


def refuse_other_names(keys: Mapping[str, Any], kind: Kind, directory: Path) -> None:
    """Raise UserError if weights are named as in the other layout than config.json."""
    other, foreign = ("transformers", HUB_NAMES) if kind.layout == "original" else ("original", ORIGINAL_NAMES)
    found = next((key for key in keys if foreign.match(key)), None)
    if found is not None:
        raise UserError(
            f"{directory} mixes two layouts: config.json is of the {kind.layout} layout, but the weight {found} has a "
            f"name of the {other} one; take both from one checkpoint."
        )


def refuse_missing_towers(keys: Mapping[str, Any], family: Family, directory: Path) -> None:
    """Raise UserError if the weights lack a whole part of the model."""
    for prefix, name in TOWERS[family].items():
        if not any(key.startswith(prefix) for key in keys):
            raise UserError(
                f"The weights in {directory} hold nothing of {name} ({prefix.rstrip('.')}), which {NAMES[family]} "
                "needs; fetch all of the checkpoint's files."
            )


def container_config(config: Mapping[str, Any], family: Family, directory: Path) -> PretrainedConfig:
    """Build the HF model's configuration from the fields of a config.json, which its schema has checked."""
    try:
        made = HF_CLASSES[family].config_class.from_dict(dict(config))
    except (StrictDataclassError, TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"{directory}/config.json describes no {NAMES[family]} model: {' '.join(str(error).split())}"
        ) from error
    check_feature_layer(made, family, directory)
    return made


def video_frames(weights: Mapping[str, Tensor]) -> int | None:
    """Return the frames of a video tower with temporal attention; None for a tower without."""
    name = next((key for key in weights if re.match(r"model\.video_tower\..*\.temporal_embedding$", key)), None)
    return None if name is None else weights[name].shape[1]


def hf_class(kind: Kind, weights: Mapping[str, Tensor]) -> tuple[type[PreTrainedModel], tuple[int, ...]]:
    """Return the HF model's class, and its arguments after the configuration."""
    frames = video_frames(weights)
    return (HF_CLASSES[kind.family], ()) if frames is None else (VideoLlavaWithTime, (frames,))


def fill(
    kind: Kind,
    config: PretrainedConfig,
    weights: Mapping[str, Tensor],
    dtype: torch.dtype,
    device: str | torch.device,
    directory: Path,
    quantization: str | None = None,
    parallel: Parallel | None = None,
) -> PreTrainedModel:
    """Build the HF model and load exactly these weights into it.

    Args:
        weights: memory-mapped, by their names in the HF model.
        directory: of the checkpoint, for errors.
        quantization: "8bit" or "4bit" to quantise the decoder while it is loaded.
        parallel: how the decoder is spread over ranks; None to hold it whole.

    Raises:
        UserError: weights and configuration do not fit, or the memory is too small.
    """
    device = torch.device(device)
    build, extra = hf_class(kind, weights)
    _refuse_numbers_without_meaning(weights, config, directory)
    loading = quantised_loading(config, quantization, dtype, directory)
    check_depth(config, weights, directory)
    if parallel is not None:
        return _fill_spread(build, extra, config, weights, dtype, device, directory, parallel)
    check_memory(config, weights, dtype, device, bool(loading), directory)
    with errors_only(), _quantiser_errors(directory if loading else None):
        model, report = build.from_pretrained(
            None,
            *extra,
            config=config,
            state_dict=dict(weights),
            dtype=dtype,
            attn_implementation="sdpa",
            device_map=None if device.type == "cpu" and not loading else {"": device},
            # Reported below with names, like missing weights; the library would print a table of all.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **loading,
        )
    _refuse_problems(report, directory)
    return model.eval()


def _fill_spread(
    build: type[PreTrainedModel],
    extra: tuple[int, ...],
    config: PretrainedConfig,
    weights: Mapping[str, Tensor],
    dtype: torch.dtype,
    device: torch.device,
    directory: Path,
    parallel: Parallel,
) -> PreTrainedModel:
    """Load the part of the model that this rank holds; see `fill`."""
    from llava.model.parallel.mapped import mapped_model  # only here: a whole model needs no DeepSpeed

    if stored_method(config) is not None:
        raise UserError(f"{directory} is quantised, and a quantised weight cannot be cut; take it unquantised.")
    check_heads(config, parallel.tensor, directory.name)
    if parallel.offload is not None:
        group.join_alone(device)
    check_part(config, weights, dtype, device, parallel, directory)
    with errors_only():
        model, report = mapped_model(build, extra, config, weights, dtype)
    _refuse_problems(report, directory)
    if parallel.offload is None:
        from llava.model.parallel.tensor import split

        split(model, parallel.tensor, dtype, device)
    else:
        from llava.model.parallel.zero import partition

        partition(model, parallel, dtype, device)
    return model.eval()


def _refuse_numbers_without_meaning(weights: Mapping[str, Tensor], config: PretrainedConfig, directory: Path) -> None:
    """Raise UserError for weights of integers, truth values or 8-bit floats whose scale no configuration tells."""
    strange = {key: tensor.dtype for key, tensor in weights.items() if tensor.dtype not in PLAIN}
    if strange and stored_method(config) is None:
        kinds = ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in strange.values()}))
        raise UserError(
            f"{directory} has weights of {kinds} ({listed(strange)}), and its config.json has no "
            "quantization_config that says what they mean; take it from the checkpoint, or take unquantised weights."
        )


def _refuse_problems(report: Mapping[str, Any], directory: Path) -> None:
    """Raise UserError if weights are missing, unexpected or of another shape."""
    problems = [
        f"{len(keys)} {fault}: {listed(keys)}"
        for fault, keys in (("missing", report["missing_keys"]), ("unexpected", report["unexpected_keys"]))
        if keys
    ]
    if report["mismatched_keys"]:
        shapes = [
            f"{key} {tuple(found)} instead of {tuple(wanted)}" for key, found, wanted in report["mismatched_keys"]
        ]
        problems.append(f"{len(shapes)} of another shape: {listed(shapes)}")
    if problems:
        raise UserError(f"The weights in {directory} do not fit its config.json, {'; '.join(problems)}.")


@contextmanager
def _quantiser_errors(directory: Path | None) -> Iterator[None]:
    """Turn errors of a quantiser, such as a missing package or GPU, into a UserError. None: no quantiser is used."""
    try:
        yield
    except (ImportError, RuntimeError, ValueError) as error:
        if directory is None:
            raise
        raise UserError(f"Cannot load {directory} quantised here: {' '.join(str(error).split())}") from error


@contextmanager
def errors_only() -> Iterator[None]:
    """Silence the library's own report; our error says the same in one sentence."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
