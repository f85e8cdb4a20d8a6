"""Train one stage of a toy model: step-based, seeded, resumable, with a bar, a log and W&B.

    python -m lab.toy.train next --folder runs/next

FOLDER holds corpora, features, checkpoints and logs; the trained weights end up in FOLDER/STAGE.pt. The same command
continues an interrupted run. `--quick` takes a few steps on a few scenes, to see that everything works.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from eval.command import exit_on_user_error
from eval.tracking import Tracker, start
from lab.toy.long_stages import Next, Video
from lab.toy.stages import RECIPES, Boxes, Instruct, Language, Settings, Stage, Vision, fast_dtype
from llava.errors import UserError

LOG_EVERY = 25  # steps
STAGES: dict[str, type[Stage]] = {stage.name: stage for stage in (Vision, Language, Next, Video, Instruct, Boxes)}


class MasterOptimizer:
    """Steps float32 masters and copies them into the working model.

    Muon takes the hidden matrices (2-D weights of blocks), AdamW the rest. bfloat16 weights, not autocast: on a CPU
    with bfloat16 instructions this trains about four times faster. On others, torch's Muon computes in float32, too.

    Args:
        model: its parameters are converted in place to `fast_dtype` of the settings' dtype.
    """

    def __init__(self, model: nn.Module, settings: Settings):
        self.masters = {name: p.detach().clone().float() for name, p in model.named_parameters()}
        model.to(fast_dtype(settings.dtype))
        self.working = dict(model.named_parameters())
        self.clip, lr, adam_lr = settings.clip, settings.lr, settings.adam_lr
        muon = {name: p for name, p in self.masters.items() if p.dim() == 2 and ".layers." in name}
        adam = [p for name, p in self.masters.items() if name not in muon]
        self.optimizers = {
            torch.optim.Muon(
                list(muon.values()), lr, weight_decay=0.02, momentum=0.95, adjust_lr_fn="match_rms_adamw"
            ): lr,
            torch.optim.AdamW(adam, adam_lr, betas=(0.9, 0.98), weight_decay=0.0): adam_lr,
        }

    @torch.no_grad()
    def step(self, scale: float) -> float:
        """One update at `scale` times the base learning rates; returns the gradient norm."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.working.values()]
        flat = torch.cat([grad.float().flatten() for grad in grads])
        norm = flat.norm().item()
        flat *= min(1.0, self.clip / (norm + 1e-6))
        for part, name in zip(flat.split([g.numel() for g in grads]), self.working, strict=True):
            self.masters[name].grad = part.view_as(self.masters[name])
            self.working[name].grad = None
        emulated = fast_dtype("bfloat16") == torch.float32
        # torch's Muon turns each gradient to bfloat16 before it multiplies.
        in_float32 = patch.object(Tensor, "bfloat16", Tensor.clone) if emulated else nullcontext()
        for optimizer, lr in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = lr * scale
            with in_float32:
                optimizer.step()
        self.publish()
        return norm

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the masters into the working model."""
        for name, p in self.working.items():
            p.copy_(self.masters[name])

    def save(self, checkpoint: Path, **more: Any) -> None:
        """Write a checkpoint, with what else belongs to it, in one step."""
        state = {"masters": self.masters, "optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}
        partial = checkpoint.with_suffix(".partial")
        torch.save({"optimizer": state, **more}, partial)
        partial.replace(checkpoint)

    def resume(self, checkpoint: Path, settings: Settings) -> tuple[int, float]:
        """Load a checkpoint of the same settings; returns its number of steps and the seconds they took."""
        saved = torch.load(checkpoint, weights_only=True)
        wanted = dataclasses.asdict(settings)
        if saved["settings"] != wanted:
            raise UserError(
                f"{checkpoint} is of a run with other settings ({saved['settings']}) than this one ({wanted}); "
                "use the same settings, or delete it to start anew."
            )
        for name, value in saved["optimizer"]["masters"].items():
            self.masters[name].copy_(value)
        for optimizer, state in zip(self.optimizers, saved["optimizer"]["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.publish()
        return saved["step"], saved["seconds"]


def schedule(step: int, steps: int, warmup: int = 60, decay: float = 0.6) -> float:
    """Linear warm-up, flat, linear decay to zero over the last `decay` of the run."""
    return min(1.0, (step + 1) / warmup) * min(1.0, (1 - step / steps) / decay)


def train(stage: Stage, folder: Path, tracker: Tracker | None = None) -> MasterOptimizer:
    """Run all steps of a stage, continuing after the last checkpoint in `folder`; returns the optimizer.

    The batch of a step is a function of its number alone, so a resumed run sees the same data as an uninterrupted one.
    """
    settings = stage.settings
    optimizer = MasterOptimizer(stage.trainee, settings)
    checkpoint = folder / f"{stage.name}.checkpoint.pt"
    first, seconds = optimizer.resume(checkpoint, settings) if checkpoint.exists() else (0, 0.0)
    averages: dict[str, float] = {}
    bar = tqdm(range(first, settings.steps), desc=stage.name, initial=first, total=settings.steps)
    started = time.time() - seconds
    for step in bar:
        rng = np.random.default_rng([0, 0, step])
        torch.manual_seed(int(rng.integers(2**31)))
        loss, numbers = stage.loss(step, rng)
        loss.backward()
        norm = optimizer.step(schedule(step, settings.steps, settings.warmup, settings.decay))
        for name, value in {"loss": loss.item(), "gradient_norm": norm, **numbers}.items():
            if value == value:
                averages[name] = 0.95 * averages.get(name, value) + 0.05 * value
        done, seconds = step + 1, time.time() - started
        due = lambda every: done % every == 0 or done == settings.steps  # noqa: E731, B023
        if due(LOG_EVERY):
            line = {"step": done, "seconds": round(seconds, 1)}
            line |= {name: round(value, 4) for name, value in averages.items()}
            if due(settings.evaluate_every):
                line |= {f"val/{name}": round(value, 4) for name, value in stage.evaluate(settings.watched).items()}
            with open(folder / f"{stage.name}.log.jsonl", "a") as log:
                log.write(json.dumps(line) + "\n")
            if tracker:
                tracker.log(line, step=done)
            bar.set_postfix(loss=f"{averages['loss']:.3f}")
        if due(settings.save_every):
            optimizer.save(checkpoint, step=done, seconds=seconds, settings=dataclasses.asdict(settings))
    return optimizer


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--folder", type=Path, required=True, help="where corpora, checkpoints and logs go")
    parser.add_argument("--model", type=Path, help="the toy model that fine-tuning starts from; default: as shipped")
    parser.add_argument("--quick", action="store_true", help="a few steps on a few scenes")
    args = parser.parse_args(arguments)
    name, folder = args.stage, args.folder
    folder.mkdir(parents=True, exist_ok=True)
    recipe = RECIPES[name]
    settings = Settings(**recipe["recipe"], **recipe["quick" if args.quick else "full"])
    torch.manual_seed(0)
    model = args.model or STAGES[name].start
    stage = STAGES[name](folder, settings, model)
    config = {"benchmark": "toy", "split": name, "folder": str(folder), "model": str(model)}
    tracker = start("auto", folder, config | dataclasses.asdict(settings))
    optimizer = train(stage, folder, tracker)
    if tracker:
        tracker.close(failed=False)
    torch.save(optimizer.masters, folder / f"{name}.pt")
    print({key: round(value, 4) for key, value in stage.evaluate(settings.final).items()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
