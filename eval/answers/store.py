"""The answer store: one folder per run, one line per answer, safe against kill -9, two writers and a full disk.

    answers.jsonl, timing.jsonl, runs.jsonl, failures.jsonl    see eval.answers.files
    conflicts.jsonl  answers that a rank gave to a question with another answer; only if there was one
    settings.json    what the answers depend on, with hashes of the model's files and of every source file; a run with
                     others is refused
    result.json      the result of all questions, beside the benchmark's submission files
    limit50/         the result and the submission files of a run with --limit 50
    replaced-1/      what --restart moved aside
    lock             host and process that took the folder last; the lock ends with the process, the file stays

While several ranks answer, and after all of them were killed, there are also:

    shards/          answers of the ranks that are not merged yet
    merging/         the files with the lines of the shards, while they are written
    merged/          the same once they are whole: on their way to the places of the store's own

The step from merging/ to merged/ is one rename. Before it nothing has changed; after it the next process finishes the
merge if this one is killed. The next run in the folder merges what is left there. It also deletes temporary files
(.NAME.PROCESS) of processes that were killed while they replaced a file, so after it the folder holds what the first
list names.

The number of questions asked (--limit) is not a setting: a store holds the answers to some of the benchmark's
questions, and growing the limit continues it.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from eval.answers.files import (
    ANSWERS,
    FAILURES,
    RUNS,
    SHARDS,
    TIMING,
    AnswerFiles,
    Row,
    answer_id,
    answer_problem,
    delete_shards,
    failure_problem,
    holds_lines,
    settings_hash,
    shard_folders,
)
from eval.answers.jsonl import (
    garbage_collection_paused,
    is_file,
    read_appended,
    read_json,
    read_jsonl,
    sync_folder,
    write_json,
)
from eval.answers.source_hash import differences
from llava.errors import UserError

CONFLICTS = "conflicts.jsonl"
MERGING, MERGED = "merging", "merged"
# In merging/ and merged/: names of the shards.
MERGED_SHARDS = "shards.jsonl"
ADVICE = "choose another --output, or --restart to move them aside"
# The order in which --restart moves them: answers without the settings that they were made under are worth nothing.
FILES = (
    "result.json",
    "predictions.json",
    SHARDS,
    FAILURES,
    CONFLICTS,
    TIMING,
    RUNS,
    ANSWERS,
    "settings.json",
    "wandb_id",
)
# Files that `eval.answers.jsonl.write_bytes` had not renamed yet when its process (the number) was killed.
UNFINISHED = re.compile(r"\..+\.\w+\.\d+")
# Sub-folders that a run does not write its own files to.
SEPARATE = re.compile(r"replaced-\d+|wandb|shards")
# limit50/mme_results/ is the deepest folder that a run writes to.
DEPTH = 2


class AnswerStore(AnswerFiles):
    """The answers of one run, open for writing by this process alone.

    Attributes:
        answers: question id -> line, in the order they were written.
        failures: question id -> line of the latest failure, of the questions without an answer.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        known: Collection[str],
        restart: bool = False,
        process: Mapping[str, Any] | None = None,
    ):
        """Open or create the store, and merge the shards that ranks of an earlier start have left.

        Args:
            folder: made if it is not there.
            settings: what the answers depend on, JSON types only.
            known: ids of all questions of the benchmark, asked in this run or not.
            restart: move what is there into a numbered sub-folder first.
            process: what runs.jsonl says about this process if it adds answers.

        Raises:
            UserError: another process has the folder, its lines do not belong to these settings or questions, or it
                cannot be written to.
        """
        super().__init__(folder, process)
        self._settings, self._known = settings, frozenset(known)
        self._lock, unlocked = lock_folder(folder)
        self._remarks = [] if unlocked is None else [unlocked]
        try:
            if self._lock is not None:
                remove_unfinished(folder)
            finish_merge(folder)
            if restart:
                move_aside(folder)
            self._read()
            self._agree()
            self.merge()
        except BaseException:
            self.close()
            raise

    def _read(self) -> None:
        """Open the files and index their lines; a store is refused if one is incomplete, foreign or repeated."""
        self.answers: dict[str, Row] = {}
        with garbage_collection_paused():
            lines = self._open(ANSWERS)
            for name in (TIMING, RUNS):
                self._open(name)
        for number, row in enumerate(lines.rows, start=1):
            if problem := answer_problem(row, self._known):
                raise UserError(f"{lines.path} line {number} {problem}.")
            if row["question_id"] in self.answers:
                raise UserError(f"{lines.path} line {number} answers question {row['question_id']} a second time.")
            self.answers[row["question_id"]] = row
        self.failures: dict[str, Row] = {}
        if is_file(self.folder / FAILURES):
            lines = self._open(FAILURES)
            for number, row in enumerate(lines.rows, start=1):
                if problem := failure_problem(row, self._known):
                    raise UserError(f"{lines.path} line {number} {problem}.")
                if row["question_id"] not in self.answers:
                    self.failures[row["question_id"]] = row

    def _agree(self) -> None:
        """Refuse answers that were made under other settings, and lines of another store."""
        path = self.folder / "settings.json"
        if not self.answers and not self.failures and not any(map(holds_lines, shard_folders(self.folder))):
            write_json(path, self._settings)
            return
        if not path.exists():
            raise UserError(
                f"{self.folder} has answers but no settings.json beside them, so nobody knows how they were made; "
                f"{ADVICE}."
            )
        if changes := differences(read_json(path), self._settings):
            raise UserError(f"{self.folder} holds answers made under other settings ({'; '.join(changes)}); {ADVICE}.")
        own = settings_hash(self._settings)
        if foreign := [name for name, row in self.answers.items() if row.get("answer_id") != answer_id(own, name)]:
            raise UserError(
                f"{self.folder / ANSWERS} holds {len(foreign):,} answers of another store, the first to question "
                f"{foreign[0]}: their answer_id is not that of these settings; {ADVICE}."
            )

    @property
    def remarks(self) -> list[str]:
        """What a reader of the result must know about the store: no locks, shards left out, unequal answers."""
        conflicts = [row for _, _, row in read_appended(self.folder / CONFLICTS) if row]
        names = list(dict.fromkeys(str(row.get("question_id")) for row in conflicts))
        if not names:
            return self._remarks
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        what = "1 question was" if len(names) == 1 else f"{len(names):,} questions were"
        return [
            *self._remarks,
            f"{what} answered by two ranks in different words ({shown}); the first answer counts, and the other is in "
            f"{CONFLICTS}",
        ]

    def merge(self) -> int:
        """Merge all shards into the store, in one step for a reader of answers.jsonl, and delete them.

        A kill at any moment loses no answer and repeats none: the next opening of the store merges again. Of two
        answers to a question the first counts; if their texts differ, `remarks` says so and conflicts.jsonl keeps the
        other. Ranks must have closed their shards or have ended.

        Returns:
            How many answers were taken.

        Raises:
            UserError: a shard holds lines that do not belong, or the disk is full. The shards are kept, and the store
                is as it was.
        """
        shards, before = shard_folders(self.folder), len(self.answers)
        if not shards:
            return 0
        own = settings_hash(self._settings)
        taken: dict[str, Row] = {}
        lines: dict[str, list[Row]] = {name: [] for name in (ANSWERS, TIMING, RUNS, FAILURES, CONFLICTS)}
        merged = []
        with garbage_collection_paused():
            for shard in shards:
                # A process that outlives --restart can leave such a shard in the new store.
                first = next((row for _, _, row in read_appended(shard / ANSWERS) if row), {})
                if first and first.get("answer_id") != answer_id(own, str(first.get("question_id"))):
                    remark = (
                        f"the answers in {shard.relative_to(self.folder)} are left out, because they were made under "
                        "other settings or by other code; delete that folder, or --restart to move everything aside"
                    )
                    self._remarks += [] if remark in self._remarks else [remark]
                else:
                    self._take(shard, own, taken, lines)
                    merged.append(shard.name)
        if not merged:
            return 0
        lines |= {ANSWERS: list(taken.values()), MERGED_SHARDS: [{"shard": name} for name in merged]}
        try:
            write_merged(self.folder, lines)
        except OSError as error:
            raise UserError(
                f"Cannot merge the answers of the ranks into {self.folder / ANSWERS}: {error.strerror}; they are kept "
                f"in {self.folder / SHARDS}, so make room and run the same command again."
            ) from error
        self._close_files()
        finish_merge(self.folder)
        self._read()
        return len(self.answers) - before

    def _take(self, shard: Path, own: str, taken: dict[str, Row], lines: dict[str, list[Row]]) -> None:
        """Read and check a shard: its answers go to `taken` and its other lines to `lines`.

        Args:
            own: hash of the settings.
        """
        mine = set()
        for number, _, row in read_appended(shard / ANSWERS):
            if row is None:
                continue
            if problem := answer_problem(row, self._known):
                raise UserError(f"{shard / ANSWERS} line {number} {problem}.")
            name = row["question_id"]
            if row.get("answer_id") != answer_id(own, name):
                raise UserError(f"{shard / ANSWERS} line {number} was made under other settings than the first line.")
            earlier = self.answers.get(name) or taken.get(name)
            if earlier is None:
                taken[name] = row
                mine.add(name)
            elif earlier["text"] != row["text"]:
                lines[CONFLICTS].append(row)
        for _, _, row in read_appended(shard / TIMING):
            if row and (ids := [name for name in row["question_ids"] if name in mine]):
                lines[TIMING].append(row | {"question_ids": ids})
        lines[RUNS] += [row for _, _, row in read_appended(shard / RUNS) if row and mine]
        for number, _, row in read_appended(shard / FAILURES):
            if row is not None:
                if problem := failure_problem(row, self._known):
                    raise UserError(f"{shard / FAILURES} line {number} {problem}.")
                lines[FAILURES].append(row)

    @property
    def _batches(self) -> dict[str, Row]:
        """Question id -> the line of timing.jsonl of its answer: the last one, if it was asked again after a crash."""
        return {name: row for row in self._open(TIMING).rows for name in row["question_ids"] if name in self.answers}

    @property
    def timing(self) -> list[Row]:
        """Every batch that was timed, of this run and of the runs it continues."""
        return self.timing_of(self.answers)

    def timing_of(self, names: Collection[str]) -> list[Row]:
        """The batches all of whose questions are among `names`.

        Seconds of a batch cannot be divided: one that was torn, or of which another rank gave an answer, is left out.
        """
        wanted, batches = set(names), self._batches
        return [
            row
            for row in self._open(TIMING).rows
            if row["questions"] == len(row["question_ids"])
            and wanted.issuperset(row["question_ids"])
            and all(batches.get(name) is row for name in row["question_ids"])
        ]

    def origins(self, names: Iterable[str]) -> list[tuple[Row | None, int]]:
        """Which processes answered these questions: (line of runs.jsonl, number of answers), None for not recorded."""
        processes = {(row.get("run"), row.get("rank")): row for row in self._open(RUNS).rows}
        batches = self._batches
        counts: dict[Any, int] = {}
        for name in names:
            if name in self.answers:
                batch = batches.get(name, {})
                key = batch.get("run"), batch.get("rank")
                counts[key] = counts.get(key, 0) + 1
        return [(processes.get(key), count) for key, count in counts.items()]

    def add(self, answers: Sequence[Row], timing: Mapping[str, Any]) -> None:
        if not self.answers.keys().isdisjoint(row["question_id"] for row in answers):
            raise AssertionError("a question was answered twice")
        super().add(answers, timing)
        for row in answers:
            self.answers[row["question_id"]] = row
            self.failures.pop(row["question_id"], None)

    def fail(self, failures: Sequence[Mapping[str, Any]]) -> list[Row]:
        for line in failures:
            if line["question_id"] not in self._known or line["question_id"] in self.answers:
                raise AssertionError(f"question {line['question_id']} is unknown or answered, so it cannot fail")
        lines = super().fail(failures)
        self.failures |= {line["question_id"]: line for line in lines}
        return lines

    def close(self) -> None:
        """Sync and close the files and give the folder back; further calls do nothing."""
        try:
            super().close()
        finally:
            if self._lock is not None:
                self._lock.release()
                self._lock = None


def result_folder(output: Path, asked: int, available: int) -> Path:
    """Where result and submission of a run go: a partial result never replaces the complete one."""
    return output if asked >= available else output / f"limit{asked}"


# -- merging ---------------------------------------------------------------------------------------------------------


def write_merged(folder: Path, lines: Mapping[str, Sequence[Row]]) -> None:
    """Write copies of the store's files with further lines to merged/, all of them or none.

    Args:
        lines: name of the file -> what is added to it.

    Raises:
        OSError: the disk is full or fails; nothing has changed then.
    """
    staging = folder / MERGING
    try:
        staging.mkdir()
        for name, rows in lines.items():
            if rows:
                with contextlib.suppress(FileNotFoundError):
                    shutil.copyfile(folder / name, staging / name)
                with open(staging / name, "ab") as file:
                    file.writelines(json.dumps(row).encode() + b"\n" for row in rows)
                    file.flush()
                    os.fsync(file.fileno())
        sync_folder(staging)
        os.replace(staging, folder / MERGED)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    sync_folder(folder)


def finish_merge(folder: Path) -> None:
    """Finish the merge of a process that has written merged/, and forget one that has not; no file may be open.

    Raises:
        UserError: the disk fails; a later call goes on.
    """
    merged = folder / MERGED
    shutil.rmtree(folder / MERGING, ignore_errors=True)
    if not merged.is_dir():
        return
    try:
        if is_file(merged / MERGED_SHARDS):
            shards = [row["shard"] for _, row in read_jsonl(merged / MERGED_SHARDS)]
            for path in sorted(merged.iterdir()):
                if path.name != MERGED_SHARDS:
                    os.replace(path, folder / path.name)
            sync_folder(folder)
            delete_shards(folder, shards)
            (merged / MERGED_SHARDS).unlink()
        merged.rmdir()
    except OSError as error:
        raise UserError(f"Cannot repair {folder} after a merge that was interrupted: {error.strerror}.") from error
    sync_folder(folder)


# -- one writer ------------------------------------------------------------------------------------------------------


def lock_folder(folder: Path) -> tuple[FileLock | None, str | None]:
    """Take the folder for this process until `release()`, or until the process ends, however it ends.

    The file `lock` names the host and the process that took the folder last; it stays in the folder.

    Returns:
        (lock, None), or on a file system without locks (None, a sentence that says so): unprotected is better than
        unusable.

    Raises:
        UserError: another process holds the folder, or it cannot be written to.
    """
    path = folder / "lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.touch()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"Cannot write to the output folder {folder}: {reason}.") from error
    # No fallback to a lock by the existence of a file: a process that is killed would leave the folder locked.
    lock = FileLock(path, timeout=0, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError(
            f"{folder} is in use by another run{owner(path)}; wait for it or choose another --output."
        ) from error
    except OSError as error:
        return None, (
            f"the file system of {folder} has no locks ({error.strerror}): a second run that writes to this folder at "
            "the same time would not have been noticed"
        )
    with contextlib.suppress(OSError):  # the name only helps to read the message above
        path.write_text(f"{os.uname().nodename} {os.getpid()}\n")
    return lock, None


def owner(path: Path) -> str:
    """Who holds a lock, for an error; empty if its file does not say it."""
    words = path.read_text(errors="replace").split()
    return f" (process {words[1]} on host {words[0]})" if len(words) == 2 and words[1].isdigit() else ""


def remove_unfinished(folder: Path) -> None:
    """Delete temporary files of processes that were killed while they wrote, in a run's folder and its sub-folders.

    The folder must be locked: then no other process writes there, whatever its number. Sub-folders that are runs of
    their own, or that --restart made, are left alone.
    """
    for path, folders, files in os.walk(folder):
        place = Path(path)
        folders[:] = [name for name in folders if not SEPARATE.fullmatch(name) and not (place / name / "lock").exists()]
        if len(place.relative_to(folder).parts) >= DEPTH:
            folders.clear()
        for name in filter(UNFINISHED.fullmatch, files):
            (place / name).unlink(missing_ok=True)


# -- restart --------------------------------------------------------------------------------------------------------


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
