"""GQA in the official layout, read from DATA/gqa.

    llava_gqa_testdev_balanced.jsonl        LLaVA's question file: question_id, image, text with suffix, category
    data/testdev_balanced_questions.json    official questions with answers
    data/images/                            official images
    data/testdev_choices.json               optional, for validity and plausibility
    data/testdev_all_questions.json         optional, for consistency

The split `val` has the same names with `val` for `testdev`. Without LLaVA's file the questions are asked in the order
of the official one, with LLaVA's suffix. The mirror has two tables for a split, one of questions and one of images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from eval.answers.jsonl import is_file
from eval.benchmarks.base import Benchmark, Dataset, Need, Question, fingerprint
from eval.benchmarks.gqa import metric as gqa
from eval.benchmarks.hub import official_file, open_table
from eval.benchmarks.llava_files import read_prompts, unique
from eval.benchmarks.media import Folder, image_name
from eval.benchmarks.prompts import SHORT
from eval.benchmarks.records import Filled, Id, Record, TypedDict, check_map
from eval.metrics import Score, accuracy, exact_match
from llava.errors import UserError

MIRROR = ("lmms-lab-encoder/GQA", "lmms-lab/GQA")


class Types(TypedDict):
    """What kind of question it is."""

    structural: str
    semantic: str
    detailed: str


class Step(TypedDict):
    """An operation of the program that answers the question."""

    operation: str
    argument: str


# "global" is a keyword of Python and cannot stand in a class.
Groups = TypedDict("Groups", {"global": str | None})


class Official(TypedDict):
    """A question of the official file."""

    question: Filled
    answer: str
    imageId: Id
    isBalanced: bool
    types: Types
    semantic: list[Step]
    groups: Groups
    entailed: list[str]


class Entailed(TypedDict):
    """What is looked at of a question in the file with all questions."""

    answer: str
    isBalanced: bool


class Choices(TypedDict):
    """The answers that make sense for a question, and those that are likely in the world."""

    valid: list[str]
    plausible: list[str]


class MirrorQuestion(TypedDict):
    """A row of the mirror's table of questions."""

    id: Id
    question: Filled
    answer: Filled
    imageId: Id


class MirrorPicture(TypedDict):
    """What is read of a row of the mirror's table of images."""

    id: Id


Records = dict[str, Official]


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
    records = check_map(official, Official)
    images = folder / "data" / "images"
    if is_file(prompts):
        questions = from_prompts(prompts, official, records)
        sources = [prompts, official]
    else:
        questions = from_records(records, official, images)
        sources = [official]
    choices = read_optional(folder / "data" / f"{split}_choices.json", Choices)
    everything = read_optional(folder / "data" / f"{split}_all_questions.json", Entailed)

    def score(asked: Sequence[str], texts: Mapping[str, str]) -> Score:
        predictions = {name: accuracy.normalise(text) for name, text in texts.items()}
        return gqa.score({name: records[name] for name in asked}, predictions, choices, everything)

    unbalanced = {name for name, record in {**(everything or {}), **records}.items() if not record["isBalanced"]}
    found = Dataset(
        f"GQA {split}",
        questions,
        Folder(images),
        fingerprint(sources),
        score,
        sample_score,
        submission,
        facts={"source": "official", "profile": profile},
        accepts=frozenset(unbalanced),
        normalise=accuracy.normalise,
    )
    return as_lmms(found) if profile == "lmms" else found


def from_mirror(data: Path, split: str, profile: str, download: bool) -> Dataset:
    """The tables of the hub: question, answer and imageId of each question; id and encoded bytes of each image."""
    table = open_table(data, MIRROR, f"{split}_balanced_instructions", split, download)
    shown = open_table(data, MIRROR, f"{split}_balanced_images", split, download)
    row_of = {str(record["id"]): row for row, record in enumerate(shown.records(MirrorPicture))}
    questions = []
    for record in table.records(MirrorQuestion):
        image = str(record["imageId"])
        if image not in row_of:
            raise UserError(f"Question {record['id']} in {table.where} is about image {image}, which has no row.")
        questions.append(
            Question(str(record["id"]), record["question"], SHORT, (f"{row_of[image]}/image",), record["answer"])
        )
    answers = {question.id: question.answer for question in questions}

    def score(asked: Sequence[str], texts: Mapping[str, str]) -> Score:
        # The mirror has no types and programs: what needs them is not measured.
        return exact_match.score({name: answers[name] for name in asked}, texts, {}, sample_score=gqa_score)

    found = Dataset(
        f"GQA {split}",
        unique(questions, table.where),
        shown.pictures(),
        table.fingerprint(list(MirrorQuestion.__annotations__)),
        score,
        sample_score,
        submission,
        facts={"source": table.id, "profile": profile},
        normalise=accuracy.normalise,
    )
    return as_lmms(found) if profile == "lmms" else found


def as_lmms(data: Dataset) -> Dataset:
    """The same questions as lmms-eval asks and scores them: 16 tokens, case and punctuation ignored."""
    answers = {question.id: question.answer for question in data.questions}

    def score(asked: Sequence[str], texts: Mapping[str, str]) -> Score:
        wanted = {name: answers[name] for name in asked}
        given = {name: texts[name] for name in texts if name in wanted}
        return exact_match.score(wanted, given, {}, sample_score=exact_match.loose_score)

    return replace(
        data,
        score=score,
        sample_score=lambda q, text: exact_match.loose_score(text, q.answer),
        max_new_tokens=16,
        normalise=exact_match.bare,
    )


def gqa_score(text: str, answer: str) -> float:
    """1 if the text is the answer as the official script compares them."""
    return float(accuracy.normalise(text) == answer)


def sample_score(question: Question, text: str) -> float:
    """1 if the text is the answer."""
    return gqa_score(text, question.answer)


def submission(texts: Mapping[str, str]) -> dict[str, list[dict[str, str]]]:
    """The official script's input, its testdev_balanced_predictions.json."""
    return {
        "predictions.json": [
            {"questionId": name, "prediction": accuracy.normalise(text)} for name, text in texts.items()
        ]
    }


def read_optional(path: Path, schema: type[Record]) -> dict[str, Record] | None:
    """The file's records by question id, None if there is no such file."""
    return check_map(path, schema) if is_file(path) else None


def from_prompts(path: Path, official: Path, records: Records) -> tuple[Question, ...]:
    """Questions as LLaVA's file words and orders them."""
    questions: dict[str, Question] = {}
    for prompt in read_prompts(path):
        name = str(prompt.id)
        if name not in records:
            raise UserError(f"{prompt.where} asks question {name}, which is not in {official}.")
        if name in questions:
            raise UserError(f"{prompt.where} asks question {name} a second time.")
        answer = records[name]["answer"]
        questions[name] = Question(name, prompt.question, prompt.suffix, (prompt.image,), answer)
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
    read=load,
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
    licence="annotations CC BY 4.0; images of COCO and Flickr under their own terms",
)
