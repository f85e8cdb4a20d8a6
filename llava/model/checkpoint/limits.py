"""Checks of a whole configuration: its parts against one another, against the weights and against the free memory."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

import psutil
import torch
from torch import Tensor
from transformers import PretrainedConfig

from llava.errors import UserError
from llava.model.checkpoint.identify import QWEN, Family
from llava.model.parallel.choice import Parallel

LAYER = re.compile(r"^model\.language_model\.layers\.(\d+)\.")
CUT = ("model.language_model.layers.", "lm_head.")  # what several ranks share
GIB = 2**30
PACKED = 8  # 4-bit values in one element of a quantised file, at most


def check_feature_layer(config: PretrainedConfig, family: Family, directory: Path) -> None:
    """Raise UserError if the tower has no such layer as vision_feature_layer (mm_vision_select_layer) names.

    hidden_states of a tower with n blocks has n + 1 entries, so -n-1 to n are possible.
    """
    if family in QWEN:
        return
    layer, depth = config.vision_feature_layer, config.vision_config.num_hidden_layers
    if not -depth - 1 <= layer <= depth:
        raise UserError(
            f"{directory}/config.json takes image features from layer {layer} of a vision tower with {depth} blocks; "
            f"expected {-depth - 1} to {depth}, LLaVA uses -2."
        )


def check_depth(config: PretrainedConfig, weights: Mapping[str, Tensor], directory: Path) -> None:
    """Raise UserError if config.json asks for more than twice the decoder layers that the weights have.

    Smaller differences are reported weight by weight; building thousands of layers for that takes minutes.
    """
    found = {int(match[1]) for key in weights if (match := LAYER.match(key))}
    asked = config.get_text_config().num_hidden_layers
    if asked > 2 * len(found) + 8:
        raise UserError(
            f"{directory}/config.json has num_hidden_layers {asked}, but the weights hold {len(found)} decoder layers; "
            "take both from one checkpoint."
        )


def check_memory(
    config: PretrainedConfig,
    weights: Mapping[str, Tensor],
    dtype: torch.dtype,
    device: torch.device,
    quantised: bool,
    directory: Path,
) -> None:
    """Raise UserError if the model does not fit into the free memory of the device.

    On the CPU, weights that have the right dtype stay mapped to their files and need no memory.

    Args:
        quantised: the decoder needs less than in `dtype`; only what config.json asks for beyond the files is counted.
    """
    size = dtype.itemsize
    held = sum(tensor.numel() for tensor in weights.values())
    missing = max(0, parameters(config) - held) * size
    if quantised:
        needed = max(0, parameters(config) - PACKED * held) * size
    elif device.type == "cuda":
        needed = missing + held * size
    else:
        needed = missing + sum(tensor.numel() for tensor in weights.values() if tensor.dtype != dtype) * size
    _refuse_above_free(needed, dtype, device, directory)


def check_part(
    config: PretrainedConfig,
    weights: Mapping[str, Tensor],
    dtype: torch.dtype,
    device: torch.device,
    parallel: Parallel,
    directory: Path,
) -> None:
    """Raise UserError if one rank's part of the model does not fit into the free memory.

    Decoder layers and head are cut into as many parts as there are ranks, and everything else is whole. Ranks on one
    CPU share its memory.
    """
    cut = sum(tensor.numel() for name, tensor in weights.items() if name.startswith(CUT))
    moved = [tensor for name, tensor in weights.items() if not name.startswith(CUT)]
    if device.type == "cpu":
        moved = [tensor for tensor in moved if tensor.dtype != dtype]
    missing = max(0, parameters(config) - sum(tensor.numel() for tensor in weights.values()))
    whole = (missing + sum(tensor.numel() for tensor in moved)) * dtype.itemsize
    part = -(-cut // parallel.ranks) * dtype.itemsize
    here = int(os.environ.get("LOCAL_SIZE", "1"))
    on_device, on_host = whole, 0
    if parallel.offload in (None, "none"):
        on_device += part
    elif parallel.offload == "cpu":
        on_host = part
    if device.type == "cpu":
        on_device, on_host = (on_device + on_host) * here, 0
    _refuse_above_free(on_device, dtype, device, directory)
    _refuse_above_free(on_host * here, dtype, torch.device("cpu"), directory)


def _refuse_above_free(needed: int, dtype: torch.dtype, device: torch.device, directory: Path) -> None:
    free = free_memory(device)
    if needed > free:
        name = str(dtype).removeprefix("torch.")
        raise UserError(
            f"The model that {directory}/config.json describes needs about {needed / GIB:.1f} GiB of memory on "
            f"{device} in {name}, {free / GIB:.1f} GiB are free; use a smaller dtype, a quantization or another "
            "device, or correct the sizes in config.json."
        )


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on a device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available + psutil.swap_memory().free


def parameters(config: PretrainedConfig) -> int:
    """Parameters of the decoder, its embeddings and the tower; norms, biases and the projector are left out."""
    text, vision = config.get_text_config(), config.vision_config
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    queries, keys = text.num_attention_heads * head, text.num_key_value_heads * head
    layer = text.hidden_size * (2 * queries + 2 * keys + 3 * text.intermediate_size)
    tied = getattr(config, "tie_word_embeddings", False) or getattr(text, "tie_word_embeddings", False)
    words = (1 if tied else 2) * text.vocab_size * text.hidden_size
    return words + text.num_hidden_layers * layer + _tower_parameters(vision)


def _tower_parameters(vision: PretrainedConfig) -> int:
    depth = getattr(vision, "num_hidden_layers", None) or vision.depth
    width = getattr(vision, "embed_dim", None) or vision.hidden_size
    inner = getattr(vision, "intermediate_size", None) or int(width * vision.mlp_ratio)
    return depth * width * (4 * width + 2 * inner)
