"""ChartQA, questions about charts, as lmms-eval 0.7.3 asks and scores them.

Read from DATA/hub/lmms-lab-encoder/ChartQA or its older name lmms-lab/ChartQA: type, question, answer, image. Half of
the questions were written by people (human_test), half by a program (augmented_test).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from eval.benchmarks.base import Benchmark, Dataset, Question
from eval.benchmarks.chartqa import metric
from eval.benchmarks.hub import check_answers, dataset_of, open_split, picture_hashes, picture_names
from eval.benchmarks.records import Filled, TypedDict
from eval.metrics import Score

IDS = ("lmms-lab-encoder/ChartQA", "lmms-lab/ChartQA")
COLUMNS = ("question", "answer", "type")
SUFFIX = "Answer the question with a single word."
EXPECTED = 2500


class Row(TypedDict):
    """A row of the table."""

    question: Filled
    answer: Filled
    type: Filled


def load(data: Path, split: str, profile: str = "lmms", source: str = "auto") -> Dataset:
    """Read the split; rows have no id, so theirs is their number, as in lmms-eval's samples."""
    table = open_split(data, IDS, None, split, source)
    pictures = picture_names(picture_hashes(table))
    records = {str(number): record for number, record in enumerate(table.records(Row))}
    answers = {name: record["answer"] for name, record in records.items()}
    types = {name: record["type"] for name, record in records.items()}
    check_answers(table.where, answers)
    questions = tuple(
        Question(name, record["question"], SUFFIX, (picture,), record["answer"])
        for (name, record), picture in zip(records.items(), pictures, strict=True)
    )

    def score(asked: Sequence[str], texts: Mapping[str, str]) -> Score:
        return metric.score({name: answers[name] for name in asked}, texts, types)

    return dataset_of(f"ChartQA {split}", table, COLUMNS, questions, score, sample_score, profile, EXPECTED, 16)


def sample_score(question: Question, text: str) -> float:
    """1 if the text is right within the tolerance."""
    return float(metric.relaxed(text, question.answer))


BENCHMARK = Benchmark(
    name="chartqa",
    summary="Questions about charts; numbers may be 5 % off.",
    splits=("test",),
    read=load,
    profiles=("lmms",),
    mirror=IDS,
    licence="GPL-3.0 (https://github.com/vis-nlp/ChartQA)",
)
