"""Shards: the answers of one rank, in a folder of their own inside the store until they are merged into it.

    shards/<world>-rank<rank>/    answers.jsonl, timing.jsonl, runs.jsonl and failures.jsonl as in a store

A rank is one process, a world all ranks of one start. Ranks write without locks and without waiting for each other,
because no two processes ever write to the same shard: a process of an earlier start that still lives has another world.
"""

import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.answers.files import ANSWERS, FAILURES, RUNS, TIMING, AnswerFiles
from eval.answers.jsonl import read_appended, sync_folder
from llava.errors import UserError

SHARDS = "shards"
NAME = re.compile(r"[A-Za-z0-9_.]+-rank\d+")


class Shard(AnswerFiles):
    """The answers of one rank, open for writing.

    `first` in its lines counts the shard's own answers; merging replaces it by the place in the store.

    Attributes:
        folder: of the shard.
    """

    def __init__(self, store_folder: Path, world: str, rank: int, run: Mapping[str, Any] | None = None):
        """Make the shard's folder and files.

        Args:
            store_folder: folder of the store that the answers are merged into.
            world: random name of this start of ranks: letters, digits, "_" and ".".
            rank: number of this process in its start; lines of timing.jsonl and runs.jsonl say it.
            run: what runs.jsonl says about this process.

        Raises:
            UserError: the folder cannot be written to.
        """
        folder = store_folder / SHARDS / f"{world}-rank{rank}"
        if not NAME.fullmatch(folder.name):
            raise ValueError(f"{world!r} is no name of a world: letters, digits, '_' and '.' only")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"Cannot make the folder {folder}: {error.strerror}.") from error
        super().__init__(folder, run, {"rank": rank})
        try:
            self._answered = {
                row["question_id"] for _, _, row in read_appended(folder / ANSWERS) if row and "question_id" in row
            }
            # The rank has no use for the rows it wrote.
            for name in (ANSWERS, TIMING, RUNS):
                self._open(name, keep=False)
        except BaseException:
            self.close()
            raise
        sync_folder(folder)
        sync_folder(store_folder / SHARDS)

    def add(self, answers: Sequence[dict[str, Any]], timing: Mapping[str, Any]) -> None:
        """Write one batch; it survives the end of this process.

        Raises:
            UserError: the disk is full (everything before this batch is kept), or the shard is gone because a later
                start of ranks has merged it.
        """
        names = {row["question_id"] for row in answers}
        if len(names) < len(answers) or not self._answered.isdisjoint(names):
            raise AssertionError("a question was answered twice")
        self._check_present()
        self._write_batch(answers, timing)
        self._answered |= names
        self._sync_now_and_then()

    def fail(self, failures: Sequence[Mapping[str, Any]]) -> None:
        """Write questions that could not be answered: see AnswerStore.fail."""
        self._check_present()
        self._write_failures(failures)
        self._sync_now_and_then()

    def _check_present(self) -> None:
        if self._open(ANSWERS).unlinked:
            raise UserError(
                f"{self.folder} was merged by a later start of ranks and deleted, so this process, which belongs to an "
                "earlier one, stops."
            )


def shard_folders(store_folder: Path) -> list[Path]:
    """The shards in a store, those of earlier starts first."""
    try:
        found = [path for path in (store_folder / SHARDS).iterdir() if NAME.fullmatch(path.name) and path.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(found, key=lambda path: (started(path), path.name))


def started(shard: Path) -> str:
    """ISO time at which the first process that wrote to a shard began; "" if the shard does not say it."""
    first = next((row for _, _, row in read_appended(shard / RUNS) if row), {})
    return str(first.get("run", ""))


def holds_lines(shard: Path) -> bool:
    """Whether a shard has an answer or a failure."""
    return any(row for name in (ANSWERS, FAILURES) for _, _, row in read_appended(shard / name))


def delete_shards(store_folder: Path, names: Iterable[str]) -> None:
    """Delete shards by the names of their folders; those that are gone already are passed over."""
    folder = store_folder / SHARDS
    for name in filter(NAME.fullmatch, names):
        # A process of an earlier start may still have files of its shard open, which a network file system keeps under
        # other names: what matters is that the lines are gone.
        shutil.rmtree(folder / name, ignore_errors=True)
        if (folder / name / ANSWERS).exists():
            raise UserError(f"Cannot delete {folder / name}, whose answers are merged; delete it by hand.")
    try:
        folder.rmdir()
    except OSError:  # other shards are there, or it is gone
        return
    sync_folder(store_folder)
