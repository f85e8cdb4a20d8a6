"""Decide whether stored answers may be used again: for today's questions, and next to the answers of another run.

An answer is valid for what produced it, and a score also for its labels. Where each of these is recorded:

    questions       settings.json `questions`, and the `prompt` of every line
    images          a hash in every line; one hash over all lines in result.json `images`
    model, code     settings.json: hashes of the checkpoint's files and of every source file
    options         the rest of settings.json
    labels          result.json `labels`

The `answer_id` of a line is a hash of the settings and the question, so a line of another store is noticed. The store
compares the settings when it is opened (eval.answers.store). This module serves everything that reads a store which
nobody has open: use `read_stored` to score its answers again, and `joint_differences` before comparing two runs.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eval.answers.jsonl import is_file, read_appended, read_json
from eval.answers.source_hash import differences
from eval.answers.store import ADVICE, ANSWERS, answer_id, check_line, settings_hash
from eval.benchmarks.base import Dataset, Question
from eval.benchmarks.media import digest_of
from eval.benchmarks.records import NotRequired, Number, TypedDict, check
from eval.metrics import first_names
from llava.errors import UserError

RESULT = "result.json"
# Settings that belong to a method: runs that differ only in these are comparable.
OF_THE_METHOD = ("method", "config", "seed", "text_tower", "method_code")
# Settings that may differ between a result and the process that reads it.
UNEXPECTED = ("device", "code", "method_code")
# What may differ between two runs if their answers to common questions are scored again.
OF_THE_SCORE = ("asked", "images", "main", "facts")


class Result(TypedDict):
    """The part of a result.json that every reader relies on."""

    settings: dict[str, Any]
    asked: int
    main: str
    metrics: dict[str, Number | None]
    facts: NotRequired[dict[str, Any]]
    config: NotRequired[dict[str, Any]]
    failed: NotRequired[list[dict[str, Any]]]
    submission: NotRequired[list[str]]
    remarks: NotRequired[list[str]]
    limit: NotRequired[int | None]


def read_result(folder: Path) -> dict[str, Any]:
    """The result.json of a finished run.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = folder / RESULT
    try:
        return dict(check(Result, read_json(path), str(path)))
    except UserError as error:
        if not is_file(path):
            raise
        raise UserError(f"{error} Run its command again, which asks what has no answer and writes it anew.") from error


def own_lines(path: Path, settings: Mapping[str, Any], wanted: Iterable[str]) -> tuple[dict[str, Any], list[str]]:
    """The answers of a store to some questions; an incomplete last line is skipped.

    Args:
        settings: of the store.
        wanted: ids of questions.

    Returns:
        Question id -> line of answers.jsonl, and the ids of questions whose line comes from another store.

    Raises:
        UserError: a line before the last is damaged.
    """
    hashed, known = settings_hash(settings), frozenset(wanted)
    lines = {}
    for number, _, row in read_appended(path):
        if row is not None and row.get("question_id") in known:
            check_line(row, path, number)
            lines[row["question_id"]] = row
    return lines, [name for name, row in lines.items() if row.get("answer_id") != answer_id(hashed, name)]


def check_reuse(data: Dataset, questions: Iterable[Question], answers: Mapping[str, Any], folder: Path) -> None:
    """Check that stored answers belong to the prompts and images that their questions have now.

    Args:
        questions: of this run; those without an answer are skipped.
        answers: question id -> line of answers.jsonl.
        folder: of the store, for the error.

    Raises:
        UserError: an answer was given to another prompt or to other images.
    """
    asked = [question for question in questions if question.id in answers]
    prompts = [one.id for one in asked if answers[one.id].get("prompt", one.message) != one.message]
    images = [one.id for one in asked if images_of(answers[one.id]) != digest_of(data.images, one.images)]
    for names, what in ((prompts, "to other prompts"), (images, f"to other {data.images.noun}")):
        if names:
            raise UserError(
                f"{folder} holds {len(names):,} answers {what} than the data have now (questions "
                f"{first_names(names, 3)}); {ADVICE}, or take the old data back."
            )


def images_of(line: Mapping[str, Any]) -> str | None:
    """The image hashes recorded in a line of an answer file; None if there are none."""
    metadata = line.get("metadata")
    return metadata.get("images") if isinstance(metadata, dict) else None


def accounting_of(line: Mapping[str, Any]) -> Mapping[str, Any]:
    """The visual tokens recorded in a line of an answer file (eval.results.cost.accounting_record); {} if none are."""
    metadata = line.get("metadata")
    return (metadata.get("accounting") or {}) if isinstance(metadata, dict) else {}


def images_digest(lines: Iterable[Mapping[str, Any]]) -> str:
    """One hash over the images of several lines of answers.jsonl."""
    images = sorted((line["question_id"], images_of(line)) for line in lines)
    text = "".join(f"{name} {hashes}\n" for name, hashes in images)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Stored:
    """A finished run.

    Attributes:
        folder: as the caller named it.
        answers: the answer file.
        result: content of result.json.
        texts: question id -> answer, for the questions that were answered.
        images: question id -> hash of its images.
        accounting: question id -> its visual tokens, see `accounting_of`.
    """

    folder: Path
    answers: Path
    result: Mapping[str, Any]
    texts: dict[str, str]
    images: dict[str, str | None]
    accounting: dict[str, Mapping[str, Any]]

    def judged(self, facts: Mapping[str, Any]) -> "Stored":
        """A copy with facts about the judge that scores it now, which may differ from when the result was written.

        Args:
            facts: as eval.judging.choice.score_answers returns them.
        """
        return replace(self, result={**self.result, "facts": {**self.result["facts"], **facts}})


def results_folder(folder: Path) -> Path:
    """The folder that holds a run's result.json: the run's folder, or its only limitN/ (a run of N questions)."""
    if is_file(folder / RESULT):
        return folder
    parts = sorted(path.parent for path in folder.glob(f"limit*/{RESULT}"))
    if len(parts) == 1:
        return parts[0]
    if parts:
        raise UserError(f"{folder} has several partial results; name one: {', '.join(map(str, parts))}.")
    if not folder.exists():
        raise UserError(f"There is no folder {folder}; give the output folder of a finished run.")
    raise UserError(f"{folder} has no {RESULT}; give the output folder of a finished run.")


def read_stored(
    folder: Path, data: Dataset, partial: bool = False, expected: Mapping[str, Any] | None = None
) -> Stored:
    """Read the answers of a finished run to the questions of a data set, so that they can be scored again.

    Args:
        partial: accept a run in which questions failed, without these.
        expected: settings that the run must have, except device and code; None to accept any.

    Raises:
        UserError: the run is not finished, its questions, labels or settings differ, or it holds lines of another run.
    """
    place = results_folder(folder)
    result = read_result(place)
    answers = place / ANSWERS if is_file(place / ANSWERS) else place.parent / ANSWERS
    if result.get("failed") and not partial:
        raise UserError(
            f"{len(result['failed']):,} questions have no answer in {folder}; ask them again with --retry-failed."
        )
    settings = result["settings"]
    if settings.get("questions") != data.questions_digest:
        raise UserError(f"{folder} was asked other questions than the data folder holds; check --data and --source.")
    if result.get("labels") != data.fingerprint:
        raise UserError(
            f"{folder} was scored with other labels or question files than the data folder holds now; run its command "
            "again, which asks nothing and scores the stored answers anew, or check --data and --source."
        )
    own, wanted = (without(one, UNEXPECTED) for one in (settings, expected or settings))
    if changes := differences(own, wanted):
        raise UserError(f"{folder} holds answers made under other settings ({'; '.join(changes)}).")
    asked = [question.id for question in data.questions[: result["limit"]]]
    failed = {line["question_id"] for line in result.get("failed", ())}
    lines, foreign = own_lines(answers, settings, asked)
    if missing := [name for name in asked if name not in lines and name not in failed]:
        raise UserError(f"{answers} lacks {len(missing):,} of {len(asked):,} answers, the first to {missing[0]}.")
    if foreign:
        names = first_names(foreign, 3)
        raise UserError(f"{answers} holds {len(foreign):,} answers of another run (questions {names}).")
    answered = {name: lines[name] for name in asked if name in lines}
    texts = {name: line["text"] for name, line in answered.items()}
    images = {name: images_of(line) for name, line in answered.items()}
    return Stored(folder, answers, result, texts, images, {n: accounting_of(line) for n, line in answered.items()})


def joint(result: Mapping[str, Any]) -> dict[str, Any]:
    """What two results must have in common to be compared, such as a method and `full`, or two methods."""
    own = {key: result.get(key) for key in ("labels", "images", "asked", "main")}
    facts = dict(result.get("facts") or {})
    if "judge" in facts:  # the name alone, because each run has its own verdicts
        facts["judge"] = facts["judge"]["name"]
    return without(result["settings"], OF_THE_METHOD) | own | {"facts": facts}


def without(settings: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The settings without those named."""
    return {key: value for key, value in settings.items() if key not in names}


def joint_differences(a: Mapping[str, Any], b: Mapping[str, Any], leave_out: Sequence[str] = ()) -> list[str]:
    """The differences that forbid comparing two results, in words; empty if they may be compared.

    The code of the two methods may differ, but a source file that both used must be the same in both runs.
    """
    code_a, code_b = (result["settings"].get("method_code", {}) for result in (a, b))
    common = code_a.keys() & code_b.keys()
    first = without(joint(a), leave_out) | {"method_code": {name: code_a[name] for name in common}}
    second = without(joint(b), leave_out) | {"method_code": {name: code_b[name] for name in common}}
    return differences(first, second, between=" and")


def check_images(a: Mapping[str, str | None], b: Mapping[str, str | None], title: str) -> None:
    """Raise UserError if the same questions were asked about different images.

    Args:
        a, b: question id -> hash of its images; None if unknown.
        title: names both runs in the error.
    """
    other = [name for name in a if name in b and None not in (a[name], b[name]) and a[name] != b[name]]
    if other:
        names = first_names(other, 3)
        raise UserError(f"{title} were asked about other images ({len(other):,} questions: {names}).")


def check_joint(a: Stored, b: Stored) -> None:
    """Raise UserError unless both answered the same questions about the same images under the same settings."""
    if changes := joint_differences(a.result, b.result):
        raise UserError(f"{b.folder} and {a.folder} differ in {'; '.join(changes)}: compare equal runs.")
    check_images(a.images, b.images, f"{b.folder} and {a.folder}")


def check_table(folders: Sequence[Path], model_files: Any = None) -> None:
    """Raise UserError unless finished runs may be put into one table.

    Args:
        folders: the folders of their result.json; `full` comes first.
        model_files: fingerprint of the table's model; None if no model is loaded.
    """
    full = read_result(folders[0])
    if model_files not in (None, full["settings"].get("model_files")):
        raise UserError(f"{folders[0]} holds answers of other files of the model; ask the questions again (--restart).")
    for folder in folders[1:]:
        if changes := joint_differences(full, read_result(folder)):
            raise UserError(
                f"{folder} and {folders[0]} differ in {'; '.join(changes)}; ask the questions of both again."
            )
