"""python -m eval with the fake model, on one process or on ranks, and with faults that the environment asks for.

python -m tests.fake_evaluation FLAGS    FAULT holds a JSON object, read here and nowhere else:

    rank      the rank that the fault is for; every one if left out
    pause     seconds that a batch takes, on every rank
    broken    ids of questions that raise an error, on every rank
    call      die by SIGKILL in the system call of that number (from 0) that changes a file of the store ...
    during    ... counted from here: "open" (opening the store), "shard" (opening one), "merge" or "result"
    error     ... or, with this name, raise an OSError there and go on: "EIO"
    hang      stop for ever in "load", "merge" or the questions with these ids
    locked    die by SIGKILL at the question with this id, while it holds the lock of progress bars
    disk      bytes that a file may have; more is an error, as on a full disk
"""

import errno
import functools
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

import eval.run
from eval import __main__ as command
from eval import run
from eval.answers.store import AnswerStore, Shard
from eval.parallel import launch, ranks
from tests.eval_fakes import FakeLlava
from tests.shard_worker import disturb_call

EVERYWHERE = ("pause", "broken")


class Disturbed(FakeLlava):
    """The fake model with the faults that concern questions."""

    def __init__(self, fault: dict[str, Any]):
        super().__init__()
        self.fault = fault

    def answer(self, samples, reducer, max_new_tokens=128):
        names = {sample.id for sample in samples}
        if names & set(self.fault.get("hang", "").split()):
            time.sleep(1000)
        if self.fault.get("locked") in names:
            tqdm.get_lock().acquire()
            os.kill(os.getpid(), signal.SIGKILL)
        if names & set(self.fault.get("broken", ())):
            raise RuntimeError("no such colour")
        time.sleep(self.fault.get("pause", 0))
        return super().answer(samples, reducer, max_new_tokens)


def main(words: Sequence[str]) -> int:
    """Returns the exit code."""
    rank, fault = ranks.current(), json.loads(os.environ.get("FAULT", "{}"))
    if fault.get("rank", rank.number) != rank.number:
        fault = {name: fault[name] for name in EVERYWHERE if name in fault}
    run.load_model = functools.partial(load, fault)
    # The command line starts ranks of this module in place of eval.__main__.
    command.launch = functools.partial(start_ranks, command.launch)
    if "disk" in fault:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault["disk"], fault["disk"]))
    if "call" in fault or fault.get("hang") == "merge":
        holder, name = {
            "open": (AnswerStore, "__init__"),
            "shard": (Shard, "__init__"),
            "result": (eval.run, "write_json"),
        }.get(fault.get("during"), (AnswerStore, "merge"))
        fault["below"] = words[words.index("--output") + 1]
        setattr(holder, name, first(fault, getattr(holder, name)))
    return command.main(words)


def start_ranks(real: Callable[..., int], module: str, *more: Any, **options: Any) -> int:
    return real("tests.fake_evaluation", *more, **options)


def load(fault: dict[str, Any], config: Any) -> FakeLlava:
    if fault.get("hang") == "load":
        time.sleep(1000)
    return Disturbed(fault)


def first(fault: dict[str, Any], real: Callable) -> Callable:
    """The function, which hangs or will be killed once there is something to do."""

    def called(*arguments: Any, **options: Any) -> Any:
        # Opening an empty store merges nothing.
        if fault.get("during", "merge") != "merge" or (arguments[0].folder / "shards").exists():
            if "call" not in fault:
                time.sleep(1000)
            number = getattr(errno, fault["error"]) if "error" in fault else None
            disturb_call(fault["call"], number, Path(fault["below"]))
        return real(*arguments, **options)

    return called


if __name__ == "__main__":
    launch.END_SECONDS = 4
    sys.exit(main(sys.argv[1:]))
