"""The transformers model (HF model) of a checkpoint: its configuration, its checks, and how it takes the weights.

The model is built without memory. Each weight is read from its mapped file in the requested dtype and on the requested
device, so there is never a second copy of the model; a weight that has the right dtype already stays mapped. Loading
1.4 GB of float16 as bfloat16, anonymous memory peaked at 1.001 times the model, in both layouts and from .safetensors
and .bin; loading it as float16, at 0.001 times.

The decoder may be quantised to 8 or 4 bits while it is loaded, with bitsandbytes through transformers. Towers,
projector and head keep the requested dtype: methods rank tokens by what the tower computes, and the tower is a
thirtieth of the weights.

Official code read: haotian-liu/LLaVA@c121f04, llava/model/builder.py (NF4 with double quantisation for 4 bits)
Differs from it: the projector is not quantised; the requested dtype is used to compute, not always float16.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import (
    BitsAndBytesConfig,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)
from transformers.initialization import no_init_weights
from transformers.utils import logging

from llava.errors import UserError, unknown
from llava.model.checkpoint.files import listed
from llava.model.checkpoint.layouts import NAMES, QWEN, Family, Kind
from llava.model.parallel import Parallel, check_heads, join_alone, mapped_model, partition, split
from llava.model.video_llava import LanguageBindVideoTower

HF_CLASSES: dict[Family, type[PreTrainedModel]] = {
    "llava": LlavaForConditionalGeneration,
    "llava_next": LlavaNextForConditionalGeneration,
    "video_llava": VideoLlavaForConditionalGeneration,
    "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
    "qwen2_vl": Qwen2VLForConditionalGeneration,
}
# Parts that the weights must contain. They are checked first: a list of 391 missing keys explains nothing.
TOWERS: dict[Family, dict[str, str]] = {
    "llava": {"model.vision_tower.": "the vision tower"},
    "llava_next": {"model.vision_tower.": "the vision tower", "model.image_newline": "image_newline"},
    "video_llava": {"model.image_tower.": "the image tower", "model.video_tower.": "the video tower"},
    "qwen2_5_vl": {"model.visual.": "the vision tower"},
    "qwen2_vl": {"model.visual.": "the vision tower"},
}
TEMPORAL = re.compile(r"^model\.video_tower\..*\.temporal_embedding$")
CUT = ("model.language_model.layers.", "lm_head.")  # what several ranks share

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
# Weights of other types are quantised already.
PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
GIB = 2**30


class VideoLlavaWithTime(VideoLlavaForConditionalGeneration):
    """Video-LLaVA as it was trained: with the video tower's attention over time, which transformers leaves out."""

    def __init__(self, config: VideoLlavaConfig, frames: int):
        super().__init__(config)
        vision: Any = config.vision_config
        self.model.video_tower = LanguageBindVideoTower(vision, frames)


# The model


def container_config(config: Mapping[str, Any], family: Family, directory: Path) -> PretrainedConfig:
    """Build the HF model's configuration from the fields of a config.json, which its schema has checked.

    Raises:
        UserError: transformers refuses the fields, or the tower has no such layer as vision_feature_layer
            (mm_vision_select_layer) names.
    """
    config_class: Any = HF_CLASSES[family].config_class
    try:
        made: PretrainedConfig = config_class.from_dict(dict(config))
    except (StrictDataclassError, TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"{directory}/config.json describes no {NAMES[family]} model: {' '.join(str(error).split())}"
        ) from error
    if family in QWEN:
        return made
    refuse_feature_layer(made, f"{directory}/config.json")
    return made


def refuse_feature_layer(config: PretrainedConfig, where: str) -> None:
    """Raise UserError for features from a layer that the tower lacks."""
    # hidden_states of a tower with n blocks has n + 1 entries, so -n-1 to n are possible.
    layer, depth = config.vision_feature_layer, config.vision_config.num_hidden_layers
    if not -depth - 1 <= layer <= depth:
        raise UserError(
            f"{where} takes image features from layer {layer} of a vision tower with {depth} blocks; "
            f"expected {-depth - 1} to {depth}, LLaVA uses -2."
        )


def video_frames(weights: Mapping[str, Tensor]) -> int | None:
    """Return the frames of a video tower with temporal attention; None for a tower without."""
    name = next((key for key in weights if TEMPORAL.match(key)), None)
    return None if name is None else weights[name].shape[1]  # [1, frames, width]


def hf_class(family: Family, frames: int | None) -> tuple[type[PreTrainedModel], tuple[int, ...]]:
    """Return the HF model's class, and its arguments after the configuration.

    Args:
        frames: of a video tower with attention over time; None for a tower without.
    """
    return (HF_CLASSES[family], ()) if frames is None else (VideoLlavaWithTime, (frames,))


def empty_model(config: PretrainedConfig, kind: Kind, frames: int | None = None) -> PreTrainedModel:
    """The HF model of a configuration on the meta device; for `frames` see `hf_class`."""
    config._attn_implementation = "sdpa"
    build, extra = hf_class(kind.family, frames)
    with torch.device("meta"), no_init_weights():
        model: PreTrainedModel = build(config, *extra)
        model.tie_weights()
    return model.eval()


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
        parallel: how the decoder is spread over ranks, of which this process loads its part; None to hold it whole.

    Raises:
        UserError: weights and configuration do not fit, or the memory is too small.
    """
    device = torch.device(device)
    build, extra = hf_class(kind.family, video_frames(weights))
    _refuse_quantised_weights(weights, directory)
    if parallel is None:
        check_memory(config, weights, dtype, device, directory, quantised=quantization is not None)
        with errors_only(), _quantiser_errors(directory if quantization else None):
            read: Any = build.from_pretrained
            model, report = read(
                None,
                *extra,
                config=config,
                state_dict=dict(weights),
                dtype=dtype,
                attn_implementation="sdpa",
                device_map=None if device.type == "cpu" and not quantization else {"": device},
                # Reported below with names, like missing weights; the library would print a table of all.
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                quantization_config=quantiser(quantization, dtype) if quantization else None,
            )
    else:
        check_heads(config, parallel.tensor, directory.name)
        if parallel.offload is not None:
            join_alone(device)
        check_memory(config, weights, dtype, device, directory, parallel=parallel)
        with errors_only():
            model, report = mapped_model(build, extra, config, weights, dtype)
    _refuse_problems(report, directory)
    if parallel is not None and parallel.offload is None:
        split(model, parallel.tensor, dtype, device)
    elif parallel is not None:
        partition(model, parallel, dtype, device)
    return model.eval()


# Weights and configuration


def refuse_missing_towers(keys: Mapping[str, Any], family: Family, directory: Path) -> None:
    """Raise UserError if the weights lack a whole part of the model."""
    for prefix, name in TOWERS[family].items():
        if not any(key.startswith(prefix) for key in keys):
            raise UserError(
                f"The weights in {directory} hold nothing of {name} ({prefix.rstrip('.')}), which {NAMES[family]} "
                "needs; fetch all of the checkpoint's files."
            )


def _refuse_quantised_weights(weights: Mapping[str, Tensor], directory: Path) -> None:
    """Raise UserError for weights of integers, truth values or 8-bit floats."""
    strange = {key: tensor.dtype for key, tensor in weights.items() if tensor.dtype not in PLAIN}
    if strange:
        kinds = ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in strange.values()}))
        raise UserError(
            f"{directory} has weights of {kinds} ({listed(strange)}), which are not supported; take unquantised ones."
        )


def _refuse_problems(report: Mapping[str, Any], directory: Path) -> None:
    """Raise UserError if weights are missing, unexpected or of another shape."""
    problems = [
        f"{len(keys)} {fault}: {listed(keys)}"
        for fault, keys in (("missing", report["missing_keys"]), ("unexpected", report["unexpected_keys"]))
        if keys
    ]
    if report["mismatched_keys"]:
        shapes = [f"{key} {tuple(has)} instead of {tuple(wanted)}" for key, has, wanted in report["mismatched_keys"]]
        problems.append(f"{len(shapes)} of another shape: {listed(shapes)}")
    if problems:
        raise UserError(f"The weights in {directory} do not fit its config.json, {'; '.join(problems)}.")


@contextmanager
def errors_only() -> Iterator[None]:
    """Silence the library's own report; our error says the same in one sentence."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


# Memory


def check_memory(
    config: PretrainedConfig,
    weights: Mapping[str, Tensor],
    dtype: torch.dtype,
    device: torch.device,
    directory: Path,
    quantised: bool = False,
    parallel: Parallel | None = None,
) -> None:
    """Raise UserError if what this process loads of the model does not fit into the free memory.

    On the CPU, weights that have the right dtype stay mapped to their files and need no memory, unless ranks cut them.
    Decoder layers and head are cut into as many parts as there are ranks, and everything else is whole. Ranks on one
    CPU share its memory.

    Args:
        quantised: the decoder needs less than in `dtype`; only what config.json asks for beyond the files is counted.
    """
    sizes = {name: tensor.numel() for name, tensor in weights.items()}
    on_cpu = device.type == "cpu"
    cut = {name for name in weights if parallel is not None and name.startswith(CUT)}
    mapped = {name for name, tensor in weights.items() if on_cpu and tensor.dtype == dtype}
    beyond = max(0, parameter_count(config) - sum(sizes.values()))
    whole = beyond + (0 if quantised else sum(sizes[name] for name in sizes.keys() - mapped - cut))
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
                f"The model that {directory}/config.json describes needs about {needed / GIB:.1f} GiB of memory on "
                f"{place} in {name}, {free / GIB:.1f} GiB are free; use a smaller dtype, a quantization or another "
                "device, or correct the sizes in config.json."
            )


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on a device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available + psutil.swap_memory().free


def parameter_count(config: PretrainedConfig) -> int:
    """Parameters of the decoder, its embeddings and the tower; norms, biases and the projector are left out."""
    text, vision = config.get_text_config(), config.vision_config
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    queries, keys = text.num_attention_heads * head, text.num_key_value_heads * head
    layer = text.hidden_size * (2 * queries + 2 * keys + 3 * text.intermediate_size)
    tied = getattr(config, "tie_word_embeddings", False) or getattr(text, "tie_word_embeddings", False)
    words = (1 if tied else 2) * text.vocab_size * text.hidden_size
    depth = getattr(vision, "num_hidden_layers", None) or vision.depth
    width = getattr(vision, "embed_dim", None) or vision.hidden_size
    inner = getattr(vision, "intermediate_size", None) or int(width * vision.mlp_ratio)
    return words + text.num_hidden_layers * layer + depth * width * (4 * width + 2 * inner)


# Quantisation


def check_quantization(choice: str | None) -> None:
    """Raise UserError for an unknown choice or a missing package, before anything is read."""
    if choice is not None and choice not in CHOICES:
        raise unknown("quantization", choice, CHOICES)
    if choice is not None and find_spec("bitsandbytes") is None:
        raise UserError(
            f"quantization {choice!r} needs the package bitsandbytes, which is not installed; pip install bitsandbytes."
        )


def refuse_quantised(config: Mapping[str, Any], directory: Path) -> None:
    """Raise UserError for a config.json whose weights are quantised already."""
    for part in (config, config.get("text_config") or {}):
        if (stored := part.get("quantization_config")) is not None:
            method = stored.get("quant_method", "an unnamed method")
            raise UserError(f"{directory} is quantised with {method}, which is not supported; take it unquantised.")


def quantiser(choice: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """How transformers quantises the decoder.

    Args:
        choice: "8bit" or "4bit".
        dtype: in which a 4-bit layer computes.
    """
    if choice == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(KEPT))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=list(KEPT),
    )


@contextmanager
def _quantiser_errors(directory: Path | None) -> Iterator[None]:
    """Turn errors of a quantiser, such as a missing package or GPU, into a UserError. None: no quantiser is used."""
    try:
        yield
    except (ImportError, RuntimeError, ValueError) as error:
        if directory is None:
            raise
        raise UserError(f"Cannot load {directory} quantised here: {' '.join(str(error).split())}") from error
