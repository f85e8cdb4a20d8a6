"""The results page as HTML: the table is written here, plots and filters are drawn by report.js in the browser."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from eval.config import FULL, TOY_BANNER, is_toy
from eval.pages.report.results import RESULT, Found, Row
from eval.pages.skeleton import asset, environment, inline_json

HERE = Path(__file__).parent
# Fields of a row that report.js reads.
PLOTTED = (
    "method", "budget", "benchmark", "model", "metric", "unit", "score", "low", "high", "percent", "tokens", "ttft",
    "batch", "timed", "kv", "gflop", "questions", "partial", "folder", "group", "series",
)  # fmt: skip


def page(found: Found, searched: Path, output: Path, made_by: str) -> str:
    """The whole page, one file without links to anything on the network.

    Args:
        searched: the folder that the results were found in.
        output: where the page will be written; links to the result files start there.
        made_by: the command that makes the page.
    """
    from plotly.offline import get_plotlyjs

    rows = found.rows
    series = series_of(rows)
    full = {row.series for row in rows if row.method == FULL}
    data = {
        "rows": [plotted(row, series) for row in rows],
        "series": series,
        "groups": list(found.groups),
        "full": [name in full for name in series],
    }
    template = environment(HERE).get_template("report.html.j2")
    return template.render(
        style=asset("style.css") + (HERE / "report.css").read_text(),
        script=asset("sort.js"),
        plotly=get_plotlyjs(),
        report_script=(HERE / "report.js").read_text(),
        data=inline_json(json.dumps(data, allow_nan=False)),
        rows=rows,
        banner=banner(rows),
        series=series,
        benchmarks=distinct(row.benchmark for row in rows),
        models=distinct(row.model for row in rows),
        links=[link(row, searched, output) for row in rows],
        damaged=found.damaged,
        replaced=found.replaced,
        summary=summary(found),
        searched=str(searched),
        made_by=made_by,
    )


def banner(rows: Sequence[Row]) -> str:
    """What to say of toy models, and of which if there are others; nothing where there is none."""
    models = distinct(row.model for row in rows)
    toys = [name for name in models if is_toy(name)]
    if not toys or toys == models:
        return TOY_BANNER if toys else ""
    return f"{TOY_BANNER} Here: {', '.join(toys)}."


def summary(found: Found) -> str:
    """How much there is, in one sentence."""
    rows = found.rows
    counted = [
        (len(rows), "result"),
        (len({row.method for row in rows}), "method"),
        (len({row.model for row in rows}), "model"),
        (len({row.benchmark for row in rows}), "benchmark"),
    ]
    (results, methods, models, sets) = [f"{count:,} {word}{'' if count == 1 else 's'}" for count, word in counted]
    partial = sum(row.partial for row in rows)
    return f"{results}, {partial:,} of them on part of a benchmark: {methods}, {models}, {sets}."


def series_of(rows: Sequence[Row]) -> list[str]:
    """Methods with their options: `full` first, then by name. The place decides colour and symbol."""
    known = {(row.method != FULL, row.series) for row in rows}
    return [name for _, name in sorted(known)]


def plotted(row: Row, series: Sequence[str]) -> dict[str, Any]:
    """What the plots need of a row."""
    known = {**dataclasses.asdict(row), "series": series.index(row.series)}
    return {name: known[name] for name in PLOTTED}


def distinct(values: Any) -> list[str]:
    return sorted(set(values))


def link(row: Row, searched: Path, output: Path) -> str:
    """Address of the row's result file, relative to the page."""
    target = searched.resolve() / row.folder / RESULT
    return quote(os.path.relpath(target, output.resolve().parent))
