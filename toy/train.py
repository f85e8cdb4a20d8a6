"""Train one stage of a toy model: step-based, seeded, resumable, with a bar, a log and W&B.

    python -m toy.train next --folder runs/next
    RANKS=2 python -m toy.train vision --folder runs/tiny

FOLDER holds corpora, features, checkpoints and logs; the trained weights end up in FOLDER/STAGE.pt. The same command
continues an interrupted run. `--quick` takes a few steps on a few scenes, to see that everything works.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from eval.command import exit_on_user_error
from eval.config import DEFAULT_MODEL
from eval.parallel import placement, ranks
from eval.parallel.launch import launch
from eval.tracking import Tracker, start
from llava.errors import UserError
from toy.optimizer import RANK, MasterOptimizer, join_ranks, leave_ranks, schedule
from toy.stages import Settings, Stage
from toy.stages.next import Next
from toy.stages.scenes import Instruct, Language, Vision
from toy.stages.video import Video

LOG_EVERY = 25  # steps
STAGES: dict[str, type[Stage]] = {stage.name: stage for stage in (Vision, Language, Next, Video, Instruct)}


def train(stage: Stage, folder: Path, seed: int = 0, tracker: Tracker | None = None) -> MasterOptimizer:
    """Run all steps of a stage, continuing after the last checkpoint in `folder`; returns the optimizer.

    The batch of a step is a function of (seed, rank, step) alone, so a resumed run sees the same data as an
    uninterrupted one.
    """
    recipe, settings = stage.recipe, stage.settings
    optimizer = MasterOptimizer(
        stage.trainee, stage.is_hidden, recipe.lr, recipe.adam_lr, recipe.clip, getattr(torch, recipe.dtype)
    )
    checkpoint = folder / f"{stage.name}.checkpoint.pt"
    first, seconds = resume(optimizer, checkpoint, settings) if checkpoint.exists() else (0, 0.0)
    averages: dict[str, float] = {}
    bar = tqdm(range(first, settings.steps), desc=stage.name, initial=first, total=settings.steps, disable=RANK > 0)
    started = time.time() - seconds
    for step in bar:
        rng = np.random.default_rng([seed, RANK, step])
        torch.manual_seed(int(rng.integers(2**31)))
        loss, numbers = stage.loss(step, rng)
        loss.backward()
        norm = optimizer.step(schedule(step, settings.steps, decay=recipe.decay))
        for name, value in {"loss": loss.item(), "gradient_norm": norm, **numbers}.items():
            if value == value:
                averages[name] = 0.95 * averages.get(name, value) + 0.05 * value
        last = step + 1 == settings.steps
        if RANK > 0:
            continue
        if (step + 1) % LOG_EVERY == 0 or last:
            line = {"step": step + 1, "seconds": round(time.time() - started, 1)}
            line |= {name: round(value, 4) for name, value in averages.items()}
            if (step + 1) % recipe.evaluate_every == 0 or last:
                line |= {f"val/{name}": round(value, 4) for name, value in stage.evaluate(settings.watched).items()}
            with open(folder / f"{stage.name}.log.jsonl", "a") as log:
                log.write(json.dumps(line) + "\n")
            if tracker:
                tracker.log(line, step=step + 1)
            bar.set_postfix(loss=f"{averages['loss']:.3f}")
        if (step + 1) % recipe.save_every == 0 or last:
            state = {"optimizer": optimizer.state_dict(), "step": step + 1, "seconds": time.time() - started}
            partial = checkpoint.with_suffix(".partial")
            torch.save(state | {"settings": dataclasses.asdict(settings)}, partial)
            partial.replace(checkpoint)
    return optimizer


def resume(optimizer: MasterOptimizer, checkpoint: Path, settings: Settings) -> tuple[int, float]:
    """Load a checkpoint of the same settings; returns its number of steps and the seconds they took."""
    saved = torch.load(checkpoint, weights_only=True)
    wanted = dataclasses.asdict(settings)
    if saved.get("settings") != wanted:
        raise UserError(
            f"{checkpoint} is of a run with other settings ({saved.get('settings', 'not recorded')}) than this one "
            f"({wanted}); use the same settings, or delete it to start anew."
        )
    optimizer.load_state_dict(saved["optimizer"])
    return saved["step"], saved["seconds"]


def run(name: str, folder: Path, settings: Settings, model: Path) -> None:
    """Train a stage from its data to FOLDER/STAGE.pt, on all ranks."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    stage = STAGES[name](folder, settings, model)
    tracker = None
    if RANK == 0:
        config = {"benchmark": "toy", "split": name, "folder": str(folder), "model": str(model)}
        tracker = start("auto", folder, config | dataclasses.asdict(settings))
    optimizer = train(stage, folder, tracker=tracker)
    if tracker:
        tracker.close(failed=False)
    if RANK == 0:
        torch.save(optimizer.masters, folder / f"{name}.pt")
        print({key: round(value, 4) for key, value in stage.evaluate(settings.final).items()})


def read_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The stage and its folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--folder", type=Path, required=True, help="where corpora, checkpoints and logs go")
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="the toy model that fine-tuning starts from")
    parser.add_argument("--quick", action="store_true", help="a few steps on a few scenes")
    return parser.parse_args(words)


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    args = read_arguments(words)
    if (place := placement.here(device="cpu")) is not None:
        return launch("toy.train", words, place, timeout=600)
    stage = STAGES[args.stage]
    settings = stage.quick if args.quick else stage.defaults
    ranks.current().report(ranks.TRAINING)
    join_ranks()
    run(args.stage, args.folder, settings, args.model)
    leave_ranks()
    return 0


if __name__ == "__main__":
    sys.exit(main())
