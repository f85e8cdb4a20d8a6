"""GQA in the official layout, read from DATA/gqa.

    llava_gqa_testdev_balanced.jsonl        LLaVA's question file: question_id, image, text with suffix, category
    data/testdev_balanced_questions.json    official questions with answers
    data/images/                            official images
    data/testdev_choices.json               optional, for validity and plausibility
    data/testdev_all_questions.json         optional, for consistency

The split `val` has the same names with `val` for `testdev`. Without LLaVA's file the questions are asked in the order
of the official one, with LLaVA's suffix. The mirror has two tables for a split, one of questions and one of pictures.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from eval.dataset import Benchmark, Dataset, Need, Question, fingerprint
from eval.hub import open_table
from eval.jsonl import read_json, read_jsonl
from eval.metrics import Score, exact_match, gqa
from eval.pictures import Folder, image_name
from eval.prompts import SHORT, split_suffix
from eval.sources import official_file
from llava.errors import UserError

Records = dict[str, dict[str, Any]]

MIRROR = ("lmms-lab-encoder/GQA", "lmms-lab/GQA")
FIELDS = ("question", "answer", "imageId", "isBalanced", "types", "semantic", "groups", "entailed")


def load(data: Path, split: str, profile: str = "llava", source: str = "auto") -> Dataset:
    """Read a split; everything that can be wrong with its files is said here, images excepted."""
    file = data / "gqa" / "data" / f"{split}_balanced_questions.json"
    if official_file(data, source, f"GQA {split}", [file], MIRROR) is not None:
        return from_official(data / "gqa", split, profile)
    return from_mirror(data, split, profile, download=source == "mirror")


def from_official(folder: Path, split: str, profile: str) -> Dataset:
    """The official questions, in LLaVA's order where its file is there."""
    official = folder / "data" / f"{split}_balanced_questions.json"
    prompts = folder / f"llava_gqa_{split}_balanced.jsonl"
    records = read_records(official)
    images = folder / "data" / "images"
    if prompts.is_file():
        questions = from_prompts(prompts, official, records)
        sources = [prompts, official]
    else:
        questions = from_records(records, official, images)
        sources = [official]
    choices = read_optional(folder / "data" / f"{split}_choices.json")
    everything = read_optional(folder / "data" / f"{split}_all_questions.json")

    def score(asked: Sequence[str], texts: Mapping[str, str]) -> Score:
        predictions = {name: gqa.normalise(text) for name, text in texts.items()}
        return gqa.score({name: records[name] for name in asked}, predictions, choices, everything)

    unbalanced = {name for name, record in {**(everything or {}), **records}.items() if not record["isBalanced"]}
    found = Dataset(
        f"GQA {split}",
        questions,
        Folder(images),
        fingerprint(sources),
        score,
        judge,
        submission,
        facts={"source": "official", "profile": profile},
        accepts=frozenset(unbalanced),
    )
    return as_lmms(found) if profile == "lmms" else found


def from_mirror(data: Path, split: str, profile: str, download: bool) -> Dataset:
    """The tables of the hub: question, answer and imageId of each question; id and image of each picture."""
    table = open_table(data, MIRROR, f"{split}_balanced_instructions", split, download)
    shown = open_table(data, MIRROR, f"{split}_balanced_images", split, download)
    row_of = {str(name): row for row, name in enumerate(shown.column("id"))}
    fields = ("id", "question", "answer", "imageId")
    questions = []
    for record in table.records(fields):
        image = str(record["imageId"])
        if image not in row_of:
            raise UserError(f"Question {record['id']} in {table.where} is about image {image}, which has no row.")
        questions.append(
            Question(str(record["id"]), record["question"], SHORT, (f"{row_of[image]}/image",), record["answer"])
        )
    answers = {question.id: question.answer for question in questions}

    def score(asked: Sequence[str], texts: Mapping[str, str]) -> Score:
        # The mirror has no types and programs: what needs them is not measured.
        return exact_match.score({name: answers[name] for name in asked}, texts, {}, credit=gqa_credit)

    found = Dataset(
        f"GQA {split}",
        tuple(questions),
        shown.pictures(),
        table.fingerprint(fields),
        score,
        judge,
        submission,
        facts={"source": table.id, "profile": profile},
    )
    return as_lmms(found) if profile == "lmms" else found


def as_lmms(data: Dataset) -> Dataset:
    """The same questions as lmms-eval asks and scores them: 16 tokens, case and punctuation ignored."""
    answers = {question.id: question.answer for question in data.questions}

    def score(asked: Sequence[str], texts: Mapping[str, str]) -> Score:
        wanted = {name: answers[name] for name in asked}
        given = {name: texts[name] for name in texts if name in wanted}
        return exact_match.score(wanted, given, {}, credit=exact_match.loose_credit)

    return replace(data, score=score, judge=lambda q, text: exact_match.loose_credit(text, q.answer), max_new_tokens=16)


def gqa_credit(text: str, answer: str) -> float:
    """1 if the text is the answer as the official script compares them."""
    return float(gqa.normalise(text) == answer)


def judge(question: Question, text: str) -> float:
    """1 if the text is the answer."""
    return gqa_credit(text, question.answer)


def submission(texts: Mapping[str, str]) -> dict[str, list[dict[str, str]]]:
    """The official script's input, its testdev_balanced_predictions.json."""
    return {
        "predictions.json": [{"questionId": name, "prediction": gqa.normalise(text)} for name, text in texts.items()]
    }


def read_records(path: Path) -> Records:
    """The official question file: id -> record with every field the metric looks at."""
    records = read_json(path)
    if not isinstance(records, dict) or not records:
        raise UserError(f"{path} should map question ids to questions and hold at least one.")
    for name, record in records.items():
        if not isinstance(record, dict) or (lost := [field for field in FIELDS if field not in record]):
            what = f"no {', '.join(lost)}" if isinstance(record, dict) else "no fields"
            raise UserError(f"Question {name} in {path} has {what}.")
    return records


def read_optional(path: Path) -> Any:
    """The file's content, None if there is no such file."""
    return read_json(path) if path.is_file() else None


def from_prompts(path: Path, official: Path, records: Records) -> tuple[Question, ...]:
    """Questions as LLaVA's file words and orders them."""
    questions: dict[str, Question] = {}
    for number, row in read_jsonl(path):
        where = f"{path} line {number}"
        if lost := [field for field in ("question_id", "image", "text") if row.get(field) in (None, "")]:
            raise UserError(f"{where} has no {' and no '.join(lost)}.")
        name = str(row["question_id"])
        if name not in records:
            raise UserError(f"{where} asks question {name}, which is not in {official}.")
        if name in questions:
            raise UserError(f"{where} asks question {name} a second time.")
        text, suffix = split_suffix(str(row["text"]))
        image = image_name(str(row["image"]), where)
        questions[name] = Question(name, text, suffix, (image,), str(records[name]["answer"]))
    lost = [name for name, record in records.items() if record["isBalanced"] and name not in questions]
    if lost:
        raise UserError(f"{path} lacks {len(lost):,} of the balanced questions in {official}, the first is {lost[0]}.")
    return tuple(questions.values())


def from_records(records: Records, path: Path, images: Path) -> tuple[Question, ...]:
    """Questions in file order with the suffix LLaVA uses for GQA."""
    return tuple(
        Question(name, record["question"], SHORT, (find_image(images, str(record["imageId"]), path),), record["answer"])
        for name, record in records.items()
    )


def find_image(images: Path, stem: str, path: Path) -> str:
    """File name of an image id: GQA ships .jpg; a lossless set may use .png."""
    name = image_name(f"{stem}.jpg", str(path))
    lossless = f"{stem}.png"
    return lossless if not (images / name).exists() and (images / lossless).exists() else name


BENCHMARK = Benchmark(
    name="gqa",
    summary="Compositional questions about scenes; exact match with a one-word answer.",
    splits=("testdev", "val"),
    load=load,
    model="tinyllava",
    published="62.0 accuracy",
    published_by=(
        "LLaVA-1.5-7B, LLaVA's model zoo; 61.94 in a re-run of the released weights with LLaVA's scripts in "
        "FasterVLM's EVAL.md"
    ),
    needs=(
        Need(
            "gqa/data/testdev_balanced_questions.json", "questions1.2.zip of https://cs.stanford.edu/people/dorarad/gqa"
        ),
        Need("gqa/data/images", "images.zip of https://cs.stanford.edu/people/dorarad/gqa"),
        Need("gqa/llava_gqa_testdev_balanced.jsonl", "eval.zip of LLaVA's docs/Evaluation.md", optional=True),
    ),
    mirror=MIRROR,
    licence="annotations CC BY 4.0; pictures of COCO and Flickr under their own terms",
)
