"""Score answers that exist already, without a model.

python -m eval.score gqa --answers merge.jsonl --data playground/data/eval
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval import benchmarks
from eval.__main__ import Help, Parser
from eval.config import DEFAULT_DATA
from eval.jsonl import read_json, read_jsonl, write_json
from eval.metrics.gqa import by_question
from eval.report import score_lines, scored
from llava.errors import UserError

# The names that id and text have in LLaVA's answer files and in the official prediction files.
IDS = ("question_id", "questionId")
TEXTS = ("text", "prediction")


def read_answers(path: Path) -> dict[str, str]:
    """Raw text by question id, from a JSON-lines answer file or an official JSON list of predictions."""
    try:
        with open(path, "rb") as file:
            is_list = file.read(4096).lstrip().startswith(b"[")
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error
    if is_list:
        rows = [(f"{path} entry {number}", row) for number, row in enumerate(read_json(path), start=1)]
    else:
        rows = [(f"{path} line {number}", row) for number, row in read_jsonl(path)]
    return by_question(answer(row, where) for where, row in rows)


def answer(row: Any, where: str) -> tuple[str, str]:
    """(id, text) of one answer in either naming."""
    if isinstance(row, dict):
        ids = [row[key] for key in IDS if key in row]
        texts = [row[key] for key in TEXTS if key in row]
        if ids and texts and isinstance(texts[0], str):
            return str(ids[0]), texts[0]
    raise UserError(f"{where} should have {' or '.join(IDS)}, and {' or '.join(TEXTS)} as a string.")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    p = Parser(
        prog="python -m eval.score",
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=Help,
        allow_abbrev=False,
    )
    p.add_argument("benchmark", help=f"one of: {', '.join(benchmarks.names())}")
    p.add_argument("--answers", required=True, help="answers.jsonl, LLaVA's merge.jsonl, or a list of predictions")
    p.add_argument("--data", default=str(DEFAULT_DATA), help="folder that holds the benchmarks, one folder each")
    p.add_argument("--split", help="split of the benchmark; its first one if left out")
    p.add_argument("--json", metavar="OUT", help="also write the numbers to this file")
    try:
        args = p.parse_args(arguments)
        benchmark = benchmarks.get(args.benchmark)
        data = benchmark.load(Path(args.data), benchmarks.check_split(benchmark, args.split))
        score = data.score([question.id for question in data.questions], read_answers(Path(args.answers)))
        record = {"title": data.title, **scored(score, data.questions)}
        print("\n".join([f"{data.title}, {record['questions']:,} questions", *score_lines(record)]))
        if args.json:
            write_json(Path(args.json), record)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
