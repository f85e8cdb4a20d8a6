"""OCRBench, reading text in images: 1,000 questions of ten types, one point for every answer that the text contains.

Read from DATA/hub/echo840/OCRBench: dataset, question, question_type, answer (a list), image.

Profile llava: the benchmark's script for LLaVA-1.5 (scripts/LLaVA1_5.py of MultimodalOCR), with LLaVA's instruction for
short answers. Profile lmms: lmms-eval 0.7.3, which asks without one and takes full-width ASCII for ASCII. In both,
formulas of HME100k keep their case and lose their spaces.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from eval.benchmarks.base import Benchmark, Dataset, Question
from eval.benchmarks.hub import check_answers, dataset_of, open_split, picture_hashes, picture_names
from eval.benchmarks.llava_files import SHORT
from eval.benchmarks.records import Filled, Texts, TypedDict
from eval.metrics import Score, SufficientStatistics
from eval.metrics.accuracy import mean_score
from llava.errors import unknown

IDS = ("echo840/OCRBench",)
COLUMNS = ("dataset", "question", "question_type", "answer")
FULL = 1000


FORMULAS = "HME100k"

RECOGNITION = (
    "Regular Text Recognition",
    "Irregular Text Recognition",
    "Artistic Text Recognition",
    "Handwriting Recognition",
    "Digit String Recognition",
    "Non-Semantic Text Recognition",
)


OTHERS = (
    "Scene Text-centric VQA",
    "Doc-oriented VQA",
    "Key Information Extraction",
    "Handwritten Mathematical Expression Recognition",
)


TYPES = (*RECOGNITION, *OTHERS)

# The 94 printable ASCII characters stand in the same order from U+FF01 on; U+3000 is their space.
HALF_WIDTH = {0xFF01 + offset: 0x21 + offset for offset in range(94)} | {0x3000: 0x20}


class Row(TypedDict):
    """A row of the table. The answer is a list or one text."""

    dataset: str
    question: Filled
    question_type: str
    answer: Filled | Texts


@dataclass(frozen=True)
class Item:
    """What the metric needs of a question.

    Attributes:
        set: the data set it was taken from.
        type: one of TYPES.
    """

    answers: Sequence[str]
    set: str
    type: str


def load(data: Path, split: str, profile: str = "llava", source: str = "auto") -> Dataset:
    """Read the split; rows have no id, so theirs is their number, as in lmms-eval's samples."""
    table = open_split(data, IDS, None, split, source)
    pictures = picture_names(picture_hashes(table))
    lmms = profile == "lmms"
    items: dict[str, Item] = {}
    questions = []
    for number, record in enumerate(table.records(Row)):
        kind, answer = record["question_type"], record["answer"]
        if kind not in TYPES:
            raise unknown("OCRBench question type", str(kind), TYPES)
        item = Item([answer] if isinstance(answer, str) else answer, record["dataset"], kind)
        # lmms-eval strips questions, the script does not.
        asked, suffix = (record["question"].strip(), "") if lmms else (record["question"], SHORT)
        items[str(number)] = item
        questions.append(Question(str(number), asked, suffix, (pictures[number],), item.answers[0]))
    check_answers(table.where, {name: item.answers for name, item in items.items()})

    def score(asked: Sequence[str], texts: Mapping[str, str]) -> Score:
        return evaluate({name: items[name] for name in asked}, texts, fold=lmms)

    def sample_score(question: Question, text: str) -> float:
        return is_right(text, items[question.id], fold=lmms)

    return dataset_of(f"OCRBench {split}", table, COLUMNS, questions, score, sample_score, profile, FULL)


def is_right(text: str, item: Item, fold: bool) -> float:
    """1 if the text contains one of the answers.

    Args:
        fold: take full-width ASCII for ASCII, as lmms-eval does outside HME100k.
    """

    def plain(string: str) -> str:
        string = string.strip().replace("\n", " ")
        if item.set == FORMULAS:
            return string.replace(" ", "")
        return (string.translate(HALF_WIDTH) if fold else string).lower()

    said = plain(text)
    return float(any(plain(answer) in said for answer in item.answers))


def evaluate(items: Mapping[str, Item], texts: Mapping[str, str], fold: bool) -> Score:
    """Points over all questions that were asked, of the recognition types together, and per type.

    Args:
        items: question id -> what was asked.
        texts: question id -> the model's text; one for every question.
    """
    score = mean_score(items, texts, lambda text, item: is_right(text, item, fold))
    correct = score.correct
    points = {kind: [correct[name] for name, item in items.items() if item.type == kind] for kind in TYPES}
    read = float(sum(sum(points[kind]) for kind in RECOGNITION))
    values: dict[str, float | None] = {"score": sum(correct.values()), "text_recognition": read}
    notes = []
    if len(items) != FULL:
        values |= score.values
        notes.append(f"score counts {len(items):,} questions, published scores are out of {FULL:,}: compare accuracy")
    names, sums = tuple(correct), np.array([[value] for value in correct.values()])
    return replace(
        score,
        values=values,
        groups={"type": {kind: (sum(there), len(there)) for kind, there in points.items() if there}},
        notes=tuple(notes),
        main="score",
        points=frozenset({"score", "text_recognition", "type"}),
        terms=SufficientStatistics("question", names, names, sums, lambda sums: sums[..., 0], most=len(names)),
    )


BENCHMARK = Benchmark(
    name="ocrbench",
    summary="Reading text in images, from single words to forms and formulas; points out of 1,000.",
    splits=("test",),
    read=load,
    mirror=IDS,
    licence="see https://github.com/Yuliang-Liu/MultimodalOCR and the data card",
)
