"""Time methods in rounds on one model, so that a busy machine slows all of them, and divide their times.

In each round, every method has one prefill whose stages are timed, and then one whole answer for each output length.
Answers have a fixed length; no end token or stop string ends them.

Times to the first token are divided round by round, and the median of these ratios is reported. If the machine slows
down from round to round, both times of a ratio grow. The ratio of two medians would mix times of different rounds.
"""

import ctypes
import gc
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import psutil
import torch
from torch import Tensor
from tqdm import tqdm

from eval.efficiency.counts import Counts, OperationCounter, first_token
from eval.versions import commit
from llava.errors import UserError, is_out_of_memory, release_memory
from llava.model.llava_arch import Llava
from llava.pipeline.accounting import Timer
from llava.pipeline.generate import generate
from llava.processing.prompt import Sample
from llava.reduction.merging import Reduction
from llava.reduction.reducer import Reducer

# "cpu" is the CPU time of this process, which other processes on the same cores do not change.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
PARTS = ("vision", "selection", "merging", "prefill")
SPREAD = 1.25  # slowest over fastest round, from which on the machine counts as busy
CONFIDENCE = 0.95
FEWEST = 6  # rounds whose whole range covers the median with this confidence
Ask = Callable[[int], list[Sample]]  # number of the round -> a batch


@dataclass(frozen=True)
class Scenario:
    """What is asked, how often, and how long the answers are, modelled on the scenarios of MLPerf.

    Attributes:
        summary: text for the help and the table.
        lengths: numbers of tokens of the answers.
        repeats: rounds after the warm-up.
        differ: every round asks about another image.
        largest: batch sizes double up to this size or to the largest that fits; None for only the sizes asked for.
    """

    summary: str
    lengths: tuple[int, ...]
    repeats: int
    differ: bool = False
    largest: int | None = None


SCENARIOS = {
    "latency": Scenario("the same question again", (1, 16, 128), 5),
    "single-stream": Scenario("one question after another, each about another image", (16,), 20, differ=True),
    "offline": Scenario("growing batches, to the largest that fits", (16,), 3, largest=32),
}


@dataclass(frozen=True)
class Measured:
    """The times and memory of one method on batches of one size.

    Attributes:
        seconds: median seconds of vision, selection, merging and prefill of a batch; their sum is `ttft`.
        kv_bytes: bytes of the key/value cache of all layers after the prefill, padding included.
        flops: operations up to the first token, by the closed formula of the accounting.
        peak_bytes: the most memory in use in any round.
        above_bytes: the most that a round added to the memory in use before it.
        decode: median seconds per token after the first; None if no answer has a second token.
        end_to_end: output length -> seconds of every round, from opened images to texts.
        ttfts: seconds to the first token of every round.
        attention: names of the attention kernels that ran.
    """

    seconds: dict[str, float]
    kv_bytes: int
    flops: int
    peak_bytes: int
    above_bytes: int = 0
    decode: float | None = None
    end_to_end: dict[int, tuple[float, ...]] = field(default_factory=dict)
    ttfts: tuple[float, ...] = ()
    attention: tuple[str, ...] = ()

    @property
    def ttft(self) -> float:
        return sum(self.seconds.values())


class Measurements:
    """Measurements by round, method and batch size; round 0 is the warm-up.

    If a JSONL file is given, each measurement is appended to it at once. An interrupted benchmark can then continue,
    also on another machine with the same hardware.

    Args:
        path: the file; None keeps measurements in memory only.
        settings: what all measurements have in common; None takes the settings from the file.

    Attributes:
        commits: commits of the code that measured. Outside a git checkout, COMMIT in the environment names it.

    Raises:
        UserError: the file holds measurements under other settings; or no settings are given and there is no file.
    """

    def __init__(self, path: Path | None = None, settings: dict[str, Any] | None = None):
        self.path, self.settings = path, json.loads(json.dumps(settings or {}))
        self.rows: dict[tuple[int, str, int], dict[str, Any]] = {}
        self.commit, self.commits = os.environ.get("COMMIT") or commit(), set[str]()
        if path is None:
            return
        if not path.exists():
            if settings is None:
                raise UserError(f"There are no measurements in {path}; measure first.")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(settings) + "\n")
        whole = path.read_text()
        if not whole.endswith("\n"):  # its writer was stopped in the middle of a line
            path.write_text(whole := whole[: whole.rfind("\n") + 1])
        first, *lines = map(json.loads, whole.splitlines())
        here = first if settings is None else self.settings
        other = [key for key in first | here if first.get(key) != here.get(key)]
        if other:
            differing = "; ".join(f"{key} {first.get(key)} there, {here.get(key)} here" for key in other)
            raise UserError(f"{path} holds measurements under other settings ({differing}); name another file.")
        self.settings = first
        for row in lines:
            self.commits.add(row.pop("commit", "unknown"))
            self.rows[row.pop("round"), row.pop("method"), row.pop("batch", 1)] = row

    def add(self, number: int, name: str, batch: int, row: dict[str, Any]) -> None:
        self.rows[number, name, batch] = row
        self.commits.add(self.commit)
        if self.path:
            with self.path.open("a") as file:
                file.write(
                    json.dumps({"round": number, "method": name, "batch": batch, "commit": self.commit} | row) + "\n"
                )


def measure(
    model: Llava,
    reducers: dict[str, Reducer],
    ask: Ask,
    repeats: int,
    kept: Measurements | None = None,
    lengths: Sequence[int] = (),
    batch: int = 1,
    clock: str = "wall",
    deadline: float = math.inf,
) -> dict[str, Measured | None]:
    """Measure each method `repeats` times in turns, after one warm-up each.

    The order of the methods is reversed in the warm-up and in every second round. If the machine slows down within
    rounds, the first and the last method are therefore slowed alike over two rounds.

    Args:
        ask: number of a round -> the batch that all methods are asked in it; round 0 is the warm-up.
        lengths: numbers of tokens of the answers that are timed end to end; if empty, only the prefill is timed.
        batch: questions in a batch, under which `kept` stores these measurements.
        clock: one of CLOCKS, used where nothing runs on a GPU.
        deadline: value of `time.monotonic` after which no turn begins.

    Returns:
        Method -> what was measured; None for a method whose batch did not fit into the device's memory. A method that
        has only a warm-up before the deadline is left out. Others may have fewer than `repeats` rounds, the first ones.
    """
    kept = kept or Measurements()
    orders = [list(reversed(reducers)), list(reducers)]
    rounds = [(number, name) for number in range(repeats + 1) for name in orders[number % 2]]
    too_large, warm = {name for (_, name, size), row in kept.rows.items() if size == batch and not row}, set()
    for number, name in tqdm(rounds, desc=f"batches of {batch}", unit="turn", disable=None):
        if (number, name, batch) in kept.rows or name in too_large:
            continue
        if time.monotonic() >= deadline:
            break
        # Watching operations takes time, so only the warm-up, whose time does not count, is watched.
        watched = OperationCounter() if number == 0 else nullcontext()
        try:
            if number and name not in warm:  # continues from a file: this process needs a warm-up of its own
                measure_round(model, reducers[name], ask(number), lengths, CLOCKS[clock])
            with watched as counter:
                row = measure_round(model, reducers[name], ask(number), lengths, CLOCKS[clock])
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            release_memory(error)
            row = {}
            too_large.add(name)
        if row and counter is not None:
            row["attention"] = sorted(counter.attention)
        warm.add(name)
        kept.add(number, name, batch, row)
    found: dict[str, Measured | None] = {}
    for name in reducers:
        turns = [kept.rows[key] for number in range(repeats + 1) if kept.rows.get(key := (number, name, batch))]
        if name in too_large:
            found[name] = None
        elif len(turns) > 1:
            found[name] = summary(turns)
    return found


@torch.inference_mode()
def measure_round(
    model: Llava, reducer: Reducer, samples: list[Sample], lengths: Sequence[int], clock: Callable[[], float] | None
) -> dict[str, Any]:
    """Time a prefill, then one answer of every length."""
    held = start_peak(model.device)
    timer = StageTimer(model.device, clock)
    with timer.merging():
        state, record = first_token(model, reducer, samples, timer)
    spent = timer.seconds
    row = {
        "seconds": {part: spent.get(part, 0.0) for part in PARTS},
        "kv_bytes": state.kv_bytes_held,
        "flops": record.operations.total,
    }
    del state
    whole, decode, read = {}, None, clock or time.perf_counter
    for length in sorted(lengths):
        began = read()
        batch = generate(model, samples, reducer, length, ignore_eos=True, clock=clock)
        # `generate` returns texts, so the host has read all tokens and the device is done.
        whole[str(length)] = read() - began
        if batch.decode_steps:
            decode = batch.timing.decode / batch.decode_steps
    peak = read_peak(model.device)
    return row | {"end_to_end": whole, "decode": decode, "peak_bytes": peak, "above_bytes": peak - held}


def summary(rows: list[dict[str, Any]]) -> Measured:
    """Medians over the rounds of one method; the first row is the warm-up and does not count."""
    warm_up, *counted = rows
    last = counted[-1]
    decodes = [row["decode"] for row in counted if row.get("decode") is not None]
    return Measured(
        seconds={part: median(row["seconds"].get(part, 0.0) for row in counted) for part in PARTS},
        kv_bytes=last["kv_bytes"],
        flops=last["flops"],
        peak_bytes=max(row["peak_bytes"] for row in counted),
        above_bytes=max(row.get("above_bytes", 0) for row in counted),
        decode=median(decodes) if decodes else None,
        end_to_end={int(n): tuple(row["end_to_end"][n] for row in counted) for n in last.get("end_to_end", {})},
        ttfts=tuple(sum(row["seconds"].values()) for row in counted),
        attention=tuple(warm_up.get("attention", ())),
    )


class StageTimer(Timer):
    """Seconds by stage, with "merging" as a stage of its own instead of a part of the one in which it happens.

    Merging is the time inside `Reduction.apply` of reductions that average tokens. Gathering kept tokens counts as
    selection, and so does projecting merged features again.
    """

    def mark(self, stage: str) -> None:
        super().mark(stage)
        self._stages = [known or stage for known in self._stages]

    @contextmanager
    def merging(self) -> Iterator[None]:
        """While active, time the merging of every reduction."""
        plain, mark = Reduction.apply, super().mark

        def apply(reduction: Reduction, tokens: Tensor) -> Tensor:
            if not reduction.merges:
                return plain(reduction, tokens)
            mark("")  # the first part of a stage, whose name is known only at its end
            merged = plain(reduction, tokens)
            mark("merging")
            return merged

        with patch.object(Reduction, "apply", apply):
            yield


def start_peak(device: torch.device) -> int:
    """Reset the peak of memory; on a CPU, first give freed memory back to the system.

    Returns:
        Bytes in use now: allocated on a GPU, resident on a CPU.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    resident: int = psutil.Process().memory_info().rss
    return resident


def read_peak(device: torch.device) -> int:
    """Peak bytes since `start_peak`, weights included: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


# Ratios


@dataclass(frozen=True)
class Ratio:
    """The ratio of two times: its median over rounds, and an interval for that median."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def over_rounds(above: Sequence[float], below: Sequence[float]) -> Ratio:
    """Divide two times round by round; the median of the ratios and its interval. What slows both in a round cancels.

    Source:
        The interval is that of the sign test: order statistics of the ratios, without an assumption about their
        distribution (Conover, Practical Nonparametric Statistics, 1999, section 3.2).

    Raises:
        ValueError: the times are of different numbers of rounds.
    """
    ordered = sorted(one / other for one, other in zip(above, below, strict=True))
    outer = interval_rank(len(ordered))
    return Ratio(median(ordered), ordered[outer], ordered[-1 - outer])


def both(one: Sequence[float], other: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    """The rounds that both rows have. If a deadline cut one short, these are the first ones."""
    shared = min(len(one), len(other))
    return one[:shared], other[:shared]


def interval_rank(rounds: int) -> int:
    """How many sorted values can be left out at each end, so that the rest spans the median with 95 % confidence.

    It is 0, for the whole range, also below FEWEST rounds, where even that range covers the median less often.
    """
    from scipy.stats import binom

    return max(0, int(binom.ppf((1 - CONFIDENCE) / 2, rounds, 0.5)) - 1)


def ratios(
    full: Measured,
    ours: Measured,
    counts: tuple[Counts, Counts] | None = None,
    oracle: Measured | None = None,
) -> dict[str, Any]:
    """The ratios of a method; docs/efficiency.md defines each.

    Args:
        counts: of full and of the method; None takes the operations of the closed formula.
        oracle: measured in the same rounds, though a deadline may have ended it earlier.

    Returns:
        ttft: time to first token of full over that of the method in the same round, median over rounds.
        ttft_interval: low and high end of the interval of that median.
        flops: operations of full over those of the method.
        realised: `ttft` / `flops`, the share of the theoretical speed-up that was measured.
        over_oracle: time to first token over that of the oracle in the same round, less 1, median over rounds. The
            oracle has the same tokens, so this is the price of choosing them. None without an oracle.
        over_oracle_interval: low and high end of the interval of that median.
        calm: the slowest round took less than 1.25 times the fastest, for the method and for full.
    """
    most, least = (counts[0].flops, counts[1].flops) if counts else (full.flops, ours.flops)
    faster = over_rounds(*both(full.ttfts, ours.ttfts))
    slower = None if oracle is None else over_rounds(*both(ours.ttfts, oracle.ttfts))
    return {
        "ttft": faster.median,
        "ttft_interval": (faster.low, faster.high),
        "flops": most / least,
        "realised": faster.median * least / most,
        "over_oracle": None if slower is None else slower.median - 1,
        "over_oracle_interval": None if slower is None else (slower.low - 1, slower.high - 1),
        "calm": all(max(one.ttfts) < SPREAD * min(one.ttfts) for one in (full, ours)),
    }
