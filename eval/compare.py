"""Compare two answer files on the same benchmark: difference, 95 % interval and a paired test.

python -m eval.compare A.jsonl B.jsonl --benchmark gqa --data DIR
python -m eval.compare RUN_A RUN_B      # two output folders of `python -m eval` say by themselves what they answer
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.answers.jsonl import read_json, write_json
from eval.answers.reading import read_answers
from eval.benchmarks.base import Dataset
from eval.command import add_data_flags, exit_on_user_error, make_parser, open_dataset
from eval.judging.choice import HELP as JUDGE_HELP
from eval.judging.choice import check_judge, score_answers
from eval.results import statistics
from llava.errors import UserError


def compare(
    a: Path, b: Path, data: Dataset, partial: bool = False, judge: str = "auto", seed: int = 0
) -> dict[str, Any]:
    """Both scores and a minus b; with `partial`, over the questions that both answer."""
    check_judge(data, judge)
    files = [read_answers(path, data, partial) for path in (a, b)]
    common = files[0].texts.keys() & files[1].texts.keys()
    asked = [question.id for question in data.questions if question.id in common]
    notes = [f"{'AB'[i]}: {note}" for i, file in enumerate(files) for note in file.notes]
    if len(asked) < len(data.questions):
        notes.append(f"compared on {len(asked):,} of {len(data.questions):,} questions")
    scores = [
        score_answers(data, judge, asked, {n: t for n, t in file.texts.items() if n in common}, path)[0]
        for file, path in zip(files, (a, b), strict=True)
    ]
    main = scores[0].main
    if scores[1].main != main:
        raise UserError(
            f"A was scored with {main} and B with {scores[1].main}; score both files with the same --judge."
        )
    if any(score.values.get(main) is None for score in scores):
        raise UserError(f"{data.title} has no score to compare here: {'; '.join(scores[0].notes)}.")
    images = {question.id: question.image for question in data.questions}
    a_terms, b_terms = (statistics.terms_of(score, images) for score in scores)
    found = statistics.compare(a_terms, b_terms, seed=seed)
    return {
        "title": data.title,
        "main": main,
        "questions": len(asked),
        "a": scores[0].values[main],
        "b": scores[1].values[main],
        **dataclasses.asdict(found),
        "drawn": a_terms.unit,
        "unit": "" if main in scores[0].points else "%",
        "notes": notes,
    }


def lines(record: Mapping[str, Any]) -> list[str]:
    """The comparison as lines of text."""
    unit = f" {record['unit']}" if record["unit"] else ""
    verdict = "significant at 5 %" if record["p"] <= 1 - statistics.LEVEL else "not significant at 5 %"
    low, high = record["low"], record["high"]
    sure = record["note"] if low is None else f"{low:+.2f} to {high:+.2f}"
    return [
        f"{record['title']}, {record['main']} over {record['questions']:,} questions",
        f"A  {record['a']:.2f}{unit}",
        f"B  {record['b']:.2f}{unit}",
        f"A - B  {record['difference']:+.2f} (95 % CI {sure})",
        f"p  {statistics.p_text(record['p'])}, paired permutation test by {record['drawn']}: {verdict}",
        *(f"note: {note}" for note in record["notes"]),
    ]


def run_folder(path: Path) -> tuple[str, str, str | None]:
    """Benchmark, split and profile of an output folder."""
    settings = read_json(path / "settings.json")
    return settings["benchmark"], settings["split"], settings.get("profile")


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    p = make_parser("eval.compare", __doc__)
    p.add_argument("a", help="answer file, or output folder of a run")
    p.add_argument("b", help="answer file, or output folder of a run")
    p.add_argument("--benchmark", help="of the files; output folders say it themselves")
    add_data_flags(p)
    p.add_argument("--partial", action="store_true", help="compare on the questions that both files answer")
    p.add_argument("--judge", default="auto", metavar="JUDGE", help=JUDGE_HELP)
    p.add_argument("--json", metavar="OUT", help="also write the numbers to this file")
    args = p.parse_args(arguments)
    paths = [Path(args.a), Path(args.b)]
    folders = [path for path in paths if path.is_dir() and (path / "settings.json").is_file()]
    said = {run_folder(path) for path in folders}
    if len(said) > 1:
        raise UserError(f"The two runs are of different benchmarks: {' and '.join(map(str, sorted(said)))}.")
    name, split, profile = said.pop() if said else (args.benchmark, args.split, args.profile)
    if name is None:
        raise UserError("--benchmark is missing; only output folders of `python -m eval` say what they answer.")
    data = open_dataset(args.benchmark or name, args.data, args.split or split, args.profile or profile, args.source)
    a, b = (path / "answers.jsonl" if path in folders else path for path in paths)
    record = compare(a, b, data, args.partial, args.judge)
    print("\n".join(lines(record)))
    if args.json:
        write_json(Path(args.json), record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
