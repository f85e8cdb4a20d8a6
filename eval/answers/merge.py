"""Merging shards into their store, all of them or none, whatever kills the process.

Every file of a store is only ever appended to, so a merge that did not finish is undone by cutting files to the sizes
they had. `merge.json` holds those sizes while a merge goes on:

1. The shards are read and checked. Answers go to a copy of answers.jsonl that nobody else sees.
2. merge.json is written with the sizes of the files now, and the size of the copy.
3. Timing, runs, failures and conflicts are appended to their files: a kill until here undoes the merge.
4. The copy replaces answers.jsonl: from here on a kill finishes the merge, so a reader never sees an answer vanish.
5. merge.json is replaced by the names of the shards, the shards are deleted, then merge.json.
"""

import contextlib
import os
import shutil
from bisect import bisect_left
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import IO, Any

from eval.answers.durable import DurableLines
from eval.answers.files import ANSWERS, FAILURES, RUNS, TIMING, answer_id, answer_problem, failure_problem
from eval.answers.jsonl import garbage_collection_paused, is_file, read_appended, read_json, sync_folder, write_json
from eval.answers.shards import SHARDS, delete_shards, shard_folders
from llava.errors import UserError

JOURNAL = "merge.json"
# Answers that another shard, or the store, gave before in other words.
CONFLICTS = "conflicts.jsonl"

Row = dict[str, Any]


def recover(folder: Path) -> None:
    """Undo or finish the merge of a process that was killed; the store's files must not be open.

    Raises:
        UserError: the disk is full or fails; a later call goes on.
    """
    path = folder / JOURNAL
    if not is_file(path):
        return
    journal = read_json(path)
    try:
        before, after = journal["sizes"][ANSWERS], journal["answers"]
        if journal["done"] or (after > before and (folder / ANSWERS).stat().st_size >= after):
            delete_shards(folder, journal["shards"])
        else:
            for name, size in journal["sizes"].items():
                cut(folder / name, size)
        path.unlink()
    except OSError as error:
        raise UserError(f"Cannot repair {folder} after a merge that was interrupted: {error.strerror}.") from error
    sync_folder(folder)


def cut(path: Path, size: int | None) -> None:
    """Cut a file to a size in bytes; None: it was not there."""
    if size is None:
        path.unlink(missing_ok=True)
    elif path.stat().st_size > size:
        with open(path, "r+b") as file:
            file.truncate(size)
            os.fsync(file.fileno())


class Merge:
    """The lines that the shards of a store add to it.

    Attributes:
        shards: folders that were read, in the order of their lines.
        answers: question id -> line, of questions that had no answer.
        timing, runs, failures, conflicts: lines for those files.
        remarks: sentences about shards that were left out.
    """

    def __init__(self, folder: Path, present: Mapping[str, Row], known: Collection[str], seal: str) -> None:
        """
        Args:
            folder: of the store.
            present: question id -> line, of the store.
            known: ids of the benchmark's questions.
            seal: of the store's settings.
        """
        self.folder, self.present, self.known = folder, present, known
        self._seal = seal
        self.shards: list[Path] = []
        self.answers: dict[str, Row] = {}
        self.timing: list[Row] = []
        self.runs: list[Row] = []
        self.failures: list[Row] = []
        self.conflicts: list[Row] = []
        self.remarks: list[str] = []
        self.temporary = folder / f".{ANSWERS}.{os.getpid()}"
        self._output: IO[bytes] | None = None

    def read(self) -> None:
        """Read and check every shard, and write the copy of answers.jsonl.

        Raises:
            UserError: a shard holds lines that do not belong, or the disk is full; nothing has changed then.
        """
        try:
            with garbage_collection_paused():
                for shard in shard_folders(self.folder):
                    if reason := self._foreign(shard):
                        self.remarks.append(
                            f"the answers in {shard.relative_to(self.folder)} are left out, because {reason}; delete "
                            "that folder, or --restart to move everything aside"
                        )
                    else:
                        self.shards.append(shard)
                        self._read_shard(shard)
            if self._output is not None:
                self._output.flush()
                os.fsync(self._output.fileno())
        except OSError as error:
            raise self._failed(error) from error
        finally:
            if self._output is not None:
                with contextlib.suppress(OSError):  # a full disk was reported by the flush above
                    self._output.close()

    def _failed(self, error: OSError) -> UserError:
        return UserError(
            f"Cannot merge the answers of the ranks into {self.folder / ANSWERS}: {error.strerror}; they are kept in "
            f"{self.folder / SHARDS}, so make room and run the same command again."
        )

    def _foreign(self, shard: Path) -> str | None:
        """Why a shard does not belong to the store's settings, judged by its first line; None if it does.

        A process that outlives --restart can leave such a shard in the new store.
        """
        first = next((row for _, _, row in read_appended(shard / ANSWERS) if row), {})
        if first and first.get("answer_id") != answer_id(self._seal, str(first.get("question_id"))):
            return "they were made under other settings or by other code"
        return None

    def _read_shard(self, shard: Path) -> None:
        base = len(self.present) + len(self.answers)
        # Numbers of the shard's answers that the store does not take; all others get consecutive places.
        skipped: list[int] = []
        count = 0
        path = shard / ANSWERS
        for number, line, row in read_appended(path):
            if row is not None:
                if not self._take(path, number, line, row):
                    skipped.append(count)
                count += 1

        def place(number: int) -> int:
            """Place in the store of the shard's first taken answer from `number` on."""
            return base + number - bisect_left(skipped, number)

        for _, _, row in read_appended(shard / TIMING):
            first, end = (row["first"], row["first"] + row.get("questions", 0)) if row else (0, 0)
            # Seconds of a batch cannot be divided: without all of its answers it is left out, and the result counts the
            # questions without timing.
            if row and end <= count and place(end) - place(first) == end - first:
                self.timing.append({**row, "first": place(first)})
        runs = [row for _, _, row in read_appended(shard / RUNS) if row] or [{"first": 0}]
        ends = [*(row["first"] for row in runs[1:]), count]
        for row, end in zip(runs, ends, strict=True):
            if place(end) > place(row["first"]):
                self.runs.append({**row, "first": place(row["first"])})
        for number, _, row in read_appended(shard / FAILURES):
            if row is not None:
                if problem := failure_problem(row, self.known):
                    raise UserError(f"{shard / FAILURES} line {number} {problem}.")
                self.failures.append(row)

    def _take(self, path: Path, number: int, line: bytes, row: Row) -> bool:
        """Take an answer, if it is the first to its question."""
        if problem := answer_problem(row, self.known):
            raise UserError(f"{path} line {number} {problem}.")
        name = row["question_id"]
        if row.get("answer_id") != answer_id(self._seal, name):
            raise UserError(f"{path} line {number} was made under other settings than the first line.")
        earlier = self.present.get(name) or self.answers.get(name)
        if earlier is not None:
            if earlier["text"] != row["text"]:
                self.conflicts.append(row)
            return False
        if self._output is None:
            shutil.copyfile(self.folder / ANSWERS, self.temporary)
            self._output = open(self.temporary, "ab", buffering=1 << 20)  # noqa: SIM115 - closed by `read`
        self._output.write(line if line.endswith(b"\n") else line + b"\n")
        self.answers[name] = row
        return True

    def write(self, files: Mapping[str, DurableLines | None]) -> None:
        """Bring the lines into the store and delete the shards: steps 2 to 5 of the module's description.

        Args:
            files: the store's open files by name; None for one that is not there yet.

        Raises:
            UserError: the disk is full or fails. `recover` then leaves the store as it was.
        """
        answers = files[ANSWERS]
        assert answers is not None
        journal: dict[str, Any] = {
            "sizes": {name: None if file is None else file.size for name, file in files.items()},
            "answers": self.temporary.stat().st_size if self.answers else answers.size,
            "shards": [shard.name for shard in self.shards],
            "done": False,
        }
        write_json(self.folder / JOURNAL, journal)
        lines = {TIMING: self.timing, RUNS: self.runs, FAILURES: self.failures, CONFLICTS: self.conflicts}
        for name, rows in lines.items():
            if rows:
                file = files[name] or DurableLines(self.folder / name)
                file.append(rows)
                if files[name] is None:
                    file.close()
        try:
            sync_folder(self.folder)
            if self.answers:
                answers.replace(self.temporary, list(self.answers.values()))
            sync_folder(self.folder)
        except OSError as error:
            raise self._failed(error) from error
        # Without new answers, this and not the replaced file says that the lines above are whole.
        write_json(self.folder / JOURNAL, journal | {"done": True})
        delete_shards(self.folder, journal["shards"])
        (self.folder / JOURNAL).unlink()
        sync_folder(self.folder)

    def discard(self) -> None:
        """Delete the copy of answers.jsonl if it was not used."""
        self.temporary.unlink(missing_ok=True)


def conflict_remarks(folder: Path) -> list[str]:
    """A sentence about questions that two ranks answered in different words; none where that did not happen."""
    names = list(dict.fromkeys(str(row.get("question_id")) for _, _, row in read_appended(folder / CONFLICTS) if row))
    if not names:
        return []
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    what = "1 question was" if len(names) == 1 else f"{len(names):,} questions were"
    return [
        f"{what} answered by two ranks in different words ({shown}); the first answer counts, and the other is in "
        f"{CONFLICTS}"
    ]
