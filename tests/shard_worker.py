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


# What changes a file or makes it durable. Files are opened for reading, and never written to, by other functions.
CALLS = ("open", "write", "fsync", "close", "replace", "unlink", "ftruncate", "mkdir", "rmdir")


def disturb_call(number: int, error: int | None = None, below: Path | None = None) -> None:
    """Let this process die by SIGKILL in its system call of that number that changes a file, from 0.

    Of a write, half is done first: it counts as two calls.

    Args:
        error: raise OSError with this number in its place, and go on.
        below: count only the calls for files of this folder.
    """
    calls = itertools.count()
    here = str(below.resolve()) if below is not None else ""

    def path_of(target: object, folder: int | None) -> str:
        if isinstance(target, int):
            return os.readlink(f"/proc/self/fd/{target}")
        return os.path.abspath(target) if folder is None else f"{path_of(folder, None)}/{os.fspath(target)}"

    def disturb() -> None:
        if error is None:
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(error, os.strerror(error))

    def disturbed(real: Callable) -> Callable:
        def call(*arguments, **options):
            if here and not path_of(arguments[0], options.get("dir_fd")).startswith(here):
                return real(*arguments, **options)
            if next(calls) == number:
                if real is close:
                    real(*arguments)  # a file is closed, whatever the call says
                disturb()
            if real is write and next(calls) == number:
                real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                disturb()
            return real(*arguments, **options)

        return call

    write, close = os.write, os.close
    for name in CALLS:
        setattr(os, name, disturbed(getattr(os, name)))
    shutil.copyfile = disturbed(shutil.copyfile)


def die_in_merge(folder: Path, number: int) -> bool:
    """Open a store with shards in a process of its own that dies in call `number`; whether it did."""
    child = os.fork()
    if child == 0:
        disturb_call(number)
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
