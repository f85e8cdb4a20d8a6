"""One factor at a time around a method's defaults, on the validation split of the toy GQA benchmark.

Defaults are chosen here, never on `testdev`. Each page of a paper has a module beside this one that lists its factors.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.config import DEFAULT_DATA, ROOT
from eval.results import statistics
from eval.sweep import CachingLlava, Credits, Setting, describe, sweep
from eval.tables.page import csv_numbers, difference_text, insert, markdown
from llava.errors import UserError
from llava.model.llava_arch import Llava
from llava.reduction import registry
from llava.reduction.crop_budget import require

TABLES = ROOT / "docs" / "tables"
Factors = Sequence[tuple[str, Sequence[dict[str, str]]]]


@dataclass(frozen=True)
class Ablation:
    """What to vary.

    Attributes:
        factors: (title, options) per choice; the defaults of each are among them.
        page: where the table goes, between the markers `ablation`.
    """

    method: str
    factors: Factors
    page: Path


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


def ablate(ablation: Ablation, model: CachingLlava, budgets: Sequence[int], output: Path) -> None:
    """Run every factor at every budget; write the page's table and docs/tables/<method>_ablation.csv."""
    usual = defaults(ablation.method)
    entries = [(title, options) for title, group in ablation.factors for options in group]
    settings = [
        setting
        for budget in budgets
        for _, options in entries
        if fits(setting := Setting(ablation.method, budget, changed(options, usual)), model)
    ]
    scores = sweep(settings, model, DEFAULT_DATA, "val", output)
    credits = {(s.budget, describe(s)): credit for s, credit in zip(settings, scores, strict=True)}
    groups = image_of("val")
    rows: list[list[str]] = []
    numbers: list[list[object]] = []
    for title, options in entries:
        label = ", ".join(f"{key} {value}" for key, value in options.items())
        cells = []
        for budget in budgets:
            credit = credits.get((budget, describe(Setting("", budget, changed(options, usual)))))
            found, line = compare(credit, credits[budget, ""], groups, is_default(options, usual))
            cells += found
            numbers.append([title, label, budget, *line])
        name = f"**{label}**" if is_default(options, usual) else label
        rows.append([f"{title}: {name}", *cells])
    header = ["choice"] + [cell for b in budgets for cell in (f"{b} tokens", "against the default [95 % CI]")]
    insert(ablation.page, "ablation", markdown(header, rows))
    write_csv(
        TABLES / f"{ablation.method}_ablation.csv",
        ["factor", "value", "budget", "accuracy", "difference", "low", "high"],
        numbers,
    )


def fits(setting: Setting, model: Llava) -> bool:
    """Whether the method can run so on this model at this budget."""
    try:
        require(registry.build(setting.method, setting.budget or model.visual_tokens, setting.options), model.spec)
    except UserError:
        return False
    return True


def compare(
    credit: Credits | None, base: Credits, groups: dict[str, str], default: bool
) -> tuple[list[str], list[str]]:
    """Two cells of the table and four of the file; empty where the setting cannot run."""
    if credit is None:
        return ["n/a", "cannot run"], ["", "", "", ""]
    mean = 100 * sum(credit.values()) / len(credit)
    if default:
        return [f"{mean:.1f}", "default"], [f"{mean:.2f}", "0", "0", "0"]
    found = statistics.compare_scores(credit, base, groups)
    return (
        [f"{mean:.1f}", difference_text(found)],
        csv_numbers(mean, found.difference, found.low, found.high),
    )


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
