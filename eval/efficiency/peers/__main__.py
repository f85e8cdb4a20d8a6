"""Compare this repository with another code on this machine: two workers take turns, ratios are taken per round.

    python -m eval.efficiency.peers measure --name visiondrop --json results/bench/peers/visiondrop.json \
        --worker "python -m eval.efficiency.peers.ours --method visiondrop --budget 64" \
        --worker "/envs/visiondrop/bin/python worker.py"
    python -m eval.efficiency.peers table results/bench/peers/*.json
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.command import exit_on_user_error, make_parser
from eval.efficiency.peers.alternate import compare
from eval.efficiency.peers.ratios import table
from llava.errors import UserError


def read(path: Path) -> dict[str, Any]:
    """A result file.

    Raises:
        UserError: there is none, or it is not a result of `measure`.
    """
    try:
        result: dict[str, Any] = json.loads(path.read_text())
        missing = [key for key in ("name", "rounds") if not result[key]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no result of `measure`: {error!r}.") from error
    if missing:
        raise UserError(f"{path} is no result of `measure`: its {missing[0]} is empty.")
    return result


def measure(args: argparse.Namespace) -> int:
    if args.rounds < 1 or args.threads < 1:
        raise UserError(f"--rounds and --threads should be at least 1, not {args.rounds} and {args.threads}.")
    result = compare(args.name, args.worker, args.rounds, args.threads)
    print(table([result]))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = make_parser("eval.efficiency.peers", __doc__)
    commands = parser.add_subparsers(required=True, metavar="measure|table")
    measuring = commands.add_parser("measure", help="let workers take turns")
    measuring.add_argument("--name", required=True, help="of the comparison, a row's first cell")
    measuring.add_argument(
        "--worker", action="append", required=True, metavar="COMMAND", help="a worker's command line; the first is ours"
    )
    measuring.add_argument("--rounds", type=int, default=7, help="measurements of each worker after one warm-up")
    measuring.add_argument("--threads", type=int, default=2, help="of the CPU, for each worker")
    measuring.add_argument("--json", type=Path, help="also write the result here")
    measuring.set_defaults(run=measure)
    tabulating = commands.add_parser("table", help="print the ratios of result files as Markdown")
    tabulating.add_argument("results", nargs="+", type=Path, help="files that measure wrote")
    tabulating.add_argument("--beside", metavar="NAME", help="divide by the times of this name, not of the first")
    tabulating.set_defaults(run=lambda args: print(table(list(map(read, args.results)), args.beside)) or 0)
    args = parser.parse_args(arguments)
    return int(args.run(args))


if __name__ == "__main__":
    sys.exit(main())
