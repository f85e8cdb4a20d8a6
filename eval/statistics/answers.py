"""Statistics of single answers: loyalty to the full model, and accuracy on the questions that need detail.

**Loyalty**: how often the reduced model gives the answer of the full model, right or wrong. A score hides part of what
reduction changes: questions lost and questions gained cancel. Xu et al. (2021, "Beyond preserved accuracy: evaluating
loyalty and robustness of BERT compression") introduced it for compressed models, as the accuracy with the original
model's predictions in place of the references.

**Hard questions**: VTC-Bench (Liao et al. 2025, arXiv:2510.07143) divides the questions that the full model answers
right into group A, which plain downsampling of the image to the same budget answers wrong, and group B, which it
answers right. Accuracy on group A is where a method can show more than downsampling.
"""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from eval.benchmarks.base import Dataset
from eval.metrics import Score
from eval.results.statistics import Interval, accuracy_terms, interval
from llava.errors import UserError

# A sample score above this counts as right; benchmarks with partial credit (VQAv2, ANLS) have values in between.
RIGHT = 0.5

Normalise = Callable[[str], str]


def plain(text: str) -> str:
    """The text without white space around it and final full stops, in lower case."""
    return text.strip().rstrip(".").rstrip().lower()


def sample_scores(score: Score, texts: Mapping[str, str], data: Dataset) -> Mapping[str, float] | None:
    """The scores of single answers: by the benchmark's rule, or a judge's."""
    if data.sample_score is not None:
        questions = {question.id: question for question in data.questions}
        return {name: data.sample_score(questions[name], text) for name, text in texts.items()}
    return score.correct if score.correct.keys() == texts.keys() else None


def check_same_questions(one: Mapping[str, Any], other: Mapping[str, Any], who: str) -> None:
    """UserError where two runs, which `who` names, answered other questions."""
    if lost := one.keys() ^ other.keys():
        raise UserError(
            f"{who} must have answered the same questions; {len(lost):,} have an answer of one of them only."
        )


def same_answers(
    texts: Mapping[str, str], full_texts: Mapping[str, str], normalise: Normalise = plain
) -> dict[str, float]:
    """Question id -> 1 if both texts are the same answer, else 0."""
    check_same_questions(texts, full_texts, "The method and the full model")
    return {name: float(normalise(text) == normalise(full_texts[name])) for name, text in texts.items()}


def loyalty(
    texts: Mapping[str, str],
    full_texts: Mapping[str, str],
    full_scores: Mapping[str, float] | None,
    clusters: Mapping[str, str],
    normalise: Normalise = plain,
) -> dict[str, Interval | None]:
    """Percent of questions with the full model's answer: of all, and of those that it answers right and wrong.

    A lost point of "loyalty_right" is where the method fails. "loyalty_wrong" counts the full model's errors that are
    kept; another answer may be right or wrong in another way.

    Args:
        texts, full_texts: question id -> answer, of the same questions.
        full_scores: question id -> sample score of the full model, above 0.5 is right; None where single answers have
            none, and the two parts are None.
        clusters: question id -> label of what is drawn together, mostly the image.
        normalise: the benchmark's own form of an answer, where it has one.
    """
    same = same_answers(texts, full_texts, normalise)
    found: dict[str, Interval | None] = {"loyalty": accuracy_on(same, same, clusters)}
    if full_scores is None:
        return found | {"loyalty_right": None, "loyalty_wrong": None}
    right = [name for name in same if full_scores[name] > RIGHT]
    wrong = [name for name in same if full_scores[name] <= RIGHT]
    parts = {"loyalty_right": right, "loyalty_wrong": wrong}
    return found | {part: accuracy_on(same, names, clusters) for part, names in parts.items()}


def hard_questions(full: Mapping[str, float], downsampled: Mapping[str, float]) -> dict[str, tuple[str, ...]]:
    """Ids of "group_a" (full right, downsampling wrong) and "group_b" (both right), in the order of `full`.

    Args:
        full: question id -> sample score in [0, 1] without reduction; above 0.5 is right.
        downsampled: the same of the control `downsample` at the budget.
    """
    check_same_questions(full, downsampled, "Full and downsample")
    right = [name for name, score in full.items() if score > RIGHT]
    return {
        "group_a": tuple(name for name in right if downsampled[name] <= RIGHT),
        "group_b": tuple(name for name in right if downsampled[name] > RIGHT),
    }


def accuracy_on(scores: Mapping[str, float], ids: Collection[str], clusters: Mapping[str, str]) -> Interval:
    """Mean score of these questions in percent; an interval "n/a" with the mean NaN where there are none.

    Args:
        scores: question id -> sample score in [0, 1].
        clusters: question id -> label of what is drawn together, mostly the image.
    """
    if missing := [name for name in ids if name not in scores]:
        raise UserError(f"{len(missing):,} questions of the group have no score, the first is {missing[0]}.")
    if not ids:
        return Interval(math.nan, None, None, "n/a: no question is in the group")
    return interval(accuracy_terms({name: scores[name] for name in ids}, clusters))
