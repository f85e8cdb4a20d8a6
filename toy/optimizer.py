"""The optimizer of the toy trainings, and what several training processes share.

Muon takes the hidden matrices, AdamW the rest, with float32 master weights for a bfloat16 model. bfloat16 weights, not
autocast: on a CPU with bfloat16 instructions this trains about four times faster. Two one-thread processes train faster
than one two-thread process on a small CPU; the mean of their gradients, and waiting for each other, is all they share.
"""

import os
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

RANK = int(os.environ.get("RANK", "0"))
WORLD = int(os.environ.get("WORLD_SIZE", "1"))


def join_ranks() -> None:
    """Join the group that the launcher made; alone, use every core."""
    if WORLD > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // WORLD))
        dist.init_process_group("gloo")


def wait_for_ranks() -> None:
    """Until every rank is here."""
    if WORLD > 1:
        dist.barrier()


def leave_ranks() -> None:
    if WORLD > 1:
        dist.barrier()
        dist.destroy_process_group()


def average_over_ranks(flat: torch.Tensor) -> torch.Tensor:
    """Mean over ranks, in place."""
    if WORLD > 1:
        dist.all_reduce(flat)
        flat /= WORLD
    return flat


class MasterOptimizer:
    """Averages gradients over ranks, steps float32 masters, copies them into the working model.

    Args:
        model: its parameters are converted to `dtype` in place.
        hidden: tells from a parameter's name whether Muon takes it (2-D weights of blocks).
        clip: global gradient norm.
        dtype: bfloat16 where the CPU multiplies it natively, float32 where it does not.
    """

    def __init__(
        self,
        model: nn.Module,
        hidden: Callable[[str], bool],
        lr: float,
        adam_lr: float,
        clip: float,
        dtype: torch.dtype = torch.bfloat16,
    ):
        named = dict(model.named_parameters())
        self.masters = {name: p.detach().clone().float() for name, p in named.items()}
        model.to(dtype)
        self.working = dict(model.named_parameters())
        self.clip = clip
        muon = [self.masters[n] for n, p in self.masters.items() if p.dim() == 2 and hidden(n)]
        adam = [self.masters[n] for n, p in self.masters.items() if not (p.dim() == 2 and hidden(n))]
        self.optimizers = (
            torch.optim.Muon(muon, lr=lr, weight_decay=0.02, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(adam, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
        )
        self.base_lr = (lr, adam_lr)

    @torch.no_grad()
    def step(self, scale: float) -> float:
        """One update at `scale` times the base learning rates; returns the gradient norm."""
        grads = [
            p.grad.float() if p.grad is not None else torch.zeros_like(self.masters[n]) for n, p in self.working.items()
        ]
        flat = average_over_ranks(torch.cat([grad.flatten() for grad in grads]))
        norm = flat.norm().item()
        flat *= min(1.0, self.clip / (norm + 1e-6))
        for part, name in zip(flat.split([g.numel() for g in grads]), self.working, strict=True):
            self.masters[name].grad = part.view_as(self.masters[name])
            self.working[name].grad = None
        for optimizer, lr in zip(self.optimizers, self.base_lr, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * scale
            optimizer.step()
        self.publish()
        return norm

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the masters into the working model."""
        for name, p in self.working.items():
            p.copy_(self.masters[name])

    def state_dict(self) -> dict:
        return {"masters": self.masters, "optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state: dict) -> None:
        for name, value in state["masters"].items():
            self.masters[name].copy_(value)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.publish()


def schedule(step: int, steps: int, warmup: int = 60, decay: float = 0.6) -> float:
    """Linear warm-up, flat, linear decay to zero over the last `decay` of the run."""
    return min(1.0, (step + 1) / warmup) * min(1.0, (1 - step / steps) / decay)
