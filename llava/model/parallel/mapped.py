"""A HF model whose weights are still the mapped files: nothing is copied or cast until a rank takes its part.

transformers' own loading casts every weight of the model to the requested dtype, so each rank would hold a whole copy
before the first weight is cut. Here a weight keeps the dtype of its file; what a rank keeps is cast afterwards.
"""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel


def mapped_model(
    build: type[PreTrainedModel],
    extra: tuple[Any, ...],
    config: PretrainedConfig,
    weights: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Build a model around mapped weights, without copying them.

    Args:
        build: the HF class; `extra` are its arguments after the configuration.
        weights: by their names in the model, in any floating dtype.
        dtype: that the weights will have in the end; buffers and the configuration have it from the start.

    Returns:
        The model, and the names of missing, unexpected and mismatched weights as transformers reports them.
    """
    with init_empty_weights(include_buffers=False):
        config.dtype = dtype
        for part in config.sub_configs:
            getattr(config, part).dtype = dtype
        config._attn_implementation = "sdpa"
        config.name_or_path = None  # as in a model loaded from a state dict
        model = _build(build, extra, config, dtype)
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    mismatched = [
        (name, tuple(tensor.shape), tuple(wanted[name]))
        for name, tensor in weights.items()
        if name in wanted and tensor.shape != wanted[name]
    ]
    wrong = {name for name, _, _ in mismatched}
    fitting = {name: tensor for name, tensor in weights.items() if name in wanted and name not in wrong}
    model.load_state_dict(fitting, strict=False, assign=True)
    missing = set(wanted) - set(weights)
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    unexpected = set(weights) - set(wanted)
    return model, {"missing_keys": missing, "unexpected_keys": unexpected, "mismatched_keys": mismatched}


def _build(build, extra: tuple[Any, ...], config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return build(config, *extra)
    finally:
        torch.set_default_dtype(before)


def settle(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Cast the weights that this rank has kept and move them to the device, one at a time; buffers keep their dtype.

    Weights that DeepSpeed has partitioned are left alone.
    """
    for weight in model.parameters():
        if not hasattr(weight, "ds_id"):
            weight.data = weight.data.to(device=device, dtype=dtype)
            weight.requires_grad = False
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
