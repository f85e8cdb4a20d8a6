"""ScienceQA, of which papers print the accuracy over the questions with an image. Read from DATA/scienceqa.

    problems.json              official questions with answers, by id
    pid_splits.json            official lists of ids by split
    llava_test_CQM-A.json      LLaVA's wording; without it the same wording is made from problems.json
    images/test/ID/image.png   official images

The split `val` has the same names with `val` for `test`. Under LLaVA's profile all questions are asked, those without
an image as text alone; lmms-eval asks those with an image only.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from eval.answers.jsonl import is_file, read_json
from eval.benchmarks.base import Benchmark, Dataset, Need, Question, fingerprint
from eval.benchmarks.hub import Table, letters, local_copy, official_file, open_table, option_lines
from eval.benchmarks.media import Folder, Pictures, image_name
from eval.benchmarks.prompts import LETTER
from eval.benchmarks.records import Filled, Id, NotRequired, Texts, TypedDict, check_list, check_map
from eval.benchmarks.scienceqa import metric as scienceqa
from eval.metrics import Score, first_names
from llava.errors import UserError

MIRROR = ("lmms-lab-encoder/ScienceQA", "lmms-lab/ScienceQA")
# Configurations of the mirror: with and without the questions that are text alone.
FULL, WITH_IMAGE = "ScienceQA-FULL", "ScienceQA-IMG"
MIRROR_SPLITS = {"test": "test", "val": "validation"}
IMAGE = "<image>"


class Record(TypedDict):
    """A problem of the official file or of the mirror."""

    question: Filled
    choices: Texts
    answer: Annotated[int, Field(ge=0)]
    hint: NotRequired[str | None]
    image: NotRequired[str | None]
    subject: NotRequired[str | None]


class MirrorRow(TypedDict):
    """A row of the mirror, without its image."""

    question: Filled
    choices: Texts
    answer: Annotated[int, Field(ge=0)]
    hint: NotRequired[str | None]
    subject: NotRequired[str | None]


class Turn(TypedDict):
    """What one side says in a conversation."""

    value: Filled


class Prompt(TypedDict):
    """An entry of LLaVA's file."""

    id: Id
    image: NotRequired[Filled]
    conversations: Annotated[list[Turn], Field(min_length=1)]


Problems = dict[str, scienceqa.Problem]


def load(data: Path, split: str, profile: str = "llava", source: str = "auto") -> Dataset:
    """Read a split; everything that can be wrong with its files is said here, images excepted."""
    title, folder = f"ScienceQA {split}", data / "scienceqa"
    if official_file(data, source, title, [folder / "problems.json"], MIRROR) is not None:
        name = "official files"
        questions, problems, pictures, seal = from_official(folder, split)
    else:
        table = open_mirror(data, split, profile, download=source == "mirror")
        name = table.id
        questions, problems, pictures, seal = from_mirror(table)
    shown = {question.id for question in questions if question.images}
    if profile == "lmms":
        questions = tuple(question for question in questions if question.images)
    prompts = {question.id: f"{IMAGE}\n" * bool(question.images) + question.message for question in questions}
    read = scienceqa.parse_lmms if profile == "lmms" else scienceqa.parse

    def score(asked: Sequence[str], texts: Mapping[str, str]) -> Score:
        return scienceqa.score({name: problems[name] for name in asked}, texts, shown, read)

    def sample_score(question: Question, text: str) -> float:
        return scienceqa.sample_score(text, problems[question.id], read)

    def submission(texts: Mapping[str, str]) -> dict[str, str]:
        return {"scienceqa_answers.jsonl": answer_lines(texts, prompts)}

    return Dataset(
        title,
        questions,
        pictures,
        seal,
        score,
        sample_score,
        submission,
        # LLaVA's script for ScienceQA generates up to 1,024 tokens, not the 128 of its other scripts.
        max_new_tokens=16 if profile == "lmms" else 1024,
        facts={"source": name, "profile": profile, "questions": len(questions), "with an image": len(shown)},
        # An answer file over all questions is an answer file over those with an image.
        accepts=frozenset(problems.keys() - {question.id for question in questions}),
    )


def answer_lines(texts: Mapping[str, str], prompts: Mapping[str, str]) -> str:
    """The input of LLaVA's eval_science_qa.py, which tells by "<image>" in the prompt which questions show one."""
    rows = ({"question_id": name, "prompt": prompts[name], "text": text} for name, text in texts.items())
    return "".join(json.dumps(row) + "\n" for row in rows)


def from_official(folder: Path, split: str) -> tuple[tuple[Question, ...], Problems, Pictures, str]:
    """Questions as LLaVA's file words them, or worded alike, in the official order."""
    path, splits, prompts = folder / "problems.json", folder / "pid_splits.json", folder / f"llava_{split}_CQM-A.json"
    records, lists = check_map(path, Record), read_json(splits)
    names = lists.get(split) if isinstance(lists, dict) else None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{splits} should map the split {split} to a list of ids.")
    if len(set(names)) < len(names):
        raise UserError(f"{splits} has ids of the split {split} more than once.")
    if lost := [name for name in names if name not in records]:
        raise UserError(
            f"{path} lacks problems that {splits} has in {split}, {len(lost):,} in all: {first_names(lost)}."
        )
    problems = {name: read_problem(records[name], f"Problem {name} in {path}") for name in names}
    pictures = Folder(folder / "images" / split)
    if is_file(prompts):
        questions = from_prompts(prompts, problems, records)
        return questions, problems, pictures, fingerprint([prompts, path, splits])
    questions = tuple(
        ask(name, records[name], (image_name(f"{name}/{records[name]['image']}", str(path)),))
        if records[name].get("image")
        else ask(name, records[name], ())
        for name in names
    )
    return questions, problems, pictures, fingerprint([path, splits])


def from_prompts(path: Path, problems: Problems, records: Mapping[str, Record]) -> tuple[Question, ...]:
    """LLaVA's wording: the placeholder is removed and the suffix is not in the file."""
    questions: dict[str, Question] = {}
    for number, row in enumerate(check_list(path, Prompt), start=1):
        where, name = f"{path} entry {number}", str(row["id"])
        if name not in problems:
            raise UserError(f"{where} asks question {name}, which the official split does not have.")
        if name in questions:
            raise UserError(f"{where} asks question {name} a second time.")
        text = row["conversations"][0]["value"].replace(IMAGE, "").strip()
        if ("image" in row) != bool(records[name].get("image")):
            raise UserError(f"{where} and problem {name} of problems.json do not agree on whether there is an image.")
        images = (image_name(row["image"], where),) if "image" in row else ()
        questions[name] = question(name, text, images, problems[name])
    if lost := [name for name in problems if name not in questions]:
        raise UserError(f"{path} lacks questions of the official split, {len(lost):,} in all: {first_names(lost)}.")
    return tuple(questions.values())


def open_mirror(data: Path, split: str, profile: str, download: bool) -> Table:
    """All questions for LLaVA's profile, unless the local copy holds those with an image only."""
    name = MIRROR_SPLITS[split]
    if profile == "lmms":
        return open_table(data, MIRROR, WITH_IMAGE, name, download)
    try:
        return open_table(data, MIRROR, FULL, name, download)
    except UserError:
        if local_copy(data, MIRROR) is None:
            raise
        return open_table(data, MIRROR, WITH_IMAGE, name, download)


def from_mirror(table: Table) -> tuple[tuple[Question, ...], Problems, Pictures, str]:
    """The hub's table; its rows have no ids, so their numbers stand for them."""
    records = {str(row): record for row, record in enumerate(table.records(MirrorRow))}
    pictures = table.pictures()
    problems = {name: read_problem(record, f"{table.where} row {name}") for name, record in records.items()}
    images = {name: (f"{name}/image",) if f"{name}/image" in pictures.names else () for name in records}
    questions = tuple(ask(name, record, images[name]) for name, record in records.items())
    return questions, problems, pictures, table.fingerprint(("question", "choices", "answer"))


def read_problem(record: Record | MirrorRow, where: str) -> scienceqa.Problem:
    """Choices and answer, checked."""
    choices, answer = record["choices"], record["answer"]
    if answer >= len(choices):
        raise UserError(f"{where} should have the index of one of its {len(choices)} choices as answer, got {answer}.")
    return scienceqa.Problem(len(choices), answer, record.get("subject") or "")


def ask(name: str, record: Record | MirrorRow, images: Iterable[str]) -> Question:
    """Context, question and choices as in LLaVA's file; lmms-eval words them alike."""
    context = f"Context: {record['hint']}\n" if record.get("hint") else ""
    text = f"{context}{record['question']}\n{option_lines(letters(record['choices']))}"
    return question(name, text, tuple(images), read_problem(record, name))


def question(name: str, text: str, images: tuple[str, ...], problem: scienceqa.Problem) -> Question:
    return Question(name, text, LETTER, images, scienceqa.OPTIONS[problem.answer : problem.answer + 1])


BENCHMARK = Benchmark(
    name="scienceqa",
    summary="Science questions of school books, multiple choice; the accuracy over those with an image.",
    splits=("test", "val"),
    read=load,
    published="69.5 accuracy with images",
    published_by=(
        "LLaVA-1.5-7B, re-run of the released weights with LLaVA's scripts in FasterVLM's EVAL.md; LLaVA's "
        "paper has 66.8"
    ),
    needs=(
        Need("scienceqa/problems.json", "https://github.com/lupantech/ScienceQA, data/scienceqa"),
        Need("scienceqa/pid_splits.json", "https://github.com/lupantech/ScienceQA, data/scienceqa"),
        Need("scienceqa/images/test", "https://github.com/lupantech/ScienceQA, tools/download.sh (2,017 of 4,241 ids)"),
        Need("scienceqa/llava_test_CQM-A.json", "LLaVA's eval.zip (docs/Evaluation.md)", optional=True),
    ),
    mirror=MIRROR,
    licence="CC BY-NC-SA 4.0",
)
