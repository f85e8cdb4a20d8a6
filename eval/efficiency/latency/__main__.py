"""The efficiency protocol: time, memory and operations of methods beside `full` and their oracles, in one process.

    python -m eval.efficiency.latency --method consensusdrop --budget 64
    python -m eval.efficiency.latency --method all --budget 64 --shape llava-1.5-7b --dtype bfloat16
    python -m eval.efficiency.latency --method consensusdrop --budget 64 --scenario offline

With `--shape` the model has random weights: the tower has its full depth, the decoder all of its layers or `--layers`,
of which `--distinct` have weights of their own, which the others share. With `--measurements FILE` every measurement is
written at once, and an interrupted run continues from the file. docs/efficiency.md defines every column.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from eval.command import exit_on_user_error, make_parser, value
from eval.config import DEFAULT_DATA, DEFAULT_MODEL, FULL, count
from eval.efficiency.latency.measure import CLOCKS
from eval.efficiency.latency.methods import COMPILED
from eval.efficiency.latency.plot import plot
from eval.efficiency.latency.run import run
from eval.efficiency.latency.scenarios import SCENARIOS
from eval.efficiency.latency.table import page, sentence
from eval.efficiency.shapes import SHAPES
from llava.budget import count_or_ratio
from llava.model.builder import DTYPES


def counts(text: str) -> tuple[int, ...]:
    """ "1,8,32" as numbers."""
    return tuple(count(part) for part in text.split(","))


def lengths(text: str) -> tuple[int, ...]:
    """ "1,16" as numbers; "0" for none."""
    return () if text == "0" else counts(text)


def share(text: str) -> float:
    """A share between 0 and 1."""
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 <= found <= 1:
        raise ValueError(f"should be a share from 0 to 1, got {text!r}")
    return found


def parser() -> argparse.ArgumentParser:
    """All flags."""
    found = make_parser("eval.efficiency.latency", __doc__)
    found.add_argument("--method", required=True, help="a name, several separated by commas, or all")
    found.add_argument(
        "--budget",
        type=value(count_or_ratio),
        required=True,
        help="visual tokens to keep per image, or their ratio (1/9)",
    )
    found.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="[METHOD.]KEY=VALUE",
        help="option of one method, or without METHOD of each that is named",
    )
    found.add_argument(
        "--scenario",
        default="latency",
        choices=tuple(SCENARIOS),
        help="; ".join(f"{name}: {one.summary}" for name, one in SCENARIOS.items()),
    )
    found.add_argument("--model", default=DEFAULT_MODEL, help="folder or hub name of a checkpoint")
    found.add_argument("--shape", help=f"random weights in the shape of: {', '.join(SHAPES)}")
    found.add_argument("--distinct", type=value(count), default=4, help="with --shape: layers with their own weights")
    found.add_argument("--layers", type=value(count), help="with --shape: so many decoder layers instead of all")
    found.add_argument("--picture", action="append", default=[], metavar="KEY=VALUE", help="how images are read")
    found.add_argument("--dtype", default="float32", choices=tuple(DTYPES), help="of the weights")
    found.add_argument("--device", default="auto", help="torch device")
    found.add_argument(
        "--batch-size", type=value(counts), help="questions in a batch, each about its own image: 1, or 1,8,32"
    )
    found.add_argument("--lengths", type=value(lengths), help="tokens of the answers: 1,16; 0 for the prefill alone")
    found.add_argument("--repeats", type=value(count), help="turns of each method after one warm-up")
    found.add_argument(
        "--clock",
        default="wall",
        choices=CLOCKS,
        help="cpu: time that this process computes",
    )
    found.add_argument("--threads", type=int, default=0, help="of the CPU; 0 leaves torch's choice")
    found.add_argument(
        "--oracle", action=argparse.BooleanOptionalAction, default=True, help="measure as many tokens chosen for free"
    )
    found.add_argument(
        "--counts", action=argparse.BooleanOptionalAction, default=True, help="count operations, waits and bytes"
    )
    found.add_argument("--compile", action="store_true", help="measure every row a second time, with compiled graphs")
    found.add_argument("--gate", type=value(count), metavar="N", help="accuracy gate: ask N questions first")
    found.add_argument("--gate-share", type=value(share), default=0.9, help="of the accuracy of full that counts")
    found.add_argument("--gate-benchmark", default="gqa", help="where the gate's questions come from")
    found.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder that holds the benchmark of the gate")
    found.add_argument(
        "--measurements",
        "--laps",
        type=Path,
        metavar="FILE",
        help="write every measurement to this file and continue from what is there",
    )
    found.add_argument("--json", type=Path, help="also write the numbers here")
    found.add_argument("--markdown", type=Path, help="also write the tables here")
    found.add_argument("--plot", type=Path, help="also draw the time to the first token here")
    return found


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = parser().parse_args(arguments)
    result = run(args)
    text = page(result)
    print(text)
    rows = [name for name in result["batches"][0]["methods"] if not name.endswith(COMPILED)]
    measured = [name for name in rows if name != FULL and not name.startswith("oracle of")]
    found = result["batches"][0]["methods"][measured[0]].get("ratios") if len(measured) == 1 else None
    if found:
        print(f"\n{sentence(measured[0], args.budget, found)}")
    for path, content in ((args.json, json.dumps(result, indent=1)), (args.markdown, text)):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content + "\n")
    if args.plot:
        plot(args.plot, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
