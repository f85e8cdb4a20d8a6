"""Time methods in turns on one model, so that a busy machine slows all of them.

A turn of a method is one prefill whose stages are timed, then one whole answer for each output length. Answers have a
fixed length: no end token and no stop string ends them.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from tqdm import tqdm

from eval.efficiency.latency.measurements import Measurements
from eval.efficiency.latency.memory_peak import read_peak, start_peak
from eval.efficiency.latency.noted import Noted
from eval.efficiency.latency.stages import StageTimer
from llava.model.llava_arch import Llava
from llava.pipeline.generate import generate
from llava.pipeline.prefill import prefill
from llava.processing.sample import Sample
from llava.reduction.reducer import Reducer

CLOCKS = ("wall", "cpu")
PARTS = ("vision", "selection", "merging", "prefill")
Ask = Callable[[int], list[Sample]]  # turn -> a batch


@dataclass(frozen=True)
class Measured:
    """One method on batches of one size.

    Attributes:
        seconds: vision, selection, merging and prefill of a batch, medians; their sum is the time to the first token.
        kv_bytes: of all layers after the prefill, padding included.
        flops: up to the first token, by the closed formula of the accounting.
        peak_bytes: highest memory of all turns.
        preprocess: seconds of tokenizing and of preparing images on the CPU, before the time to the first token starts.
        decode: seconds per token after the first, median; None where no answer has a second token.
        end_to_end: output length -> seconds of every turn, from opened images to texts.
        ttfts: seconds to the first token of every turn.
        attention: the attention kernels that ran; () where they are inside of compiled graphs.
        compiling: seconds by the wall clock of what was compiled in these turns, in no other time here.
    """

    seconds: dict[str, float]
    kv_bytes: int
    flops: int
    peak_bytes: int
    preprocess: float = 0.0
    decode: float | None = None
    end_to_end: dict[int, tuple[float, ...]] = field(default_factory=dict)
    ttfts: tuple[float, ...] = ()
    attention: tuple[str, ...] = ()
    compiling: float = 0.0

    @property
    def ttft(self) -> float:
        return sum(self.seconds.values())


def measure(
    model: Llava,
    reducers: dict[str, Reducer],
    ask: Ask,
    repeats: int,
    kept: Measurements | None = None,
    lengths: Sequence[int] = (),
    batch: int = 1,
    clock: str = "wall",
    compiled: Mapping[str, Llava] | None = None,
) -> dict[str, Measured | None]:
    """Measure each method `repeats` times in turns, after one warm-up each; every second turn in reverse.

    So a machine that slows down within turns slows the first and the last method alike over two turns.

    Args:
        ask: turn -> the batch that all methods are asked in it; turn 0 is the warm-up.
        lengths: tokens of the answers that are timed end to end; none times the prefill alone.
        batch: questions in a batch, the name of these measurements in `kept`.
        clock: "wall", or "cpu" for the time that this process computes.
        compiled: the rows that run as graphs, with the model that has them.

    Returns:
        None for a method whose batch did not fit into the device's memory.
    """
    kept, compiled = kept or Measurements(), compiled or {}
    orders = [list(reducers), list(reversed(reducers))]
    rounds = [(turn, name) for turn in range(repeats + 1) for name in orders[turn % 2]]
    too_large = {name for (_, name, size), row in kept.found.items() if size == batch and not row}
    for turn, name in tqdm(rounds, desc=f"batches of {batch}", unit="turn", disable=None):
        if (turn, name, batch) in kept.found or name in too_large:
            continue
        try:
            # The warm-up is no time that counts, so that it can be watched; operations inside of a graph cannot.
            with ticking(clock), Noted() if turn == 0 and name not in compiled else nullcontext() as noted:
                row = once(compiled.get(name, model), reducers[name], ask(turn), lengths)
        except torch.OutOfMemoryError as error:
            error.with_traceback(None)  # its frames hold the tensors that fill the memory
            torch.cuda.empty_cache()
            row = {}
            too_large.add(name)
        if row and noted is not None:
            row["attention"] = sorted(noted.attention)
        kept.add(turn, name, batch, row)
    turns = range(1, repeats + 1)
    return {
        name: None
        if name in too_large
        else summary([kept.found[turn, name, batch] for turn in turns], kept.found[0, name, batch])
        for name in reducers
    }


def once(model: Llava, reducer: Reducer, samples: list[Sample], lengths: Sequence[int] = ()) -> dict[str, Any]:
    """One turn. One in which a graph was compiled does not count: it says how long that took, and is made again."""
    if model.compiled is None:
        return turn_of(model, reducer, samples, lengths)
    began = model.compiled.seconds
    row = turn_of(model, reducer, samples, lengths)
    if model.compiled.seconds == began:
        return row
    compiling = model.compiled.seconds - began
    return turn_of(model, reducer, samples, lengths) | {"compiling": compiling}


@torch.inference_mode()
def turn_of(model: Llava, reducer: Reducer, samples: list[Sample], lengths: Sequence[int]) -> dict[str, Any]:
    """A timed prefill, then one answer of every length."""
    start_peak(model.device)
    timer = StageTimer(model.device)
    with timer.merging():
        state, record = prefill(model, samples, reducer, timer)
        model.logits(state.hidden).argmax(-1)
        timer.mark("prefill")
    spent = timer.seconds
    row = {
        "seconds": {part: spent.get(part, 0.0) for part in PARTS},
        "preprocess": spent.get("preprocess", 0.0),
        "kv_bytes": state.kv_bytes_held,
        "flops": record.operations.total,
    }
    del state
    whole, decode = {}, None
    for length in sorted(lengths):
        began = time.perf_counter()
        batch = generate(endless(model), samples, reducer, length)
        # `generate` returns texts, which the host has read: the device is done.
        whole[str(length)] = time.perf_counter() - began
        if batch.decode_steps:
            decode = batch.timing.decode / batch.decode_steps
    return row | {"end_to_end": whole, "decode": decode, "peak_bytes": read_peak(model.device)}


@contextmanager
def ticking(clock: str) -> Iterator[None]:
    """While active, timers outside CUDA read this clock: with "cpu" other processes on the same cores do not count."""
    with patch.object(time, "perf_counter", time.perf_counter if clock == "wall" else time.process_time):
        yield


def endless(model: Llava) -> Llava:
    """The same model, whose answers end at no token and no text."""
    family = type(model)
    other: Llava = object.__new__(type("Endless", (family,), {"end_ids": frozenset(), "stop": None}))
    other.__dict__.update(model.__dict__)
    other.__dict__.pop("end_ids", None)
    return other


def summary(rows: list[dict[str, Any]], warm_up: dict[str, Any]) -> Measured:
    """Medians over turns."""
    last = rows[-1]
    seconds = {part: statistics.median(row["seconds"].get(part, 0.0) for row in rows) for part in PARTS}
    decodes = [row["decode"] for row in rows if row.get("decode") is not None]
    return Measured(
        seconds,
        last["kv_bytes"],
        last["flops"],
        max(row["peak_bytes"] for row in rows),
        statistics.median(row["preprocess"] for row in rows),
        statistics.median(decodes) if decodes else None,
        {int(length): tuple(row["end_to_end"][length] for row in rows) for length in last.get("end_to_end", {})},
        tuple(sum(row["seconds"].values()) for row in rows),
        tuple(warm_up.get("attention", ())),
        sum(row.get("compiling", 0.0) for row in (warm_up, *rows)),
    )


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of the values do not exceed, between neighbours in proportion (0.5 is the median)."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
