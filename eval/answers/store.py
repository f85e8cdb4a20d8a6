"""The answer store: one folder per run, one line per answer, safe against kill -9, two writers and a full disk.

    answers.jsonl    one line per question with LLaVA's fields and a hash of the question's images; in the order of
                     answering, sorted into the benchmark's order before a result is written
    timing.jsonl     one line per batch: its questions and process, seconds, FLOPs and the conditions of measurement
    runs.jsonl       one line per process that wrote answers: commit and library versions
    failures.jsonl   one line per failed try to answer a question, with the reason; only if there was one
    conflicts.jsonl  answers of a second rank that differ from the first rank's; only if there are any
    settings.json    what the answers depend on, with hashes of the model's files and of every source file; a run with
                     other settings is refused
    result.json      the result over all questions; the benchmark's submission files stand next to it. It is written
                     last, so if one of them or an answer is missing, it was lost later (eval.answers.reuse)
    limit50/         result and submission files of a run with --limit 50
    replaced-1/      what --restart moved aside
    lock             host and process that last took the folder; the lock ends with the process, the file stays

Lines of different files are matched by question id and by the `run` and `rank` of the process. If a crash tears the
answers of a batch, its line in timing.jsonl names questions that have no answer or that a later batch answered.

While several ranks answer, and if all of them were killed, there are also:

    shards/<world>-rank<rank>/   the first four files, written by one rank, until they are merged
    merging/         copies of the store's files with the lines of the shards added, while they are written
    merged/          the same copies once they are complete, until they have replaced the store's files

A rank is one process; a world is all ranks of one start. Ranks write without locks and without waiting for each other,
because no two processes write to the same shard: a process of an earlier start that is still alive has another world.

The step from merging/ to merged/ is one rename. Before it nothing has changed; after it, if this process is killed, the
next one finishes the merge. The next run in the folder merges the shards that it finds. It also deletes the temporary
files (.NAME.PROCESS) of processes that were killed while replacing a file. The folder then holds only what the first
list names.

The number of questions (--limit) is not a setting: a store may hold answers to some of the benchmark's questions, and
a run with a larger limit continues it.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from eval.answers.jsonl import (
    DurableLines,
    is_file,
    make_folder,
    read_appended,
    read_json,
    read_jsonl,
    sync_folder,
    write_bytes,
    write_json,
)
from eval.answers.source_hash import differences
from llava.errors import UserError

ANSWERS, TIMING, RUNS, FAILURES = "answers.jsonl", "timing.jsonl", "runs.jsonl", "failures.jsonl"
CONFLICTS = "conflicts.jsonl"
SHARDS = "shards"
SHARD_NAME = re.compile(r"[A-Za-z0-9_.]+-rank\d+")
MERGING, MERGED = "merging", "merged"
# File in merging/ and merged/ that names the shards whose lines are included.
MERGED_SHARDS = "shards.jsonl"
ADVICE = "choose another --output, or --restart to move them aside"
# Shortest time between two syncs. A sync takes 0.2 ms on a local disk and 50 ms on a busy shared one; two after every
# question would take a tenth of the run.
SYNC_SECONDS = 10
# In the order in which --restart moves them: settings go after the answers, which are worth nothing without them.
FILES = (
    "result.json", "predictions.json", SHARDS, FAILURES, CONFLICTS, TIMING, RUNS, ANSWERS, "settings.json", "wandb_id",
)  # fmt: skip
# Errors by which a file system says that it has no locks. Any other error may be temporary.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)
UNLOCKED = "has no locks"
# Temporary files of `eval.answers.jsonl.write_bytes`; the number is the process that was killed before it renamed them.
UNFINISHED = re.compile(r"\..+\.\w+\.\d+")

Row = dict[str, Any]

# Keys that every line of a file must have, with their types; and the keys of its process, which may be missing.
FORMS: dict[str, dict[str, type]] = {
    ANSWERS: {"question_id": str, "text": str},
    FAILURES: {"question_id": str, "reason": str},
    TIMING: {"questions": int, "question_ids": list},
    RUNS: {"commit": str, "versions": dict},
}
PROCESS: dict[str, type] = {"run": str, "rank": int}


def settings_hash(settings: Mapping[str, Any]) -> str:
    """Hash of the settings that answers depend on, 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def answer_id(settings: str, question_id: str) -> str:
    """The `answer_id` of an answer. It depends only on settings and question, so equal runs write equal files.

    Args:
        settings: as returned by `settings_hash`.
    """
    return hashlib.sha256(f"{settings} {question_id}".encode()).hexdigest()[:22]


def check_line(row: Row, path: Path, number: int) -> None:
    """Raise UserError unless a line has the keys and types that its file needs (FORMS)."""
    form = FORMS[path.name]
    wrong = [key for key, kind in form.items() if not isinstance(row.get(key), kind)]
    wrong += [key for key, kind in PROCESS.items() if not isinstance(row.get(key), kind | None)]
    if not wrong and not all(isinstance(name, str) for name in row.get("question_ids", ())):
        wrong = ["question_ids"]
    if wrong:
        got = f"{wrong[0]} is {row[wrong[0]]!r:.80}" if wrong[0] in row else f"there is no {wrong[0]}"
        raise UserError(f"{path} line {number} needs {' and '.join(form)}: {got}.")


# -- one writer ------------------------------------------------------------------------------------------------------


class AnswerFiles:
    """The files of a store, or of a rank's shard; only this process appends to them.

    What `add` and `fail` have written survives any end of this process. A power failure or a crash of the machine can
    lose the batches of the last SYNC_SECONDS; their questions are then asked again.

    Attributes:
        process: the line of this process in runs.jsonl, written before its first answer or failure; may be empty.
    """

    def __init__(self, folder: Path, process: Mapping[str, Any] | None = None):
        """
        Args:
            process: what runs.jsonl says about this process: "run", its name; "rank", if there are several; and more.
        """
        self.folder, self.process = folder, dict(process or {})
        self._named = False
        self._files: dict[str, DurableLines] = {}
        self._next_sync = 0.0

    def _open(self, name: str) -> DurableLines:
        """A file of the folder, opened on first use and created if missing."""
        if name not in self._files:
            self._files[name] = DurableLines(self.folder / name)
        return self._files[name]

    def _write(self, lines: Mapping[str, Iterable[Row]]) -> None:
        """Append lines to the files in the given order; before the first time write the line of this process."""
        if not self._named and self.process:
            self._open(RUNS).append([self.process], sync=False)
        self._named = True
        for name, rows in lines.items():
            self._open(name).append(rows, sync=False)
        if time.monotonic() >= self._next_sync:
            self.sync()
            self._next_sync = time.monotonic() + SYNC_SECONDS

    def sync(self) -> None:
        """Wait until every line survives a power failure; UserError if the disk is full or fails."""
        for file in self._files.values():
            file.sync()

    def add(self, answers: Sequence[Row], timing: Mapping[str, Any]) -> None:
        """Write one batch; once this returns it survives any end of this process.

        Args:
            timing: the batch's line of timing.jsonl; its questions, their number and this process are added here.

        Raises:
            UserError: the disk is full; everything before this batch is kept.
        """
        ids = [row["question_id"] for row in answers]
        own = {key: self.process[key] for key in ("run", "rank") if key in self.process}
        self._write({TIMING: [own | dict(timing) | {"questions": len(ids), "question_ids": ids}], ANSWERS: answers})

    def fail(self, failures: Sequence[Mapping[str, Any]]) -> list[Row]:
        """Record questions that could not be answered; once this returns the lines survive any end of this process.

        Args:
            failures: {"question_id", "reason": one sentence, "kind": "image", "error" or "memory"}; the "run" of this
                process is added.

        Returns:
            The lines as they were written.
        """
        own = {"run": self.process["run"]} if "run" in self.process else {}
        lines = [own | dict(line) for line in failures]
        self._write({FAILURES: lines})
        return lines

    def close(self) -> None:
        """Sync and close the files; further calls do nothing."""
        with contextlib.ExitStack() as stack:  # closes every file, even if one cannot be synced
            while self._files:
                stack.callback(self._files.popitem()[1].close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Shard(AnswerFiles):
    """The answers of one rank, open for writing."""

    def __init__(self, store_folder: Path, world: str, rank: int, process: Mapping[str, Any]):
        """Make the shard's folder and files.

        Args:
            store_folder: folder of the store that the answers will be merged into.
            world: random name of this start of the ranks; letters, digits, "_" and ".".
            rank: number of this process among the ranks.

        Raises:
            UserError: the folder cannot be written to.
        """
        folder = store_folder / SHARDS / f"{world}-rank{rank}"
        make_folder(folder)
        super().__init__(folder, {**process, "rank": rank})
        self._open(ANSWERS)
        sync_folder(folder)

    def _write(self, lines: Mapping[str, Iterable[Row]]) -> None:
        if self._open(ANSWERS).unlinked:
            raise UserError(
                f"{self.folder} was merged by a later start of ranks and deleted, so this process, which belongs to an "
                "earlier one, stops."
            )
        super()._write(lines)


# -- the store of a run ----------------------------------------------------------------------------------------------


class AnswerStore(AnswerFiles):
    """The answers of one run, open for writing by this process alone.

    Attributes:
        answers: question id -> line, in the order of the file.
        failures: question id -> line of its latest failure, for questions without an answer.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        known: Collection[str],
        restart: bool = False,
        process: Mapping[str, Any] | None = None,
    ):
        """Open or create the store, and merge the shards that an earlier start of ranks has left.

        Args:
            folder: created if missing.
            settings: what the answers depend on, JSON types only.
            known: ids of all questions of the benchmark, also of those that this run does not ask.
            restart: first move what is there into a numbered sub-folder.
            process: see `AnswerFiles`.

        Raises:
            UserError: another process holds the folder, its lines belong to other settings or questions, or it cannot
                be written to.
        """
        super().__init__(folder, process)
        self._settings = settings
        self._known = {name: place for place, name in enumerate(known)}
        self._lock, unlocked = lock_folder(folder)
        self._remarks = [] if unlocked is None else [unlocked]
        try:
            if self._lock is not None:
                remove_unfinished(folder)
            finish_merge(folder)
            if restart:
                move_aside(folder)
            self._read()
            self._check_settings()
            self.merge()
        except BaseException:
            self.close()
            raise

    def _read(self) -> None:
        """Open the files and index their lines; UserError if a line is incomplete, foreign or answers a second time."""
        self.answers: dict[str, Row] = {}
        self.failures: dict[str, Row] = {}
        for name in (ANSWERS, TIMING, RUNS):
            self._open(name)
        for number, row in enumerate(self._open(ANSWERS).rows, start=1):
            name = self._check(row, self.folder / ANSWERS, number)
            # Without locks two processes may have written the same answer.
            if self.answers.setdefault(name, row) != row:
                raise UserError(f"{self.folder / ANSWERS} line {number} answers question {name} a second time.")
        for name in (TIMING, RUNS):
            for number, row in enumerate(self._open(name).rows, start=1):
                self._check(row, self.folder / name, number)
        if is_file(self.folder / FAILURES):
            for number, row in enumerate(self._open(FAILURES).rows, start=1):
                name = self._check(row, self.folder / FAILURES, number)
                if name not in self.answers:
                    self.failures[name] = row

    def _check(self, row: Row, path: Path, number: int) -> str:
        """Return the question id of a line that has one; UserError if the line does not belong to this benchmark."""
        check_line(row, path, number)
        name = row.get("question_id")
        if "question_id" in FORMS[path.name] and name not in self._known:
            what = "answers" if path.name == ANSWERS else "is about"
            raise UserError(f"{path} line {number} {what} question {name}, which this benchmark does not have.")
        return str(name)

    def _check_settings(self) -> None:
        """Raise UserError for answers made under other settings or of another store; write settings.json if new."""
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
        """Notes about the store for the reader of a result: missing locks, skipped shards, conflicting answers."""
        names = dict.fromkeys(str(row["question_id"]) for _, _, row in read_appended(self.folder / CONFLICTS) if row)
        unequal = (
            f"two ranks answered question {name} differently; {CONFLICTS} holds what is not counted" for name in names
        )
        return [*self._remarks, *unequal]

    def merge(self) -> int:
        """Merge all shards into the store and delete them. A reader of answers.jsonl sees one single change.

        Ranks must have closed their shards or have ended. A kill at any moment neither loses nor repeats an answer,
        because the next opening of the store merges again. If two answers to a question differ, the first counts and
        conflicts.jsonl keeps the other.

        Returns:
            The number of new answers.

        Raises:
            UserError: a shard holds foreign lines, or the disk is full. Shards and store are then unchanged.
        """
        before, taken = len(self.answers), dict[str, Row]()
        lines: dict[str, list[Row]] = {name: [] for name in (ANSWERS, TIMING, RUNS, FAILURES, CONFLICTS)}
        merged = [shard for shard in shard_folders(self.folder) if self._take(shard, taken, lines)]
        if not merged:
            delete_shards(self.folder, ())  # only removes the empty folder
            return 0
        in_order = sorted(taken.values(), key=lambda row: self._known[row["question_id"]])
        lines |= {ANSWERS: in_order, MERGED_SHARDS: [{"shard": shard.name} for shard in merged]}
        try:
            write_merged(self.folder, lines)
        except OSError as error:
            raise UserError(
                f"Cannot merge the answers of the ranks into {self.folder / ANSWERS}: {error.strerror}; they are kept "
                f"in {self.folder / SHARDS}, so make room and run the same command again."
            ) from error
        super().close()
        finish_merge(self.folder)
        self._read()
        return len(self.answers) - before

    def _take(self, shard: Path, taken: dict[str, Row], lines: dict[str, list[Row]]) -> bool:
        """Read and check a shard; its new answers are added to `taken`, its other lines to `lines`.

        Returns:
            False for a shard of other settings, which a process that outlived --restart can leave in the new store. It
            is skipped with a remark.
        """
        own, mine, first = settings_hash(self._settings), set[str](), True
        for number, _, row in read_appended(shard / ANSWERS):
            if row is None:
                continue
            if row.get("answer_id") != answer_id(own, str(row.get("question_id"))):
                if not first:
                    self._check(row, shard / ANSWERS, number)
                    raise UserError(
                        f"{shard / ANSWERS} line {number} was made under other settings than the first line."
                    )
                remark = (
                    f"the answers in {shard.relative_to(self.folder)} are left out, because they were made under "
                    "other settings or by other code; delete that folder, or --restart to move everything aside"
                )
                if remark not in self._remarks:
                    self._remarks.append(remark)
                return False
            name, first = self._check(row, shard / ANSWERS, number), False
            if name not in self.answers and name not in taken:
                taken[name] = row
                mine.add(name)
            elif (self.answers.get(name) or taken[name])["text"] != row["text"]:
                lines[CONFLICTS].append(row)
        for number, _, row in read_appended(shard / TIMING):
            if row is None:
                continue
            self._check(row, shard / TIMING, number)
            if ids := [name for name in row["question_ids"] if name in mine]:
                lines[TIMING].append(row | {"question_ids": ids})
        for number, _, row in read_appended(shard / RUNS):
            if row is not None and mine:
                self._check(row, shard / RUNS, number)
                lines[RUNS].append(row)
        for number, _, row in read_appended(shard / FAILURES):
            if row is not None:
                self._check(row, shard / FAILURES, number)
                lines[FAILURES].append(row)
        return True

    @property
    def _batches(self) -> dict[str, Row]:
        """Question id -> line of timing.jsonl with its answer; the last one, if it was asked again after a crash."""
        return {name: row for row in self._open(TIMING).rows for name in row["question_ids"] if name in self.answers}

    def timing_of(self, names: Collection[str]) -> list[Row]:
        """The lines of timing.jsonl whose questions are all among `names`.

        The seconds of a batch cannot be divided, so a batch is skipped if it lost an answer or another rank gave one.
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
        """The processes that answered these questions: (line of runs.jsonl or None, number of answers) of each."""
        processes = {(row.get("run"), row.get("rank")): row for row in self._open(RUNS).rows}
        known = self._batches
        batches = [known.get(name, {}) for name in names if name in self.answers]
        counts = Counter((batch.get("run"), batch.get("rank")) for batch in batches)
        return [(processes.get(key), count) for key, count in counts.items()]

    def add(self, answers: Sequence[Row], timing: Mapping[str, Any]) -> None:
        super().add(answers, timing)
        for row in answers:
            self.answers[row["question_id"]] = row
            self.failures.pop(row["question_id"], None)

    def fail(self, failures: Sequence[Mapping[str, Any]]) -> list[Row]:
        lines = super().fail(failures)
        self.failures |= {line["question_id"]: line for line in lines}
        return lines

    def put_in_order(self) -> None:
        """Sync, and sort the answers into the benchmark's order, each once, before a result is written.

        Without a lock another process may be writing to the file, so its lines stay as they are.

        Raises:
            UserError: the disk is full or fails; no further answer is lost.
        """
        self.sync()
        if self._lock is None or ANSWERS not in self._files:  # not open: sorted before, and nothing was added since
            return
        rows = sorted(self.answers.values(), key=lambda row: self._known[row["question_id"]])
        if rows == self._files[ANSWERS].rows:
            return
        self._files.pop(ANSWERS).close()
        write_bytes(self.folder / ANSWERS, b"".join(json.dumps(row).encode() + b"\n" for row in rows))
        self.answers = {row["question_id"]: row for row in rows}

    def close(self) -> None:
        """Sync and close the files and release the folder; further calls do nothing."""
        try:
            super().close()
        finally:
            if self._lock is not None:
                with contextlib.suppress(OSError):  # the lock ends with this process
                    self._lock.release()
                self._lock = None


# -- merging ---------------------------------------------------------------------------------------------------------


def shard_folders(store_folder: Path) -> list[Path]:
    """The shards in a store."""
    try:
        return sorted(p for p in (store_folder / SHARDS).iterdir() if SHARD_NAME.fullmatch(p.name) and p.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def holds_lines(shard: Path) -> bool:
    """Whether a shard has an answer or a failure."""
    return any(row for name in (ANSWERS, FAILURES) for _, _, row in read_appended(shard / name))


def delete_shards(store_folder: Path, names: Iterable[str]) -> None:
    """Delete shards by the names of their folders, as far as they still exist; UserError if one cannot be deleted."""
    folder = store_folder / SHARDS
    for name in filter(SHARD_NAME.fullmatch, names):
        # A process of an earlier start may still have files of its shard open, and a network file system then keeps
        # them under other names. It is enough that answers.jsonl is gone.
        shutil.rmtree(folder / name, ignore_errors=True)
        if (folder / name / ANSWERS).exists():
            raise UserError(f"Cannot delete {folder / name}, whose answers are merged; delete it by hand.")
    with contextlib.suppress(OSError):  # it holds other shards, or is gone
        folder.rmdir()
        sync_folder(store_folder)


def write_merged(folder: Path, lines: Mapping[str, Sequence[Row]]) -> None:
    """Write copies of the store's files with added lines to merged/, either all or none.

    Args:
        lines: name of a file -> lines to add.

    Raises:
        OSError: the disk is full or fails; nothing has changed.
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
    """Finish a merge whose merged/ is complete and discard one that is not; no file of the store may be open.

    Raises:
        UserError: the disk fails; a later call continues.
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


# -- the folder ------------------------------------------------------------------------------------------------------


def lock_folder(folder: Path) -> tuple[FileLock | None, str | None]:
    """Take the folder for this process, until `release()` or any end of the process.

    The file `lock` names the host and process that last took the folder; it stays in the folder.

    Returns:
        (lock, None); on a file system without locks (None, a sentence about it), and the folder is used unprotected.

    Raises:
        UserError: another process holds the folder, or it cannot be written to.
    """
    path = folder / "lock"
    make_folder(folder)
    # No fallback to a lock by a file's existence: a process that is killed would leave the folder locked.
    lock = FileLock(path, timeout=0, thread_local=False, fallback_to_soft=False)
    try:
        path.touch()
        lock.acquire()
    except Timeout as error:
        text = ""
        with contextlib.suppress(OSError):
            text = path.read_text(errors="replace").strip()
        owner = f" ({text})" if text else ""
        raise UserError(f"{folder} is in use by another run{owner}; wait for it or choose another --output.") from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise UserError(f"Cannot write to the output folder {folder}: {error.strerror}.") from error
        return None, (
            f"the file system of {folder} {UNLOCKED} ({error.strerror}): a second run that writes to this folder at "
            "the same time would not have been noticed"
        )
    with contextlib.suppress(OSError):  # the text is only used in the message above
        path.write_text(f"process {os.getpid()} on host {os.uname().nodename}\n")
    return lock, None


def remove_unfinished(folder: Path) -> None:
    """Delete the temporary files of killed processes in a run's folder and its sub-folders.

    The folder must be locked, so that no other process writes there. Sub-folders that are runs of their own are left
    alone.
    """
    for pattern in (".*", "*/.*", "limit*/*/.*"):
        for path in folder.glob(pattern):
            is_ours = path.parent == folder or not (path.parent / "lock").exists()
            if is_ours and UNFINISHED.fullmatch(path.name):
                path.unlink(missing_ok=True)


def check_restart(folder: Path, planned: Collection[str]) -> None:
    """Refuse a --restart that would move more answers aside than the run asks for again.

    Answers to other questions cannot stay, because the settings they were made under are moved too.

    Args:
        planned: ids of the questions that will be asked.

    Raises:
        UserError: the folder has answers to other questions.
    """
    lines = (row for path in (folder, *shard_folders(folder)) for _, _, row in read_appended(path / ANSWERS) if row)
    if lost := {str(row.get("question_id")) for row in lines} - set(planned):
        raise UserError(
            f"--restart would move {len(lost):,} more answers in {folder} aside than the {len(planned):,} questions of "
            "--limit ask for again; leave out --limit, or choose another --output."
        )


def move_aside(folder: Path) -> None:
    """Move an earlier run's files to the first free `replaced-N`; nothing is deleted."""
    partial = [path.name for path in folder.glob("limit*") if path.name.removeprefix("limit").isdecimal()]
    written: list[Any] = []
    with contextlib.suppress(UserError, AttributeError):  # a damaged result names no files
        written = read_json(folder / "result.json").get("submission", [])
    submission = [name for name in written if isinstance(name, str) and ".." not in Path(name).parts]
    present = [name for name in dict.fromkeys([*partial, *submission, *FILES]) if (folder / name).exists()]
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
