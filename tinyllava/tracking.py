"""W&B logging of a training stage, with the evaluation's rules: offline without a key, never asks, never in the way."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.results.tracking import Tracker, start


def start_tracking(stage: str, folder: Path, settings: Mapping[str, Any]) -> Tracker:
    """A tracker for one stage; W&B's files go below `folder`."""
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    # Stages share a folder, and each is a run of its own.
    about = {"benchmark": "tinyllava", "split": stage, **plain}
    return start("auto", folder, about, tags=["tinyllava", stage], id_file=f"{stage}.wandb_id")
