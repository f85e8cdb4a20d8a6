"""What benchmarks in LLaVA's layout have in common: question files, annotation files, reference answers."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.dataset import Question
from eval.jsonl import read_json, read_jsonl
from eval.metrics import first_names
from eval.pictures import Pictures, image_name
from eval.prompts import split_suffix
from llava.errors import UserError


@dataclass(frozen=True)
class Prompt:
    """A line of one of LLaVA's question files.

    Attributes:
        where: file and line, for errors.
        id: as the file has it.
        text: with the suffix.
        question, suffix: the text's parts.
    """

    where: str
    id: int | str
    image: str
    text: str
    question: str
    suffix: str


@dataclass(frozen=True)
class Found:
    """A split as it was read.

    Attributes:
        source: "official", or the id of the mirror.
        records: what the data say of each question, with answers where they are public.
        mark: fingerprint of the question files.
    """

    source: str
    records: Sequence[Mapping[str, Any]]
    questions: tuple[Question, ...]
    pictures: Pictures
    mark: str


def read_prompts(path: Path) -> list[Prompt]:
    """Questions as LLaVA words and orders them."""
    prompts = []
    for number, row in read_jsonl(path):
        where = f"{path} line {number}"
        if lost := [field for field in ("question_id", "image", "text") if row.get(field) in (None, "")]:
            raise UserError(f"{where} has no {' and no '.join(lost)}.")
        image, text = image_name(str(row["image"]), where), str(row["text"])
        prompts.append(Prompt(where, row["question_id"], image, text, *split_suffix(text)))
    if not prompts:
        raise UserError(f"{path} holds no questions.")
    return prompts


def read_records(path: Path, key: str | None, fields: Sequence[str]) -> list[dict[str, Any]]:
    """A list of objects that all have `fields`: the whole JSON document, or what stands under `key`."""
    document = read_json(path)
    records = document.get(key) if key is not None and isinstance(document, dict) else document
    if not isinstance(records, list) or not records:
        place = f"a list under {key!r}" if key is not None else "a list"
        raise UserError(f"{path} should hold {place} with at least one entry.")
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict) or (lost := [field for field in fields if field not in record]):
            what = f"no {', '.join(lost)}" if isinstance(record, dict) else "no fields"
            raise UserError(f"{path} entry {number} has {what}.")
    return records


def unique(questions: Iterable[Question], where: str) -> tuple[Question, ...]:
    """The questions, refused if an id comes twice."""
    questions = tuple(questions)
    repeated = [name for name, count in Counter(question.id for question in questions).items() if count > 1]
    if repeated:
        raise UserError(f"{where} has question ids more than once: {first_names(repeated)}.")
    return questions


def people_said(record: Mapping[str, Any], where: str) -> list[str]:
    """The reference answers of a record, which are texts or objects with a text under "answer"."""
    answers = record.get("answers") or []
    texts = [answer.get("answer") if isinstance(answer, dict) else answer for answer in answers]
    if not all(isinstance(text, str) for text in texts):
        name = record.get("question_id", record.get("image"))
        raise UserError(f"Question {name} in {where} has answers that are no texts.")
    return texts


def most_common(answers: Sequence[str]) -> str:
    """What most people said, for tables; "" where nobody did."""
    return max(answers, key=list(answers).count) if answers else ""


def as_number(name: str) -> int | str:
    """A question id as the official files have it: digits are a number there."""
    return int(name) if name.isdecimal() else name


def need_file(path: Path, title: str, source: str) -> Path:
    """`path`, with a sentence on where to get it if it is not there."""
    if not path.is_file():
        raise UserError(f"{title} needs {path}; it is in {source}.")
    return path


def size(found: int, published: int) -> str:
    """How many questions there are, for `facts`: another number than the published one is another version."""
    return f"{found:,} questions" + ("" if found == published else f" (the published split has {published:,})")
