"""Loyalty: how often the reduced model gives the answer of the full model, right or wrong.

A score hides part of what reduction changes: questions lost and questions gained cancel. Xu et al. (2021, "Beyond
preserved accuracy: evaluating loyalty and robustness of BERT compression") introduced it for compressed models, as the
accuracy with the original model's predictions in place of the references.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from eval.results.statistics import Interval, accuracy_terms, interval
from eval.statistics.hard_questions import RIGHT
from llava.errors import UserError

Normalise = Callable[[str], str]


def plain(text: str) -> str:
    """The text without white space around it and final full stops, in lower case."""
    return text.strip().rstrip(".").rstrip().lower()


def same_answers(
    texts: Mapping[str, str], full_texts: Mapping[str, str], normalise: Normalise = plain
) -> dict[str, float]:
    """Question id -> 1 if both texts are the same answer, else 0."""
    if texts.keys() != full_texts.keys():
        raise UserError(
            f"The method and the full model must have answered the same questions; "
            f"{len(texts.keys() ^ full_texts.keys()):,} have an answer of one of them only."
        )
    return {name: float(normalise(text) == normalise(full_texts[name])) for name, text in texts.items()}


def loyalty(
    texts: Mapping[str, str],
    full_texts: Mapping[str, str],
    clusters: Mapping[str, str],
    normalise: Normalise = plain,
) -> Interval:
    """Percent of questions with the full model's answer.

    Args:
        texts, full_texts: question id -> answer, of the same questions.
        clusters: question id -> label of what is drawn together, mostly the image.
        normalise: the benchmark's own form of an answer, where it has one.
    """
    return of_part(same_answers(texts, full_texts, normalise), clusters)


@dataclass(frozen=True)
class LoyaltyParts:
    """Loyalty by whether the full model's answer is right.

    Attributes:
        right: a lost point where it fails.
        wrong: the full model's errors that are kept; another answer may be right or wrong in another way.
    """

    all: Interval
    right: Interval
    wrong: Interval


def loyalty_parts(
    texts: Mapping[str, str],
    full_texts: Mapping[str, str],
    full_scores: Mapping[str, float],
    clusters: Mapping[str, str],
    normalise: Normalise = plain,
) -> LoyaltyParts:
    """Loyalty over all questions, and over those that the full model answers right (above 0.5) and wrong.

    Args:
        full_scores: question id -> sample score of the full model.
    """
    same = same_answers(texts, full_texts, normalise)
    right = {name: value for name, value in same.items() if full_scores[name] > RIGHT}
    wrong = {name: value for name, value in same.items() if full_scores[name] <= RIGHT}
    return LoyaltyParts(*(of_part(part, clusters) for part in (same, right, wrong)))


def of_part(same: Mapping[str, float], clusters: Mapping[str, str]) -> Interval:
    """The mean in percent; "n/a" for no questions."""
    if not same:
        return Interval(math.nan, None, None, "n/a: no question is in the group")
    return interval(accuracy_terms(same, clusters))
