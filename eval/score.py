"""Score answers that exist already, without a model.

python -m eval.score gqa --answers merge.jsonl --data playground/data/eval

Files of LLaVA's scripts, of lmms-eval (samples_*.jsonl) and of this repository are read; see eval/answers/reading.py.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval import benchmarks
from eval.answers.jsonl import write_json
from eval.answers.reading import read_answers
from eval.benchmarks.base import Benchmark, Dataset, Question
from eval.command import add_data_flags, exit_on_user_error, make_parser, open_dataset
from eval.config import DEFAULT_DATA
from eval.judging.choice import HELP as JUDGE_HELP
from eval.judging.choice import check_judge, score_answers
from eval.results.report import score_lines, scored


def score_file(path: Path, data: Dataset, partial: bool = False, judge: str = "auto") -> dict[str, Any]:
    """Score an answer file; returns the record for JSON. Verdicts of an LLM judge are stored beside the file."""
    check_judge(data, judge)
    answers = read_answers(path, data, partial)
    asked = [question for question in data.questions if question.id in answers.texts]
    score, judged = score_answers(data, judge, [question.id for question in asked], answers.texts, path)
    record = scored(score, asked)
    record["notes"] += answers.notes
    return {"title": data.title, "facts": {**data.facts, **judged}, "available": len(data.questions), **record}


def score_alone(path: Path, benchmark: Benchmark, partial: bool = False) -> dict[str, Any] | None:
    """The record of a file that holds its references; None if it does not, or the benchmark has no such format."""
    score = benchmark.score_alone(path, partial) if benchmark.score_alone is not None else None
    if score is None:
        return None
    record = scored(score, [Question(name, "", "", (), "") for name in score.correct])
    record["notes"].append("scored with the references in the answer file itself; its questions were not checked")
    return {"title": benchmark.name, "facts": {"source": "answer file"}, "available": record["questions"], **record}


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    p = make_parser("eval.score", __doc__)
    p.add_argument("benchmark", help=f"one of: {', '.join(benchmarks.names())}")
    p.add_argument("--answers", required=True, help="answers.jsonl, LLaVA's merge.jsonl, or a list of predictions")
    add_data_flags(p)
    p.add_argument("--partial", action="store_true", help="score what fits of a file that lacks answers or has others")
    p.add_argument("--judge", default="auto", metavar="JUDGE", help=JUDGE_HELP)
    p.add_argument("--json", metavar="OUT", help="also write the numbers to this file")
    args = p.parse_args(arguments)
    path, benchmark = Path(args.answers), benchmarks.get(args.benchmark)
    has_data = args.data != str(DEFAULT_DATA) and benchmark.is_in(Path(args.data))
    record = None if has_data else score_alone(path, benchmark, args.partial)
    if record is None:
        data = open_dataset(args.benchmark, args.data, args.split, args.profile, args.source)
        record = score_file(path, data, args.partial, args.judge)
    print("\n".join([f"{record['title']}, {record['questions']:,} questions", *score_lines(record)]))
    if args.json:
        write_json(Path(args.json), record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
