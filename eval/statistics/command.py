"""Statistics of finished runs compared with the full model: percent of full, loyalty, hard questions, tokens needed.

vtr stats FOLDER_OF_FULL FOLDER...      # several budgets of a method, of downsample for the hard questions, and none
                                        # for the visual gain

The folders are output folders of `vtr eval`, all of one benchmark. docs/statistics.md defines every number.
"""

import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.answers.reuse import Stored, check_joint, read_result, read_stored, results_folder
from eval.benchmarks.base import Dataset
from eval.command import (
    add_data_flags,
    add_json_flag,
    exit_on_user_error,
    make_parser,
    open_dataset,
    print_record,
    value,
)
from eval.config import FULL, shortened
from eval.judging.choice import check_judge, score_answers
from eval.metrics import Score, SufficientStatistics
from eval.results.report import circumstances
from eval.results.statistics import Interval, interval, p_text, rounded, terms_of
from eval.statistics.answers import accuracy_on, hard_questions, loyalty, plain, sample_scores
from eval.statistics.budgets import budgets_lines, budgets_record, spent
from eval.statistics.gain import Floor, answerable_blind, blind_record, floor_of, gain_lines, gains
from eval.statistics.relative import LEVEL, SHARE, tokens_needed
from eval.tables import markdown, score_text
from llava.budget import BLIND, RETENTION_RATIO
from llava.errors import UserError

DOWNSAMPLE = "downsample"
GROUPS = ("group_a", "group_b")
# Number of a row -> head of its column.
COLUMNS = {
    "loyalty": "loyalty",
    "loyalty_right": "loyalty, full right",
    "loyalty_wrong": "loyalty, full wrong",
    "group_a": "group A",
    "group_b": "group B",
}


@dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        budget: visual tokens per image; for a retention ratio the mean over layers and questions, rounded.
        options: of the method, without budget or retention ratio.
        sample_scores: question id -> score in [0, 1]; None if single answers have no score.
    """

    stored: Stored
    method: str
    budget: int
    options: Mapping[str, Any]
    score: Score
    terms: SufficientStatistics
    sample_scores: Mapping[str, float] | None

    @property
    def folder(self) -> Path:
        return self.stored.folder

    @property
    def texts(self) -> Mapping[str, str]:
        """Question id -> answer."""
        return self.stored.texts


def read_run(folder: Path, data: Dataset, judge: str = "auto") -> Run:
    """Read a finished run and score its stored answers again.

    Raises:
        UserError: the run has no score, or see eval.answers.reuse.read_stored.
    """
    stored = read_stored(folder, data)
    check_judge(data, judge)
    score, judge_facts = score_answers(data, judge, list(stored.texts), stored.texts, stored.answers)
    if score.values.get(score.main) is None:
        raise UserError(f"{data.title} has no score for {folder}: {'; '.join(score.notes)}.")
    result = stored.result
    ratio = result.get("config", {}).get(RETENTION_RATIO)
    return Run(
        stored.judged(judge_facts),
        result["method"],
        round(result["accounting"]["mean_tokens_per_layer"]) if ratio else int(result["budget"]),
        {key: value for key, value in result["settings"]["config"].items() if key not in ("budget", RETENTION_RATIO)},
        score,
        terms_of(score, data.labels(stored.images)),
        sample_scores(score, stored.texts, data),
    )


def by_method(runs: list[Run]) -> dict[str, dict[int, Run]]:
    """Label -> budget -> run. The label is the method's name with the options in which its runs differ."""
    found: dict[str, dict[int, Run]] = {}
    for run in runs:
        same = [other.options for other in runs if other.method == run.method]
        differing = {key: value for key, value in run.options.items() if any(o.get(key) != value for o in same)}
        label = " ".join([run.method, *(f"{key}={value}" for key, value in differing.items())])
        budgets = found.setdefault(label, {})
        if run.budget in budgets:
            raise UserError(f"{budgets[run.budget].folder} and {run.folder} are both {label} at {run.budget}.")
        budgets[run.budget] = run
    return found


def statistics_of(full: Run, runs: list[Run], data: Dataset, share: float, floor: Floor | None = None) -> Any:
    """All statistics of the runs in JSON types: one row per run, and the tokens needed by method.

    Args:
        floor: of the questions, if there is a run of none.
    """
    first: dict[str, Run] = {}
    for run in runs:
        check_joint(full.stored, run.stored)
        check_joint(first.setdefault(run.method, run).stored, run.stored)
    methods = by_method(runs)
    controls = {run.budget: run for run in runs if run.method == DOWNSAMPLE}
    terms = {label: {budget: run.terms for budget, run in budgets.items()} for label, budgets in methods.items()}
    blind = next((run for run in runs if run.method == BLIND), None)
    kept = {} if blind is None else gains(terms, full.terms, blind.terms)
    rows, needed = [], {}
    for label, budgets in methods.items():
        found = tokens_needed(full.terms, terms[label], share)
        if label != BLIND:
            needed[label] = dataclasses.asdict(found) | {"text": found.text}
        for budget, test in found.tests.items():
            row = row_of(budgets[budget], full, controls.get(budget), data)
            gain = plain_interval(kept[label][budget]) if kept else None
            rows.append({"method": label, "budget": budget, **row, "gain": gain, "test": dataclasses.asdict(test)})
    labels = data.labels(full.stored.images)
    known = [
        spent(label, budget, run.terms, run.sample_scores, run.stored.accounting)
        for label, budgets in ({FULL: {full.budget: full}} | methods).items()
        for budget, run in budgets.items()
        if label != BLIND
    ]
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
        "blind": None if blind is None else blind_record(needed, terms, full.terms, blind.terms, share, floor),
        "budgets": budgets_record(known[0], [run for run in known[1:] if run], labels),
        "notes": answerable_blind(data.benchmark)
        + circumstances({str(run.folder): run.stored.result for run in (full, *runs)}),
    }


def row_of(run: Run, full: Run, control: Run | None, data: Dataset) -> dict[str, Any]:
    """Score, loyalty and hard questions of one run; a value is None if it cannot be computed.

    Loyalty and hard questions leave out questions without an image, which no method changes.
    """
    labels = data.labels(full.stored.images)
    shown = {question.id for question in data.questions if question.images}
    texts, full_texts = ({name: text for name, text in one.texts.items() if name in shown} for one in (run, full))
    known = None if run.sample_scores is None else full.sample_scores
    found: dict[str, Interval | None] = {"score": interval(run.terms)}
    found |= loyalty(texts, full_texts, known, labels, data.normalise or plain)
    groups: dict[str, tuple[str, ...]] = {}
    if run.sample_scores is not None and known is not None and control and control.sample_scores is not None:
        groups = hard_questions(known, control.sample_scores)
        groups = {name: tuple(one for one in ids if one in shown) for name, ids in groups.items()}
    counts = {f"in_{name}": len(groups[name]) if name in groups else None for name in GROUPS}
    for name in GROUPS:
        found[name] = accuracy_on(run.sample_scores or {}, groups[name], labels) if name in groups else None
    return {name: plain_interval(one) for name, one in found.items()} | counts


def plain_interval(found: Interval | None) -> dict[str, Any] | None:
    """An interval in JSON types; a mean of NaN becomes None."""
    if found is None:
        return None
    return dataclasses.asdict(found) | {"mean": None if math.isnan(found.mean) else found.mean}


def lines(record: Mapping[str, Any]) -> list[str]:
    """The statistics as a table and sentences."""
    unit = f" {record['unit']}" if record["unit"] else ""
    # The visual gain of full is 100 and that of none 0, by definition.
    gain = [] if record["blind"] is None else ["100.0"]
    header = ["method", "budget", f"{record['main'].replace('_', ' ')}{unit}", "of full (bound)"]
    header += ["gain kept"] * len(gain) + [*COLUMNS.values()]
    table = [["full", "", cell(record["full"]), "100.0", *gain, *[""] * len(COLUMNS)]]
    for row in record["rows"]:
        bound = f"{rounded(row['test']['of_full'])} (≥ {rounded(row['test']['low'])})"
        known = (cell(row[name], row.get(f"in_{name}")) for name in COLUMNS)
        gain = [] if row["gain"] is None else ["0.0" if row["method"] == BLIND else cell(row["gain"])]
        table.append([row["method"], f"{row['budget']:,}", cell(row["score"]), bound, *gain, *known])
    about = f"{record['title']}, {record['questions']:,} questions, {record['clusters']:,} {record['drawn']}s"
    found = [about, "", markdown(header, table), ""]
    for label, needed in record["tokens_needed"].items():
        tests = ", ".join(f"{budget}: {p_text(test['p'])}" for budget, test in needed["tests"].items())
        found.append(
            f"{label} needs {needed['text']} tokens to keep {100 * needed['share']:g} % of full (one-sided test at "
            f"{100 * LEVEL:g} %, largest budget first; p by budget: {tests})."
        )
    found += gain_lines(record["blind"]) if record["blind"] else []
    found += budgets_lines(record["budgets"], record["unit"])
    found += [f"no interval, {name}: {reason}" for name, reason in withheld(record)]
    return found + [f"note: {note}" for note in record["notes"]]


def withheld(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The numbers that have no interval, and why."""
    cells = [("full", record["full"])]
    for row in record["rows"]:
        place = f"{row['method']} at {row['budget']:,}"
        cells += [(f"{place}, {name.replace('_', ' ')}", row[name]) for name in ("score", *COLUMNS)]
        cells += [(f"{place}, gain kept", row["gain"])] if row["method"] != BLIND else []
    return [
        (name, one["method"].removeprefix("n/a: "))
        for name, one in cells
        if one and one["mean"] is not None and one["low"] is None
    ]


def cell(found: Mapping[str, Any] | None, questions: int | None = None) -> str:
    """An interval as a cell of the table; for a group of questions also their number."""
    if found is None:
        return "n/a"
    text = "n/a" if found["mean"] is None else score_text(Interval(found["mean"], found["low"], found["high"]))
    return text if questions is None else f"{text} n={questions:,}"


def fraction(text: str) -> float:
    """Read a number above 0 and below 1; ValueError for anything else."""
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
        "--share",
        type=value(fraction),
        default=SHARE,
        help="share of the score of full, and of the visual gain, that tokens needed asks for",
    )
    add_json_flag(p, "title, main, unit, questions, clusters, drawn, full, rows, tokens_needed, blind, budgets, notes")
    args = p.parse_args(arguments)
    result = read_result(results_folder(args.full))
    settings, profile = result["settings"], args.profile or result["facts"].get("profile")
    data = open_dataset(settings["benchmark"], args.data, args.split or settings["split"], profile, args.source)
    full = read_run(args.full, data, args.judge)
    if full.method != FULL:
        raise UserError(f"The first folder should be a run of {FULL}, got one of {full.method}: {full.folder}.")
    runs, floor = [read_run(folder, data, args.judge) for folder in args.runs], None
    if any(run.method == BLIND for run in runs):
        floor = floor_of(data, full.texts, Path(args.data), settings["split"], profile)
    record = statistics_of(full, runs, data, args.share, floor)
    print_record(record, lines(record), args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
