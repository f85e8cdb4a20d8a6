"""Read answer files of LLaVA's scripts, lmms-eval and this repository, and match them with a benchmark's questions.

A file is never trusted. Answers that are missing, repeated or belong to no question are counted and named. They are
refused or, with `partial`, left out and noted in the result. If a file records prompts, these must contain the
questions, because equal ids prove little: English and Chinese MMBench share their ids, and lmms-eval only numbers the
rows of its data sets.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eval.answers.jsonl import AnswerRow, is_file, parse_json, parse_line, read_bytes, read_json
from eval.answers.reuse import images_of
from eval.benchmarks.base import Dataset, Question
from eval.benchmarks.llava_files import split_suffix
from eval.benchmarks.media import digest_of
from eval.metrics import first_names
from llava.errors import UserError

# Keys of id and text in LLaVA's answer files, official prediction files, lmms-eval's samples and Video-LLaVA's files.
# "answer" comes late because it is the reference in Video-LLaVA's files.
IDS = ("question_id", "questionId", "id", "index", "image", "image_id")
TEXTS = ("text", "prediction", "pred", "filtered_resps", "resps", "answer", "caption")
# If more than this share of the recorded prompts lack their question, the file answers other questions.
REFUSED = 0.5


@dataclass(frozen=True)
class Answers:
    """Question id -> answer in file order, and notes about the file for the reader of a score."""

    texts: dict[str, str]
    notes: tuple[str, ...] = ()


def read_answers(path: Path, data: Dataset, partial: bool = False) -> Answers:
    """Read the answers of a file to the questions of a data set.

    Args:
        partial: use the answers that fit instead of refusing the file.
    """
    rows = data.read(path) if data.read is not None else None
    notes: list[str] = []
    if rows is None:
        rows, notes = read_rows(path, partial)
    found = join(path, rows, data, partial)
    return replace(found, notes=(*notes, *found.notes))


def read_rows(path: Path, partial: bool = False) -> tuple[list[AnswerRow], list[str]]:
    """The answers of a JSON-lines file, a JSON list of records, or a JSON map from id to text; and notes."""
    content = read_bytes(path).strip()
    first, _, more = content.partition(b"\n")
    if first and not (more and is_object(first)):
        document = read_json(path)
        if isinstance(document, dict) and not any(key in document for key in ("question_id", *TEXTS)):
            if wrong := [name for name, text in document.items() if not isinstance(text, str)]:
                raise UserError(f"{path} should map question ids to texts; {first_names(wrong)} have none.")
            return [AnswerRow(f"{path} entry {name}", name, text) for name, text in document.items()], []
        records = document if isinstance(document, list) else [document]
        return [read_row(row, f"{path} entry {number}") for number, row in enumerate(records, start=1)], []
    lines = content.split(b"\n")
    rows: list[AnswerRow] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = parse_line(path, number, line)
        except UserError as error:
            if number < len(lines):
                raise
            # Only the end of a file can be incomplete, after a full disk or a kill.
            torn = f"{path} line {number}, the last one, is cut off"
            if not partial:
                raise UserError(f"{torn}; repair the file, or score the rest of it with --partial.") from error
            return rows, [f"{torn} and was left out"]
        rows.append(read_row(record, f"{path} line {number}"))
    return rows, []


def is_object(line: bytes) -> bool:
    """Whether a line is a whole JSON object, so that its file holds JSON lines and not one document."""
    try:
        return isinstance(parse_json(line, "line 1"), dict)
    except UserError:
        return False


def read_row(record: Any, where: str) -> AnswerRow:
    """One answer, under any of the keys in IDS and TEXTS."""
    if not isinstance(record, dict):
        raise UserError(f"{where} should be a JSON object, got {type(record).__name__}.")
    found = record.get("doc")
    doc: Mapping[str, Any] = found if isinstance(found, dict) else {}
    ids = [source[key] for source in (record, doc) for key in IDS if isinstance(source.get(key), str | int)]
    texts = []
    for key in TEXTS:
        value = record.get(key)
        while isinstance(value, list) and value:  # lmms-eval nests texts in lists
            value = value[0]
        if isinstance(value, str):
            texts.append(value)
    number = record.get("doc_id") if isinstance(record.get("doc_id"), int) else None
    if not texts or (not ids and number is None):
        raise UserError(f"{where} should have an id ({', '.join(IDS)}) and a text ({', '.join(TEXTS)}).")
    prompt, asked = record.get("prompt"), doc.get("question")
    return AnswerRow(
        where,
        str(ids[0]) if ids else None,
        texts[0],
        prompt if isinstance(prompt, str) else None,
        number,
        asked if isinstance(asked, str) else None,
        record,
    )


def join(path: Path, rows: Sequence[AnswerRow], data: Dataset, partial: bool = False) -> Answers:
    """Match the answers of a file with the questions of a data set.

    Args:
        partial: leave out what does not fit and note it.

    Raises:
        UserError: without `partial`, if questions and answers do not match one to one; always, if nothing fits or a
            question has two different answers.
    """
    known = {question.id: question for question in data.questions}
    official: dict[str, list[Question]] = defaultdict(list)
    for question in data.questions:
        official[question.official or question.id].append(question)
    texts: dict[str, str] = {}
    answered: list[tuple[Question, AnswerRow]] = []
    foreign: list[str] = []
    repeated: list[str] = []
    changed: list[str] = []
    if data.facts.get("source") == "official" and any(row.id is None for row in rows):
        raise UserError(
            f"{path} names questions by their row in lmms-eval's data set, and {data.title} was read from the official "
            "files, whose order may be another; add --source mirror."
        )
    for row in rows:
        name = name_of(row, known, official, data.questions)
        if name is None and row.id in data.accepts:
            name = row.id
        if name is None:
            foreign.append(str(row.id if row.id is not None else row.number))
        elif name in texts:
            (repeated if texts[name] == row.text else changed).append(name)
        else:
            texts[name] = row.text
            if name in known:
                answered.append((known[name], row))
    total, title = len(data.questions), data.title
    if not rows:
        raise UserError(f"{path} holds no answers.")
    if not texts:
        raise UserError(
            f"None of the {len(rows):,} answers in {path} belongs to {title}, whose ids look like "
            f"{data.questions[0].official or data.questions[0].id}; check the benchmark's name and split."
        )
    if changed:
        raise UserError(
            f"{counted(len(changed), 'question')} answered more than once in {path}: {first_names(changed)}; "
            "nobody can say which answer counts, so remove all but one."
        )
    notes = check_prompts(path, answered, data)
    unlike, absent = other_images(answered, data)
    if absent:
        what = f"{data.images.noun} of {counted(absent, 'answer')}"
        notes.append(f"{data.images.where} lacks the {what}, so they were not compared")
    missing = [name for name in known if name not in texts and name not in data.accepts]
    kinds = (
        ("question", "without a prediction", missing),
        ("prediction", "for questions that are not in the question file", foreign),
        ("answer", "given twice in the same words", repeated),
        ("answer", f"about other {data.images.noun} than {data.images.where} holds", unlike),
    )
    problems = [f"{counted(len(ids), noun)} {what} ({first_names(ids)})" for noun, what, ids in kinds if ids]
    if problems and not partial:
        raise UserError(
            f"{path} does not fit {title} with its {total:,} questions: {'; '.join(problems)}. Is it another version "
            "of the data, or another --source? Score what fits with --partial."
        )
    texts = {name: text for name, text in texts.items() if name not in unlike}
    if not texts:
        raise UserError(f"All answers in {path} are about other {data.images.noun} than {data.images.where} holds.")
    notes += [f"the answer file has {problem}: left out" for problem in problems]
    if [name for name in texts if name in known] != [name for name in known if name in texts]:
        notes.append("the answers are not in the order of the question file")
    return Answers(texts, tuple(notes))


def other_images(answered: Sequence[tuple[Question, AnswerRow]], data: Dataset) -> tuple[list[str], int]:
    """Compare the image hashes that our own answer files record with the images of the data set.

    Returns:
        Ids of the questions whose images have changed, and the number of answers whose images are not here to compare.
    """
    unlike, absent = [], 0
    for question, row in answered:
        if hashes := images_of(row.fields):
            if data.images.missing(question.images):
                absent += 1
            elif digest_of(data.images, question.images) != hashes:
                unlike.append(question.id)
    return unlike, absent


def name_of(
    row: AnswerRow,
    known: Mapping[str, Question],
    official: Mapping[str, Sequence[Question]],
    questions: Sequence[Question],
) -> str | None:
    """Our id of the question that a row answers; None if there is none or several fit."""
    if row.id is None:
        return questions[row.number].id if row.number is not None and 0 <= row.number < len(questions) else None
    if row.id in known:
        return row.id
    candidates = official.get(row.id, ())
    if len(candidates) > 1 and row.prompt is not None:
        # Several questions share this id, for example an image's: the prompt decides.
        prompt = row.prompt.strip()
        candidates = [q for q in candidates if prompt in (q.message.strip(), q.question.strip())] or [
            q for q in candidates if q.question.strip() in prompt
        ]
    if len(candidates) > 1 and row.number is not None:
        there = questions[row.number].id if 0 <= row.number < len(questions) else None
        candidates = [q for q in candidates if q.id == there]
    return candidates[0].id if len(candidates) == 1 else None


def counted(number: int, noun: str) -> str:
    """ "1 question", "2,000 questions"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def plain(text: str) -> str:
    """A text in lower case, without image placeholders and extra white space, in which profiles differ."""
    return " ".join(text.replace("<image>", " ").lower().split())


def holds(prompt: str, question: Question) -> bool:
    """Whether a recorded prompt asks a question.

    It does if one text contains the other, or if the prompt contains at least half of the question's lines: other
    programs join lines, and add or leave out hints.
    """
    asked, wanted = plain(split_suffix(prompt.strip())[0]), plain(question.question)
    if not asked or asked in wanted or wanted in asked:
        return True
    lines = [line for line in map(plain, question.question.split("\n")) if line]
    return 2 * sum(line in asked for line in lines) >= len(lines)


def check_prompts(path: Path, answered: Sequence[tuple[Question, AnswerRow]], data: Dataset) -> list[str]:
    """Notes about recorded prompts that do not contain their question.

    Raises:
        UserError: more than half of them do not, or the file belongs to a run of ours on another benchmark.
    """
    recorded = [(question, row.prompt or row.asked) for question, row in answered]
    known = [(question, prompt) for question, prompt in recorded if prompt is not None]
    wrong = [question.id for question, prompt in known if not holds(prompt, question)]
    if len(wrong) > REFUSED * len(known):
        question, prompt = next(pair for pair in known if pair[0].id == wrong[0])
        raise UserError(
            f"{path} answers other questions than those of {data.title}: {len(wrong):,} of {len(known):,} recorded "
            f"prompts do not hold the question with their id; {question.id} was asked {shorten(prompt)!r}, and the "
            f"question is {shorten(question.question)!r}. Check the benchmark's name, split and profile."
        )
    # If all questions have the same words, prompts prove nothing; but our own runs name their benchmark.
    proven = known and len({question.question for question in data.questions}) > 1
    settings_file = path.with_name("settings.json")
    if not proven and path.name == "answers.jsonl" and is_file(settings_file):
        settings: Any = read_json(settings_file)
        benchmark = settings.get("benchmark") if isinstance(settings, Mapping) else None
        if data.benchmark and isinstance(benchmark, str) and benchmark != data.benchmark:
            raise UserError(f"{path} holds answers to {benchmark}, as {settings_file} says, not to {data.benchmark}.")
    if not wrong:
        return []
    return [f"{len(wrong):,} of {len(known):,} recorded prompts do not hold their question ({first_names(wrong)})"]


def shorten(text: str, length: int = 60) -> str:
    """The first `length` characters of a text on one line, for an error."""
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[:length]}..."
