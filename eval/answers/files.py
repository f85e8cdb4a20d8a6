"""The files that answers are appended to, batch by batch: the same for the store of a run and for a rank's shard."""

import hashlib
import json
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from eval.answers.durable import DurableLines
from llava.errors import UserError

ANSWERS, TIMING, RUNS, FAILURES = "answers.jsonl", "timing.jsonl", "runs.jsonl", "failures.jsonl"
# Why a question could not be answered: its image cannot be read, anything else went wrong, or memory did not suffice.
KINDS = ("image", "error", "memory")
# Largest part of the time that goes into waiting for the disk. A sync takes 0.2 ms on a local disk and 50 ms on a busy
# shared one; twice after every question, that would be a tenth of the run.
SYNC_SHARE = 0.0025


class AnswerFiles:
    """answers.jsonl, timing.jsonl, runs.jsonl and failures.jsonl of a folder, appended to by this process alone.

    What `add` and `fail` have written survives the end of this process, however it ends. A power failure or a crash of
    the whole machine can lose the batches since the last sync; their questions are then asked again.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any] | None, about: Mapping[str, Any] | None = None):
        """
        Args:
            run: what runs.jsonl says about this process if it adds answers.
            about: fields for every line of timing.jsonl and runs.jsonl.
        """
        self.folder = folder
        self._run, self._about = run, dict(about or {})
        self._run_written = False
        self._files: dict[str, DurableLines] = {}
        self._next_sync = 0.0
        self._closed = False

    def _open(self, name: str, keep: bool = True) -> DurableLines:
        """A file of the folder, opened once and made if it is not there."""
        if name not in self._files:
            if self._closed:
                raise AssertionError(f"{self.folder} is closed")
            self._files[name] = DurableLines(self.folder / name, keep)
        return self._files[name]

    def _write_run(self) -> None:
        """Say once, before its first line, which process writes from here on."""
        if not self._run_written and self._run is not None:
            first = self._open(ANSWERS).count
            self._open(RUNS).append([{"first": first, **self._run, **self._about}], sync=False)
        self._run_written = True

    def _write_batch(self, answers: Sequence[dict[str, Any]], timing: Mapping[str, Any]) -> None:
        """Append one batch.

        Answers go first: a crash between the two leaves a batch without timing, which the result reports, and
        never timing for questions that have no answer.
        """
        self._write_run()
        first = self._open(ANSWERS).count
        self._open(ANSWERS).append(answers, sync=False)
        self._open(TIMING).append([{**timing, "first": first, **self._about}], sync=False)

    def _write_failures(self, lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Append failures and return them as they were written."""
        named = {} if self._run is None or "run" not in self._run else {"run": self._run["run"]}
        written = [{**named, **line} for line in lines]
        for line in written:
            if problem := failure_problem(line):
                raise AssertionError(f"a failure {problem}")
        self._write_run()
        self._open(FAILURES).append(written, sync=False)
        return written

    def sync(self) -> None:
        """Return when everything that was written would survive a power failure."""
        begun = time.monotonic()
        # In this order: see _write_batch.
        for name in (ANSWERS, TIMING, RUNS, FAILURES):
            if name in self._files:
                self._files[name].sync()
        ended = time.monotonic()
        self._next_sync = ended + (ended - begun) / SYNC_SHARE

    def _sync_now_and_then(self) -> None:
        """Sync, unless the time since the last sync is too short for it to be cheap."""
        if time.monotonic() >= self._next_sync:
            self.sync()

    def close(self) -> None:
        """Sync and close the files; further calls do nothing."""
        self._closed = True
        problem: UserError | None = None
        for file in self._files.values():
            try:
                file.close()
            except UserError as error:  # the others are closed all the same
                problem = problem or error
        if problem is not None:
            raise problem

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def seal_of(settings: Mapping[str, Any]) -> str:
    """Hash of the settings that answers depend on."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def answer_id(seal: str, question_id: str) -> str:
    """The `answer_id` of an answer: it depends on settings and question, so equal runs write equal files.

    Args:
        seal: see `seal_of`.
    """
    return hashlib.sha256(f"{seal} {question_id}".encode()).hexdigest()[:22]


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
