"""The answer store: one folder per run, one line per answer, safe against kill -9, two writers and a full disk.

    answers.jsonl    one line per question, in LLaVA's fields, with a hash of the question's images
    timing.jsonl     one line per batch: seconds, FLOPs and the conditions they were measured under
    runs.jsonl       one line per process that added answers: commit, library versions, number of the first answer
    failures.jsonl   one line per failed try to answer a question, with the reason; only if there was one
    conflicts.jsonl  answers that a rank gave to a question with another answer; only if there was one
    settings.json    what the answers depend on, with hashes of the model's files and of every source file; a run with
                     others is refused
    result.json      the result of all questions, beside the benchmark's submission files
    limit50/         the result and the submission files of a run with --limit 50
    replaced-1/      what --restart moved aside
    lock             host and process that took the folder last; the lock ends with the process, the file stays

While several ranks answer, and after all of them were killed, there are also:

    shards/          answers of the ranks that are not merged yet, see eval.answers.shards
    merge.json       a merge that goes on, see eval.answers.merge

The next run in the folder merges what is left there. It also deletes temporary files (.NAME.PROCESS) of processes that
were killed while they replaced a file, so after it the folder holds what the first list names.

The number of questions asked (--limit) is not a setting: a store holds the answers to some of the benchmark's
questions, and growing the limit continues it.
"""

import contextlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.answers.files import (
    ANSWERS,
    FAILURES,
    RUNS,
    TIMING,
    AnswerFiles,
    answer_id,
    answer_problem,
    failure_problem,
    seal_of,
)
from eval.answers.folder_lock import lock_folder, remove_unfinished
from eval.answers.jsonl import garbage_collection_paused, is_file, read_json, write_json
from eval.answers.merge import CONFLICTS, Merge, conflict_remarks, recover
from eval.answers.restart import move_aside
from eval.answers.shards import holds_lines, shard_folders
from eval.answers.source_hash import changed_files
from llava.errors import UserError

ADVICE = "choose another --output, or --restart to move them aside"
# Settings that are hashes of files, and what these are in words.
HASHED = {
    "code": "code",
    "method_code": "code of the method",
    "model_files": "files of the model",
    "text_tower": "files of the text tower",
}
NAMED = 5  # files


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
        run: Mapping[str, Any] | None = None,
    ):
        """Open or create the store, and merge the shards that ranks of an earlier start have left.

        Args:
            folder: made if it is not there.
            settings: what the answers depend on, JSON types only.
            known: ids of all questions of the benchmark, asked in this run or not.
            restart: move what is there into a numbered sub-folder first.
            run: what runs.jsonl says about this process if it adds answers.

        Raises:
            UserError: another process has the folder, its lines do not belong to these settings or questions, or it
                cannot be written to.
        """
        super().__init__(folder, run)
        self._settings, self._known = settings, frozenset(known)
        self._lock, unlocked = lock_folder(folder)
        self._remarks = [] if unlocked is None else [unlocked]
        try:
            if self._lock is not None:
                remove_unfinished(folder)
            recover(folder)
            if restart:
                move_aside(folder)
            answers = self._open(ANSWERS)
            with garbage_collection_paused():
                self.answers = index_answers(answers.path, answers.rows, self._known)
            answers.forget_rows()
            self._drop_unanswered()
            self.failures = self._index_failures()
            self._agree()
            self.merge()
        except BaseException:
            self.close()
            raise

    @property
    def remarks(self) -> list[str]:
        """What a reader of the result must know about the store: no locks, shards left out, unequal answers."""
        return [*self._remarks, *conflict_remarks(self.folder)]

    def _drop_unanswered(self) -> None:
        """Cut timing and runs of answers that a power failure took: the order of files on the disk is not ours."""
        timing, runs, count = self._open(TIMING), self._open(RUNS), len(self.answers)
        for number, line in enumerate(timing.rows):
            if line["first"] + line.get("questions", 0) > count:
                timing.keep_first(number)
                break
        runs.keep_first(sum(line["first"] <= count for line in runs.rows))

    def _index_failures(self) -> dict[str, dict[str, Any]]:
        if not is_file(self.folder / FAILURES):
            return {}
        lines = self._open(FAILURES)
        for number, row in enumerate(lines.rows, start=1):
            if problem := failure_problem(row, self._known):
                raise UserError(f"{lines.path} line {number} {problem}.")
        return {row["question_id"]: row for row in lines.rows if row["question_id"] not in self.answers}

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
        seal = seal_of(self._settings)
        if foreign := [name for name, row in self.answers.items() if row.get("answer_id") != answer_id(seal, name)]:
            raise UserError(
                f"{self.folder / ANSWERS} holds {len(foreign):,} answers of another store, the first to question "
                f"{foreign[0]}: their answer_id is not that of these settings; {ADVICE}."
            )

    def merge(self) -> int:
        """Merge all shards into the store, in one step for a reader of answers.jsonl, and delete them.

        A kill at any moment loses no answer and repeats none: the next opening of the store merges again. Of two
        answers to a question the first counts; if their texts differ, `remarks` says so and conflicts.jsonl keeps the
        other. Ranks must have closed their shards or have ended.

        Returns:
            How many answers were taken.

        Raises:
            UserError: a shard holds lines that do not belong, or the disk is full. The shards are kept, and the store
                is closed and as it was.
        """
        if not shard_folders(self.folder):
            return 0
        merge = Merge(self.folder, self.answers, self._known, seal_of(self._settings))
        try:
            merge.read()
            if not merge.shards:
                return 0
            present = {name: self._open(name) for name in (ANSWERS, TIMING, RUNS)}
            optional = {
                name: self._open(name) if is_file(self.folder / name) else None for name in (FAILURES, CONFLICTS)
            }
            merge.write({**present, **optional})
        except BaseException:
            self._abandon(merge)
            raise
        finally:
            self._remarks += [remark for remark in merge.remarks if remark not in self._remarks]
        self.answers.update(merge.answers)
        for line in merge.failures:
            self.failures[line["question_id"]] = line
        self._end_failures(self.failures.keys() & self.answers.keys())
        if merge.answers:
            # Answers that this process adds later come after those of the ranks: runs.jsonl says so again.
            self._run_written = False
        return len(merge.answers)

    def _abandon(self, merge: Merge) -> None:
        """Leave the folder as it was before a merge that failed; the next opening does what is not possible now."""
        with contextlib.suppress(OSError, UserError):
            AnswerFiles.close(self)
        with contextlib.suppress(OSError, UserError):
            merge.discard()
            recover(self.folder)
        self.close()

    def _end_failures(self, names: Iterable[str]) -> None:
        for name in names:
            self.failures.pop(name, None)

    @property
    def timing(self) -> list[dict[str, Any]]:
        """Every batch that was timed, of this run and of the runs it continues."""
        return self._open(TIMING).rows

    def timing_of(self, names: Collection[str]) -> list[dict[str, Any]]:
        """The batches all of whose questions are among `names`."""
        order = list(self.answers)
        wanted = set(names)
        if wanted.issuperset(order):
            return self.timing
        return [
            line for line in self.timing if wanted.issuperset(order[line["first"] : line["first"] + line["questions"]])
        ]

    def origins(self, names: Iterable[str]) -> list[tuple[dict[str, Any] | None, int]]:
        """Which processes answered these questions: (line of runs.jsonl, number of answers), None for not recorded."""
        wanted = set(names)
        counts: dict[int, int] = {}
        runs = self._open(RUNS).rows
        number = -1
        for place, name in enumerate(self.answers):
            while number + 1 < len(runs) and runs[number + 1]["first"] <= place:
                number += 1
            if name in wanted:
                counts[number] = counts.get(number, 0) + 1
        return [
            # A rank that was started without a description has a line of these fields only.
            (runs[number] if number >= 0 and runs[number].keys() - {"first", "rank"} else None, count)
            for number, count in counts.items()
        ]

    def add(self, answers: Sequence[dict[str, Any]], timing: Mapping[str, Any]) -> None:
        """Write one batch; on return it survives the end of this process.

        Args:
            timing: line of timing.jsonl; `first`, the place of the batch's first answer, is set here.
        """
        fresh = {row["question_id"]: row for row in answers}
        if len(fresh) < len(answers) or not self.answers.keys().isdisjoint(fresh):
            raise AssertionError("a question was answered twice")
        try:
            self._write_batch(answers, timing)
        finally:
            # Answers that are in the file count, with their timing or without.
            if self._open(ANSWERS).count > len(self.answers):
                self.answers.update(fresh)
                self._end_failures(fresh)
        self._sync_now_and_then()

    def fail(self, failures: Sequence[Mapping[str, Any]]) -> None:
        """Write questions that could not be answered; on return the lines survive the end of this process.

        Args:
            failures: {"question_id", "reason": one sentence, "kind": one of eval.answers.files.KINDS}, with the "run"
                of this process if it is not given.
        """
        for line in failures:
            if line["question_id"] not in self._known or line["question_id"] in self.answers:
                raise AssertionError(f"question {line['question_id']} is unknown or answered, so it cannot fail")
        for line in self._write_failures(failures):
            self.failures[line["question_id"]] = line
        self._sync_now_and_then()

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


def index_answers(path: Path, rows: Sequence[dict[str, Any]], known: Collection[str]) -> dict[str, dict[str, Any]]:
    """Lines by question id; a store is refused if a line is incomplete, foreign or repeated."""
    known = frozenset(known)
    answers: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(rows, start=1):
        if problem := answer_problem(row, known):
            raise UserError(f"{path} line {number} {problem}.")
        name = row["question_id"]
        if name in answers:
            raise UserError(f"{path} line {number} answers question {name} a second time.")
        answers[name] = row
    return answers


def differences(old: Mapping[str, Any], new: Mapping[str, Any], between: str = ", now") -> list[str]:
    """Settings that differ, as 'key: old, now new', and 'code: decoder.py' for files.

    Args:
        between: what stands between two values.
    """
    hashed = {key for key in HASHED if isinstance(old.get(key), dict) and isinstance(new.get(key), dict)}
    before, after = (flatten({key: value for key, value in one.items() if key not in hashed}) for one in (old, new))
    absent = "absent"
    found = [
        f"{key}: {before.get(key, absent)}{between} {after.get(key, absent)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key, absent) != after.get(key, absent)
    ]
    for key in sorted(hashed):
        if names := changed_files(old[key], new[key]):
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            found.append(f"{HASHED[key]}: {', '.join(names[:NAMED])}{more}")
    return found


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
