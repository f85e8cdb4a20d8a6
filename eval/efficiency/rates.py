"""How fast a device multiplies and copies, measured in about a second: what a lower bound of a run's time needs."""

import functools
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from eval.results.report import hardware

SPENT = 0.5  # seconds of each measurement
LONGEST = 0.2  # seconds of one product
REPEATS = 3  # of every measurement, at the least
FEWEST = 16  # rows of the first product
COPIED = 1 << 28  # bytes


@dataclass(frozen=True)
class Rates:
    """What a device was measured to do.

    Attributes:
        device: its name, with the number of threads on a CPU.
        operations: floating point operations per second of a matrix product.
        bandwidth: bytes per second that a copy inside its memory reads and writes.
        bus: bytes per second from the machine's memory to the device; `bandwidth` / 2 where they are the same.
    """

    device: str
    operations: float
    bandwidth: float
    bus: float


def measure_rates(device: torch.device, dtype: torch.dtype, rows: int, width: int, inner: int) -> Rates:
    """Time products of [rows, width] with [width, inner], and copies, and take the fastest of each.

    Fewer rows are tried first: a product that would last longer than LONGEST seconds is not made.
    """
    right = torch.randn(width, inner, device=device).to(dtype)
    operations, count, began = 0.0, min(FEWEST, rows), time.perf_counter()
    while True:
        left = torch.randn(count, width, device=device).to(dtype)
        spent = fastest(device, functools.partial(torch.matmul, left, right), SPENT / 10)
        operations = max(operations, 2 * count * width * inner / spent)
        over = time.perf_counter() - began
        # A product can be slow because the machine is busy for a moment: others of the size are tried for a while.
        if over > 2 * SPENT or (over > SPENT and (count == rows or 2 * spent > LONGEST)):
            break
        if 2 * spent <= LONGEST:
            count = min(2 * count, rows)
    source, target = (torch.empty(COPIED, dtype=torch.uint8, device=device).fill_(1) for _ in range(2))
    copied = 2 * COPIED / fastest(device, lambda: target.copy_(source), SPENT)
    bus = copied / 2
    if device.type == "cuda":
        host = torch.empty(COPIED, dtype=torch.uint8, pin_memory=True)
        bus = COPIED / fastest(device, lambda: target.copy_(host, non_blocking=True), SPENT)
    name = hardware(str(device))
    if device.type == "cpu":
        name = f"{name}, {torch.get_num_threads()} threads"
    return Rates(name, operations, copied, bus)


def fastest(device: torch.device, call: Callable[[], object], seconds: float) -> float:
    """Seconds of the fastest call, after one that does not count; REPEATS, and more until `seconds` are spent."""
    call()
    found, stop = float("inf"), time.perf_counter() + seconds
    for call_number in itertools.count():
        if call_number >= REPEATS and time.perf_counter() > stop:
            break
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        found = min(found, time.perf_counter() - start)
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
