"""What the tables of methods have in common: a method's defaults, whether a setting fits a model, intervals, files."""

import csv
from collections.abc import Sequence
from pathlib import Path

from eval.config import DEFAULT_DATA, ROOT
from eval.results import statistics
from eval.sweep import Credits, Setting
from llava.errors import UserError
from llava.model.llava_arch import Llava
from llava.reduction import registry
from llava.reduction.budget import require

TABLES = ROOT / "docs" / "tables"


def defaults(method: str) -> dict[str, str]:
    """A method's defaults as option texts."""
    row = next(row for row in registry.describe() if row["name"] == method)
    return {option["name"]: text_of(option["default"]) for option in row["options"]}


def text_of(value: object) -> str:
    """An option's value as it is typed after `--set`."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value).lower()


def same(a: str, b: str) -> bool:
    try:
        return float(a) == float(b)
    except ValueError:
        return a == b


def is_default(options: dict[str, str], usual: dict[str, str]) -> bool:
    return all(same(value, usual[key]) for key, value in options.items())


def changed(options: dict[str, str], usual: dict[str, str]) -> dict[str, str]:
    """Only what differs from the defaults, so that equal settings share one run."""
    return {key: value for key, value in options.items() if not same(value, usual[key])}


def fits(setting: Setting, model: Llava) -> bool:
    """Whether the method can run so on this model at this budget."""
    try:
        require(registry.build(setting.method, setting.budget or model.visual_tokens, setting.options), model.spec)
    except UserError:
        return False
    return True


def interval(credit: Credits, groups: dict[str, str]) -> statistics.Interval:
    """Accuracy in percent with its confidence interval over images."""
    return statistics.interval(statistics.accuracy_terms(credit, groups))


def image_of(split: str) -> dict[str, str]:
    """Question id -> image: questions about one image are resampled together."""
    from eval import benchmarks

    return {q.id: q.image for q in benchmarks.get("gqa").load(DEFAULT_DATA, split).questions}


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])
