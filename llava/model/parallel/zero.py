"""ZeRO-Inference: the decoder's matrices are kept in pieces, and gathered module by module while they compute.

For a decoder that does not fit one device: its matrices lie in the memory of the host, in files, or in equal parts on
the devices of several ranks. Norms and biases are gathered once and stay. The head is part of it unless it shares its
weight with the embeddings, which stay whole like towers and projector. All ranks of the group answer the same
questions, so they run equally many forwards, which gathering over ranks requires.

Every weight is cast and partitioned layer by layer; a rank never holds more than its partition and one layer. Nothing
outside DeepSpeed's hooks reads a partitioned `weight`: probe and scores call the layer's own norm and projections.
Partitions on devices and on the host are tested; those in files ("nvme") follow DeepSpeed's documentation and have not
been run.

Paper: https://arxiv.org/abs/1910.02054 (ZeRO), https://arxiv.org/abs/2207.00032 (DeepSpeed Inference)
Official code read: deepspeedai/DeepSpeed@v0.19.8, deepspeed/runtime/zero/partition_parameters.py,
parameter_offload.py and partitioned_param_coordinator.py
Differs from it: decoder and head are partitioned, not the whole model; linear layers keep torch's own kernel.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from llava.errors import UserError
from llava.model.parallel import group
from llava.model.parallel.choice import Parallel
from llava.model.parallel.mapped import settle


class PartitionedPart(nn.Module):
    """The modules whose weights are partitioned: decoder layers, and the head unless it is tied."""

    def __init__(self, layers: nn.ModuleList, head: nn.Module | None):
        super().__init__()
        self.layers = layers
        self.head = head


def partition(model: PreTrainedModel, parallel: Parallel, dtype: torch.dtype, device: torch.device) -> None:
    """Partition the decoder's weights over the ranks of the group, in place; all ranks call it together.

    Args:
        model: with mapped weights, see `llava.model.parallel.mapped`.
        dtype, device: in and on which the modules compute.

    Raises:
        UserError: NVMe is asked for and DeepSpeed cannot read files asynchronously here, or it does not know the dtype
            on this device.
    """
    deepspeed = group.import_deepspeed(device.type)
    _require_dtype(dtype, device)
    if parallel.offload == "nvme":
        _require_async_io()
    llm, head = model.model.language_model, model.lm_head
    part = PartitionedPart(llm.layers, None if head.weight is llm.embed_tokens.weight else head)
    config = zero_config(part, parallel, dtype, device)
    swapper = None
    for module in (*part.layers, *filter(None, (part.head,))):
        # A copy, because DeepSpeed writes into what it partitions, and the weights are mapped files.
        for weight in module.parameters():
            weight.data = weight.data.to(device=device, dtype=dtype, copy=True)
            weight.requires_grad = False
        made = deepspeed.zero.Init(module=module, config_dict_or_path=config, dtype=dtype, param_swapper=swapper)
        swapper = made.param_swapper
    engine, *_ = deepspeed.initialize(model=part, config=config)
    engine.eval()
    # Kept alive: an engine that is collected removes its hooks. Not a submodule, whose weights would count twice.
    model.__dict__["zero_engine"] = engine
    _start_passes_at_layer_0(part, engine)
    settle(model, dtype, device)


def _start_passes_at_layer_0(part: PartitionedPart, engine: Any) -> None:
    """Tell DeepSpeed where a pass over the decoder begins: prefill, a decoding step, or layers run for a probe.

    DeepSpeed resets its record of the order of modules in the forward of the module that it was given, which is never
    called here: without this, nothing is fetched ahead. A pass that visits the modules in another order than the record
    (a score between two layers, a probe of the first layers) discards the record, and the next one is recorded anew,
    so decoding fetches ahead from its third step on, and the record never holds more than one pass.
    """
    coordinator = engine.optimizer.get_param_coordinator()
    part.layers[0].register_forward_pre_hook(lambda *_: coordinator.reset_step(), prepend=True)

    def released(module: nn.Module, _: int) -> set[int]:
        return {weight.ds_id for weight in module.parameters(recurse=False) if not weight.ds_persist}

    # DeepSpeed keeps a weight that its record uses again soon, and remembers that by module, also for later records: a
    # weight that one pass uses for a score and in its layer would stay whole for ever. Here a weight is released after
    # every use.
    coordinator._PartitionedParameterCoordinator__params_to_release = released


def zero_config(part: PartitionedPart, parallel: Parallel, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's configuration: stage 3, matrices partitioned, one layer fetched ahead."""
    weights = list(part.parameters())
    layer = sum(weight.numel() for weight in part.layers[0].parameters())
    largest = max(weight.numel() for weight in weights)
    zero: dict[str, Any] = {
        "stage": 3,
        "stage3_param_persistence_threshold": max((w.numel() for w in weights if w.dim() == 1), default=0),
        "stage3_prefetch_bucket_size": layer,
        "stage3_max_live_parameters": 2 * layer + largest,
        # A module is used once in a pass; the weights that a score has read are fetched again.
        "stage3_max_reuse_distance": 0,
        # It would replace torch.nn.functional.linear in the whole process, the tower's too.
        "memory_efficient_linear": False,
    }
    if parallel.offload != "none":
        zero["offload_param"] = {"device": parallel.offload, "pin_memory": device.type == "cuda"}
    if parallel.offload == "nvme":
        count = sum(
            weight.numel() > zero["stage3_param_persistence_threshold"] for weight in part.layers[0].parameters()
        )
        zero["offload_param"] |= {
            "nvme_path": str(parallel.folder),
            "buffer_size": -(-largest // group.size()) + 1,
            "buffer_count": 2 * count + 1,
        }
    return {
        "train_micro_batch_size_per_gpu": 1,  # required, without effect
        "zero_optimization": zero,
        "fp16": {"enabled": dtype == torch.float16},
        "bf16": {"enabled": dtype == torch.bfloat16},
    }


def _require_dtype(dtype: torch.dtype, device: torch.device) -> None:
    from deepspeed.accelerator import get_accelerator

    known = get_accelerator().supported_dtypes()
    if dtype not in known:
        names = ", ".join(str(one).removeprefix("torch.") for one in known)
        raise UserError(
            f"DeepSpeed partitions weights on {device} in {names}, got {str(dtype).removeprefix('torch.')}; choose "
            "another --dtype."
        )


def _require_async_io() -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise UserError(
            "zero nvme=FOLDER needs DeepSpeed's async_io, which cannot be built here; install libaio-dev, or choose "
            "zero cpu."
        )
