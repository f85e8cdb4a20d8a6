"""Print POPE's numbers of an answer file for each category, as LLaVA's module of this name does.

Differs from LLaVA's: categories are in the order of the paper, labels are joined by question and not by line, a missing
answer is an error, and a division by zero gives 0 with a note on standard error.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started by its path: import `llava` and `eval` from this checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from eval.answers.reading import read_rows
from eval.benchmarks.pope import FN, FP, TN, TP, categories_of, empty_notes, measures, parse, read_official, tally
from eval.command import exit_on_user_error, make_parser

NAMES = {
    "accuracy": "Accuracy",
    "precision": "Precision",
    "recall": "Recall",
    "f1": "F1 score",
    "yes_ratio": "Yes ratio",
}
LAST = ("f1", "accuracy", "precision", "recall", "yes_ratio")


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    p = make_parser("llava.eval.eval_pope", __doc__)
    p.add_argument("--annotation-dir", type=Path, required=True, help="folder of coco_pope_random.json and so on")
    p.add_argument("--question-file", type=Path, required=True, help="LLaVA's questions")
    p.add_argument("--result-file", type=Path, required=True, help="the answers to them")
    args = p.parse_args(arguments)
    items = read_official(args.question_file, "test", args.annotation_dir).references
    rows, _ = read_rows(args.result_file)
    _, counts = tally(items, {row.id or "": row.text for row in rows}, parse)
    categories, counted = categories_of(items), counts.sum(0)
    for note in empty_notes(categories, counted):
        print(note, file=sys.stderr)
    for category, sums in zip(categories, counted, strict=True):
        values = {name: float(value) for name, value in measures(sums).items()}
        print(f"Category: {category}, # samples: {int(sums.sum())}")
        print("TP\tFP\tTN\tFN\t")
        print(*(int(sums[column]) for column in (TP, FP, TN, FN)), sep="\t")
        for name, title in NAMES.items():
            print(f"{title}: {values[name]}")
        print(", ".join(f"{values[name]:.3f}" for name in LAST))
        print("====================================")
    return 0


if __name__ == "__main__":
    sys.exit(main())
