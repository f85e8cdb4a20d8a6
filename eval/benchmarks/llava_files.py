"""What benchmarks in LLaVA's layout share: question files, their answer-format instructions, people's answers."""

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from eval.answers.jsonl import is_file
from eval.benchmarks.base import Question
from eval.benchmarks.media import image_name
from eval.benchmarks.records import Filled, Id, TypedDict, check_lines
from eval.metrics import first_names
from llava.conversation import ANSWER_FORMATS
from llava.errors import UserError

# The answer-format instructions of LLaVA's benchmark files, by name.
VIZ, SHORT, LETTER, LETTER_CN = ANSWER_FORMATS

# The archive with LLaVA's question files, for sentences.
EVAL_ZIP = "eval.zip of LLaVA's docs/Evaluation.md"


def split_suffix(text: str) -> tuple[str, str]:
    """A prompt of the question files -> (question, suffix), because query-aware methods look at the question alone.

    A text that ends with none of the known instructions is all question.
    """
    for suffix in ANSWER_FORMATS:
        if text.endswith(f"\n{suffix}"):
            return text[: -len(suffix) - 1], suffix
    return text, ""


class QuestionRecord(TypedDict):
    """What most records of a question have, in official files and on the hub."""

    question_id: Id
    question: Filled


class QuestionLine(TypedDict):
    """A line of one of LLaVA's question files."""

    question_id: Id
    image: Filled
    text: Filled


@dataclass(frozen=True)
class Prompt:
    """The same, checked and taken apart.

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


def read_prompts(path: Path) -> list[Prompt]:
    """Questions as LLaVA words and orders them."""
    prompts = []
    for where, row in check_lines(path, QuestionLine):
        image = image_name(row["image"], where)
        prompts.append(Prompt(where, row["question_id"], image, row["text"], *split_suffix(row["text"])))
    return prompts


def each_once(places: Iterable[tuple[str, str]], known: Collection[str] | None = None, source: object = "") -> None:
    """Refuse a question that is asked twice, and one that is not among those known.

    Args:
        places: (file and line, question id) of every question that is asked.
        known: ids of the official questions; None takes every id.
        source: the file with the official questions, for the sentence.
    """
    seen: set[str] = set()
    for where, name in places:
        if known is not None and name not in known:
            raise UserError(f"{where} asks question {name}, which is not in {source}.")
        if name in seen:
            raise UserError(f"{where} asks question {name} a second time.")
        seen.add(name)


def all_asked(path: Path, asked: Collection[str], wanted: Iterable[str], source: object) -> None:
    """Refuse a question file that lacks official questions."""
    if lost := [name for name in wanted if name not in asked]:
        raise UserError(f"{path} lacks {len(lost):,} of the questions in {source}, the first is {lost[0]}.")


def prompts_by_id(
    path: Path, official: Path, known: Collection[str], wanted: Iterable[str], prefix: str = ""
) -> list[tuple[str, Prompt]]:
    """LLaVA's questions in its order with their official ids, all checked.

    Args:
        known: ids of the official questions.
        wanted: those that have to be asked.
        prefix: of official ids, which LLaVA's file leaves out.
    """
    prompts = [(f"{prefix}{prompt.id}", prompt) for prompt in read_prompts(path)]
    each_once(((prompt.where, name) for name, prompt in prompts), known, official)
    all_asked(path, {name for name, _ in prompts}, wanted, official)
    return prompts


def unique(questions: Iterable[Question], where: str) -> tuple[Question, ...]:
    """The questions, refused if an id comes twice."""
    questions = tuple(questions)
    counts = Counter(question.id for question in questions)
    if repeated := [name for name, count in counts.items() if count > 1]:
        raise UserError(f"{where} has question ids more than once: {first_names(repeated)}.")
    return questions


class Answer(TypedDict):
    """One person's answer, as VQAv2's and VizWiz's files have it."""

    answer: str


# What people answered: texts, or objects with a text under "answer".
Answers = Annotated[list[str] | list[Answer], Field(min_length=1)]


def people_said(answers: Sequence[str | Answer]) -> list[str]:
    """The reference answers of a record, as texts."""
    return [answer if isinstance(answer, str) else answer["answer"] for answer in answers]


def most_common(answers: Sequence[str]) -> str:
    """What most people said, for tables; "" where nobody did."""
    return max(answers, key=list(answers).count) if answers else ""


def as_number(name: str) -> int | str:
    """A question id as the official files have it: digits are a number there."""
    return int(name) if name.isdecimal() else name


def json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """A file of JSON lines as the official scripts read it."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def by_id(records: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The records by question id."""
    return {str(record["question_id"]): record for record in records}


def need_file(path: Path, title: str, source: str) -> Path:
    """`path`, with a sentence on where to get it if it is not there."""
    if not is_file(path):
        raise UserError(f"{title} needs {path}; it is in {source}.")
    return path


def size(questions: int, published: int) -> str:
    """How many questions there are, for `facts`: another number than the published one is another version."""
    return f"{questions:,} questions" + ("" if questions == published else f" (the published split has {published:,})")
