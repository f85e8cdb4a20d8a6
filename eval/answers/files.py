"""The files that one process appends answers to: those of a run's store, or of a rank's shard of it.

    answers.jsonl    one line per question, in LLaVA's fields, with a hash of the question's images
    timing.jsonl     one line per batch: its questions, its process, seconds, FLOPs and the conditions of measurement
    runs.jsonl       one line per process that wrote: commit, library versions
    failures.jsonl   one line per failed try to answer a question, with the reason; only if there was one

Lines belong together by the ids of questions, and by `run` and `rank` of the process. So a batch whose answers were
torn by a crash does no harm: its line of timing.jsonl names questions that have no answer, or a later batch.

    shards/<world>-rank<rank>/

is a shard: the files of one rank, in the folder of the store until they are merged into it. A rank is one process, a
world all ranks of one start. Ranks write without locks and without waiting for each other, because no two processes
ever write to the same shard: a process of an earlier start that still lives has another world.
"""

import hashlib
import json
import re
import shutil
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from eval.answers.jsonl import DurableLines, read_appended, sync_folder
from llava.errors import UserError

ANSWERS, TIMING, RUNS, FAILURES = "answers.jsonl", "timing.jsonl", "runs.jsonl", "failures.jsonl"
SHARDS = "shards"
SHARD_NAME = re.compile(r"[A-Za-z0-9_.]+-rank\d+")
# Why a question could not be answered: its image cannot be read, anything else went wrong, or memory did not suffice.
KINDS = ("image", "error", "memory")
# Largest part of the time that goes into waiting for the disk. A sync takes 0.2 ms on a local disk and 50 ms on a busy
# shared one; twice after every question, that would be a tenth of the run.
SYNC_SHARE = 0.0025

Row = dict[str, Any]


class AnswerFiles:
    """The files of a folder, appended to by this process alone.

    What `add` and `fail` have written survives the end of this process, however it ends. A power failure or a crash of
    the whole machine can lose the batches since the last sync; their questions are then asked again.

    Attributes:
        process: the line of runs.jsonl, written before the first answer or failure; empty for a process without a name.
    """

    def __init__(self, folder: Path, process: Mapping[str, Any] | None = None, keep: bool = True):
        """
        Args:
            process: with a "run", the name of this process, and a "rank" where there are several.
            keep: hold the lines in memory.
        """
        self.folder, self.process = folder, dict(process or {})
        self._keep, self._named = keep, False
        self._files: dict[str, DurableLines] = {}
        self._next_sync = 0.0
        self._closed = False

    def _open(self, name: str) -> DurableLines:
        """A file of the folder, opened once and made if it is not there."""
        if name not in self._files:
            if self._closed:
                raise AssertionError(f"{self.folder} is closed")
            self._files[name] = DurableLines(self.folder / name, self._keep)
        return self._files[name]

    def _write(self, lines: Mapping[str, Iterable[Row]]) -> None:
        """Append lines to the files in the given order, after the line of this process."""
        if not self._named and self.process:
            self._open(RUNS).append([self.process], sync=False)
        self._named = True
        for name, rows in lines.items():
            self._open(name).append(rows, sync=False)
        if time.monotonic() >= self._next_sync:  # not too soon after the last one for it to be cheap
            self.sync()

    def add(self, answers: Sequence[Row], timing: Mapping[str, Any]) -> None:
        """Write one batch; on return it survives the end of this process.

        Args:
            timing: line of timing.jsonl; its questions, their number and this process are set here.

        Raises:
            UserError: the disk is full; everything before this batch is kept.
        """
        ids = [row["question_id"] for row in answers]
        if len(set(ids)) < len(ids):
            raise AssertionError("a question was answered twice")
        own = {key: self.process[key] for key in ("run", "rank") if key in self.process}
        self._write({TIMING: [own | dict(timing) | {"questions": len(ids), "question_ids": ids}], ANSWERS: answers})

    def fail(self, failures: Sequence[Mapping[str, Any]]) -> list[Row]:
        """Write questions that could not be answered; on return the lines survive the end of this process.

        Args:
            failures: {"question_id", "reason": one sentence, "kind": one of KINDS}, with the "run" of this process if
                it is not given.

        Returns:
            The lines as they were written.
        """
        own = {"run": self.process["run"]} if "run" in self.process else {}
        lines = [own | dict(line) for line in failures]
        for line in lines:
            if problem := failure_problem(line):
                raise AssertionError(f"a failure {problem}")
        self._write({FAILURES: lines})
        return lines

    def sync(self) -> None:
        """Return when everything that was written would survive a power failure."""
        begun = time.monotonic()
        for file in self._files.values():
            file.sync()
        ended = time.monotonic()
        self._next_sync = ended + (ended - begun) / SYNC_SHARE

    def _close_files(self) -> None:
        problem: UserError | None = None
        while self._files:
            try:
                self._files.popitem()[1].close()
            except UserError as error:  # the others are closed all the same
                problem = problem or error
        if problem is not None:
            raise problem

    def close(self) -> None:
        """Sync and close the files; further calls do nothing."""
        self._closed = True
        self._close_files()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Shard(AnswerFiles):
    """The answers of one rank, open for writing."""

    def __init__(self, store_folder: Path, world: str, rank: int, process: Mapping[str, Any]):
        """Make the shard's folder and files.

        Args:
            store_folder: folder of the store that the answers are merged into.
            world: random name of this start of ranks: letters, digits, "_" and ".".
            rank: number of this process in its start.

        Raises:
            UserError: the folder cannot be written to.
        """
        folder = store_folder / SHARDS / f"{world}-rank{rank}"
        if not SHARD_NAME.fullmatch(folder.name):
            raise ValueError(f"{world!r} is no name of a world: letters, digits, '_' and '.' only")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"Cannot make the folder {folder}: {error.strerror}.") from error
        super().__init__(folder, {**process, "rank": rank}, keep=False)
        try:
            for name in (ANSWERS, TIMING, RUNS):
                self._open(name)
        except BaseException:
            self.close()
            raise
        sync_folder(folder)
        sync_folder(store_folder / SHARDS)

    def _write(self, lines: Mapping[str, Iterable[Row]]) -> None:
        if self._open(ANSWERS).unlinked:
            raise UserError(
                f"{self.folder} was merged by a later start of ranks and deleted, so this process, which belongs to an "
                "earlier one, stops."
            )
        super()._write(lines)


def shard_folders(store_folder: Path) -> list[Path]:
    """The shards in a store, those of earlier starts first: the name of a world is random."""
    try:
        shards = [p for p in (store_folder / SHARDS).iterdir() if SHARD_NAME.fullmatch(p.name) and p.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []

    def started(shard: Path) -> str:
        first = next((row for _, _, row in read_appended(shard / RUNS) if row), {})
        return str(first.get("run", ""))

    return sorted(shards, key=lambda path: (started(path), path.name))


def holds_lines(shard: Path) -> bool:
    """Whether a shard has an answer or a failure."""
    return any(row for name in (ANSWERS, FAILURES) for _, _, row in read_appended(shard / name))


def delete_shards(store_folder: Path, names: Iterable[str]) -> None:
    """Delete shards by the names of their folders; those that are gone already are passed over."""
    folder = store_folder / SHARDS
    for name in filter(SHARD_NAME.fullmatch, names):
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


def settings_hash(settings: Mapping[str, Any]) -> str:
    """Hash of the settings that answers depend on."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def answer_id(settings: str, question_id: str) -> str:
    """The `answer_id` of an answer: it depends on settings and question, so equal runs write equal files.

    Args:
        settings: their hash.
    """
    return hashlib.sha256(f"{settings} {question_id}".encode()).hexdigest()[:22]


def answer_problem(row: Mapping[str, Any], known: Collection[str]) -> str | None:
    """What is wrong with a line of answers.jsonl, as the end of a sentence that begins with the line; None if nothing.

    Args:
        known: ids of the benchmark's questions.
    """
    name = row.get("question_id")
    if not isinstance(name, str) or not isinstance(row.get("text"), str):
        return "needs question_id and text, both strings"
    if name not in known:
        return f"answers question {name}, which this benchmark does not have"
    return None


def failure_problem(row: Mapping[str, Any], known: Collection[str] | None = None) -> str | None:
    """The same for a line of failures.jsonl.

    Args:
        known: None to check no ids.
    """
    name = row.get("question_id")
    if not isinstance(name, str) or not isinstance(row.get("reason"), str) or row.get("kind") not in KINDS:
        return f"needs question_id and reason, both strings, and a kind ({', '.join(KINDS)})"
    if known is not None and name not in known:
        return f"is about question {name}, which this benchmark does not have"
    return None
