"""What the answer store costs: its share of a run at several batch sizes, and the time to open a large one.

    python -m eval.efficiency.store_cost [--milliseconds 12] [--answers 100000]

No model runs: a question takes the milliseconds that are given, in which this process only counts the time.
"""

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.answers import AnswerStore, answer_id, seal_of
from eval.command import exit_on_user_error, make_parser, value
from eval.config import count

BATCHES = (1, 8, 48)
QUESTIONS = 2642  # as many as the toy GQA has: a sync at the start weighs more in a shorter run
SETTINGS = {"benchmark": "gqa"}
SEAL = seal_of(SETTINGS)


def line(number: int) -> dict[str, Any]:
    """An answer of usual length."""
    audit = {
        "entering": [64] * 32,
        "mean": 64.0,
        "planned": 64.0,
        "visual_tokens": 576,
        "merged": 30,
        "kv_bytes": 819200,
    }
    return {
        "question_id": str(number),
        "prompt": "Is there a red thing on the left of the tree?\nAnswer the question using a single word or phrase.",
        "text": "yes",
        "answer_id": answer_id(SEAL, str(number)),
        "model_id": "toy",
        "metadata": {"audit": audit, "pictures": "0123456789ab"},
    }


def open_store(folder: Path, questions: int) -> AnswerStore:
    return AnswerStore(folder, SETTINGS, [str(number) for number in range(questions)])


def share(folder: Path, size: int, seconds: float) -> float:
    """The part of a run's time that goes into storing batches of `size` questions, each of which takes `seconds`."""
    spent, began = 0.0, time.perf_counter()
    with open_store(folder, QUESTIONS) as store:
        for first in range(0, QUESTIONS, size):
            lines = [line(number) for number in range(first, min(first + size, QUESTIONS))]
            end = time.perf_counter() + len(lines) * seconds
            while time.perf_counter() < end:  # busy, as a processor that answers: one that sleeps is slow to wake
                pass
            ready = time.perf_counter()
            store.add(lines, {"questions": len(lines), "notes": []})
            spent += time.perf_counter() - ready
    return spent / (time.perf_counter() - began)


def opening(folder: Path, answers: int) -> float:
    """Seconds to open a store that holds so many answers."""
    with open_store(folder, answers) as store:
        for first in range(0, answers, 1000):
            last = min(first + 1000, answers)
            store.add([line(number) for number in range(first, last)], {"questions": last - first})
    began = time.perf_counter()
    open_store(folder, answers).close()
    return time.perf_counter() - began


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = make_parser("eval.efficiency.store_cost", __doc__)
    parser.add_argument("--milliseconds", type=value(count), default=12, help="time of a question")
    parser.add_argument("--answers", type=value(count), default=100_000, help="answers of the store that is opened")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        for size in BATCHES:
            part = share(Path(folder) / str(size), size, args.milliseconds / 1000)
            print(f"batches of {size}: {100 * part:.2f} % of a run of {args.milliseconds} ms per question")
        seconds = opening(Path(folder) / "large", args.answers)
        print(f"opening {args.answers:,} answers: {seconds:.1f} s, {1e6 * seconds / args.answers:.1f} us each")
    return 0


if __name__ == "__main__":
    sys.exit(main())
