"""This repository beside what a user would run instead, on one machine: two worker processes take turns.

    python -m eval.efficiency.peers measure --name visiondrop --json results/bench/peers/visiondrop.json \
        --worker "python -m eval.efficiency.peer_workers ours --method visiondrop --budget 64" \
        --worker "/envs/visiondrop/bin/python worker.py"
    python -m eval.efficiency.peers table results/bench/peers/*.json

A worker is a process that builds its model once and then measures on request. `peer_workers.py` holds that of this
repository and that of transformers; a worker of an official code lives outside, in an environment of its own. These
lines go over its standard input and output:

    worker -> parent    {"ready": "what it runs", ...}              once, with whatever the result should record
    parent -> worker    measure
    worker -> parent    {"seconds": {"name": 1.23, ...}}            one measurement of each thing that it runs
    parent -> worker    end of input                                the worker ends

Lines of a worker that do not begin with "{" are skipped: codes print. A worker measures nothing between two requests,
so at most one of two workers is busy. What slows the machine in a round slows both, so ratios are taken per round.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import comb
from pathlib import Path
from statistics import median
from typing import Any, Self

from tqdm import tqdm

from eval.command import exit_on_user_error, make_parser
from eval.results.report import commit, hardware
from llava.errors import UserError

REQUEST = "measure"
EQUAL = ("layers", "distinct_layers", "dtype", "threads")  # of all workers that say these of themselves
CONFIDENCE = 0.95
FEWEST = 6  # rounds whose whole range covers the median so often

# Workers and their turns


class Worker:
    """A worker process, as its parent sees it.

    Args:
        command: the worker's command line.
        threads: threads of its CPU operations (OMP_NUM_THREADS).

    Raises:
        UserError: the command cannot be started, the worker ended early, or its line is not one of the protocol.
    """

    def __init__(self, command: str, threads: int):
        self.command = command
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        try:
            self.process = subprocess.Popen(
                shlex.split(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
            )
        except (OSError, ValueError) as error:
            raise UserError(f"The worker {command!r} cannot be started: {error}.") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End the worker: it reads the end of its input; one that does not end by itself is killed."""
        assert self.process.stdin and self.process.stdout
        self.process.stdout.close()
        try:
            self.process.stdin.close()
            self.process.wait(timeout=10)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()

    def ready(self) -> dict[str, Any]:
        """What the worker says of itself, once its model is built."""
        return self._read("ready")

    def measure(self) -> dict[str, float]:
        """One measurement: seconds by name.

        Raises:
            UserError: also where there is no number, or one that is no positive time.
        """
        assert self.process.stdin
        try:
            self.process.stdin.write(f"{REQUEST}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        seconds = self._read("seconds")["seconds"]
        times = list(seconds.values()) if isinstance(seconds, dict) else []
        if not times or not all(isinstance(value, int | float) and 0 < value < float("inf") for value in times):
            raise UserError(f"The worker {self.command!r} answered {seconds!r}, not seconds above 0 by name.")
        return {name: float(value) for name, value in seconds.items()}

    def _read(self, key: str) -> dict[str, Any]:
        """The worker's next line of the protocol, which must have `key`."""
        assert self.process.stdout
        for line in self.process.stdout:
            if not line.startswith("{"):
                continue
            try:
                said: dict[str, Any] = json.loads(line)
            except ValueError:
                said = {}
            if key not in said:
                raise UserError(f"The worker {self.command!r} wrote {line.strip()[:200]!r}, not JSON with {key!r}.")
            return said
        raise self._ended()

    def _ended(self) -> UserError:
        code = self.process.wait()
        return UserError(f"The worker {self.command!r} ended with exit code {code}; its own words are above.")


def serve(ready: Mapping[str, Any], measure: Callable[[], Mapping[str, float]]) -> None:
    """Be a worker: say what is run, then measure once per request until the input ends.

    Args:
        ready: has the key "ready"; goes into the result.
        measure: seconds by name.
    """
    print(json.dumps(ready), flush=True)
    for line in sys.stdin:
        if line.strip() == REQUEST:
            print(json.dumps({"seconds": dict(measure())}), flush=True)


def compare(name: str, commands: Sequence[str], rounds: int, threads: int) -> dict[str, Any]:
    """Measure the workers in turns, forwards in one round and backwards in the next.

    A drift of the machine within rounds cancels over two rounds. Each worker measures once before the first round,
    which is thrown away.

    Args:
        name: of the comparison.
        commands: command lines of the workers; the first name that the first one measures is the reference.

    Returns:
        What a result file holds: name, settings, what the workers say of themselves, and seconds by name per round.

    Raises:
        UserError: a worker fails, workers say that they run models of different size, or two measure something under
            the same name.
    """
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(command, threads)) for command in commands]
        ready = [worker.ready() for worker in workers]
        refuse_unequal(ready)
        names = [name for worker in workers for name in worker.measure()]
        if len(set(names)) != len(names):
            raise UserError(f"The workers measure {', '.join(names)}; a name may occur once.")
        began, load = time.time(), [os.getloadavg()[0]]
        rows = []
        for number in tqdm(range(rounds), desc=name, unit="round", disable=None):
            row: dict[str, float] = {}
            for worker in workers if number % 2 == 0 else reversed(workers):
                row |= worker.measure()
            rows.append({name: row[name] for name in names})
            load.append(os.getloadavg()[0])
    return {
        "name": name,
        "commands": list(commands),
        "threads": threads,
        "hardware": hardware("cpu"),
        "commit": commit(),
        "began": began,
        "load": load,
        "workers": ready,
        "rounds": rows,
    }


def refuse_unequal(ready: Sequence[dict[str, Any]]) -> None:
    """Raise UserError where two workers that say how deep or how precise they are do not say the same."""
    for key in EQUAL:
        said = [worker[key] for worker in ready if key in worker]
        if any(one != said[0] for one in said):
            raise UserError(f"The workers say {key} {', '.join(map(str, said))}; give all of them the same model.")


# Ratios


@dataclass(frozen=True)
class Ratio:
    """How many times the reference's time something takes: the median over rounds, and an interval for it."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def paired(rounds: Sequence[Mapping[str, float]], name: str, reference: str) -> Ratio:
    """The ratio of two times in each round; what slows both in a round cancels.

    Args:
        rounds: seconds by name, one dictionary per round.
    """
    return over_rounds([row[name] / row[reference] for row in rounds])


def over_rounds(ratios: Sequence[float]) -> Ratio:
    """The median of the ratios of all rounds, and its interval.

    Source:
        The interval is that of the sign test: order statistics of the ratios, without an assumption on how they are
        distributed (Conover, Practical Nonparametric Statistics, 1999, section 3.2).
    """
    ordered = sorted(ratios)
    outer = interval_rank(len(ordered))
    return Ratio(median(ordered), ordered[outer], ordered[-1 - outer])


def interval_rank(rounds: int) -> int:
    """How many values may be left out at either end, so that the rest spans the median with 95 % confidence.

    0, the whole range, also where that is too few rounds: below FEWEST it covers the median less often.
    """
    rank, tail = 0, 0.0
    while rank < rounds // 2:
        tail += comb(rounds, rank) / 2**rounds
        if 2 * tail > 1 - CONFIDENCE:
            break
        rank += 1
    return max(0, rank - 1)


# The command


def table(results: Sequence[dict[str, Any]], beside: str | None = None) -> str:
    """Results of several comparisons as a Markdown table: a row for all but the reference of each.

    Args:
        results: what `compare` returned. The first name of a comparison's rounds is its reference.
        beside: another reference.

    Raises:
        UserError: a comparison did not measure `beside`.
    """
    lines = ["| comparison | seconds | beside it | seconds | ratio | rounds |", "|---|---|---|---|---|---|"]
    for result in results:
        rounds = result["rounds"]
        names = list(rounds[0])
        if beside is not None and beside not in names:
            raise UserError(f"{result['name']} measured {', '.join(names)}, not {beside!r}; choose one of these.")
        reference = beside or names[0]
        title = result["name"] if beside is None else f"{result['name']}: {beside}"
        seconds = {name: f"{median(row[name] for row in rounds):.2f}" for name in names}
        for name in names:
            if name != reference:
                cells = [title, seconds[reference], name, seconds[name], str(paired(rounds, name, reference))]
                lines.append(f"| {' | '.join(cells)} | {len(rounds)} |")
    return "\n".join(lines)


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
    tabulating.set_defaults(run=lambda args: print(table(list(map(read, args.results)), args.beside)))
    args = parser.parse_args(arguments)
    args.run(args)
    return 0


def measure(args: argparse.Namespace) -> None:
    if args.rounds < 1 or args.threads < 1:
        raise UserError(f"--rounds and --threads should be at least 1, not {args.rounds} and {args.threads}.")
    result = compare(args.name, args.worker, args.rounds, args.threads)
    print(table([result]))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
