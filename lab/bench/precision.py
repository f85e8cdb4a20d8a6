"""Compare which tokens methods keep in float16 and bfloat16 with those that they keep in float32.

python -m lab.bench.precision --budget 64 --questions 16    # every method that runs at this budget
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from eval.command import exit_on_user_error, make_parser, open_dataset, value
from eval.config import DEFAULT_DATA, count
from eval.efficiency.oracle import reducers_of
from eval.efficiency.turns import survivors
from eval.tables import markdown, write_csv
from llava.model.builder import load
from llava.model.llava_arch import Llava
from llava.pipeline.accounting import Answer
from llava.pipeline.generate import generate
from llava.places import WORK, check_checkout
from llava.processing.prompt import Sample
from llava.reduction.reducer import Reducer

TABLE = WORK / "docs" / "tables" / "precision.csv"
DTYPES = ("float32", "float16", "bfloat16")
HEAD = [
    "method",
    *(f"{dtype}, {what}" for dtype in DTYPES[1:] for what in ("kept tokens dropped, %", "answers changed")),
]


def answers_of(model: Llava, samples: Sequence[Sample], reducer: Reducer) -> list[Answer]:
    """The method's answers to the questions, one at a time."""
    return [generate(model, [sample], reducer, 8).answers[0] for sample in samples]


def kept_share(exact: Sequence[Answer], other: Sequence[Answer]) -> float:
    """The share of the tokens kept in `exact` that the `other` answers to the same questions keep too."""
    kept = [(survivors(one), survivors(two)) for one, two in zip(exact, other, strict=True)]
    total = sum(len(one) for one, _ in kept)
    return sum(len(one & two) for one, two in kept) / total if total else 1.0


def row_of(name: str, found: dict[str, dict[str, list[Answer]]]) -> list[str]:
    """For each half precision, the share of float32's kept tokens that it drops, and how many answers differ."""
    row, exact = [name], found["float32"][name]
    for dtype in DTYPES[1:]:
        halves = found[dtype][name]
        changed = sum(whole.text != half.text for whole, half in zip(exact, halves, strict=True))
        row += [f"{100 * (1 - kept_share(exact, halves)):.1f}", f"{changed} of {len(exact)}"]
    return row


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = make_parser("lab.bench.precision", __doc__)
    parser.add_argument("--model", help="folder or hub name of a checkpoint; default: the bundled toy model")
    parser.add_argument("--methods", default="all", help="names separated by commas, or all that run at the budget")
    parser.add_argument("--budget", type=value(count), default=64, help="visual tokens to keep")
    parser.add_argument("--questions", type=value(count), default=16, help="of GQA, each about another image")
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder that holds the benchmarks")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:NUMBER")
    parser.add_argument("--write", action="store_true", help="put the table into docs/tables/precision.csv")
    args = parser.parse_args(arguments)
    if args.write:
        check_checkout(f"{parser.prog} --write")
    data = open_dataset("gqa", str(args.data), None, None, "auto")
    one_each = {question.image: question for question in reversed(data.questions)}
    samples = [data.sample(question) for question in list(one_each.values())[: args.questions]]
    reducers = reducers_of(args.methods.split(","), args.budget, {}, load(args.model, device="cpu"))
    found: dict[str, dict[str, list[Answer]]] = {}
    for dtype in DTYPES:
        model, named = load(args.model, dtype, args.device), tqdm(reducers.items(), desc=dtype, unit="method")
        found[dtype] = {name: answers_of(model, samples, reducer) for name, reducer in named}
    rows = sorted((row_of(name, found) for name in reducers), key=lambda row: -float(row[3]))
    print(markdown(HEAD, rows))
    if args.write:
        write_csv(TABLE, HEAD, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
