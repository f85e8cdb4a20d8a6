"""OCRBench, reading text in images, 1,000 questions of ten types.

Read from DATA/hub/echo840/OCRBench: dataset, question, question_type, answer (a list), image.

Profile llava: the benchmark's script for LLaVA-1.5 (scripts/LLaVA1_5.py of MultimodalOCR), with LLaVA's instruction for
short answers. Profile lmms: lmms-eval 0.7.3, which asks without one and takes full-width ASCII for ASCII.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from eval.benchmarks.base import Benchmark, Dataset, Question, no_submission
from eval.benchmarks.hub import check_answers, facts, open_split, picture_hashes, picture_names
from eval.benchmarks.ocrbench import metric
from eval.benchmarks.prompts import SHORT
from eval.benchmarks.records import Filled, Texts, TypedDict
from eval.metrics import Score
from llava.errors import unknown

IDS = ("echo840/OCRBench",)
COLUMNS = ("dataset", "question", "question_type", "answer")


class Row(TypedDict):
    """A row of the table. The answer is a list or one text."""

    dataset: str
    question: Filled
    question_type: str
    answer: Filled | Texts


def load(data: Path, split: str, profile: str = "llava", source: str = "auto") -> Dataset:
    """Read the split; rows have no id, so theirs is their number, as in lmms-eval's samples."""
    table = open_split(data, IDS, None, split, source)
    pictures = picture_names(picture_hashes(table))
    records = {str(number): record for number, record in enumerate(table.records(Row))}
    items = {name: read_item(record) for name, record in records.items()}
    check_answers(table.where, {name: item.answers for name, item in items.items()})
    lmms = profile == "lmms"
    questions = tuple(
        # lmms-eval strips questions, the script does not.
        Question(
            name,
            record["question"].strip() if lmms else record["question"],
            "" if lmms else SHORT,
            (picture,),
            items[name].answers[0],
        )
        for (name, record), picture in zip(records.items(), pictures, strict=True)
    )

    def score(asked: Sequence[str], texts: Mapping[str, str]) -> Score:
        return metric.score({name: items[name] for name in asked}, texts, fold=lmms)

    def sample_score(question: Question, text: str) -> float:
        return metric.sample_score(text, items[question.id], fold=lmms)

    return Dataset(
        f"OCRBench {split}",
        questions,
        table.pictures(),
        table.fingerprint(COLUMNS),
        score,
        sample_score,
        no_submission,
        # Of both profiles.
        max_new_tokens=128,
        facts=facts(table, profile, metric.FULL),
    )


def read_item(record: Row) -> metric.Item:
    """What the metric needs of a row, whose answer is a list or one text."""
    kind, answer = record["question_type"], record["answer"]
    if kind not in metric.TYPES:
        raise unknown("OCRBench question type", str(kind), metric.TYPES)
    return metric.Item([answer] if isinstance(answer, str) else answer, record["dataset"], kind)


BENCHMARK = Benchmark(
    name="ocrbench",
    summary="Reading text in images, from single words to forms and formulas; points out of 1,000.",
    splits=("test",),
    read=load,
    mirror=IDS,
    licence="see https://github.com/Yuliang-Liu/MultimodalOCR and the data card",
)
