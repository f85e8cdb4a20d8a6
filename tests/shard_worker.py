"""Stores whose merges are killed in every system call, and what their lines look like; it imports no torch."""

import itertools
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from eval.answers.store import AnswerStore, answer_id, settings_hash

SETTINGS = {"model": "m", "config": {"alpha": 0.5}, "dtype": "float32"}
KNOWN = [f"q{number:03}" for number in range(60)]


def line(name: str, text: str | None = None) -> dict:
    """The answer to a question: it depends on the question alone, as a rank's does."""
    words = text if text is not None else f"answer to {name} \u2028 " + "long " * (int(name[1:]) % 9)
    return {"question_id": name, "text": words, "answer_id": answer_id(settings_hash(SETTINGS), name)}


def describe(world: str, rank: int = 0) -> dict:
    return {"run": f"start {world} {rank}", "commit": "c", "versions": {}, "code": "code"}


def open_store(folder: Path, world: str = "single", **options) -> AnswerStore:
    return AnswerStore(folder, options.pop("settings", SETTINGS), KNOWN, process=describe(world), **options)


def kill_before_call(number: int) -> None:
    """Let this process die by SIGKILL in its system call of that number that changes a file, from 0.

    Of a write, half is done first: it counts as two calls.
    """
    calls = itertools.count()

    def dying(real: Callable) -> Callable:
        def call(*arguments, **options):
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            if real is write and next(calls) == number:
                real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        return call

    write = os.write
    for name in ("write", "fsync", "replace", "unlink", "ftruncate", "rmdir", "open"):
        setattr(os, name, dying(getattr(os, name)))
    shutil.copyfile = dying(shutil.copyfile)


def die_in_merge(folder: Path, number: int) -> bool:
    """Open a store with shards in a process of its own that dies in call `number`; whether it did."""
    child = os.fork()
    if child == 0:
        kill_before_call(number)
        with open_store(folder, "opened"):
            pass
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def die_in_every_call(folder: Path) -> None:
    """For every call of a merge a copy of folder/whole in which a process died there, and then in the repair."""
    draw = random.Random(0)
    for number in itertools.count():
        copy = folder / f"{number:03}"
        shutil.copytree(folder / "whole", copy)
        if not die_in_merge(copy, number):
            break
        # The second kill mostly comes early, because the repair of most kills has little to do.
        die_in_merge(copy, draw.randrange(draw.randrange(1, 40)))


if __name__ == "__main__":
    die_in_every_call(Path(sys.argv[1]))
