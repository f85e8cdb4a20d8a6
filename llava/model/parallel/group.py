"""The process group of one replica: the ranks that together hold one model.

Official code read: deepspeedai/DeepSpeed@v0.19.8, deepspeed/comm/comm.py and deepspeed/comm/torch.py
Differs from it: no shared-memory kernel on the CPU, which DeepSpeed would compile for a minute when it is first used.
"""

import hashlib
import importlib
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from llava.errors import UserError


def join(rank: int, size: int, address: str, port: int, device: str) -> None:
    """Make this process one rank of a replica; it waits until all ranks have joined.

    Sets RANK, WORLD_SIZE, LOCAL_SIZE, MASTER_ADDR and MASTER_PORT, which DeepSpeed reads, and LOCAL_RANK unless the
    launcher has set it. On a GPU, LOCAL_RANK is the number of this rank's device.

    Args:
        rank: of this process, 0 <= rank < size.
        size: number of ranks.
        address, port: where rank 0 listens.
        device: "cpu" (gloo), or "cuda" or "cuda:1" (NCCL).

    Raises:
        UserError: DeepSpeed is missing or uses another kind of device, or the process is already in a group.
    """
    if not 0 <= rank < size:
        raise UserError(f"The rank should be between 0 and {size - 1} in a replica of {size} ranks, got {rank}.")
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
    with _without_shared_memory_kernel():
        deepspeed.init_distributed("nccl" if place.type == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False)


def import_deepspeed(kind: str):
    """The module deepspeed, which computes on this kind of device.

    Args:
        kind: "cpu" or "cuda".

    Raises:
        UserError: it is not installed, or was imported for another kind of device.
    """
    if kind == "cpu" and "deepspeed" not in sys.modules:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            f"Several ranks per model need DeepSpeed, which cannot be imported ({error}); pip install deepspeed."
        ) from error
    import logging

    from deepspeed.accelerator import get_accelerator

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    found = get_accelerator().device_name()
    if found != kind:
        raise UserError(
            f"The model is to run on {kind}, but DeepSpeed computes on {found} in this process; set DS_ACCELERATOR="
            f"{kind} before the start."
        )
    return deepspeed


@contextmanager
def _without_shared_memory_kernel() -> Iterator[None]:
    # `import deepspeed.comm.torch as ...` would give torch itself, which deepspeed.comm imports under that name.
    backend = importlib.import_module("deepspeed.comm.torch")
    build = backend.build_shm_op
    backend.build_shm_op = lambda: None
    try:
        yield
    finally:
        backend.build_shm_op = build


def join_alone(device: torch.device) -> None:
    """Join a group of one, unless this process has joined one already."""
    if not dist.is_initialized():
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        join(0, 1, "127.0.0.1", port, str(device))


def device_of_rank(device: torch.device) -> torch.device:
    """The device of this rank: the one chosen, and on CUDA without a number the one that the rank joined with."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


def leave() -> None:
    """Wait for the other ranks and leave the group; nothing happens in a process that has joined none."""
    if not dist.is_initialized():
        return
    dist.barrier()
    dist.destroy_process_group()
    if "deepspeed" in sys.modules:
        import deepspeed.comm.comm as comm
        from deepspeed.inference.engine import InferenceEngine

        # DeepSpeed would use the closed group again when the process joins another one.
        comm.cdb = None
        InferenceEngine.inference_mp_group = None


def size() -> int:
    """Ranks of the group that this process has joined; 1 where it has joined none."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(part: Tensor, dim: int) -> Tensor:
    """The parts of all ranks, concatenated along `dim` in the order of ranks; every rank receives the same tensor.

    Args:
        part: a tensor of the same shape and dtype on every rank.
    """
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(size())]
    dist.all_gather(parts, part.contiguous())
    return torch.cat(parts, dim)


def require_agreement(what: str, content: object, device: torch.device) -> None:
    """Raise UserError, on every rank, if the ranks of the group hold different contents.

    Args:
        what: the content belongs to, in words.
        content: with a `repr` that says everything.
        device: of the communication.
    """
    own = hashlib.blake2b(repr(content).encode(), digest_size=8).digest()
    found = gather(torch.frombuffer(bytearray(own), dtype=torch.uint8).to(device), 0).view(-1, 8)
    if (found != found[0]).any():
        raise UserError(
            f"The {size()} ranks that share the model kept different visual tokens or wrote different words for "
            f"{what}; run them on equal devices with equal software."
        )
