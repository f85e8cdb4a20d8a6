"""MMStar, 1,500 multiple-choice questions that cannot be answered without their image.

Read from DATA/hub/Lin-Chen/MMStar: index, question (with its options), answer, category, l2_category, image.

Profile llava: the rule of the authors' script (evaluate/mmstar.py of MMStar), right / all over 1,500 questions and
right / 250 per category. Their prompt is the question as the data set has it; LLaVA's instruction for multiple choice
follows, because the authors' own wrapper for LLaVA ends on it wherever it knows the options, and because without it
LLaVA answers in sentences, which a rule that reads first characters takes for wrong.
Profile lmms: lmms-eval 0.7.3, whose instruction is the same without the full stop. It reads letters with its extractor
and averages over the 18 second-level categories instead of over questions. Where a run asked only some questions, both
divide by what was asked; on the whole split that is the same.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from eval.benchmarks.base import Benchmark, Dataset, Question
from eval.benchmarks.hub import (
    check_answers,
    dataset_of,
    open_split,
    picture_hashes,
    picture_names,
    unique_ids,
    with_version,
)
from eval.benchmarks.llava_files import LETTER
from eval.benchmarks.records import Filled, Id, NotRequired, TypedDict
from eval.benchmarks.spreadsheet import read_xlsx, write_xlsx
from eval.metrics import Array, Score, SufficientStatistics, divide
from eval.metrics.accuracy import mean_score
from eval.metrics.letters import extract

IDS = ("Lin-Chen/MMStar",)
COLUMNS = ("index", "question", "answer", "category", "l2_category")
EXPECTED = 1500

LMMS_LETTER = LETTER.removesuffix(".")
# lmms-eval takes this out of questions, a remainder of MME's task.
LMMS_REMOVED = " Please answer yes or no."
# What may stand before the letter in an answer that the authors' script reads.
OPENINGS = ("", "(", "option ", "the answer is ")


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

    def score(asked: Sequence[str], texts: Mapping[str, str]) -> Score:
        rule = lmms_score if lmms else official_score
        return with_version(rule({name: records[name] for name in asked}, texts), len(questions), EXPECTED)

    def sample_score(question: Question, text: str) -> float:
        return (lmms_sample_score if lmms else official_sample_score)(text, question.answer)

    def submission(texts: Mapping[str, str]) -> dict[str, Any]:
        """The input of the authors' script, with the set a question was taken from as "bench"."""
        asked: list[tuple[Mapping[str, Any], str]] = [(records[name], text) for name, text in texts.items()]
        rows = (
            [*(record[column] for column in COLUMNS), (record.get("meta_info") or {}).get("source", ""), text]
            for record, text in asked
        )
        return {"MMStar.xlsx": write_xlsx([*COLUMNS, "bench", "prediction"], rows)}

    title = f"MMStar {split}"
    # Of all answers the longest is the default of LLaVA's scripts, and lmms-eval's where a task sets none.
    return dataset_of(
        title, table, COLUMNS, questions, score, sample_score, profile, EXPECTED, submission=submission, read=read_xlsx
    )


def official_sample_score(text: str, answer: str) -> float:
    """1 if the letter stands at the start or after one of OPENINGS, in either case; what follows is not looked at."""
    text, answer = (string.lower().strip().replace("\n", " ") for string in (text, answer))
    return float(any(text.startswith(opening) and text[len(opening) :][:1] == answer for opening in OPENINGS))


def lmms_sample_score(text: str, answer: str) -> float:
    """1 if lmms-eval's extractor finds the letter."""
    return float(extract(text) == answer.strip().upper())


def official_score(records: Mapping[str, Row], texts: Mapping[str, str]) -> Score:
    """Percent right over all questions, the authors' "final score".

    Args:
        records: question id -> what was asked.
        texts: question id -> the model's text; one for every question.
    """
    return by_category(records, texts, official_sample_score)


def by_category(records: Mapping[str, Row], texts: Mapping[str, str], rule: Callable[[str, str], float]) -> Score:
    """Percent right over all questions and in both levels of categories."""
    answers = {name: record["answer"] for name, record in records.items()}
    kinds = {
        "category": {name: record["category"] for name, record in records.items()},
        "detail": {name: record["l2_category"] for name, record in records.items()},
    }
    return mean_score(answers, texts, rule, kinds)


def lmms_score(records: Mapping[str, Row], texts: Mapping[str, str]) -> Score:
    """Mean of the second-level categories' percentages; the arguments are those of `official_score`."""
    score = by_category(records, texts, lmms_sample_score)
    details = sorted({record["l2_category"] for record in records.values()})
    sums = np.zeros((len(records), 2, len(details)))
    rows_of: dict[str, list[int]] = defaultdict(list)
    for row, (name, record) in enumerate(records.items()):
        sums[row, :, details.index(record["l2_category"])] = score.correct[name], 1
        rows_of[record["category"]].append(row)
    flat, names = sums.reshape(len(records), -1), tuple(records)
    averages = {name: (float(macro_average(flat[r].sum(0))), len(r)) for name, r in sorted(rows_of.items())}
    return replace(
        score,
        values={"average": float(macro_average(flat.sum(0))), **score.values},
        groups=score.groups | {"category": averages},
        notes=("average is over second-level categories, as lmms-eval prints it; accuracy is over questions",),
        main="average",
        terms=SufficientStatistics("question", names, names, flat, macro_average, most=100),
    )


def macro_average(sums: Array) -> Array:
    """Sums [..., right per group then asked per group] -> 100 x the mean rate of the groups that were asked at all."""
    right, asked = np.split(np.asarray(sums), 2, axis=-1)
    return 100 * divide(divide(right, asked).sum(-1), (asked > 0).sum(-1))


BENCHMARK = Benchmark(
    name="mmstar",
    summary="Multiple choice that needs the image, in six categories.",
    splits=("val",),
    read=load,
    mirror=IDS,
    licence="see https://huggingface.co/datasets/Lin-Chen/MMStar and the sets it was drawn from",
)
