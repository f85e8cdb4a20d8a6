"""GQA in the official layout, read from DATA/gqa.

    llava_gqa_testdev_balanced.jsonl        LLaVA's question file: question_id, image, text with suffix, category
    data/testdev_balanced_questions.json    official questions with answers
    data/images/                            official images
    data/testdev_choices.json               optional, for validity and plausibility
    data/testdev_all_questions.json         optional, for consistency

The split `val` has the same names with `val` for `testdev`. Without LLaVA's file the questions are asked in the order
of the official one, with LLaVA's suffix.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.dataset import Benchmark, Dataset, Question, fingerprint
from eval.jsonl import read_json, read_jsonl
from eval.metrics import Score, gqa
from eval.pictures import Folder, image_name
from eval.prompts import SHORT, split_suffix
from llava.errors import UserError

Records = dict[str, dict[str, Any]]

FIELDS = ("question", "answer", "imageId", "isBalanced", "types", "semantic", "groups", "entailed")


def load(data: Path, split: str, profile: str = "llava", source: str = "auto") -> Dataset:
    """Read a split; everything that can be wrong with its files is said here, images excepted."""
    folder = data / "gqa"
    official = folder / "data" / f"{split}_balanced_questions.json"
    prompts = folder / f"llava_gqa_{split}_balanced.jsonl"
    if not official.is_file():
        raise UserError(f"No GQA {split} questions at {official}; --data should be the folder that holds gqa/.")
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
    return Dataset(
        f"GQA {split}",
        questions,
        Folder(images),
        fingerprint(sources),
        score,
        judge,
        submission,
        accepts=frozenset(unbalanced),
    )


def judge(question: Question, text: str) -> float:
    """1 if the text is the answer."""
    return float(gqa.normalise(text) == question.answer)


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
    published="62.0 accuracy (LLaVA-1.5-7B, model zoo)",
)
