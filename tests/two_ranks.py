"""Run a function on several real ranks: one process each on the CPU, joined over gloo.

`python -m tests.two_ranks module:function rank size port folder` is one of them.
"""

import dataclasses
import importlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from eval.config import ROOT

# One thread each: results of matrix products depend on their number. Large blocks go back to the system when they are
# freed, so that memory can be measured.
OPTIONS = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "MALLOC_MMAP_THRESHOLD_": "100000"}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(function: str, folder: Path, size: int = 2, rank: int = 0, port: int = 0) -> subprocess.Popen:
    """Start one rank, which calls `function` ("module:name") with the folder and writes what it returns there."""
    environment = {**os.environ, **OPTIONS, "PYTHONPATH": str(ROOT)}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "tests.two_ranks", function, str(rank), str(size), str(port), str(folder)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT)


def run(function: str, folder: Path, size: int = 2, seconds: float = 180) -> list[Any]:
    """What `function` returned on each of `size` ranks.

    Args:
        function: "module:name" of a function of one argument, the folder.
        seconds: after which all ranks are killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    ranks = [start(function, folder, size, rank, port) for rank in range(size)]
    end = time.monotonic() + seconds
    try:
        texts = [one.communicate(timeout=max(1, end - time.monotonic()))[0].decode() for one in ranks]
    finally:
        for one in ranks:
            one.kill()
    for rank, (one, text) in enumerate(zip(ranks, texts, strict=True)):
        assert one.returncode == 0, f"rank {rank} of {function}:\n{text}"
    # Tensors, plain types and the dataclasses of the function's module; nothing else is read.
    module = importlib.import_module(function.partition(":")[0])
    known = [one for one in vars(module).values() if isinstance(one, type) and dataclasses.is_dataclass(one)]
    with torch.serialization.safe_globals(known):
        return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(size)]


def main(function: str, rank: str, size: str, port: str, folder: str) -> None:
    from llava.model import parallel

    module, _, name = function.partition(":")
    if int(size) > 1:
        parallel.join(int(rank), int(size), "127.0.0.1", int(port), "cpu")
    found = getattr(importlib.import_module(module), name)(Path(folder))
    torch.save(found, Path(folder) / f"rank{rank}.pt")
    parallel.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
