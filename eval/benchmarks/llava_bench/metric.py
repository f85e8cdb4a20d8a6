"""LLaVA-Bench-in-the-Wild: an LLM judge scores GPT-4's answer and the model's from 1 to 10; reported is their ratio.

Source of the definitions: LLaVA's eval_gpt_review_bench.py (how a review is read) and summarize_gpt_review.py, both at
c121f04.
Differs from them: reviews are joined with questions by id instead of by position.
"""

from collections import Counter
from collections.abc import Mapping

import numpy as np

from eval.metrics import Array, Score, SufficientStatistics, divide
from eval.metrics.words import words

Pair = tuple[float, float]

UNREADABLE: Pair = (-1.0, -1.0)
FULL_MARKS = 10.0
KINDS = ("complex", "conv", "detail")


def parse(review: str) -> Pair:
    """The two scores in a review's first line: GPT-4's answer, then the model's.

    Commas are spaces and single spaces separate, so "8,9" can be read and "8, 9" cannot. What cannot be read is
    (-1, -1) and stays in the means.
    """
    parts = review.split("\n")[0].replace(",", " ").split(" ")
    try:
        first, second = (float(part) for part in parts)
    except ValueError:
        return UNREADABLE
    return first, second


def ratio(sums: Array) -> Array:
    """[..., (reference's scores, model's scores, reviews)] -> percent, not rounded: intervals need its slopes."""
    # Guarded: unreadable reviews can cancel out to 0 for the reference, where the official script would stop.
    return divide(sums[..., 1], sums[..., 0]) * 100


def official_ratio(sums: Array) -> float:
    """The same for [3] as it is reported: both means are rounded to three digits first, the percent to one."""
    reference, model = (round(float(mean), 3) for mean in divide(sums[:2], sums[2:]))
    return round(model / reference * 100, 1) if reference else 0.0


def score(
    categories: Mapping[str, str],
    pairs: Mapping[str, Pair],
    images: Mapping[str, str],
    tail: str = "",
    note: str = "",
) -> Score:
    """The model's share of GPT-4's score in percent, over all questions and per category.

    Args:
        categories: question id -> conv, detail or complex, of every question that was asked.
        pairs: question id -> scores of the reference and of the model.
        images: question id -> its image; questions about one are drawn together in intervals.
        tail: of the numbers' names, for pairs that no judge gave.
    """
    rows = np.array([(*pairs[name], 1.0) for name in categories]).reshape(-1, 3)
    kinds = {kind: [i for i, found in enumerate(categories.values()) if found == kind] for kind in KINDS}
    table = {kind: (official_ratio(rows[members].sum(0)), len(members)) for kind, members in kinds.items() if members}
    clusters = tuple(images[name] for name in categories)
    total = rows.sum(0)
    main, *names = (f"{name}{tail}" for name in ("relative_score", "reference_points", "model_points"))
    means = total[:2] / len(rows)
    values: dict[str, float | None] = {
        main: official_ratio(total),
        names[0]: round(round(float(means[0]), 3) * 10, 1),
        names[1]: round(round(float(means[1]), 3) * 10, 1),
    }
    lost = sum(tuple(pairs[name]) == UNREADABLE for name in categories)
    notes = [note] if note else []
    if lost:
        notes.append(f"{lost:,} reviews could not be read; officially they count as -1 points for both answers")
    # No question has a sample score of its own: a ratio of means is no mean of ratios.
    terms = SufficientStatistics("image", tuple(categories), clusters, rows, ratio)
    return Score(values, {"category": table}, {}, tuple(notes), main, frozenset(names), terms)


def match_pairs(answers: Mapping[str, str], texts: Mapping[str, str]) -> dict[str, Pair]:
    """Ten points for the reference, and for the model ten times the F1 of its words with the reference's."""
    return {name: (FULL_MARKS, FULL_MARKS * unigram_f1(texts[name], answer)) for name, answer in answers.items()}


def unigram_f1(text: str, answer: str) -> float:
    """Harmonic mean of the shares of words that text and answer have in common, repeated words counted."""
    said, expected = Counter(words(text)), Counter(words(answer))
    shared = (said & expected).total()
    return 2 * shared / (said.total() + expected.total()) if shared else 0.0
