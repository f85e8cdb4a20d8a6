"""MMMU, questions of college exams in 30 subjects.

Read from DATA/hub/lmms-lab-encoder/MMMU or its older name lmms-lab/MMMU, which hold all subjects in one table: id,
question, options (a Python list as text), answer, question_type, image_1 to image_7.

Profile llava: prompt, image and parser of the authors' script for LLaVA (mmmu/run_llava.py). Answers are greedy, as
its configuration says, although its code samples from beams. It shows image_1 alone, before a text that still says
"<image 1>". Questions with several images among their options get none: the script has that rule, but looks for the
images letter by letter in the options' text, so that on this data set it never finds them; here the rule is applied
as meant, and `facts` says to how many questions.
Profile lmms: lmms-eval 0.7.3, with all images that the prompt names.
"""

import ast
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.benchmarks.base import Benchmark, Dataset, Question
from eval.benchmarks.hub import (
    Table,
    check_answers,
    facts,
    letters,
    open_split,
    option_lines,
    ungraded,
    unique_ids,
    with_version,
)
from eval.benchmarks.media import Inline
from eval.benchmarks.mmmu import metric
from eval.benchmarks.prompts import LETTER, SHORT
from eval.benchmarks.records import Filled, TypedDict
from eval.metrics import Score
from llava.errors import UserError

IDS = ("lmms-lab-encoder/MMMU", "lmms-lab/MMMU")
COLUMNS = ("id", "question", "options", "answer", "question_type")
IMAGES = tuple(f"image_{number}" for number in range(1, 8))
EXPECTED = {"validation": 900, "test": 10500}

PICTURE = re.compile(r"<image \d+>")
SUBJECT = re.compile(r"[^_]+_(.+)_\d+")


class Row(TypedDict):
    """A row of the table."""

    id: Filled
    question: Filled
    options: str | list[str]
    answer: str
    question_type: str


def load(data: Path, split: str, profile: str = "llava", source: str = "auto") -> Dataset:
    """Read a split."""
    table = open_split(data, IDS, None, split, source)
    rows = table.records(Row)
    names = unique_ids(row["id"] for row in rows)
    records = dict(zip(names, rows, strict=True))
    lmms, graded = profile == "lmms", split != "test"
    items = {name: read_item(record, table.where, lmms) for name, record in records.items()}
    if graded:
        check_answers(table.where, {name: record["answer"] for name, record in records.items()})
    forms = metric.LMMS_FORMS if lmms else metric.OFFICIAL_FORMS
    pictures = table.pictures(IMAGES)
    choose = lmms_pictures if lmms else official_pictures
    questions = tuple(
        ask(name, record, items[name], lmms, choose(row, record, items[name], pictures))
        for row, (name, record) in enumerate(records.items())
    )

    def score(asked: Sequence[str], texts: Mapping[str, str]) -> Score:
        if not graded:
            return ungraded("accuracy", file, "the MMMU challenge on EvalAI")
        found = metric.score({name: items[name] for name in asked}, texts, forms)
        return with_version(found, len(questions), EXPECTED[split])

    def sample_score(question: Question, text: str) -> float:
        return metric.sample_score(question.id, items[question.id], text, forms)

    file = f"total_{'val' if graded else split}_output.json"

    def submission(texts: Mapping[str, str]) -> dict[str, Any]:
        return {file: {records[name]["id"]: parsed(name, items[name], text, forms) for name, text in texts.items()}}

    return Dataset(
        f"MMMU {split}",
        questions,
        pictures,
        table.fingerprint(COLUMNS),
        score,
        sample_score if graded else None,
        submission,
        # Of the authors' script and of lmms-eval's task.
        max_new_tokens=128,
        facts=mmmu_facts(table, profile, EXPECTED[split], items),
    )


def read_item(record: Row, where: str, lmms: bool) -> metric.Item:
    """What the metric needs of a row."""
    found = SUBJECT.fullmatch(record["id"])
    if not found:
        raise UserError(f"Id {record['id']!r} in {where} should look like validation_Art_Theory_1.")
    choice = record["question_type"] == "multiple-choice"
    options = letters(as_list(record["options"], f"The options of {record['id']} in {where}")) if choice else None
    if options is not None and not options:
        raise UserError(f"Question {record['id']} in {where} is multiple choice but has no options.")
    answer: str | list[str] = record["answer"]
    if not choice and not lmms and record["answer"].startswith("["):
        # Several accepted answers. lmms-eval takes the list's text for the answer, which no model gives.
        answer = as_list(record["answer"], f"The answer of {record['id']} in {where}")
    return metric.Item(answer, found.group(1), options)


def as_list(value: Any, what: str) -> list[str]:
    """A list, which the data set writes as Python text."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError) as error:
            raise UserError(f"{what} should be a list, got {value[:60]!r}.") from error
    if not isinstance(value, list | tuple):
        raise UserError(f"{what} should be a list, got {type(value).__name__}.")
    return [str(part) for part in value]


def ask(name: str, record: Row, item: metric.Item, lmms: bool, pictures: tuple[str, ...]) -> Question:
    """The question in the words of the profile.

    Blank lines as the programs print them: the authors' configuration shows one after the question too, but it is a
    folded YAML text, which loses one of two line breaks.
    """
    text = record["question"]
    if item.options is not None:
        # The newline at the end and the one before the suffix make the blank line.
        text = f"{text}\n{option_lines(item.options, '{}. {}' if lmms else '({}) {}')}\n"
    elif lmms:
        text += "\n"
    suffix = SHORT if item.options is None else LETTER
    return Question(name, text, suffix, pictures, record["answer"], record["id"])


def official_pictures(row: int, record: Row, item: metric.Item, pictures: Inline) -> tuple[str, ...]:
    """The first image, or none for questions whose options hold several."""
    name = f"{row}/image_1"
    return () if several_in_options(item) or name not in pictures.names else (name,)


def lmms_pictures(row: int, record: Row, item: metric.Item, pictures: Inline) -> tuple[str, ...]:
    """Every image that question or options name, in the order of their numbers."""
    text = "\n".join([record["question"], *(item.options or {}).values()])
    named = {name.strip("<>").replace(" ", "_") for name in PICTURE.findall(text)}
    return tuple(f"{row}/{column}" for column in IMAGES if column in named and f"{row}/{column}" in pictures.names)


def several_in_options(item: metric.Item) -> bool:
    """Whether the options name more than one image."""
    return len(PICTURE.findall("\n".join((item.options or {}).values()))) > 1


def parsed(name: str, item: metric.Item, text: str, forms: Sequence[str]) -> str:
    """An answer as the authors' main_eval_only.py reads it: a letter, or the text of an open answer."""
    if item.options is None:
        return text
    return metric.find_letter(text, item.options, forms) or metric.draw_letter(name, item.options)


def mmmu_facts(table: Table, profile: str, expected: int, items: Mapping[str, metric.Item]) -> dict[str, Any]:
    """Counts, subjects that the table lacks, and questions the llava profile shows no image for."""
    there = {item.subject for item in items.values()}
    lost = [subject for subject in metric.DOMAIN_OF if subject not in there]
    more: dict[str, Any] = {"absent_subjects": lost} if lost else {}
    if profile == "llava":
        more["without_picture_for_several_in_options"] = sum(map(several_in_options, items.values()))
    return facts(table, profile, expected, **more)


BENCHMARK = Benchmark(
    name="mmmu",
    summary="Exam questions in 30 subjects, multiple choice and open.",
    splits=("validation", "test"),
    read=load,
    published="35.3 accuracy",
    published_by="LLaVA-1.5-7B run with lmms-eval, FastV's README at d165972",
    mirror=IDS,
    licence="Apache-2.0 (https://huggingface.co/datasets/MMMU/MMMU)",
)
