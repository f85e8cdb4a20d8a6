"""Statistics of finished runs beside the full model: percent of full, loyalty, hard questions, tokens needed.

vtr stats FOLDER_OF_FULL FOLDER...      # several budgets of a method, and of downsample for the hard questions

The folders are output folders of `vtr eval`, all of one benchmark. docs/statistics.md defines every number.
"""

import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.answers.jsonl import read_json, write_json
from eval.answers.reuse import RESULT, check_joint, results_folder
from eval.benchmarks.base import Dataset
from eval.command import add_data_flags, exit_on_user_error, make_parser, open_dataset, value
from eval.config import shortened
from eval.results.statistics import Interval, interval, p_text
from eval.statistics.hard_questions import accuracy_on, groups
from eval.statistics.loyalty import loyalty, loyalty_parts, plain
from eval.statistics.runs import (
    DOWNSAMPLE,
    Run,
    by_method,
    check_full,
    read_run,
)
from eval.statistics.tokens_needed import LEVEL, SHARE, tokens_needed
from eval.tables.page import markdown, score_text

COLUMNS = (
    "method",
    "budget",
    "of full (bound)",
    "loyalty",
    "loyalty, full right",
    "loyalty, full wrong",
    "group A",
    "group B",
)


def statistics_of(full: Run, runs: list[Run], data: Dataset, share: float = SHARE, level: float = LEVEL) -> Any:
    """All statistics of the runs as JSON types: a list of rows, and the tokens needed by method."""
    first: dict[str, Run] = {}
    for run in runs:
        check_joint(full.stored, run.stored)
        check_joint(first.setdefault(run.method, run).stored, run.stored)
    methods = by_method(runs)
    controls = {run.budget: run for run in runs if run.method == DOWNSAMPLE}
    rows, needed = [], {}
    for label, budgets in methods.items():
        found = tokens_needed(full.terms, {budget: run.terms for budget, run in budgets.items()}, share, level)
        needed[label] = dataclasses.asdict(found) | {"text": found.text}
        for budget, test in found.tests.items():
            row = row_of(budgets[budget], full, controls.get(budget), data)
            rows.append({"method": label, "budget": budget, **row, "test": dataclasses.asdict(test)})
    return {
        "title": data.title,
        "main": full.score.main,
        "unit": "" if full.score.main in full.score.points else "%",
        "questions": len(full.texts),
        "clusters": len(set(full.terms.clusters)),
        "drawn": full.terms.unit,
        "full": plain_interval(interval(full.terms)),
        "rows": rows,
        "tokens_needed": needed,
    }


def row_of(run: Run, full: Run, control: Run | None, data: Dataset) -> dict[str, Any]:
    """Score, loyalty and hard questions of one run; None for what cannot be computed."""
    images = {question.id: question.image for question in data.questions}
    normalise = data.normalise or plain
    found: dict[str, Interval | None] = {"score": interval(run.terms)}
    if full.sample_scores is None or run.sample_scores is None:
        found |= {"loyalty": loyalty(run.texts, full.texts, images, normalise)}
        found |= dict.fromkeys(("loyalty_right", "loyalty_wrong", "group_a", "group_b"))
        return {name: plain_interval(one) for name, one in found.items()} | {"in_group_a": None, "in_group_b": None}
    parts = loyalty_parts(run.texts, full.texts, full.sample_scores, images, normalise)
    found |= {"loyalty": parts.all, "loyalty_right": parts.right, "loyalty_wrong": parts.wrong}
    counts: dict[str, int | None] = {"in_group_a": None, "in_group_b": None}
    found |= {"group_a": None, "group_b": None}
    if control is not None and control.sample_scores is not None:
        hard = groups(full.sample_scores, control.sample_scores)
        found |= {name: accuracy_on(run.sample_scores, ids, images) for name, ids in hard.named().items()}
        counts = {f"in_{name}": len(ids) for name, ids in hard.named().items()}
    return {name: plain_interval(one) for name, one in found.items()} | counts


def plain_interval(found: Interval | None) -> dict[str, Any] | None:
    """In JSON types, which have no NaN."""
    if found is None:
        return None
    return dataclasses.asdict(found) | {"mean": None if math.isnan(found.mean) else found.mean}


def lines(record: Mapping[str, Any]) -> list[str]:
    """The statistics as a table and sentences."""
    unit = f" {record['unit']}" if record["unit"] else ""
    header = [*COLUMNS[:2], f"{record['main'].replace('_', ' ')}{unit}", *COLUMNS[2:]]
    table = [["full", "", cell(record["full"]), "100.0", *[""] * (len(COLUMNS) - 3)]]
    for row in record["rows"]:
        test = row["test"]
        table.append(
            [
                row["method"],
                f"{row['budget']:,}",
                cell(row["score"]),
                f"{test['of_full']:.1f} (≥ {test['low']:.1f})",
                *(cell(row[name]) for name in ("loyalty", "loyalty_right", "loyalty_wrong")),
                *(grouped_cell(row, name) for name in ("group_a", "group_b")),
            ]
        )
    found = [
        f"{record['title']}, {record['questions']:,} questions, {record['clusters']:,} {record['drawn']}s",
        "",
        markdown(header, table),
        "",
    ]
    found += [sentence(label, needed) for label, needed in record["tokens_needed"].items()]
    return found + [f"no interval, {name}: {reason}" for name, reason in withheld(record)]


def withheld(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The numbers that have no interval, and why."""
    cells = [("full", record["full"])]
    for row in record["rows"]:
        names = ("score", "loyalty", "loyalty_right", "loyalty_wrong", "group_a", "group_b")
        cells += [(f"{row['method']} at {row['budget']:,}, {name.replace('_', ' ')}", row[name]) for name in names]
    return [
        (name, one["method"].removeprefix("n/a: "))
        for name, one in cells
        if one and one["mean"] is not None and one["low"] is None
    ]


def sentence(label: str, needed: Mapping[str, Any]) -> str:
    """The tokens needed in words, with the p-value of every budget."""
    tests = ", ".join(f"{budget}: {p_text(test['p'])}" for budget, test in needed["tests"].items())
    return (
        f"{label} needs {needed['text']} tokens to keep {100 * needed['share']:g} % of full (one-sided test at "
        f"{100 * needed['level']:g} %, largest budget first; p by budget: {tests})."
    )


def cell(found: Mapping[str, Any] | None) -> str:
    """An interval for a table."""
    if found is None or found["mean"] is None:
        return "n/a"
    return score_text(Interval(found["mean"], found["low"], found["high"]))


def grouped_cell(row: Mapping[str, Any], name: str) -> str:
    """An accuracy on a group with the number of its questions."""
    return "n/a" if row[name] is None else f"{cell(row[name])} n={row[f'in_{name}']:,}"


def fraction(text: str) -> float:
    """A number above 0 and below 1; ValueError for anything else."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < 1:
        raise ValueError(f"should be a number between 0 and 1 such as 0.99, got {shortened(text)!r}")
    return number


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    p = make_parser("eval.statistics.command", __doc__)
    p.add_argument("full", type=Path, help="output folder of a run of full")
    p.add_argument("runs", type=Path, nargs="+", help="output folders of runs of the same benchmark")
    add_data_flags(p)
    p.add_argument(
        "--share", type=value(fraction), default=SHARE, help="of the score of full that tokens needed asks for"
    )
    p.add_argument("--level", type=value(fraction), default=LEVEL, help="of the one-sided tests")
    p.add_argument("--json", metavar="OUT", help="also write the numbers to this file")
    args = p.parse_args(arguments)
    result = read_json(results_folder(args.full) / RESULT)
    settings, profile = result["settings"], args.profile or result["facts"].get("profile")
    data = open_dataset(settings["benchmark"], args.data, args.split or settings["split"], profile, args.source)
    full = read_run(args.full, data, args.judge)
    check_full(full)
    record = statistics_of(
        full, [read_run(folder, data, args.judge) for folder in args.runs], data, args.share, args.level
    )
    print("\n".join(lines(record)))
    if args.json:
        write_json(Path(args.json), record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
