"""OCRBench: points out of 1,000, one for every answer that the model's text contains.

Two rules: that of the benchmark's own script for LLaVA-1.5 (scripts/LLaVA1_5.py of MultimodalOCR), and that of
lmms-eval 0.7.3, which also takes full-width ASCII for ASCII. In both, formulas of HME100k keep their case and lose
their spaces.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from eval.metrics import Score, SufficientStatistics
from eval.metrics.accuracy import check_coverage, percent

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


def sample_score(text: str, item: Item, fold: bool) -> float:
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


def score(items: Mapping[str, Item], texts: Mapping[str, str], fold: bool) -> Score:
    """Points over all questions that were asked, of the recognition types together, and per type.

    Args:
        items: question id -> what was asked.
        texts: question id -> the model's text; one for every question.
    """
    check_coverage(items, texts, set(items))
    correct = {name: sample_score(texts[name], item, fold) for name, item in items.items()}
    read = [correct[name] for name, item in items.items() if item.type in RECOGNITION]
    values: dict[str, float | None] = {"score": sum(correct.values()), "text_recognition": float(sum(read))}
    notes = []
    if len(items) != FULL:
        values["accuracy"] = percent(correct.values())
        notes.append(f"score counts {len(items):,} questions, published scores are out of {FULL:,}: compare accuracy")
    by_type = {kind: [correct[name] for name, item in items.items() if item.type == kind] for kind in TYPES}
    groups = {
        "type": {
            kind: (sum(sample_scores), len(sample_scores)) for kind, sample_scores in by_type.items() if sample_scores
        }
    }
    names = tuple(correct)
    terms = SufficientStatistics(
        "question",
        names,
        names,
        np.array([[correct[name]] for name in names]),
        lambda sums: sums[..., 0],
        most=len(names),
    )
    points = frozenset({"score", "text_recognition", "type"})
    return Score(values, groups, correct, tuple(notes), main="score", points=points, terms=terms)
