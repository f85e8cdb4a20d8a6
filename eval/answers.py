"""The answer store: one folder per run, one line per answer, safe against kill -9, two writers and a full disk.

    answers.jsonl   one line per question, in LLaVA's fields
    timing.jsonl    one line per batch: seconds, FLOPs and the conditions they were measured under
    settings.json   what the answers depend on; a run with other settings is refused
    lock            held by the process that writes

The number of questions asked (--limit) is not a setting: a store holds the answers to some of the benchmark's
questions, and growing the limit continues it.
"""

import fcntl
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from eval.jsonl import DurableLines, read_json, sync_folder, write_json
from llava.errors import UserError

# The order in which --restart moves them: timing without answers would claim questions that are not there.
FILES = ("result.json", "predictions.json", "timing.jsonl", "answers.jsonl", "settings.json", "wandb_id")


class AnswerStore:
    """The answers of one run, open for writing by this process alone.

    Attributes:
        answers: question id -> line, in the order they were written.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], known: Collection[str], restart: bool = False):
        """Open or create the store.

        Args:
            folder: made if it is not there.
            settings: what the answers depend on, JSON types only.
            known: ids of all questions of the benchmark, asked in this run or not.
            restart: move what is there into a numbered sub-folder first.
        """
        self.folder = folder
        self._files: list[DurableLines] = []
        self._lock = lock(folder)
        try:
            if restart:
                move_aside(folder)
            self._answers = self._open("answers.jsonl")
            self._timing = self._open("timing.jsonl")
            self.answers = index_answers(self._answers.path, self._answers.rows, known)
            self._agree(settings)
        except BaseException:
            self.close()
            raise

    def _open(self, name: str) -> DurableLines:
        lines = DurableLines(self.folder / name)
        self._files.append(lines)
        return lines

    def _agree(self, settings: dict[str, Any]) -> None:
        path = self.folder / "settings.json"
        if self.answers:
            if not path.exists():
                raise UserError(
                    f"{self._answers.path} has answers but no settings.json beside it, so nobody knows how they were "
                    "made; choose another --output, or --restart to move them aside."
                )
            if changes := differences(read_json(path), settings):
                raise UserError(
                    f"{self.folder} holds answers made under other settings ({'; '.join(changes)}); "
                    "choose another --output, or --restart to move them aside."
                )
        write_json(path, settings)

    @property
    def timing(self) -> list[dict[str, Any]]:
        """Every batch that was timed, of this run and of the runs it continues."""
        return self._timing.rows

    def add(self, answers: Sequence[dict[str, Any]], timing: dict[str, Any]) -> None:
        """Write one batch; on return it is on the disk.

        Answers go first: a crash between the two leaves a batch without timing, which the result reports, and
        never timing for questions that have no answer.
        """
        fresh = {row["question_id"]: row for row in answers}
        if len(fresh) < len(answers) or not self.answers.keys().isdisjoint(fresh):
            raise AssertionError("a question was answered twice")
        self._answers.append(answers)
        self.answers.update(fresh)
        self._timing.append([timing])

    def close(self) -> None:
        for file in self._files:
            file.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def lock(folder: Path) -> int:
    """Take the folder for this process; the lock falls with the process, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"Cannot write to the output folder {folder}: {error.strerror}.") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.read(descriptor, 20).decode(errors="replace").strip()
        os.close(descriptor)
        name = f" (process {owner})" if owner.isdigit() else ""
        raise UserError(f"{folder} is in use by another run{name}; wait for it or choose another --output.") from error
    except OSError:
        return descriptor  # a file system without locks: better unprotected than unusable
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
    except OSError:
        pass  # the number only helps to read the message above
    return descriptor


def move_aside(folder: Path) -> None:
    """Move an earlier run's files to the first free `replaced-N`; nothing is deleted."""
    present = [name for name in FILES if (folder / name).exists()]
    if not present:
        return
    number = 1
    while (folder / f"replaced-{number}").exists():
        number += 1
    target = folder / f"replaced-{number}"
    try:
        target.mkdir()
        for name in present:
            os.replace(folder / name, target / name)
    except OSError as error:
        raise UserError(f"Cannot move the earlier run to {target}: {error.strerror}.") from error
    sync_folder(folder)


def index_answers(path: Path, rows: Sequence[dict[str, Any]], known: Collection[str]) -> dict[str, dict[str, Any]]:
    """Lines by question id; a store is refused if a line is incomplete, foreign or repeated."""
    known = set(known)
    answers: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(rows, start=1):
        name = row.get("question_id")
        if not isinstance(name, str) or not isinstance(row.get("text"), str):
            raise UserError(f"{path} line {number} needs question_id and text, both strings.")
        if name not in known:
            raise UserError(f"{path} line {number} answers question {name}, which this benchmark does not have.")
        if name in answers:
            raise UserError(f"{path} line {number} answers question {name} a second time.")
        answers[name] = row
    return answers


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Settings that differ, as 'key: old, now new'."""
    before, after = flatten(old), flatten(new)
    absent = "absent"
    return [
        f"{key}: {before.get(key, absent)}, now {after.get(key, absent)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key, absent) != after.get(key, absent)
    ]


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
