"""Two one-thread processes train faster than one two-thread process on a small CPU; this is all they share."""

import os

import torch
import torch.distributed as dist

RANK = int(os.environ.get("RANK", "0"))
WORLD = int(os.environ.get("WORLD_SIZE", "1"))


def start() -> None:
    """Join the group that the launcher made; alone, use every core."""
    if WORLD > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // WORLD))
        dist.init_process_group("gloo")


def wait() -> None:
    """Until every rank is here."""
    if WORLD > 1:
        dist.barrier()


def stop() -> None:
    if WORLD > 1:
        dist.barrier()
        dist.destroy_process_group()


def average(flat: torch.Tensor) -> torch.Tensor:
    """Mean over ranks, in place."""
    if WORLD > 1:
        dist.all_reduce(flat)
        flat /= WORLD
    return flat
