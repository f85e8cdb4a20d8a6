"""The loop that both training stages share: step-based, seeded, resumable, with a bar, a log and W&B."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from eval.results.tracking import Tracker
from tinyllava import ranks
from tinyllava.optimizer import MasterOptimizer, schedule


def train(
    stage: str,
    folder: Path,
    optimizer: MasterOptimizer,
    steps: int,
    loss_of: Callable[[int, np.random.Generator], tuple[torch.Tensor, dict[str, float]]],
    evaluate: Callable[[], dict[str, float]] | None = None,
    evaluate_every: int = 400,
    save_every: int = 100,
    decay: float = 0.6,
    seed: int = 0,
    tracker: Tracker | None = None,
) -> None:
    """Run steps 0 .. `steps`, continuing after the last checkpoint in `folder`.

    The batch of a step is a function of (seed, rank, step) alone, so a resumed run sees the same data as an
    uninterrupted one. `loss_of(step, rng)` returns the loss and numbers to log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / f"{stage}.checkpoint.pt"
    first, seconds, averages = 0, 0.0, {}
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        optimizer.load_state_dict(saved["optimizer"])
        first, seconds = saved["step"], saved["seconds"]
    bar = tqdm(range(first, steps), desc=stage, initial=first, total=steps, disable=ranks.RANK > 0)
    started = time.time() - seconds
    for step in bar:
        rng = np.random.default_rng([seed, ranks.RANK, step])
        torch.manual_seed(int(rng.integers(2**31)))
        loss, numbers = loss_of(step, rng)
        loss.backward()
        norm = optimizer.step(schedule(step, steps, decay=decay))
        for name, value in {"loss": loss.item(), "gradient_norm": norm, **numbers}.items():
            if value == value:
                averages[name] = 0.95 * averages.get(name, value) + 0.05 * value
        last = step + 1 == steps
        if ranks.RANK > 0:
            continue
        if (step + 1) % 25 == 0 or last:
            line = {"step": step + 1, "seconds": round(time.time() - started, 1)}
            line |= {name: round(value, 4) for name, value in averages.items()}
            if evaluate and ((step + 1) % evaluate_every == 0 or last):
                line |= {f"val/{name}": round(value, 4) for name, value in evaluate().items()}
            with open(folder / f"{stage}.log.jsonl", "a") as log:
                log.write(json.dumps(line) + "\n")
            if tracker:
                tracker.log(line, step=step + 1)
            bar.set_postfix(loss=f"{averages['loss']:.3f}")
        if (step + 1) % save_every == 0 or last:
            partial = checkpoint.with_suffix(".partial")
            state = {"optimizer": optimizer.state_dict(), "step": step + 1, "seconds": time.time() - started}
            torch.save(state, partial)
            partial.replace(checkpoint)
    if tracker:
        tracker.close(failed=False)
