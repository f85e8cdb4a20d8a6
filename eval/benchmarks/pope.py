"""POPE: is there an object in the image, asked about random, popular and adversarial objects. Read from DATA/pope.

    llava_pope_test.jsonl           LLaVA's question file: question_id, image, text with suffix, category
    coco/coco_pope_random.json      official questions with labels, one object per line; also popular and adversarial
    val2014/                        images of COCO

The splits `random`, `popular` and `adversarial` are the questions of one category. Published numbers are over the 2,910
random questions of POPE @ e3e39262; its later versions and the mirror have 3,000.

The metrics are accuracy, precision, recall, F1 and yes ratio. `official_score` is LLaVA's eval_pope.py
(haotian-liu/LLaVA @ c121f04) and equal to it on the vectors in tests/data/pope; its headline, the mean F1 of the three
categories, is what papers print. `lmms_score` is lmms-eval @ 75571cf, which pools the categories. Both differ from the
scripts in that a quotient without a denominator is 0 and noted, where eval_pope.py stops. eval_pope.py goes by position
through the label files; here labels belong to questions, which is the same where both files are of one version, and
refused where they are not.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from eval.answers.jsonl import is_file
from eval.benchmarks.base import Contents, Dataset, Question, fingerprint, listed
from eval.benchmarks.hub import image_names, official_file, open_table
from eval.benchmarks.llava_files import (
    EVAL_ZIP,
    SHORT,
    QuestionLine,
    QuestionRecord,
    as_number,
    each_once,
    json_lines,
    split_suffix,
)
from eval.benchmarks.media import Folder, image_name
from eval.benchmarks.records import Filled, NotRequired, check_lines
from eval.metrics import Array, Score, SufficientStatistics, divide
from eval.metrics.accuracy import check_coverage
from llava.errors import UserError, unknown

MIRROR = ("lmms-lab-encoder/POPE", "lmms-lab/POPE")
MIRROR_COLUMNS = ("question_id", "question", "answer")
# LLaVA's file counts each category from a multiple of this.
OFFSET = 10_000_000
VERSIONS = {2910: "POPE @ e3e39262, as in published numbers", 3000: "later than POPE @ e3e39262"}

# In the order of the paper's table.
CATEGORIES = ("random", "popular", "adversarial")
Category = Literal["random", "popular", "adversarial"]


class PopePrompt(QuestionLine):
    """A line of LLaVA's question file."""

    category: Category


class Label(QuestionLine):
    """A line of an official file."""

    label: Literal["yes", "no"]


class MirrorRow(QuestionRecord):
    """A row of the mirror."""

    answer: Filled
    category: NotRequired[Category]
    image_source: NotRequired[str | None]


@dataclass(frozen=True)
class PopeReference:
    """One question; its label is "yes" or "no"."""

    category: str
    image: str
    label: str


def load(data: Path, split: str, profile: str = "llava", source: str = "auto") -> Dataset:
    """Read a split; everything that can be wrong with its files is said here, images excepted."""
    file = data / "pope" / "llava_pope_test.jsonl"
    prompts = official_file(data, source, f"POPE {split}", [file], MIRROR, EVAL_ZIP)
    contents = read_mirror(data, split, source) if prompts is None else read_official(prompts, split)
    questions, items = contents.questions, contents.references
    read, rule = (parse_lmms, lmms_score) if profile == "lmms" else (parse, official_score)

    def score(asked: Sequence[str], texts: Mapping[str, str]) -> Score:
        return rule({name: items[name] for name in asked}, texts)

    def submission(texts: Mapping[str, str]) -> dict[str, str]:
        """The input of LLaVA's eval_pope.py, which looks ids up as the integers they are in the question file."""
        rows = []
        for question in (question for question in questions if question.id in texts):
            row = {"question_id": as_number(question.official or question.id), "prompt": question.message}
            rows.append(row | {"text": texts[question.id], "category": items[question.id].category})
        return {"pope_answers.jsonl": json_lines(rows)}

    counts = Counter(item.category for item in items.values())
    facts: dict[str, Any] = {"questions": dict(counts)}
    if random := counts["random"]:
        facts["random_version"] = VERSIONS.get(random, "neither 2,910 nor 3,000 random questions")
    return contents.dataset(
        f"POPE {split}",
        profile,
        score,
        lambda question, text: float(read(text) == question.answer),
        submission,
        facts,
        # Both profiles leave the length to their default, which is 128 in LLaVA's loader and in lmms-eval's task.
        max_new_tokens=128,
        normalise=read,
    )


def read_official(path: Path, split: str, labels: Path | None = None) -> Contents[PopeReference]:
    """LLaVA's questions with the official labels of the lines that ask the same about the same image.

    Args:
        labels: folder of the official files; coco/ beside the question file if left out.
    """
    folder = labels or path.parent / "coco"
    lines = check_lines(path, PopePrompt)
    each_once((where, str(row["question_id"])) for where, row in lines)
    rows = [(where, row) for where, row in lines if split in ("test", row["category"])]
    if not rows:
        raise UserError(f"{path} has no questions of category {split}.")
    files = {row["category"]: folder / f"coco_pope_{row['category']}.json" for _, row in rows}
    asking: dict[tuple[str, str, str], list[Label]] = defaultdict(list)
    for category, file in files.items():
        if not is_file(file):
            raise UserError(
                f"No POPE labels at {file}; put the files of output/coco of github.com/AoiDragon/POPE @ e3e39262 there."
            )
        for _, line in check_lines(file, Label):
            asking[category, line["image"], line["text"]].append(line)
    questions, items = [], {}
    for where, row in rows:
        name, image, category = str(row["question_id"]), image_name(row["image"], where), row["category"]
        text, suffix = split_suffix(row["text"])
        label = label_of(row["question_id"], asking[category, image, text])
        if label is None:
            raise UserError(
                f"{where} asks a question that is not in {files[category]}; take question file and labels of the same "
                "version, for LLaVA's question file that of POPE @ e3e39262."
            )
        questions.append(Question(name, text, suffix, (image,), label))
        items[name] = PopeReference(category, image, label)
    mark = fingerprint([path, *files.values()])
    return Contents("official", tuple(questions), items, Folder(path.parent / "val2014"), mark)


def label_of(number: int | str, lines: Sequence[Label]) -> str | None:
    """The label of the line with the question's number, or what all lines say; None if there is no such thing."""
    short = number % OFFSET if isinstance(number, int) else number
    answers = {line["label"] for line in lines if line["question_id"] == short} or {line["label"] for line in lines}
    return answers.pop() if len(answers) == 1 else None


def read_mirror(data: Path, split: str, source: str) -> Contents[PopeReference]:
    """The hub's table: 9,000 rows in split test, a split per category in its configuration Full."""
    table = open_table(data, MIRROR, None if split == "test" else "Full", split, source)
    questions, items = [], {}
    records = table.records(MirrorRow)
    images = image_names(table, (str(record.get("image_source") or row) for row, record in enumerate(records)))
    for row, (record, image) in enumerate(zip(records, images, strict=True)):
        where = f"{table.where} row {row}"
        category, label = record.get("category", split), record["answer"].lower().strip()
        if category not in CATEGORIES:
            raise unknown(f"POPE category in {where}", category, CATEGORIES)
        if label not in ("yes", "no"):
            raise UserError(f"{where} should have the answer yes or no, got {record['answer']!r}.")
        # Ids count within a category only.
        official = str(record["question_id"])
        name = f"{category}/{official}"
        if name in items:
            raise UserError(f"{where} asks question {name} a second time.")
        questions.append(Question(name, record["question"].strip(), SHORT, (image,), label, official))
        items[name] = PopeReference(category, image, label)
    return table.contents(questions, items, MIRROR_COLUMNS)


# -- the metric ------------------------------------------------------------------------------------------------------

NEGATIONS = {"No", "not", "no"}
WORD = re.compile(r"\w+")

# Columns of the counts. "Other" is an answer that is neither, which only lmms-eval knows.
TP, FP, TN, FN, OTHER_YES, OTHER_NO = range(6)
COLUMNS = 6


def parse(text: str) -> str:
    """ "yes" or "no" as eval_pope.py reads a text: everything is yes but a negation word in the first sentence.

    Words are what single spaces separate, and case counts: "NO", "no!", "None" and "" are yes.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "yes" if NEGATIONS.isdisjoint(words) else "no"


def parse_lmms(text: str) -> str:
    """The whole text, which lmms-eval compares with "yes" and "no"."""
    return text.lower().strip()


def official_score(items: Mapping[str, PopeReference], texts: Mapping[str, str]) -> Score:
    """The numbers of eval_pope.py in percent: means over the categories that were asked.

    Args:
        items: id -> question, of those that were asked.
        texts: id -> raw text; one for every item.
    """
    said, counts = tally(items, texts, parse)
    score = score_of(items, said, counts, counts.reshape(len(items), -1))
    present, sums = categories_of(items), counts.sum(0)
    notes = empty_notes(present, sums)
    if len(present) < len(CATEGORIES):
        asked = " and ".join(present)
        notes.insert(0, f"f1 is over the questions of {asked} alone; papers print the mean of three categories")
    # Gibberish alone has an F1 of 66.7.
    if unread := sum(parse(text) == "yes" and "yes" not in WORD.findall(text.lower()) for text in texts.values()):
        notes.append(
            f"{unread:,} of {len(texts):,} answers say neither yes nor no: the official script counts them as yes"
        )
    values: dict[str, float | None] = {name: float((100 * value).mean()) for name, value in measures(sums).items()}
    return replace(score, values=values, notes=tuple(notes))


def lmms_score(items: Mapping[str, PopeReference], texts: Mapping[str, str]) -> Score:
    """The numbers of lmms-eval in percent, over all categories at once; the arguments are those of `official_score`.

    Its yes ratio is that of the labels: `yes_ratio_lmms`, while `yes_ratio` is that of the answers.
    """
    said, counts = tally(items, texts, parse_lmms)
    score = score_of(items, said, counts, counts.sum(1))
    pooled = counts.sum((0, 1))
    values: dict[str, float | None] = {name: float(100 * value) for name, value in measures(pooled).items()}
    positive = pooled[TP] + pooled[FN] + pooled[OTHER_YES]
    values["yes_ratio_lmms"] = float(100 * divide(positive, pooled.sum()))
    notes = ["yes_ratio_lmms is the share of questions whose label is yes, which lmms-eval prints as yes ratio"]
    notes += empty_notes(("all categories",), pooled[None])
    if other := int(pooled[OTHER_YES] + pooled[OTHER_NO]):
        notes.append(
            f"{other:,} answers are neither yes nor no: wrong in the accuracy, left out of recall and f1 by lmms-eval"
        )
    return replace(score, values=values, notes=tuple(notes))


def score_of(items: Mapping[str, PopeReference], said: Mapping[str, str], counts: Array, sums: Array) -> Score:
    """What both rules have in common: sample scores, every measure by category, and the headline's terms.

    Args:
        counts: [questions, categories, columns], from `tally`.
        sums: [questions, categories x columns] or [questions, columns], which the headline is the mean F1 of. Images
            are the units: the answers about one of them are not independent.
    """
    images = {image: row for row, image in enumerate(dict.fromkeys(item.image for item in items.values()))}
    by_image = np.zeros((len(images), sums.shape[1]))
    np.add.at(by_image, [images[item.image] for item in items.values()], sums)
    sizes = counts.sum((0, 2)).astype(int)
    groups = {
        name: {category: (float(100 * shares[k]), int(sizes[k])) for k, category in enumerate(categories_of(items))}
        for name, shares in measures(counts.sum(0)).items()
    }
    return Score(
        {},
        groups,
        {name: float(said[name] == item.label) for name, item in items.items()},
        main="f1",
        terms=SufficientStatistics("image", tuple(images), tuple(images), by_image, mean_f1, most=100),
        kinds={"category": {name: item.category for name, item in items.items()}},
    )


def categories_of(items: Mapping[str, PopeReference]) -> tuple[str, ...]:
    """Those that were asked, in the order of the paper."""
    there = {item.category for item in items.values()}
    return tuple(category for category in CATEGORIES if category in there)


def tally(
    items: Mapping[str, PopeReference], texts: Mapping[str, str], read: Callable[[str], str]
) -> tuple[dict[str, str], Array]:
    """What each answer says, and [questions, categories, columns]: a 1 where it counts."""
    check_coverage(items, texts, set(items))
    said = {name: read(texts[name]) for name in items}
    column = {("yes", "yes"): TP, ("yes", "no"): FP, ("no", "no"): TN, ("no", "yes"): FN}
    other = {"yes": OTHER_YES, "no": OTHER_NO}
    present = categories_of(items)
    counts = np.zeros((len(items), len(present), COLUMNS))
    for row, (name, item) in enumerate(items.items()):
        counts[row, present.index(item.category), column.get((said[name], item.label), other[item.label])] = 1
    return said, counts


def measures(counts: Array) -> dict[str, Array]:
    """Shares of counts [..., columns], the headline first; 0 where there is nothing to divide by."""
    total = counts.sum(-1)
    precision = divide(counts[..., TP], counts[..., TP] + counts[..., FP])
    recall = divide(counts[..., TP], counts[..., TP] + counts[..., FN])
    return {
        "f1": divide(2 * precision * recall, precision + recall),
        "accuracy": divide(counts[..., TP] + counts[..., TN], total),
        "precision": precision,
        "recall": recall,
        "yes_ratio": divide(counts[..., TP] + counts[..., FP], total),
    }


def mean_f1(sums: Array) -> Array:
    """[..., categories x columns] -> percent; of one category or pooled ones its F1."""
    percent: Array = 100 * measures(sums.reshape(*sums.shape[:-1], -1, COLUMNS))["f1"].mean(-1)
    return percent


def empty_notes(names: Sequence[str], counts: Array) -> list[str]:
    """Which quotients had nothing to divide by; counts is [names, columns]."""
    notes = []
    for name, row in zip(names, counts, strict=True):
        lost = [word for word, other in (("precision", FP), ("recall", FN)) if not row[TP] + row[other]]
        if not row[TP]:
            notes.append(f"{name}: nothing to divide by for {' and '.join([*lost, 'f1'])}, counted as 0")
    return notes


BENCHMARK = listed("pope", load, ("test", *CATEGORIES), mirror=MIRROR)
