"""MMStar: the rule of its authors' script (evaluate/mmstar.py of MMStar) and that of lmms-eval 0.7.3.

The authors' number is right / all, over 1,500 questions, and right / 250 per category. lmms-eval reads letters with
its extractor and averages over the 18 second-level categories instead of over questions. Where a run asked only some
questions, both divide by what was asked; on the whole split that is the same.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from eval.metrics import Array, Score, SufficientStatistics, divide
from eval.metrics.accuracy import check_coverage, grouped, percent
from eval.metrics.letters import extract

# What may stand before the letter in an answer that the authors' script reads.
OPENINGS = ("", "(", "option ", "the answer is ")


@dataclass(frozen=True)
class Item:
    """A question's letter and its two levels of categories."""

    answer: str
    category: str
    detail: str


def official_sample_score(text: str, answer: str) -> float:
    """1 if the letter stands at the start or after one of OPENINGS, in either case; what follows is not looked at."""
    text, answer = (string.lower().strip().replace("\n", " ") for string in (text, answer))
    return float(any(text.startswith(opening) and text[len(opening) :][:1] == answer for opening in OPENINGS))


def lmms_sample_score(text: str, answer: str) -> float:
    """1 if lmms-eval's extractor finds the letter."""
    return float(extract(text) == answer.strip().upper())


def official_score(items: Mapping[str, Item], texts: Mapping[str, str]) -> Score:
    """Percent right over all questions, the authors' "final score".

    Args:
        items: question id -> what was asked.
        texts: question id -> the model's text; one for every question.
    """
    check_coverage(items, texts, set(items))
    correct = {name: official_sample_score(texts[name], item.answer) for name, item in items.items()}
    groups = {
        "category": grouped(correct, {name: item.category for name, item in items.items()}),
        "detail": grouped(correct, {name: item.detail for name, item in items.items()}),
    }
    return Score({"accuracy": percent(correct.values())}, groups, correct)


def lmms_score(items: Mapping[str, Item], texts: Mapping[str, str]) -> Score:
    """Mean of the second-level categories' percentages; the arguments are those of `official_score`."""
    check_coverage(items, texts, set(items))
    correct = {name: lmms_sample_score(texts[name], item.answer) for name, item in items.items()}
    details = sorted({item.detail for item in items.values()})
    names = tuple(items)
    sums = np.zeros((len(names), 2, len(details)))
    for row, (name, item) in enumerate(items.items()):
        sums[row, :, details.index(item.detail)] = correct[name], 1
    flat = sums.reshape(len(names), -1)
    terms = SufficientStatistics("question", names, names, flat, macro_average, most=100)
    rows_of: dict[str, list[int]] = defaultdict(list)
    for row, item in enumerate(items.values()):
        rows_of[item.category].append(row)
    groups = {
        "category": {name: (float(macro_average(flat[r].sum(0))), len(r)) for name, r in sorted(rows_of.items())},
        "detail": grouped(correct, {name: item.detail for name, item in items.items()}),
    }
    values: dict[str, float | None] = {
        "average": float(macro_average(flat.sum(0))),
        "accuracy": percent(correct.values()),
    }
    note = "average is over second-level categories, as lmms-eval prints it; accuracy is over questions"
    return Score(values, groups, correct, (note,), main="average", terms=terms)


def macro_average(sums: Array) -> Array:
    """Sums [..., right per group then asked per group] -> 100 x the mean rate of the groups that were asked at all."""
    right, asked = np.split(np.asarray(sums), 2, axis=-1)
    return 100 * divide(divide(right, asked).sum(-1), (asked > 0).sum(-1))
