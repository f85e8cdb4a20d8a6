"""One model over several ranks: the choice, the ranks' process group, tensor parallelism and ZeRO-Inference.

The HF model is built around the mapped files (`mapped_model`). Then every rank takes its part of the decoder (`split`
or `partition`) and casts only that. The loading of transformers would cast every weight to the requested dtype, so that
each rank would hold a whole copy before the first weight is cut. Towers, projector and embeddings are whole on every
rank, so that all ranks compute the same scores before the decoder.

Tensor parallelism: every rank of a replica holds a part of each decoder layer, cut by DeepSpeed.
    The projections of attention (by heads) and MLP are split, and the head (by its input, as DeepSpeed does it). The
    head of a 34B model is 0.9 GB in bfloat16 and is read for every token; the sum of its parts is one row of logits per
    sample. If the key/value heads cannot be dealt equally, the first ranks have one more, with its queries.

    Each layer communicates two sums of the hidden states over ranks, [B, L, D] each, and a pass ends with one sum of
    the logits [B, 1, V]. If a method reads the decoder's attention, the ranks gather queries and keys instead of the
    attention. Keys are L x Hkv x d and queries T x H x d numbers in the model's dtype; the attention of T rows is
    T x H x L numbers in float32. The keys are fewer from T = Hkv x d / 2 H rows on (64 for Llama's 32 heads of 128, 9
    for grouped-query heads with four key heads per 28). Every rank then ranks by the float32 numbers that one process
    would compute, in the same order.

ZeRO-Inference: the decoder's matrices are kept in pieces, and gathered module by module while they compute.
    This is for a decoder that does not fit on one device: its matrices are in the memory of the host, or in equal parts
    on the devices of several ranks. Norms and biases are gathered once and stay. The head is partitioned, too, unless
    it shares its weight with the embeddings. All ranks of the group answer the same questions, because gathering
    requires that they run the same number of forwards.

    Weights are cast and partitioned layer by layer, so that a rank never holds more than its partition and one layer.
    Only DeepSpeed's hooks read a partitioned `weight`: probe and scores call the layer's own norm and projections.

Paper: https://arxiv.org/abs/1909.08053 (Megatron-LM), https://arxiv.org/abs/1910.02054 (ZeRO),
https://arxiv.org/abs/2207.00032 (DeepSpeed Inference)
Official code read: deepspeedai/DeepSpeed@v0.19.8, deepspeed/comm/comm.py and torch.py, deepspeed/inference/engine.py,
deepspeed/module_inject, deepspeed/runtime/zero/partition_parameters.py, parameter_offload.py and
partitioned_param_coordinator.py
Differs from it: there is no shared-memory kernel on the CPU, which DeepSpeed would compile for a minute at first use.
Tensor parallelism: the policy names the decoder's layers, because DeepSpeed's automatic policy also cuts CLIP's heads.
Weights keep the dtype of the file until they are cut, because DeepSpeed casts the whole module first. ZeRO: decoder and
head are partitioned, not the whole model; linear layers keep torch's own kernel.
"""

import hashlib
import importlib
import logging
import os
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Self

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from llava.errors import UserError, optional_imports
from llava.transformers_names import set_kernel

OFFLOADS = ("none", "cpu")
# Projections cut by their input, after which the ranks add their parts; all others are cut by their output.
SUMMED = ("self_attn.o_proj", "mlp.down_proj")

# Ranks wait for each other as long as it takes, for example while the first one asks a judge; the usual limit is ten
# minutes. The process that started the ranks finds one that hangs (`--timeout`); the group does not.
PATIENCE = timedelta(days=30)

# The choice


@dataclass(frozen=True)
class Parallel:
    """A checked choice.

    Attributes:
        tensor: number of ranks that each hold a part of every decoder layer; 1 splits nothing.
        offload: where ZeRO-Inference keeps the partitions, "none" (on the device) or "cpu"; None without it.
    """

    tensor: int = 1
    offload: str | None = None

    @property
    def ranks(self) -> int:
        """Number of parts into which the decoder's matrices are cut."""
        return self.tensor if self.offload is None else group_size()


def parallel_of(tensor_parallel: int, zero: str | None, quantization: str | None) -> Parallel | None:
    """Check the choice before anything is read; None for a model that one process holds whole.

    Args:
        zero: None, "none" or "cpu".

    Raises:
        UserError: the choice contradicts itself or the group that this process has joined.
    """
    if tensor_parallel < 1:
        raise UserError(f"tensor_parallel should be at least 1, got {tensor_parallel}.")
    if tensor_parallel == 1 and zero is None:
        return None
    chosen = f"tensor_parallel {tensor_parallel}" if zero is None else f"zero {zero!r}"
    if tensor_parallel > 1 and zero is not None:
        raise UserError(
            f"tensor_parallel {tensor_parallel} and {chosen} both spread the decoder's weights; choose one."
        )
    if quantization is not None:
        raise UserError(
            f"Quantization {quantization!r} cannot be combined with {chosen}, because a quantised weight cannot be "
            "cut; leave one of them out."
        )
    if zero is not None and zero not in OFFLOADS:
        raise UserError(f"zero should be {' or '.join(OFFLOADS)}, got {zero!r}.")
    if zero is None and group_size() != tensor_parallel:
        raise UserError(
            f"{chosen} needs a replica of {tensor_parallel} ranks, but this process is in a group of {group_size()}; "
            "start one process per part."
        )
    return Parallel(tensor_parallel, zero)


def check_heads(config: PretrainedConfig, tensor_parallel: int, name: str) -> None:
    """Raise UserError if the decoder has fewer key/value heads than there are ranks.

    Args:
        config: configuration of the HF model.
        name: name of the checkpoint.
    """
    heads = config.get_text_config().num_key_value_heads
    if heads < tensor_parallel:
        raise UserError(
            f"The decoder of {name} has {heads} key/value heads, too few for {tensor_parallel} ranks; choose a "
            f"tensor_parallel of at most {heads}."
        )


# The process group


def join(rank: int, size: int, address: str, port: int, device: str) -> None:
    """Make this process one rank of a replica; it waits until all ranks have joined.

    Sets RANK, WORLD_SIZE, LOCAL_SIZE, MASTER_ADDR and MASTER_PORT, which DeepSpeed reads, and LOCAL_RANK unless the
    launcher has set it. On a GPU, LOCAL_RANK is the number of this rank's device.

    Args:
        rank: rank of this process, 0 <= rank < size.
        size: number of ranks.
        address, port: where rank 0 listens.
        device: "cpu" (gloo), or "cuda" or "cuda:1" (NCCL).

    Raises:
        UserError: DeepSpeed is missing or uses another kind of device, or the process is already in a group.
    """
    if dist.is_initialized():
        raise UserError(
            f"This process is already rank {dist.get_rank()} of a group of {dist.get_world_size()}; leave it first."
        )
    place = torch.device(device)
    local = str(place.index) if place.index is not None else os.environ.get("LOCAL_RANK", str(rank))
    named = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_SIZE": size, "MASTER_ADDR": address, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in named.items()}, LOCAL_RANK=local)
    deepspeed = import_deepspeed(place.type)
    if place.type == "cuda":
        torch.cuda.set_device(int(local))
    # `import deepspeed.comm.torch as ...` would give torch itself, which deepspeed.comm imports under that name.
    backend: Any = importlib.import_module("deepspeed.comm.torch")
    build_kernel, backend.build_shm_op = backend.build_shm_op, lambda: None  # no shared-memory kernel
    try:
        deepspeed.init_distributed(
            "nccl" if place.type == "cuda" else "gloo", auto_mpi_discovery=False, timeout=PATIENCE, verbose=False
        )
    finally:
        backend.build_shm_op = build_kernel


def import_deepspeed(kind: str) -> Any:
    """Import deepspeed for computing on this kind of device.

    Args:
        kind: "cpu" or "cuda".

    Raises:
        UserError: it is not installed, or was imported for another kind of device.
    """
    if kind == "cpu" and "deepspeed" not in sys.modules:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with optional_imports("deepspeed"):
        import deepspeed
    from deepspeed.accelerator import get_accelerator

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    computes_on = get_accelerator().device_name()
    if computes_on != kind:
        raise UserError(
            f"The model is to run on {kind}, but DeepSpeed computes on {computes_on} in this process; set "
            f"DS_ACCELERATOR={kind} before the start."
        )
    return deepspeed


def join_alone(device: torch.device) -> None:
    """Join a group of one rank, unless this process is already in a group."""
    if not dist.is_initialized():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        join(0, 1, "127.0.0.1", port, str(device))


def device_of_rank(device: torch.device) -> torch.device:
    """The device of this rank: the chosen one, or for CUDA without a number the one that the rank joined with."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


def leave() -> None:
    """Wait for the other ranks and leave the group; does nothing in a process that is in no group."""
    if not dist.is_initialized():
        return
    dist.barrier()
    dist.destroy_process_group()
    if "deepspeed" in sys.modules:
        import deepspeed.comm.comm as comm
        from deepspeed.inference.engine import InferenceEngine

        # Otherwise DeepSpeed would use the closed group again when the process joins another one.
        comm.cdb = None
        InferenceEngine.inference_mp_group = None


def group_size() -> int:
    """Number of ranks of the group that this process has joined; 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(part: Tensor, dim: int, shares: Sequence[int] | None = None) -> Tensor:
    """The parts of all ranks, concatenated along `dim` in the order of ranks; every rank receives the same tensor.

    Args:
        part: this rank's part. All have the same dtype, and the same shape except along `dim`.
        shares: the size of `dim` on each rank, counted in one unit and at most one unit apart; None if all are equal.
    """
    shares = shares or (1,) * group_size()
    unit = part.shape[dim] // shares[dist.get_rank()]
    missing = max(shares) * unit - part.shape[dim]
    if missing:  # only tensors of one shape can be exchanged; the appended unit is dropped again
        part = torch.cat([part, part.narrow(dim, 0, missing)], dim)
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in shares]
    dist.all_gather(parts, part.contiguous())
    return torch.cat([one.narrow(dim, 0, share * unit) for one, share in zip(parts, shares, strict=True)], dim)


def require_agreement(what: str, content: object, device: torch.device) -> None:
    """Raise UserError, on every rank, if the ranks of the group hold different contents.

    Args:
        what: what the content belongs to, in words.
        content: an object whose `repr` says everything.
        device: device of the communication.
    """
    own = hashlib.blake2b(repr(content).encode(), digest_size=8).digest()
    digests = gather(torch.frombuffer(bytearray(own), dtype=torch.uint8).to(device), 0).view(-1, 8)
    if (digests != digests[0]).any():
        raise UserError(
            f"The {group_size()} ranks that share the model kept different visual tokens or wrote different words for "
            f"{what}; run them on equal devices with equal software."
        )


# A model around mapped files


def mapped_model(
    build: type[PreTrainedModel],
    extra: tuple[Any, ...],
    config: PretrainedConfig,
    weights: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> PreTrainedModel:
    """Build a model around mapped weights, without copying them.

    Args:
        build: the HF class; `extra` are its arguments after the configuration.
        weights: exactly the model's weights, by their names in it, in any floating dtype.
        dtype: final dtype of the weights; buffers and the configuration have it from the start.
    """
    with init_empty_weights(include_buffers=False):
        config.dtype = dtype
        for part in config.sub_configs:
            getattr(config, part).dtype = dtype
        set_kernel(config, "sdpa")
        config.name_or_path = None  # as in a model loaded from a state dict
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = build(config, *extra)
        finally:
            torch.set_default_dtype(before)
    found = model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights(missing_keys=set(found.missing_keys), recompute_mapping=False)
    return model


def settle(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Cast the weights that this rank holds and move them to the device, one at a time; buffers keep their dtype.

    Weights that DeepSpeed has partitioned stay as they are.
    """
    for weight in model.parameters():
        if not hasattr(weight, "ds_id"):
            weight.data = weight.data.to(device=device, dtype=dtype)
            weight.requires_grad = False
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


class DecoderPart(nn.Module):
    """The modules that DeepSpeed cuts or partitions: decoder layers and head, except a tied head.

    DeepSpeed casts a module before it cuts it. Casting mapped weights would copy the whole model, so the three
    functions that it calls do nothing here.
    """

    def __init__(self, layers: nn.ModuleList, head: nn.Module | None, config: PretrainedConfig):
        super().__init__()
        self.layers = layers
        self.lm_head = head
        self.config = config

    def keep(self) -> Self:
        return self

    half = bfloat16 = float = keep


# Tensor parallelism


def split(model: PreTrainedModel, ranks: int, dtype: torch.dtype, device: torch.device) -> None:
    """Leave this rank's part of the decoder in the model, in place; all ranks of the replica call it together.

    Args:
        model: a model of `mapped_model`.
        ranks: the size of the group that this process has joined.
        dtype, device: dtype and device of the weights afterwards.
    """
    deepspeed = import_deepspeed(device.type)
    llm: Any = model.model.language_model
    part = DecoderPart(llm.layers, model.lm_head, model.config.get_text_config())
    whole = {
        name: (linear.in_features, linear.out_features)
        for name, linear in part.named_modules()
        if isinstance(linear, nn.Linear)
    }
    deepspeed.init_inference(
        part,
        tensor_parallel={"tp_size": ranks},
        dtype=torch.float32,  # DecoderPart keeps what it has
        replace_with_kernel_inject=False,
        injection_policy={type(llm.layers[0]): SUMMED},
    )
    model.lm_head = part.lm_head
    for name, sizes in whole.items():
        linear: Any = part.get_submodule(name)
        # Sizes of the whole model, for which operations are counted.
        linear.in_features, linear.out_features = sizes
    heads = llm.config.num_key_value_heads
    shares = [heads // ranks + (rank < heads % ranks) for rank in range(ranks)]
    for layer in llm.layers:
        layer.self_attn.gather = partial(gather, shares=shares)
    llm.ranks = ranks
    settle(model, dtype, device)


# ZeRO-Inference


def partition(model: PreTrainedModel, parallel: Parallel, dtype: torch.dtype, device: torch.device) -> None:
    """Partition the decoder's weights over the ranks of the group, in place; all ranks call it together.

    Args:
        model: a model of `mapped_model`.
        dtype, device: dtype and device of the computation.

    Raises:
        UserError: DeepSpeed does not know the dtype on this device.
    """
    deepspeed = import_deepspeed(device.type)
    known = deepspeed.accelerator.get_accelerator().supported_dtypes()
    if dtype not in known:
        names = ", ".join(str(one).removeprefix("torch.") for one in known)
        raise UserError(
            f"DeepSpeed partitions weights on {device} in {names}, got {str(dtype).removeprefix('torch.')}; choose "
            "another --dtype."
        )
    llm, head = model.model.language_model, model.lm_head
    tied = head.weight is llm.embed_tokens.weight
    part = DecoderPart(llm.layers, None if tied else head, model.config.get_text_config())
    config = zero_config(part, parallel, dtype, device)
    for module in (*part.layers, *filter(None, (part.lm_head,))):
        # A copy, because DeepSpeed writes into what it partitions, and the weights are mapped files.
        for weight in module.parameters():
            weight.data = weight.data.to(device=device, dtype=dtype, copy=True)
            weight.requires_grad = False
        deepspeed.zero.Init(module=module, config_dict_or_path=config, dtype=dtype)
    engine, *_ = deepspeed.initialize(model=part, config=config)
    engine.eval()
    # Kept alive, because an engine that is collected removes its hooks; not as a submodule, whose weights would count
    # twice.
    model.__dict__["zero_engine"] = engine
    _start_passes_at_layer_0(part, engine)
    settle(model, dtype, device)


def _start_passes_at_layer_0(part: DecoderPart, engine: Any) -> None:
    """Tell DeepSpeed where a pass over the decoder begins: prefill, a decoding step, or layers run for a probe.

    DeepSpeed records the order of modules to fetch them ahead, and resets the record in the forward of the module that
    it was given. That forward is never called here, so nothing would be fetched ahead. A pass that visits the modules
    in another order (a score between two layers, a probe of the first layers) discards the record, and the next pass is
    recorded anew. Decoding therefore fetches ahead from its third step on, and a record never holds more than one pass.
    """
    coordinator = engine.optimizer.get_param_coordinator()
    part.layers[0].register_forward_pre_hook(lambda *_: coordinator.reset_step(), prepend=True)

    def released(module: nn.Module, _: int) -> set[int]:
        weights: Iterator[Any] = module.parameters(recurse=False)
        return {weight.ds_id for weight in weights if not weight.ds_persist}

    # DeepSpeed keeps a weight that its record uses again soon, and remembers that by module for later records, too. A
    # weight that one pass uses for a score and again in its layer would then stay whole for ever. Here a weight is
    # released after every use.
    coordinator._PartitionedParameterCoordinator__params_to_release = released


def zero_config(part: DecoderPart, parallel: Parallel, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's configuration: stage 3, matrices partitioned, one layer fetched ahead."""
    weights = list(part.parameters())
    layer = sum(weight.numel() for weight in part.layers[0].parameters())
    largest = max(weight.numel() for weight in weights)
    zero: dict[str, Any] = {
        "stage": 3,
        "stage3_param_persistence_threshold": max((w.numel() for w in weights if w.dim() == 1), default=0),
        "stage3_prefetch_bucket_size": layer,
        "stage3_max_live_parameters": 2 * layer + largest,
        # A module is used once in a pass; weights that a score has read are fetched again.
        "stage3_max_reuse_distance": 0,
        # True would replace torch.nn.functional.linear in the whole process, also for the tower.
        "memory_efficient_linear": False,
    }
    if parallel.offload != "none":
        zero["offload_param"] = {"device": parallel.offload, "pin_memory": device.type == "cuda"}
    return {
        "train_micro_batch_size_per_gpu": 1,  # required, without effect
        "zero_optimization": zero,
        "fp16": {"enabled": dtype == torch.float16},
        "bf16": {"enabled": dtype == torch.bfloat16},
    }
