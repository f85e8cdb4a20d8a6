"""POPE: is there an object in the image, asked about random, popular and adversarial objects. Read from DATA/pope.

    llava_pope_test.jsonl           LLaVA's question file: question_id, image, text with suffix, category
    coco/coco_pope_random.json      official questions with labels, one object per line; also popular and adversarial
    val2014/                        images of COCO

The splits `random`, `popular` and `adversarial` are the questions of one category. Published numbers are over the 2,910
random questions of POPE @ e3e39262; its later versions and the mirror have 3,000.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from eval.answers.jsonl import is_file
from eval.benchmarks.base import Benchmark, Dataset, Need, Question, fingerprint
from eval.benchmarks.hub import local_copy, open_table
from eval.benchmarks.llava_files import Line
from eval.benchmarks.media import Folder, Pictures, image_name
from eval.benchmarks.pope import metric as pope
from eval.benchmarks.prompts import SHORT, split_suffix
from eval.benchmarks.records import Filled, Id, NotRequired, TypedDict, check_lines
from eval.metrics import Score
from llava.errors import UserError, unknown

MIRROR = ("lmms-lab-encoder/POPE", "lmms-lab/POPE")
MIRROR_COLUMNS = ("question_id", "question", "answer")
# LLaVA's file counts each category from a multiple of this.
OFFSET = 10_000_000
VERSIONS = {2910: "POPE @ e3e39262, as in published numbers", 3000: "later than POPE @ e3e39262"}

Category = Literal["random", "popular", "adversarial"]


class Prompt(Line):
    """A line of LLaVA's question file."""

    category: Category


class Label(TypedDict):
    """A line of an official file."""

    question_id: Id
    image: Filled
    text: Filled
    label: Literal["yes", "no"]


class MirrorRow(TypedDict):
    """A row of the mirror."""

    question_id: Id
    question: Filled
    answer: Filled
    category: NotRequired[Category]
    image_source: NotRequired[str | None]


Labels = dict[str, list[Label]]


def load(data: Path, split: str, profile: str = "llava", source: str = "auto") -> Dataset:
    """Read a split; everything that can be wrong with its files is said here, images excepted."""
    prompts = data / "pope" / "llava_pope_test.jsonl"
    if source == "official" or (source == "auto" and is_file(prompts)):
        return from_official(data / "pope", prompts, split, profile)
    if source == "auto" and local_copy(data, MIRROR) is None:
        raise UserError(
            f"No POPE questions at {prompts}, and no copy of {MIRROR[0]} below {data / 'hub'}; "
            "--data should be the folder that holds pope/, with LLaVA's eval.zip unpacked in it."
        )
    return from_mirror(data, split, profile, download=source == "mirror")


def from_official(folder: Path, prompts: Path, split: str, profile: str) -> Dataset:
    """LLaVA's questions with the official labels."""
    if not is_file(prompts):
        raise UserError(f"No POPE questions at {prompts}; unpack LLaVA's eval.zip into the folder given by --data.")
    rows = [row for row in read_prompts(prompts) if split in ("test", row["category"])]
    if not rows:
        raise UserError(f"{prompts} has no questions{'' if split == 'test' else f' of category {split}'}.")
    files: dict[str, Path] = {row["category"]: folder / "coco" / f"coco_pope_{row['category']}.json" for row in rows}
    labels = {category: read_labels(file) for category, file in files.items()}
    check_counts(rows, labels, files)
    questions, items = join(rows, labels)
    return assemble(
        split,
        profile,
        tuple(questions),
        items,
        {category: [row["label"] for row in found] for category, found in labels.items()},
        Folder(folder / "val2014"),
        fingerprint([prompts, *files.values()]),
        "official",
    )


def read_prompts(path: Path) -> list[Prompt]:
    """LLaVA's question file, checked."""
    rows, seen = [], set()
    for where, row in check_lines(path, Prompt):
        name = str(row["question_id"])
        if name in seen:
            raise UserError(f"{where} asks question {name} a second time.")
        seen.add(name)
        image_name(row["image"], where)
        rows.append(row)
    return rows


def read_labels(path: Path) -> list[Label]:
    """The official questions of a category, in file order."""
    if not is_file(path):
        raise UserError(
            f"No POPE labels at {path}; put the files of output/coco of github.com/AoiDragon/POPE @ e3e39262 there."
        )
    return [row for _, row in check_lines(path, Label)]


def check_counts(rows: Sequence[Prompt], labels: Labels, files: Mapping[str, Path]) -> None:
    """Every question has a label at its position."""
    for category, count in Counter(row["category"] for row in rows).items():
        if count > len(labels[category]):
            raise UserError(
                f"{files[category]} has {len(labels[category]):,} labels for {count:,} questions; take question file "
                "and labels of the same version, for LLaVA's question file that of POPE @ e3e39262."
            )


def join(rows: Iterable[Prompt], labels: Labels) -> tuple[list[Question], dict[str, pope.Item]]:
    """Questions with the labels of the lines that ask the same about the same image."""
    lines: dict[tuple[str, str, str], list[Label]] = defaultdict(list)
    for category, found in labels.items():
        for line in found:
            lines[category, line["image"], line["text"]].append(line)
    questions, items, place = [], {}, Counter[str]()
    for row in rows:
        name, image, category = str(row["question_id"]), row["image"], row["category"]
        text, suffix = split_suffix(row["text"])
        label = own_label(row["question_id"], lines[category, image, text])
        answer = label or labels[category][place[category]]["label"]
        place[category] += 1
        questions.append(Question(name, text, suffix, (image,), answer))
        items[name] = pope.Item(category, image, label)
    return questions, items


def own_label(number: int | str, lines: Sequence[Label]) -> str | None:
    """The label of the line with the question's number, or what all lines say; None if there is no such thing."""
    short = number % OFFSET if isinstance(number, int) else number
    answers = {line["label"] for line in lines if line["question_id"] == short} or {line["label"] for line in lines}
    return answers.pop() if len(answers) == 1 else None


def from_mirror(data: Path, split: str, profile: str, download: bool) -> Dataset:
    """The hub's table: 9,000 rows in split test, a split per category in its configuration Full."""
    table = open_table(data, MIRROR, None if split == "test" else "Full", split, download)
    questions, items = [], {}
    labels: dict[str, list[str]] = defaultdict(list)
    first: dict[str, int] = {}
    for row, record in enumerate(table.records(MirrorRow)):
        where = f"{table.where} row {row}"
        category, label = record.get("category", split), record["answer"].lower().strip()
        if category not in pope.CATEGORIES:
            raise unknown(f"POPE category in {where}", category, pope.CATEGORIES)
        if label not in ("yes", "no"):
            raise UserError(f"{where} should have the answer yes or no, got {record['answer']!r}.")
        # Ids count within a category only.
        name = f"{category}/{record['question_id']}"
        if name in items:
            raise UserError(f"{where} asks question {name} a second time.")
        source = str(record.get("image_source") or row)
        image = f"{first.setdefault(source, row)}/image"
        official = str(record["question_id"])
        questions.append(Question(name, record["question"].strip(), SHORT, (image,), label, official))
        items[name] = pope.Item(category, image, label)
        labels[category].append(label)
    return assemble(
        split, profile, tuple(questions), items, labels, table.pictures(), table.fingerprint(MIRROR_COLUMNS), table.id
    )


def assemble(
    split: str,
    profile: str,
    questions: tuple[Question, ...],
    items: Mapping[str, pope.Item],
    labels: Mapping[str, Sequence[str]],
    pictures: Pictures,
    version: str,
    source: str,
) -> Dataset:
    """The data set in one of the profiles."""
    read = pope.parse_lmms if profile == "lmms" else pope.parse

    def score(asked: Sequence[str], texts: Mapping[str, str]) -> Score:
        wanted = {name: items[name] for name in asked}
        return pope.score_lmms(wanted, texts) if profile == "lmms" else pope.score(wanted, labels, texts)

    def sample_score(question: Question, text: str) -> float:
        return float(read(text) == question.answer)

    def submission(texts: Mapping[str, str]) -> dict[str, str]:
        return {"pope_answers.jsonl": answer_lines(texts, questions, items)}

    counts = Counter(item.category for item in items.values())
    facts: dict[str, Any] = {"source": source, "profile": profile, "questions": dict(counts)}
    if random := counts["random"]:
        facts["random_version"] = VERSIONS.get(random, "neither 2,910 nor 3,000 random questions")
    if (labelled := {category: len(found) for category, found in labels.items()}) != counts:
        facts["labels"] = labelled
    title = f"POPE {split}"
    # Both profiles leave the length to their default, which is 128 in LLaVA's loader and in lmms-eval's task.
    return Dataset(
        title,
        questions,
        pictures,
        version,
        score,
        sample_score,
        submission,
        max_new_tokens=128,
        facts=facts,
        normalise=read,
    )


def answer_lines(texts: Mapping[str, str], questions: Iterable[Question], items: Mapping[str, pope.Item]) -> str:
    """The input of LLaVA's eval_pope.py, which looks ids up as the integers they are in the question file."""
    lines = []
    for question in questions:
        if question.id in texts:
            official = question.official or question.id
            number = int(official) if official.isdecimal() else official
            text, category = texts[question.id], items[question.id].category
            record = {"question_id": number, "prompt": question.message, "text": text, "category": category}
            lines.append(json.dumps(record) + "\n")
    return "".join(lines)


BENCHMARK = Benchmark(
    name="pope",
    summary="Is an object in the image: yes or no; F1, the mean of random, popular and adversarial objects.",
    splits=("test", *pope.CATEGORIES),
    read=load,
    published="85.9 F1",
    published_by=(
        "LLaVA-1.5-7B, LLaVA's model zoo; 85.87 in a re-run of the released weights with LLaVA's scripts in "
        "FasterVLM's EVAL.md"
    ),
    needs=(
        Need("pope/llava_pope_test.jsonl", "eval.zip of LLaVA's docs/Evaluation.md"),
        *(
            Need(f"pope/coco/coco_pope_{category}.json", "output/coco of https://github.com/AoiDragon/POPE at e3e39262")
            for category in pope.CATEGORIES
        ),
        Need("pope/val2014", "val2014.zip of https://cocodataset.org, of which 500 images are used"),
    ),
    mirror=MIRROR,
    licence="POPE MIT; images of COCO under their own terms",
)
