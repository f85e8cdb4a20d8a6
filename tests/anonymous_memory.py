"""Anonymous memory of this process: what it owns beside mapped files."""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

MB = 2**20


@dataclass
class Grown:
    """Bytes of anonymous memory beyond those at the start: the most at a time, and at the end."""

    peak: int = 0
    end: int = 0


def anonymous() -> int:
    """Bytes of this process that belong to no file, now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/self/status has no RssAnon")


@contextmanager
def watched_memory() -> Iterator[Grown]:
    """Read the anonymous memory every millisecond while the body runs."""
    gc.collect()
    grown, before, stop = Grown(), anonymous(), threading.Event()

    def read() -> None:
        while not stop.wait(0.001):
            grown.peak = max(grown.peak, anonymous() - before)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield grown
    finally:
        stop.set()
        reader.join()
        gc.collect()
        grown.end = anonymous() - before
        grown.peak = max(grown.peak, grown.end)
