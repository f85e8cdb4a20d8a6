"""--restart: an earlier run's files are moved aside, never deleted."""

import json
import os
from pathlib import Path

from eval.answers.files import ANSWERS, FAILURES, RUNS, TIMING
from eval.answers.jsonl import sync_folder
from eval.answers.merge import CONFLICTS
from eval.answers.shards import SHARDS
from llava.errors import UserError

# The order in which --restart moves them: timing without answers would claim questions that are not there.
FILES = (
    "result.json",
    "predictions.json",
    SHARDS,
    FAILURES,
    CONFLICTS,
    TIMING,
    RUNS,
    ANSWERS,
    "settings.json",
    "wandb_id",
)


def move_aside(folder: Path) -> None:
    """Move an earlier run's files to the first free `replaced-N`; nothing is deleted."""
    partial = [path.name for path in folder.glob("limit*") if path.name.removeprefix("limit").isdecimal()]
    names = dict.fromkeys([*partial, *submission_files(folder / "result.json"), *FILES])
    present = [name for name in names if (folder / name).exists()]
    if not present:
        return
    number = 1
    while (folder / f"replaced-{number}").exists():
        number += 1
    target = folder / f"replaced-{number}"
    try:
        target.mkdir()
        for name in present:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(folder / name, target / name)
    except OSError as error:
        raise UserError(f"Cannot move the earlier run to {target}: {error.strerror}.") from error
    sync_folder(folder)


def submission_files(result: Path) -> list[str]:
    """Names of the files that were written beside a result; none for a result that does not say it."""
    try:
        names = json.loads(result.read_bytes()).get("submission", [])
    except (OSError, ValueError, AttributeError):
        return []
    return [name for name in names if isinstance(name, str) and ".." not in Path(name).parts]
