"""TextVQA validation in the official layout, read from DATA/textvqa.

    llava_textvqa_val_v051_ocr.jsonl    LLaVA's question file: image id as question_id, text with OCR tokens and suffix
    TextVQA_0.5.1_val.json              official questions with ten answers each
    train_images/                       official images of training and validation

The profiles ask different things. llava: each question is followed by a line "Reference OCR token: ..." with the words
an OCR system read in the image. It counts as part of the question, so query-aware methods look at it as the model
does. lmms: no OCR tokens, which costs LLaVA-1.5-7B about 12 points. `facts` says which it was.

Image ids stand for several questions. A question's id here is TextVQA's own question_id.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.benchmarks.base import Contents, Dataset, Question, fingerprint, listed, scored_by
from eval.benchmarks.hub import official_file, open_table
from eval.benchmarks.llava_files import (
    SHORT,
    Answers,
    QuestionRecord,
    as_number,
    by_id,
    most_common,
    need_file,
    people_said,
    read_prompts,
    size,
    unique,
)
from eval.benchmarks.media import Folder, image_name
from eval.benchmarks.records import Id, NotRequired, check_list
from eval.metrics import vqa
from llava.errors import UserError

MIRROR = ("lmms-lab-encoder/textvqa", "lmms-lab/textvqa")
PROMPTS, ANNOTATIONS = "llava_textvqa_val_v051_ocr.jsonl", "TextVQA_0.5.1_val.json"
COLUMNS = ("question_id", "question", "answers")

TEXTVQA_SITE = "https://textvqa.org/dataset"
PUBLISHED_SIZE = 5_000
PEOPLE = 10

OCR = "Reference OCR token: "


class MirrorRow(QuestionRecord):
    """A row of the mirror."""

    answers: Answers
    image_id: NotRequired[Id | None]


class MirrorWithOcr(MirrorRow):
    """A row of the mirror with the words that an OCR system read."""

    ocr_tokens: list[str]


class Official(QuestionRecord):
    """A question of the official file."""

    answers: Answers
    image_id: Id


Record = Mapping[str, Any]


def load(data: Path, split: str, profile: str = "llava", source: str = "auto") -> Dataset:
    """Read the split; everything that can be wrong with its files is said here, images excepted."""
    title, with_ocr = f"TextVQA {split}", profile == "llava"
    file = data / "textvqa" / (PROMPTS if with_ocr else ANNOTATIONS)
    official = official_file(data, source, title, [file], MIRROR)
    contents = read_mirror(data, with_ocr, source) if official is None else read_official(official, title, with_ocr)
    answers = {name: people_said(record["answers"]) for name, record in contents.references.items()}
    if wrong := [name for name, given in answers.items() if len(given) != PEOPLE]:
        raise UserError(
            f"TextVQA's metric needs {PEOPLE} answers to each question; {len(wrong):,} have another number, such as "
            f"question {wrong[0]} with {len(answers[wrong[0]])}."
        )

    def submission(texts: Mapping[str, str]) -> dict[str, list[dict[str, Any]]]:
        """The format of TextVQA's server and of lmms-eval."""
        rows = [{"question_id": as_number(name), "answer": vqa.process(text)} for name, text in texts.items()]
        return {"predictions.json": rows}

    facts = {"size": size(len(contents.questions), PUBLISHED_SIZE), "ocr_tokens": "on" if with_ocr else "off"}
    # LLaVA: model_vqa_loader.py's default. lmms-eval: no limit for this task, its LLaVA then takes 1,024.
    tokens = 128 if with_ocr else 1024
    more: dict[str, Any] = {"max_new_tokens": tokens, "normalise": vqa.process}
    return contents.dataset(title, profile, *scored_by(answers, vqa.m4c), submission, facts, **more)


def read_official(path: Path, title: str, with_ocr: bool) -> Contents[Record]:
    """LLaVA's questions, or the official file's where no OCR tokens are wanted."""
    annotations = need_file(path.with_name(ANNOTATIONS), title, TEXTVQA_SITE)
    records = check_list(annotations, Official, "data")
    if with_ocr:
        questions = from_prompts(path, annotations, records)
    else:
        images = [image_name(f"{record['image_id']}.jpg", str(annotations)) for record in records]
        questions = from_records(records, images, str(annotations))
    # One file where no OCR tokens are wanted.
    mark = fingerprint(dict.fromkeys([path, annotations]))
    return Contents("official", questions, by_id(records), Folder(path.with_name("train_images")), mark)


def read_mirror(data: Path, with_ocr: bool, source: str) -> Contents[Record]:
    """The table of the hub."""
    table = open_table(data, MIRROR, None, "validation", source)
    records: Sequence[Record] = table.records(MirrorWithOcr if with_ocr else MirrorRow)
    questions = from_records(records, table.row_images(), table.where, with_ocr)
    return table.contents(questions, by_id(records), (*COLUMNS, "ocr_tokens") if with_ocr else COLUMNS)


def from_prompts(path: Path, annotations: Path, records: Sequence[Record]) -> tuple[Question, ...]:
    """Questions as LLaVA's file words and orders them, joined with the official ones as its script does it."""
    # Where the official file had a pair twice, the later one would count, as in the script.
    known = {(str(record["image_id"]), record["question"].lower()): record for record in records}
    questions = []
    for prompt in read_prompts(path):
        official = str(prompt.id)
        record = known.get((official, prompt.text.split("\n")[0].lower()))
        if record is None:
            raise UserError(f"{prompt.where} asks a question about image {official} that is not in {annotations}.")
        name, answer = str(record["question_id"]), most_common(people_said(record["answers"]))
        questions.append(Question(name, prompt.question, prompt.suffix, (prompt.image,), answer, official, official))
    return unique(questions, str(path))


def from_records(
    records: Sequence[Record], images: Sequence[str], where: str, with_ocr: bool = False
) -> tuple[Question, ...]:
    """Questions of the official file or the mirror, with a capital at the start only, as both profiles ask them.

    Args:
        with_ocr: let the words that an OCR system read in the image follow.
    """
    questions = []
    for record, image in zip(records, images, strict=True):
        text = record["question"].capitalize()
        if with_ocr:
            text += f"\n{OCR}{', '.join(record['ocr_tokens'])}"
        name, official = str(record["question_id"]), str(record.get("image_id") or "")
        answer = most_common(people_said(record["answers"]))
        questions.append(Question(name, text, SHORT, (image,), answer, official, official))
    return unique(questions, where)


BENCHMARK = listed("textvqa", load, ("val",), mirror=MIRROR)
