"""What benchmarks in LLaVA's layout have in common: question files, annotation files, reference answers."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from eval.answers.jsonl import is_file
from eval.benchmarks.base import Question
from eval.benchmarks.media import Pictures, image_name
from eval.benchmarks.prompts import split_suffix
from eval.benchmarks.records import Filled, Id, TypedDict, check_lines
from eval.metrics import first_names
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


class Line(TypedDict):
    """A line of one of LLaVA's question files."""

    question_id: Id
    image: Filled
    text: Filled


class Answer(TypedDict):
    """One person's answer, as VQAv2's and VizWiz's files have it."""

    answer: str


# What people answered: texts, or objects with a text under "answer".
Answers = Annotated[list[str] | list[Answer], Field(min_length=1)]


def read_prompts(path: Path) -> list[Prompt]:
    """Questions as LLaVA words and orders them."""
    prompts = []
    for where, row in check_lines(path, Line):
        image = image_name(row["image"], where)
        prompts.append(Prompt(where, row["question_id"], image, row["text"], *split_suffix(row["text"])))
    return prompts


def unique(questions: Iterable[Question], where: str) -> tuple[Question, ...]:
    """The questions, refused if an id comes twice."""
    questions = tuple(questions)
    repeated = [name for name, count in Counter(question.id for question in questions).items() if count > 1]
    if repeated:
        raise UserError(f"{where} has question ids more than once: {first_names(repeated)}.")
    return questions


def people_said(answers: Sequence[str | Answer]) -> list[str]:
    """The reference answers of a record, as texts."""
    return [answer if isinstance(answer, str) else answer["answer"] for answer in answers]


def most_common(answers: Sequence[str]) -> str:
    """What most people said, for tables; "" where nobody did."""
    return max(answers, key=list(answers).count) if answers else ""


def as_number(name: str) -> int | str:
    """A question id as the official files have it: digits are a number there."""
    return int(name) if name.isdecimal() else name


def need_file(path: Path, title: str, source: str) -> Path:
    """`path`, with a sentence on where to get it if it is not there."""
    if not is_file(path):
        raise UserError(f"{title} needs {path}; it is in {source}.")
    return path


def size(found: int, published: int) -> str:
    """How many questions there are, for `facts`: another number than the published one is another version."""
    return f"{found:,} questions" + ("" if found == published else f" (the published split has {published:,})")
