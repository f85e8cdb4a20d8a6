"""Score answers that exist already, without a model; or compare two runs.

    vtr score gqa --answers merge.jsonl --data playground/data/eval
    vtr score vizwiz --answers merge.jsonl --submission upload/    # also the file for the server
    vtr compare RUN_A RUN_B      # output folders of `vtr eval`: difference, 95 % interval and a paired test
    vtr compare RUN_A RUN_B --by "semantic type"          # the same for every group of a breakdown
    vtr compare RUN_A RUN_B --by "semantic type=rel"      # for this group and for all other questions

Files of LLaVA's scripts, lmms-eval (samples_*.jsonl) and this repository are read; see eval/answers/reading.py. Two
runs, or parts such as RUN/limit200, are compared only if both asked the same questions about the same images with the
same model files, code and options; the method may differ.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval import benchmarks
from eval.answers.jsonl import write_file
from eval.answers.reading import read_answers
from eval.answers.reuse import OF_THE_SCORE, check_images, joint_differences, read_result, read_stored, results_folder
from eval.benchmarks.base import Dataset, no_submission
from eval.command import (
    Parser,
    add_data_flags,
    add_json_flag,
    exit_on_user_error,
    make_parser,
    open_dataset,
    print_record,
    value,
)
from eval.config import path_name
from eval.judging.choice import check_judge, score_answers
from eval.metrics.accuracy import percent
from eval.results import statistics
from eval.results.report import circumstances, score_lines, scored
from eval.statistics.answers import by_group, groups_of
from eval.tables import interval_text, markdown
from llava.errors import UserError


def score_file(
    path: Path, data: Dataset, partial: bool = False, judge: str = "auto", submission: Path | None = None
) -> dict[str, Any]:
    """Score an answer file; returns the record for JSON. Verdicts of an LLM judge are stored next to the file.

    Args:
        partial: see `read_answers`.
        submission: folder for the file that the benchmark's server or script reads.
    """
    check_judge(data, judge)
    if submission is not None and data.submission is no_submission:
        raise UserError(f"No server or script reads a file of answers to {data.title}; leave out --submission.")
    answers = read_answers(path, data, partial)
    asked = [question for question in data.questions if question.id in answers.texts]
    score, judged = score_answers(data, judge, [question.id for question in asked], answers.texts, path)
    record = scored(score, asked, data.labels())
    record["notes"] += answers.notes
    record["submission"] = []
    if submission is not None:
        for name, content in data.submission(answers.texts).items():
            write_file(submission / name, content)
            record["submission"].append(str(submission / name))
    elif score.values.get(score.main) is None and data.submission is not no_submission:
        record["notes"].append("--submission FOLDER writes the file for the server")
    return {"title": data.title, "facts": {**data.facts, **judged}, "available": len(data.questions), **record}


def compare(
    a: Path, b: Path, data: Dataset, partial: bool = False, judge: str = "auto", by: str = ""
) -> dict[str, Any]:
    """Both scores, and a minus b, over the questions that both runs answered.

    Args:
        a, b: output folders.
        partial: leave out questions that failed in a run instead of refusing the run.
        by: also compare within the groups of a breakdown, see eval.statistics.answers.groups_of.
    """
    check_judge(data, judge)
    runs = [read_stored(path, data, partial) for path in (a, b)]
    check_images(runs[0].images, runs[1].images, f"{a} and {b}")
    common = runs[0].texts.keys() & runs[1].texts.keys()
    asked = [question.id for question in data.questions if question.id in common]
    if not asked:
        raise UserError(f"{a} and {b} have no question in common.")
    total = len(data.questions)
    notes = [f"compared on {len(asked):,} of {total:,} questions"] if len(asked) < total else []
    notes += circumstances({"A": runs[0].result, "B": runs[1].result})
    scores, judges = [], []
    for run in runs:
        texts = {name: text for name, text in run.texts.items() if name in common}
        score, facts = score_answers(data, judge, asked, texts, run.answers)
        scores.append(score)
        if "judge" in facts:
            judges.append(facts["judge"]["name"])
    metric = scores[0].main
    if scores[1].main != metric:
        raise UserError(f"A was scored with {metric} and B with {scores[1].main}; score both with the same --judge.")
    if len(set(judges)) > 1:
        raise UserError(f"A was judged by {judges[0]} and B by {judges[1]}; score both with the same --judge.")
    if any(score.values.get(metric) is None for score in scores):
        raise UserError(f"{data.title} has no score to compare here: {'; '.join(scores[0].notes)}.")
    labels = data.labels(runs[0].images)
    a_terms, b_terms = (statistics.terms_of(score, labels) for score in scores)
    found = statistics.compare(a_terms, b_terms)
    groups = groups_of(scores[0], by, data.title) if by else {}
    differences, contrast = by_group(scores[0], scores[1], groups, labels)
    means = [{name: percent(score.correct[one] for one in ids) for name, ids in groups.items()} for score in scores]
    return {
        "title": data.title,
        "main": metric,
        "questions": len(asked),
        "a": scores[0].values[metric],
        "b": scores[1].values[metric],
        **dataclasses.asdict(found),
        "drawn": a_terms.unit,
        "unit": "" if metric in scores[0].points else "%",
        "by": by,
        "groups": {
            name: {"questions": len(ids), "a": means[0][name], "b": means[1][name]}
            | dataclasses.asdict(differences[name])
            for name, ids in groups.items()
        },
        "contrast": contrast and dataclasses.asdict(contrast),
        "notes": notes,
    }


def comparison_lines(record: Mapping[str, Any]) -> list[str]:
    """The comparison as lines of text."""
    unit = f" {record['unit']}" if record["unit"] else ""
    return [
        f"{record['title']}, {record['main']} over {record['questions']:,} questions",
        f"A  {record['a']:.2f}{unit}",
        f"B  {record['b']:.2f}{unit}",
        f"A - B  {difference_text(record)}",
        f"p  {p_line(record, record['drawn'])}",
        *(group_lines(record) if record["groups"] else ()),
        *(f"note: {note}" for note in record["notes"]),
    ]


def difference_text(found: Mapping[str, Any]) -> str:
    """A difference and its interval, or why there is none."""
    low, high = found["low"], found["high"]
    sure = found["note"] if low is None else " to ".join(statistics.rounded(end, 2, "+") for end in (low, high))
    return f"{statistics.rounded(found['difference'], 2, '+')} (95 % CI {sure})"


def p_line(found: Mapping[str, Any], drawn: str) -> str:
    """A p-value, the test that it is of, and the verdict."""
    verdict = "significant at 5 %" if found["p"] <= 1 - statistics.LEVEL else "not significant at 5 %"
    return f"{statistics.p_text(found['p'])}, paired permutation test by {drawn}: {verdict}"


def group_lines(record: Mapping[str, Any]) -> list[str]:
    """The groups as a table; of two groups, also whether the one's difference is larger than the other's."""
    rows = [
        [
            name,
            f"{group['questions']:,}",
            *(f"{group[run]:.2f}" for run in "ab"),
            f"{statistics.rounded(group['difference'], 2, '+')} {interval_text(group['low'], group['high'], True)}",
            statistics.p_text(group["p"]),
        ]
        for name, group in record["groups"].items()
    ]
    kind = record["by"].partition("=")[0]
    about = f"mean sample scores by {kind}; p-values are corrected by Holm for {len(rows)} groups, intervals are not"
    lines = ["", about, markdown([kind, "questions", "A %", "B %", "A - B [95 % CI]", "p"], rows), ""]
    if contrast := record["contrast"]:
        first, second = record["groups"]
        lines.append(f"A - B of {first} minus A - B of {second}  {difference_text(contrast)}")
        lines.append(f"p  {p_line(contrast, record['drawn'])}")
    return lines


def answers_parser(module: str, description: str, keys: str) -> Parser:
    """A parser with the flags that both command lines share.

    Args:
        keys: keys of the record that --json writes, for the help.
    """
    p = make_parser(module, description)
    add_data_flags(p)
    p.add_argument(
        "--partial", action="store_true", help="go on with what fits of a file that lacks answers or has others"
    )
    add_json_flag(p, keys)
    return p


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    keys = "title, facts, available, questions, main, metrics, points, confidence, groups, notes, submission"
    p = answers_parser("eval.score", "Score answers that exist already, without a model.", keys)
    p.add_argument("benchmark", help=f"one of: {', '.join(benchmarks.names())}")
    p.add_argument("--answers", required=True, help="answers.jsonl, LLaVA's merge.jsonl, or a list of predictions")
    p.add_argument(
        "--submission",
        type=value(path_name),
        metavar="FOLDER",
        help="write what the benchmark's server or script reads to this folder",
    )
    args = p.parse_args(arguments)
    folder = None if args.submission is None else Path(args.submission)
    with contextlib.redirect_stdout(sys.stderr):  # what libraries print
        data = open_dataset(args.benchmark, args.data, args.split, args.profile, args.source)
        record = score_file(Path(args.answers), data, args.partial, args.judge, folder)
    written = [f"Wrote {name}." for name in record["submission"]]
    lines = [f"{record['title']}, {record['questions']:,} questions", *score_lines(record), *written]
    print_record(record, lines, args.json)
    return 0


@exit_on_user_error
def compare_command(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    about = "Compare two runs on the same benchmark: difference, 95 % interval and a paired test."
    keys = "title, main, questions, a, b, difference, low, high, p, note, drawn, unit, by, groups, contrast, notes"
    p = answers_parser("eval.cli compare", about, keys)
    p.add_argument("a", type=Path, help="output folder of a run")
    p.add_argument("b", type=Path, help="output folder of another run")
    p.add_argument(
        "--by",
        default="",
        metavar="BREAKDOWN",
        help='also compare within each group of a breakdown, "semantic type"; or within some of its groups together '
        'and within all other questions, "semantic type=rel,attr"',
    )
    args = p.parse_args(arguments)
    first, second = (read_result(results_folder(path)) for path in (args.a, args.b))
    if found := joint_differences(first, second, OF_THE_SCORE):
        raise UserError(f"{args.a} and {args.b} cannot be compared: they differ in {'; '.join(found)}.")
    settings, facts = first["settings"], first["facts"]
    split, profile = args.split or settings["split"], args.profile or facts.get("profile")
    with contextlib.redirect_stdout(sys.stderr):  # what libraries print
        data = open_dataset(settings["benchmark"], args.data, split, profile, args.source)
        record = compare(args.a, args.b, data, args.partial, args.judge, args.by)
    print_record(record, comparison_lines(record), args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
