"""The score without reduction on the same questions, which "percent of full" is measured against."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.answers.jsonl import read_json
from eval.answers.reuse import joint
from eval.config import FULL
from llava.errors import UserError

PARTIAL = re.compile(r"limit\d+")


def percent_of_full(result: Mapping[str, Any], output: Path) -> float | None:
    """Main score in percent of that of `full`; None where either is missing or `full` scores 0.

    Args:
        output: the run's folder; the result of `full` is looked for in the folders beside it.
    """
    score = result["metrics"].get(result["main"])
    full = full_score(result, output)
    return 100 * score / full if score is not None and full else None


def full_score(result: Mapping[str, Any], output: Path) -> float | None:
    """Main score of a run of `full` that asked the same questions, about the same images, under the same settings."""
    if result["method"] == FULL:
        return result["metrics"].get(result["main"])
    folder = output.resolve()
    run = folder.parent if PARTIAL.fullmatch(folder.name) else folder  # results of the first questions are in limitN/
    found = [*run.parent.glob("*/result.json"), *run.parent.glob("*/limit*/result.json")]
    # Folders of `full` usually say so; a sweep has hundreds of others.
    for path in sorted(found, key=lambda path: (not path.relative_to(run.parent).parts[0].startswith(FULL), path)):
        try:
            other = read_json(path)
        except UserError:
            continue  # a damaged file is an error of the run that it belongs to
        if other.get("method") == FULL and joint(other) == joint(result):
            return other["metrics"].get(other["main"])
    return None
