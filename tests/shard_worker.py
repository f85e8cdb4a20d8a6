"""A process that writes shards and merges them, to be killed at any moment; it imports no torch."""

import itertools
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from eval.answers import AnswerStore, Shard, answer_id, settings_hash
from llava.errors import UserError

SETTINGS = {"model": "m", "config": {"alpha": 0.5}, "dtype": "float32"}
RANKS, QUESTIONS, BATCH = 3, 60, 4
KNOWN = [f"q{number:03}" for number in range(QUESTIONS)]
# Questions whose image cannot be read, as every rank that is dealt them finds.
BROKEN = frozenset(KNOWN[::13])


def line(name: str, text: str | None = None) -> dict:
    """The answer to a question: it depends on the question alone, as a rank's does."""
    words = text if text is not None else f"answer to {name} \u2028 " + "long " * (int(name[1:]) % 9)
    return {"question_id": name, "text": words, "answer_id": answer_id(settings_hash(SETTINGS), name)}


def describe(world: str, rank: int = 0) -> dict:
    return {"run": f"start {world} {rank}", "commit": "c", "versions": {}, "code": "code"}


def open_store(folder: Path, world: str = "single", **options) -> AnswerStore:
    return AnswerStore(folder, options.pop("settings", SETTINGS), KNOWN, process=describe(world), **options)


def answer(shard: Shard, names: list[str], rank: int = 0) -> None:
    """One batch: broken questions fail, the others are answered."""
    if failed := [name for name in names if name in BROKEN]:
        shard.fail([{"question_id": name, "reason": "the image cannot be read", "kind": "image"} for name in failed])
    if good := [name for name in names if name not in BROKEN]:
        shard.add([line(name) for name in good], {})


def work(folder: Path, world: str, pause: float = 0.0) -> None:
    """Ask every question that has no answer and has not failed, dealt to three ranks, and merge."""
    with open_store(folder, world) as store:
        waiting = [name for name in KNOWN if name not in store.answers and name not in store.failures]
        shards = [Shard(folder, world, rank, describe(world, rank)) for rank in range(RANKS)]
        # Batches go to the ranks in turns, so that the files of the ranks grow together.
        for number, first in enumerate(range(0, len(waiting), BATCH)):
            answer(shards[number % RANKS], waiting[first : first + BATCH])
            time.sleep(pause)
        for shard in shards:
            shard.close()
        store.merge()


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
    print("ready", flush=True)
    if sys.argv[2] == "every call":
        die_in_every_call(Path(sys.argv[1]))
        sys.exit()
    try:
        work(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
    except UserError as error:
        sys.exit(f"UserError: {error}")
