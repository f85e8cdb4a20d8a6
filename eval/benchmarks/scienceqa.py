"""ScienceQA, of which papers print the accuracy over the questions with an image. Read from DATA/scienceqa.

    problems.json              official questions with answers, by id
    pid_splits.json            official lists of ids by split
    llava_test_CQM-A.json      LLaVA's wording; without it the same wording is made from problems.json
    images/test/ID/image.png   official images

The split `val` has the same names with `val` for `test`. Under LLaVA's profile all questions are asked, those without
an image as text alone; lmms-eval asks those with an image only.

Counted as LLaVA's llava/eval/eval_science_qa.py (commit c121f04) does it, and as lmms-eval does. Written from a
description of both and equal to the official script on the vectors in tests/data/scienceqa.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from pydantic import Field

from eval.answers.jsonl import is_file, read_json
from eval.benchmarks.base import Contents, Dataset, Question, fingerprint, listed
from eval.benchmarks.hub import HubTable, letters, official_file, open_table, option_lines
from eval.benchmarks.llava_files import LETTER, all_asked, each_once, json_lines
from eval.benchmarks.media import Folder, image_name
from eval.benchmarks.records import Filled, Id, NotRequired, Texts, TypedDict, check, check_list, check_map
from eval.metrics import Score, first_names, ratio_terms
from eval.metrics.accuracy import grouped, percent
from llava.errors import UserError

MIRROR = ("lmms-lab-encoder/ScienceQA", "lmms-lab/ScienceQA")
# Configurations of the mirror: with and without the questions that are text alone.
FULL, WITH_IMAGE = "ScienceQA-FULL", "ScienceQA-IMG"
MIRROR_SPLITS = {"test": "test", "val": "validation"}
IMAGE = "<image>"
OPTIONS = "ABCDE"


class MirrorRow(TypedDict):
    """A row of the mirror, without its image."""

    question: Filled
    choices: Texts
    answer: Annotated[int, Field(ge=0)]
    hint: NotRequired[str | None]
    subject: NotRequired[str | None]


class ScienceRecord(MirrorRow):
    """A problem of the official file."""

    image: NotRequired[str | None]


class Turn(TypedDict):
    """What one side says in a conversation."""

    value: Filled


class SciencePrompt(TypedDict):
    """An entry of LLaVA's file."""

    id: Id
    image: NotRequired[Filled]
    conversations: Annotated[list[Turn], Field(min_length=1)]


@dataclass(frozen=True)
class Problem:
    """What scoring needs of a question.

    Attributes:
        choices: how many there are.
        answer: index of the right one.
        subject: "natural science", ...; "" where the data does not say.
    """

    choices: int
    answer: int
    subject: str = ""

    @property
    def letter(self) -> str:
        """Of the right choice."""
        return OPTIONS[self.answer : self.answer + 1]


def load(data: Path, split: str, profile: str = "llava", source: str = "auto") -> Dataset:
    """Read a split; everything that can be wrong with its files is said here, images excepted."""
    title = f"ScienceQA {split}"
    official = official_file(data, source, title, [data / "scienceqa" / "problems.json"], MIRROR)
    if official is None:
        config = WITH_IMAGE if profile == "lmms" else FULL
        contents = read_mirror(open_table(data, MIRROR, config, MIRROR_SPLITS[split], source))
    else:
        contents = read_official(official, split)
    questions, problems, lmms = contents.questions, contents.references, profile == "lmms"
    shown = {question.id for question in questions if question.images}
    if lmms:
        questions = tuple(question for question in questions if question.images)
    read = parse_lmms if lmms else parse

    def score(asked: Sequence[str], texts: Mapping[str, str]) -> Score:
        return evaluate({name: problems[name] for name in asked}, texts, shown, read)

    def submission(texts: Mapping[str, str]) -> dict[str, str]:
        """The input of LLaVA's eval_science_qa.py, which tells by "<image>" in the prompt which questions show one."""
        prompts = {question.id: f"{IMAGE}\n" * bool(question.images) + question.message for question in questions}
        rows = ({"question_id": name, "prompt": prompts[name], "text": text} for name, text in texts.items())
        return {"scienceqa_answers.jsonl": json_lines(rows)}

    return replace(contents, questions=questions).dataset(
        title,
        profile,
        score,
        lambda question, text: is_right(text, problems[question.id], read),
        submission,
        {"questions": len(questions), "with an image": len(shown)},
        # LLaVA's script for ScienceQA generates up to 1,024 tokens, not the 128 of its other scripts.
        max_new_tokens=16 if lmms else 1024,
        # An answer file over all questions is an answer file over those with an image.
        accepts=frozenset(problems.keys() - {question.id for question in questions}),
    )


def read_official(path: Path, split: str) -> Contents[Problem]:
    """Questions as LLaVA's file words them, or worded alike, in the official order."""
    splits, prompts = path.with_name("pid_splits.json"), path.with_name(f"llava_{split}_CQM-A.json")
    records = problems_of(path, split)
    problems = {name: read_problem(records[name], f"Problem {name} in {path}") for name in records}
    if is_file(prompts):
        questions, files = from_prompts(prompts, splits, problems, records), [prompts, path, splits]
    else:
        questions, files = [], [path, splits]
        for name in records:
            file = records[name].get("image")
            shown = (image_name(f"{name}/{file}", str(path)),) if file else ()
            questions.append(ask(name, records[name], shown, problems[name]))
    images = Folder(path.parent / "images" / split)
    return Contents("official files", tuple(questions), problems, images, fingerprint(files))


def problems_of(path: Path, split: str) -> dict[str, ScienceRecord]:
    """The problems of a split, in the order of its list."""
    splits, records = path.with_name("pid_splits.json"), check_map(path, ScienceRecord)
    names = check(dict[str, list[str]], read_json(splits), str(splits)).get(split, [])
    if not names or len(set(names)) < len(names):
        raise UserError(f"{splits} should list the ids of the split {split}, each once.")
    if lost := [name for name in names if name not in records]:
        raise UserError(
            f"{path} lacks problems that {splits} has in {split}, {len(lost):,} in all: {first_names(lost)}."
        )
    return {name: records[name] for name in names}


def from_prompts(
    path: Path, splits: Path, problems: Mapping[str, Problem], records: Mapping[str, ScienceRecord]
) -> list[Question]:
    """LLaVA's wording: the placeholder is removed and the suffix is not in the file."""
    rows = [(f"{path} entry {number}", row) for number, row in enumerate(check_list(path, SciencePrompt), start=1)]
    each_once(((where, str(row["id"])) for where, row in rows), problems, splits)
    questions = []
    for where, row in rows:
        name, text = str(row["id"]), row["conversations"][0]["value"].replace(IMAGE, "").strip()
        if ("image" in row) != bool(records[name].get("image")):
            raise UserError(f"{where} and problem {name} of problems.json do not agree on whether there is an image.")
        images = (image_name(row["image"], where),) if "image" in row else ()
        questions.append(Question(name, text, LETTER, images, problems[name].letter))
    all_asked(path, {question.id for question in questions}, problems, splits)
    return questions


def read_mirror(table: HubTable) -> Contents[Problem]:
    """The hub's table; its rows have no ids, so their numbers stand for them."""
    records = {str(row): record for row, record in enumerate(table.records(MirrorRow))}
    images = table.images()
    problems = {name: read_problem(record, f"{table.where} row {name}") for name, record in records.items()}
    questions = []
    for name, record in records.items():
        shown = (f"{name}/image",) if f"{name}/image" in images.names else ()
        questions.append(ask(name, record, shown, problems[name]))
    return table.contents(questions, problems, ("question", "choices", "answer"))


def read_problem(record: MirrorRow, where: str) -> Problem:
    """Choices and answer, checked."""
    choices, answer = record["choices"], record["answer"]
    if answer >= len(choices):
        raise UserError(f"{where} should have the index of one of its {len(choices)} choices as answer, got {answer}.")
    return Problem(len(choices), answer, record.get("subject") or "")


def ask(name: str, record: MirrorRow, images: tuple[str, ...], problem: Problem) -> Question:
    """Context, question and choices as in LLaVA's file; lmms-eval words them alike."""
    context = f"Context: {record['hint']}\n" if record.get("hint") else ""
    text = f"{context}{record['question']}\n{option_lines(letters(record['choices']))}"
    return Question(name, text, LETTER, images, problem.letter)


# -- the metric ------------------------------------------------------------------------------------------------------

FAILED = "FAILED"


# Any character may follow the letter: the official pattern's full stop is not escaped.
ANSWER_IS = re.compile(r"The answer is ([A-Z]).")


def parse(text: str) -> str:
    """The letter LLaVA's script reads, FAILED if it reads none; letters beyond E come from the sentence alone."""
    if len(text) == 1 and text in OPTIONS:
        return text
    if text[:1] and text[0] in OPTIONS and text[1:3] == ". ":
        return text[0]
    letters = ANSWER_IS.findall(text)
    return letters[0] if len(letters) == 1 else FAILED


def parse_lmms(text: str) -> str:
    """lmms-eval's rule: a letter in either case and nothing else, or an upper-case letter and a full stop."""
    text = text.strip()
    if len(text) == 1:
        return text.upper()
    return text[0] if text[:1].isupper() and text[1:2] == "." else FAILED


def is_right(text: str, problem: Problem, read: Callable[[str], str] = parse) -> float:
    """1 if the letter in `text` is that of the right choice; FAILED and letters that are not offered are wrong."""
    return float(OPTIONS[: problem.choices].find(read(text)) == problem.answer)


def evaluate(
    problems: Mapping[str, Problem],
    texts: Mapping[str, str],
    with_image: Collection[str],
    read: Callable[[str], str] = parse,
) -> Score:
    """Accuracy over all questions and, the number that papers print, over those with an image.

    As officially, a question without a prediction counts as wrong in `accuracy`, but leaves the denominator of
    `img_accuracy`: that one looks at the prompts recorded with the answers.

    Args:
        problems: the questions that count.
        texts: question id -> the model's text.
        with_image: ids of the questions that show an image.
    """
    correct = {name: is_right(texts.get(name, FAILED), problem, read) for name, problem in problems.items()}
    image = set(with_image) & texts.keys()
    shown = {name: value for name, value in correct.items() if name in image}
    values: dict[str, float | None] = {
        "img_accuracy": percent(shown.values()) if shown else None,
        "accuracy": percent(correct.values()),
        "failed": float(sum(read(texts.get(name, FAILED)) == FAILED for name in problems)),
    }
    subjects = {name: problem.subject for name, problem in problems.items() if problem.subject}
    groups = {}
    if subjects and shown:
        groups["subject"] = grouped({name: shown[name] for name in shown if name in subjects}, subjects)
    notes = ["failed: answers without a letter that the rule can read"]
    if missing := sum(name not in texts for name in problems):
        notes.append(f"questions without a prediction: {missing:,}, wrong in accuracy and left out of img_accuracy")
    if not shown:
        notes.append("no answer to a question with an image, so no img_accuracy")
    return Score(
        values,
        groups,
        correct,
        tuple(notes),
        main="img_accuracy",
        points=frozenset({"failed"}),
        terms=ratio_terms(shown, proportion=True),
        kinds={"subject": {name: subjects[name] for name in shown if name in subjects}},
    )


BENCHMARK = listed("scienceqa", load, ("test", "val"), mirror=MIRROR)
