"""The answer store: one folder per run, one line per answer, safe against kill -9, two writers and a full disk.

    answers.jsonl   one line per question, in LLaVA's fields, with a hash of the question's images
    timing.jsonl    one line per batch: seconds, FLOPs and the conditions they were measured under
    runs.jsonl      one line per process that added answers: commit, library versions, number of the first answer
    settings.json   what the answers depend on, with a hash of every source file; a run with others is refused
    result.json     the result of all questions, beside the benchmark's submission files
    limit50/        the result and the submission files of a run with --limit 50
    lock            held by the process that writes

The number of questions asked (--limit) is not a setting: a store holds the answers to some of the benchmark's
questions, and growing the limit continues it.

Stores of former versions have no hashes of source files, no hashes of images and no runs.jsonl. They are read and
completed; the result then says how many answers were made by unknown code or from images that cannot be compared.
"""

import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from eval.answers.folder_lock import lock_folder, remove_unfinished
from eval.answers.jsonl import DurableLines, read_json, sync_folder, write_json
from eval.answers.source_hash import changed_files
from llava.errors import UserError
from llava.option_names import with_current_names

# The order in which --restart moves them: timing without answers would claim questions that are not there.
FILES = (
    "result.json",
    "predictions.json",
    "timing.jsonl",
    "runs.jsonl",
    "answers.jsonl",
    "settings.json",
    "wandb_id",
)
ADVICE = "choose another --output, or --restart to move them aside"


class AnswerStore:
    """The answers of one run, open for writing by this process alone.

    Attributes:
        answers: question id -> line, in the order they were written.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        known: Collection[str],
        restart: bool = False,
        sources: Mapping[str, str] | None = None,
        run: Mapping[str, Any] | None = None,
    ):
        """Open or create the store.

        Args:
            folder: made if it is not there.
            settings: what the answers depend on, JSON types only.
            known: ids of all questions of the benchmark, asked in this run or not.
            restart: move what is there into a numbered sub-folder first.
            sources: source file -> hash, see eval.answers.source_hash; None to compare no code.
            run: what runs.jsonl says about this process if it adds answers.
        """
        self.folder = folder
        self._settings, self._sources, self._run = settings, sources, run
        self._files: list[DurableLines] = []
        self._lock = lock_folder(folder)
        try:
            remove_unfinished(folder)
            if restart:
                move_aside(folder)
            self._answers = self._open("answers.jsonl")
            self._timing = self._open("timing.jsonl")
            self._runs = self._open("runs.jsonl")
            self.answers = index_answers(self._answers.path, self._answers.rows, known)
            self._agree()
        except BaseException:
            self.close()
            raise

    def _open(self, name: str) -> DurableLines:
        lines = DurableLines(self.folder / name)
        self._files.append(lines)
        return lines

    def _agree(self) -> None:
        """Refuse answers that were made under other settings or by other code."""
        path = self.folder / "settings.json"
        if not self.answers:
            self._write_settings(self._sources)
            return
        if not path.exists():
            raise UserError(
                f"{self._answers.path} has answers but no settings.json beside it, so nobody knows how they were "
                f"made; {ADVICE}."
            )
        old = current_settings(read_json(path))
        made_by = old.pop("sources", None)
        if changes := differences(old, self._settings):
            raise UserError(f"{self.folder} holds answers made under other settings ({'; '.join(changes)}); {ADVICE}.")
        if made_by is not None and self._sources is not None and made_by != self._sources:
            names = changed_files(made_by, self._sources)
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise UserError(
                f"{self.folder} holds answers made by other code: {shown} changed since then; {ADVICE}, or take the "
                "old code back."
            )
        # Sources that are not recorded stay so until this process adds answers of its own: see `add`.
        self._write_settings(made_by)

    def _write_settings(self, sources: Mapping[str, str] | None) -> None:
        content = self._settings if sources is None else self._settings | {"sources": dict(sources)}
        write_json(self.folder / "settings.json", content)
        self._sealed = sources is not None or self._sources is None

    @property
    def timing(self) -> list[dict[str, Any]]:
        """Every batch that was timed, of this run and of the runs it continues."""
        return self._timing.rows

    def timing_of(self, names: Collection[str]) -> list[dict[str, Any]]:
        """The batches all of whose questions are among `names`."""
        order = list(self.answers)
        wanted = set(names)
        if wanted.issuperset(order):
            return self.timing
        found, position = [], 0
        for line in self.timing:
            # Former versions wrote no `first`: their batches follow one another unless a crash lost one.
            first = line.get("first", position)
            position = first + line["questions"]
            if wanted.issuperset(order[first:position]):
                found.append(line)
        return found

    def origins(self, names: Iterable[str]) -> list[tuple[dict[str, Any] | None, int]]:
        """Which processes answered these questions: (line of runs.jsonl, number of answers), None for not recorded."""
        wanted = set(names)
        counts: dict[int, int] = {}
        number = -1
        for place, name in enumerate(self.answers):
            while number + 1 < len(self._runs.rows) and self._runs.rows[number + 1]["first"] <= place:
                number += 1
            if name in wanted:
                counts[number] = counts.get(number, 0) + 1
        return [(self._runs.rows[number] if number >= 0 else None, count) for number, count in counts.items()]

    def add(self, answers: Sequence[dict[str, Any]], timing: dict[str, Any]) -> None:
        """Write one batch; on return it is on the disk.

        Answers go first: a crash between the two leaves a batch without timing, which the result reports, and
        never timing for questions that have no answer.
        """
        fresh = {row["question_id"]: row for row in answers}
        if len(fresh) < len(answers) or not self.answers.keys().isdisjoint(fresh):
            raise AssertionError("a question was answered twice")
        if not self._sealed:
            self._write_settings(self._sources)
        if self._run is not None:
            self._runs.append([{"first": len(self.answers), **self._run}])
            self._run = None
        self._answers.append(answers)
        self.answers.update(fresh)
        self._timing.append([timing])

    def close(self) -> None:
        for file in self._files:
            file.close()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def result_folder(output: Path, asked: int, available: int) -> Path:
    """Where result and submission of a run go: a partial result never replaces the complete one."""
    return output if asked >= available else output / f"limit{asked}"


def move_aside(folder: Path) -> None:
    """Move an earlier run's files to the first free `replaced-N`; nothing is deleted."""
    partial = [path.name for path in folder.glob("limit*") if path.name.removeprefix("limit").isdecimal()]
    names = dict.fromkeys([*partial, *submission_files(folder / "result.json"), *FILES])
    present = [name for name in names if (folder / name).exists()]
    if not present:
        return
    number = 1
    while (folder / f"replaced-{number}").exists():
        number += 1
    target = folder / f"replaced-{number}"
    try:
        target.mkdir()
        for name in present:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(folder / name, target / name)
    except OSError as error:
        raise UserError(f"Cannot move the earlier run to {target}: {error.strerror}.") from error
    sync_folder(folder)


def submission_files(result: Path) -> list[str]:
    """Names of the files that were written beside a result; none for a result that does not say it."""
    try:
        names = json.loads(result.read_bytes()).get("submission", [])
    except (OSError, ValueError, AttributeError):
        return []
    return [name for name in names if isinstance(name, str) and ".." not in Path(name).parts]


def current_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Stored settings with the present names of the method's options."""
    options = settings.get("config")
    return {**settings, "config": with_current_names(options)} if isinstance(options, dict) else dict(settings)


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
