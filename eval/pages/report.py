"""Write a page with all results below a folder: plots, filters and a sortable table.

vtr report
vtr report results/gqa-testdev --output gqa.html

This file writes the table; report.js draws the plots and filters in the browser.
"""

import dataclasses
import json
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from eval.answers.jsonl import read_json, write_file
from eval.answers.reuse import joint
from eval.answers.source_hash import flatten
from eval.benchmarks.records import NotRequired, Number, TypedDict, check
from eval.command import exit_on_user_error, make_parser, value
from eval.config import FULL, TOY_BANNER, changed_options, is_toy, path_name
from eval.pages import asset, environment, inline_json
from eval.results.report import gain_kept, interval_of, operations_of, tokens_text
from eval.tables import BRIGHT
from llava.budget import BLIND, RETENTION_RATIO, budget_text
from llava.errors import UserError

RESULT = "result.json"
# Folders to which `--restart` moves an earlier run. Their results are superseded.
REPLACED = re.compile(r"replaced-\d+")


class Accounting(TypedDict):
    mean_tokens_per_layer: Number
    kv_bytes_per_sample: Number


class Settings(TypedDict):
    benchmark: str
    model: str
    config: NotRequired[dict[str, Any]]


class Result(TypedDict):
    """The fields of result.json that the page needs, and those that it reads if present (NotRequired)."""

    method: str
    budget: Number | None
    asked: int
    main: str
    metrics: dict[str, Number | None]
    confidence: dict[str, Any]
    accounting: Accounting
    settings: Settings
    title: NotRequired[str]
    available: NotRequired[int]
    partial: NotRequired[bool]
    points: NotRequired[list[str]]
    failed: NotRequired[list[Any]]
    off_budget: NotRequired[dict[str, Any] | None]
    remarks: NotRequired[list[str]]
    commit: NotRequired[Any]
    finished: NotRequired[str]
    flops: NotRequired[dict[str, Any]]
    timing: NotRequired[dict[str, Any]]


@dataclass(frozen=True)
class ResultRow:
    """One result, in the units of the page.

    Attributes:
        options: the method's options that differ from their defaults, "alpha=1.0".
        size: the budget as the user gave it, "64" or "1/9"; "" if the result has none.
        low, high: the ends of the 95 % confidence interval.
        percent: main score in percent of the score of `full` on the same questions under the same settings.
        gain: what of the gain of seeing is kept, in percent, where `full` and `none` are clearly apart.
        tokens: visual tokens per layer, mean over layers and samples.
        asked: the intended value of `tokens`, if the result is off its budget or the image decides the number.
        ends: the fewest and the most tokens of an image, "40 to 96", if the image decides; else "".
        ttft: median milliseconds to the first token of a batch of `batch` questions.
        timed: conditions of the time measurement. Times are compared only between results with equal conditions.
        kv: megabytes of key/value cache per question.
        gflop: billions of operations up to the first token, per question asked alone.
        task: a text that is equal for results that may be compared, which have the same questions and settings.
        group: the number of the row's `task` on the page.
        folder: folder of the result, relative to the folder that was searched.
    """

    method: str
    options: str
    budget: float | None
    size: str
    benchmark: str
    model: str
    metric: str
    unit: str
    score: float | None
    low: float | None
    high: float | None
    interval: str
    tokens: float
    ttft: float | None
    batch: int | None
    timed: str | None
    kv: float
    gflop: float | None
    questions: int
    available: int
    failed: int
    partial: bool
    commit: str
    date: str
    folder: str
    task: str
    asked: float | None = None
    ends: str = ""
    percent: float | None = None
    gain: float | None = None
    group: int = 0

    @property
    def series(self) -> str:
        """The method with its options; a line of a plot joins the rows of one series."""
        return f"{self.method} ({self.options})" if self.options else self.method


@dataclass(frozen=True)
class Found:
    """The results below a folder.

    Attributes:
        groups: name of every group of comparable results, indexed by `ResultRow.group`.
        damaged: one sentence for every file that cannot be read as a result.
    """

    rows: Sequence[ResultRow]
    groups: Sequence[str]
    damaged: Sequence[str] = ()


def collect(folder: Path) -> Found:
    """All results below a folder, except those that `--restart` moved aside.

    Raises:
        UserError: there is no such folder, or it holds no result that can be read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; `vtr report FOLDER` takes the one that holds your runs.")
    paths = sorted(folder.rglob(RESULT))
    current = [path for path in paths if not any(REPLACED.fullmatch(part) for part in path.relative_to(folder).parts)]
    rows, damaged = [], []
    for path in current:
        try:
            rows.append(row_of(check(Result, read_json(path), str(path)), path.parent.relative_to(folder)))
        except UserError as error:
            damaged.append(str(error))
    if not rows:
        rest = f"; {len(damaged):,} cannot be read, the first one: {damaged[0]}" if damaged else "."
        raise UserError(f"{folder} holds no result of `vtr eval` (a file {RESULT} per run){rest}")
    ordered, groups = with_groups(rows)
    return Found(ordered, groups, damaged)


def row_of(result: Mapping[str, Any], folder: Path) -> ResultRow:
    """A checked result as a row.

    Args:
        folder: folder of the result, relative to the folder that was searched.
    """
    main, settings, accounting = result["main"], result["settings"], result["accounting"]
    interval = interval_of(result) or {}
    ttft, batch, timed = time_of(result)
    available, config = result.get("available", result["asked"]), settings.get("config", {})
    off = result.get("off_budget") or {}
    adapted: Mapping[str, Any] = accounting if accounting.get("adaptive") else {}
    flops = operations_of(result)
    return ResultRow(
        method=result["method"],
        options=", ".join(changed_options(result["method"], config)),
        budget=result["budget"],
        size="" if result["budget"] is None else budget_text(result["budget"], config.get(RETENTION_RATIO)),
        benchmark=result.get("title") or settings["benchmark"],
        model=settings["model"],
        metric=main.replace("_", " "),
        unit="points" if main in result.get("points", ()) else "%",
        score=result["metrics"].get(main),
        low=finite(interval.get("low")),
        high=finite(interval.get("high")),
        interval=str(interval.get("method", "")),
        tokens=accounting["mean_tokens_per_layer"],
        ttft=ttft,
        batch=batch,
        timed=timed,
        kv=accounting["kv_bytes_per_sample"] / 1e6,
        gflop=None if flops is None else flops / 1e9,
        questions=result["asked"],
        available=available,
        failed=len(result.get("failed", ())),
        partial=result.get("partial", result["asked"] < available),
        commit=str(result.get("commit") or ""),
        date=result.get("finished", ""),
        folder=str(folder),
        task=json.dumps(joint(result), sort_keys=True),
        # "planned" in results of earlier versions
        asked=adapted.get("asked_tokens_per_layer", off.get("asked", off.get("planned"))),
        ends=tokens_text(adapted).rpartition(", ")[2] if adapted else "",
    )


def finite(value: Any) -> float | None:
    """The value if it is a finite number, else None."""
    return value if isinstance(value, int | float) and abs(value) < float("inf") else None


def time_of(result: Mapping[str, Any]) -> tuple[float | None, int | None, str | None]:
    """Median TTFT of a batch in milliseconds, the size of the batch, and the conditions of the measurement.

    All three are None if no time was measured.
    """
    timed = (result.get("timing") or {}).get("ttft") or {}
    ttft, size = finite(timed.get("median_ms")), timed.get("questions")
    if ttft is None:
        return None, None, None
    known = result.get("conditions") or {}
    batches = "one question at a time" if size == 1 else f"batches of {size}"
    conditions = (known.get("device"), known.get("hardware"), f"threads {known.get('threads')}", known.get("dtype"))
    return ttft, size, ", ".join(map(str, (*conditions, batches)))


def with_groups(rows: Sequence[ResultRow]) -> tuple[list[ResultRow], list[str]]:
    """The rows with `percent` and `group` filled in, in the order of the table, and the names of the groups.

    Returns:
        The rows group by group, and one name per group. Groups are sorted by benchmark and model, then by falling
        number of questions. Within a group `full` comes first, then rows by method, options and budget.
    """
    same: dict[str, list[ResultRow]] = {}
    for row in sorted(rows, key=lambda row: (row.benchmark, row.model, -row.questions, row.task)):
        same.setdefault(row.task, []).append(row)
    filled = []
    for number, group in enumerate(same.values()):
        group.sort(key=lambda row: (row.method != FULL, row.method != BLIND, row.series, row.budget or 0, row.folder))
        full = [row for row in group if row.method == FULL and row.score]
        blind = [row for row in group if row.method == BLIND]
        for row in group:
            gain = gain_kept(row.score, vars(full[0]), vars(blind[0])) if full and blind else None
            filled.append(dataclasses.replace(row, percent=percent_of(row, full), gain=gain, group=number))
    return filled, group_names([group[0] for group in same.values()])


def percent_of(row: ResultRow, full: Sequence[ResultRow]) -> float | None:
    """The row's score in percent of the score of `full`.

    Args:
        full: results of `full` on the same task, none of which scores 0. Of several, the one whose folder is nearest to
            the row's is taken.
    """
    if row.score is None or not full:
        return None
    if row.method == FULL:
        return 100.0

    def shared(other: ResultRow) -> int:
        return len(Path(os.path.commonpath([row.folder, other.folder])).parts)

    return 100 * row.score / (max(full, key=shared).score or 1)


def group_names(firsts: Sequence[ResultRow]) -> list[str]:
    """Name each group by benchmark, model and number of questions, and add settings where these names are equal.

    Args:
        firsts: one row of each group.
    """
    plain = [f"{row.benchmark} · {row.model} · {row.questions:,} questions" for row in firsts]
    tasks = [flatten(json.loads(row.task)) for row in firsts]
    names = []
    for name, own in zip(plain, tasks, strict=True):
        alike = [task for other, task in zip(plain, tasks, strict=True) if other == name]
        differing = [key for key in own if any(task.get(key) != own[key] for task in alike)]
        names.append(" · ".join([name, *(f"{key.removeprefix('facts.')} {str(own[key])[:16]}" for key in differing)]))
    return names


# Fields of a row that report.js reads.
PLOTTED = (
    "method", "size", "benchmark", "model", "metric", "unit", "score", "low", "high", "percent", "tokens", "ttft",
    "batch", "timed", "kv", "gflop", "questions", "partial", "folder", "group", "series",
)  # fmt: skip


def page(results: Found, searched: Path, output: Path, made_by: str) -> str:
    """The whole page as HTML, which needs nothing from the network.

    Args:
        searched: the folder in which the results were found.
        output: where the page will be written; links to the result files are relative to it.
        made_by: the command that makes the page.
    """
    from plotly.offline import get_plotlyjs

    rows = results.rows
    # `full` comes first, then series by name; the position decides colour and symbol.
    series = [name for _, name in sorted({(row.method != FULL, row.series) for row in rows})]
    full = {row.series for row in rows if row.method == FULL}
    numbered = [dataclasses.asdict(row) | {"series": series.index(row.series)} for row in rows]
    data = {
        "rows": [{name: row[name] for name in PLOTTED} for row in numbered],
        "series": series,
        "groups": list(results.groups),
        "full": [name in full for name in series],
        "colours": BRIGHT[:-1],  # without black, which is the colour of full and invisible on a dark page
    }
    place, top = output.resolve().parent, searched.resolve()
    template = environment().get_template("report.html.j2")
    return template.render(
        style=asset("style.css") + asset("report.css"),
        script=asset("sort.js"),
        plotly=get_plotlyjs(),
        report_script=asset("report.js"),
        data=inline_json(json.dumps(data, allow_nan=False)),
        rows=rows,
        banner=banner(rows),
        series=series,
        benchmarks=sorted({row.benchmark for row in rows}),
        models=sorted({row.model for row in rows}),
        links=[quote(os.path.relpath(top / row.folder / RESULT, place)) for row in rows],
        damaged=results.damaged,
        summary=summary(results),
        searched=str(searched),
        made_by=made_by,
    )


def banner(rows: Sequence[ResultRow]) -> str:
    """The note about toy models, which names them if there are other models too; "" if there is no toy model."""
    models = sorted({row.model for row in rows})
    toys = [name for name in models if is_toy(name)]
    if not toys or toys == models:
        return TOY_BANNER if toys else ""
    return f"{TOY_BANNER} Here: {', '.join(toys)}."


def summary(found: Found) -> str:
    """How many results, methods, models and benchmarks there are, in one sentence."""
    rows = found.rows
    different = {word: len({getattr(row, word) for row in rows}) for word in ("method", "model", "benchmark")}
    counted = {"result": len(rows), **different}
    results, *others = [f"{count:,} {word}{'' if count == 1 else 's'}" for word, count in counted.items()]
    partial = sum(row.partial for row in rows)
    return f"{results}, {partial:,} of them on part of a benchmark: {', '.join(others)}."


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    p = make_parser("eval.pages.report", __doc__)
    p.add_argument(
        "folder", nargs="?", type=value(path_name), default="results", help="folder that holds runs, at any depth"
    )
    p.add_argument("--output", type=value(path_name), default="report.html", help="the page to write, one HTML file")
    args = p.parse_args(arguments)
    folder, output = Path(args.folder), Path(args.output)
    if output.is_dir():
        raise UserError(
            f"--output {output} is a folder; name the HTML file to write, such as {output / 'report.html'}."
        )

    results = collect(folder)
    command = shlex.join(["vtr", "report", str(folder), "--output", str(output)])
    write_file(output, page(results, folder, output, command))
    for sentence in results.damaged:
        print(f"left out: {sentence}", file=sys.stderr)
    print(summary(results))
    print(f"Wrote {output}; open it in a browser.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
