"""W&B logging of a training stage, with the evaluation's rules: offline without a key, never asks, never in the way."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.results.tracking import Tracker, start


def start_tracking(stage: str, folder: Path, settings: Mapping[str, Any]) -> Tracker:
    """A tracker for one stage; W&B's files go below `folder`."""
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    return start("auto", folder, {"benchmark": "tinyllava", "split": stage, **plain})
