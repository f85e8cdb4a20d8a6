"""MMStar, 1,500 multiple-choice questions that cannot be answered without their image.

Read from DATA/hub/Lin-Chen/MMStar: index, question (with its options), answer, category, l2_category, image.

Profile llava: the authors' rule. Their prompt is the question as the data set has it; LLaVA's instruction for multiple
choice follows, because the authors' own wrapper for LLaVA ends on it wherever it knows the options, and because without
it LLaVA answers in sentences, which a rule that reads first characters takes for wrong.
Profile lmms: lmms-eval 0.7.3, whose instruction is the same without the full stop, with its own rule and average.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.benchmarks.base import Benchmark, Dataset, Question
from eval.benchmarks.hub import (
    check_answers,
    facts,
    open_split,
    picture_hashes,
    picture_names,
    unique_ids,
    with_version,
)
from eval.benchmarks.mmstar import metric
from eval.benchmarks.prompts import LETTER
from eval.benchmarks.records import Filled, Id, NotRequired, TypedDict
from eval.benchmarks.spreadsheet import read_xlsx, write_xlsx
from eval.metrics import Score

IDS = ("Lin-Chen/MMStar",)
COLUMNS = ("index", "question", "answer", "category", "l2_category")
EXPECTED = 1500

LMMS_LETTER = LETTER.removesuffix(".")
# lmms-eval takes this out of questions, a remainder of MME's task.
LMMS_REMOVED = " Please answer yes or no."


class Source(TypedDict):
    """Where a question was taken from."""

    source: NotRequired[str | None]


class Row(TypedDict):
    """A row of the table."""

    index: Id
    question: Filled
    answer: Filled
    category: str
    l2_category: str
    meta_info: NotRequired[Source | None]


def load(data: Path, split: str, profile: str = "llava", source: str = "auto") -> Dataset:
    """Read the split."""
    table = open_split(data, IDS, None, split, source)
    rows = table.records(Row)
    records = dict(zip(unique_ids(row["index"] for row in rows), rows, strict=True))
    check_answers(table.where, {name: record["answer"] for name, record in records.items()})
    pictures = picture_names(picture_hashes(table))
    lmms = profile == "lmms"
    questions = tuple(
        Question(
            name,
            record["question"].strip().replace(LMMS_REMOVED, "") if lmms else record["question"],
            LMMS_LETTER if lmms else LETTER,
            (picture,),
            record["answer"],
            str(record["index"]),
        )
        for (name, record), picture in zip(records.items(), pictures, strict=True)
    )
    items = {name: metric.Item(r["answer"], r["category"], r["l2_category"]) for name, r in records.items()}

    def score(asked: Sequence[str], texts: Mapping[str, str]) -> Score:
        rule = metric.lmms_score if lmms else metric.official_score
        return with_version(rule({name: items[name] for name in asked}, texts), len(questions), EXPECTED)

    def sample_score(question: Question, text: str) -> float:
        return (metric.lmms_sample_score if lmms else metric.official_sample_score)(text, question.answer)

    def submission(texts: Mapping[str, str]) -> dict[str, Any]:
        return {"MMStar.xlsx": workbook({name: records[name] for name in texts}, texts)}

    return Dataset(
        f"MMStar {split}",
        questions,
        table.pictures(),
        table.fingerprint(COLUMNS),
        score,
        sample_score,
        submission,
        # The default of LLaVA's scripts, and lmms-eval's where a task sets none.
        max_new_tokens=128,
        facts=facts(table, profile, EXPECTED),
        read=read_xlsx,
    )


def workbook(records: Mapping[str, Row], texts: Mapping[str, str]) -> bytes:
    """The input of the authors' script: one row per answer, with the set a question was taken from as "bench"."""
    rows = (
        [
            *(r["index"], r["question"], r["answer"], r["category"], r["l2_category"]),  # as COLUMNS
            (r.get("meta_info") or {}).get("source", ""),
            texts[name],
        ]
        for name, r in records.items()
    )
    return write_xlsx([*COLUMNS, "bench", "prediction"], rows)


BENCHMARK = Benchmark(
    name="mmstar",
    summary="Multiple choice that needs the image, in six categories.",
    splits=("val",),
    read=load,
    mirror=IDS,
    licence="see https://huggingface.co/datasets/Lin-Chen/MMStar and the sets it was drawn from",
)
