"""Statistics of single answers: loyalty to the full model, accuracy on the questions that need detail, and by group.

**Loyalty** is how often the reduced model gives the same answer as the full model, right or wrong. A score hides part
of what reduction changes, because lost and gained questions cancel. Xu et al. (2021, "Beyond preserved accuracy:
evaluating loyalty and robustness of BERT compression") introduced it for compressed models, as the accuracy with the
original model's predictions in place of the references.

**Hard questions**: VTC-Bench (Liao et al. 2025, arXiv:2510.07143) divides the questions that the full model answers
right into two groups. Plain downsampling of the image to the same budget answers those of group A wrong and those of
group B right. On group A a method can show more than downsampling does.

**Groups** are those of a benchmark's own breakdowns, such as the types of questions.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from eval.benchmarks.base import Dataset
from eval.metrics import Array, Score, SufficientStatistics, divide
from eval.results.statistics import Comparison, Interval, accuracy_terms, compare, holm, interval, terms_of
from llava.errors import UserError, unknown

# An answer counts as right if its score is above this; scores lie between 0 and 1 on VQAv2 and with ANLS.
RIGHT = 0.5

Normalise = Callable[[str], str]


def plain(text: str) -> str:
    """The text in lower case, without surrounding white space and final full stops."""
    return text.strip().rstrip(".").rstrip().lower()


def sample_scores(score: Score, texts: Mapping[str, str], data: Dataset) -> Mapping[str, float] | None:
    """Question id -> score of the answer, by the benchmark's rule or the judge; None if answers have none."""
    if data.sample_score is not None:
        questions = {question.id: question for question in data.questions}
        return {name: data.sample_score(questions[name], text) for name, text in texts.items()}
    return score.correct if score.correct.keys() == texts.keys() else None


def check_same_questions(one: Mapping[str, Any], other: Mapping[str, Any], who: str) -> None:
    """Raise UserError if two runs answered different questions; `who` names the runs."""
    if lost := one.keys() ^ other.keys():
        raise UserError(
            f"{who} must have answered the same questions; {len(lost):,} have an answer of one of them only."
        )


def same_answers(
    texts: Mapping[str, str], full_texts: Mapping[str, str], normalise: Normalise = plain
) -> dict[str, float]:
    """Question id -> 1.0 if both texts are the same answer, else 0.0."""
    check_same_questions(texts, full_texts, "The method and the full model")
    return {name: float(normalise(text) == normalise(full_texts[name])) for name, text in texts.items()}


def loyalty(
    texts: Mapping[str, str],
    full_texts: Mapping[str, str],
    full_scores: Mapping[str, float] | None,
    clusters: Mapping[str, str],
    normalise: Normalise = plain,
) -> dict[str, Interval | None]:
    """Percent of questions answered as by the full model: of all, of those it has right, and of those it has wrong.

    What "loyalty_right" lacks to 100 are questions that the method loses. "loyalty_wrong" counts errors of the full
    model that are repeated; a different answer to these may be right, or wrong in another way.

    Args:
        texts, full_texts: question id -> answer, of the same questions.
        full_scores: question id -> score of the full model's answer, right above 0.5; None if single answers have no
            score, and then both parts are None.
        clusters: question id -> label of its cluster, mostly the image.
        normalise: brings answers into the form in which the benchmark compares them.
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
        full: question id -> score in [0, 1] without reduction; right above 0.5.
        downsampled: the same for the control method `downsample` at the budget.
    """
    check_same_questions(full, downsampled, "Full and downsample")
    right = [name for name, score in full.items() if score > RIGHT]
    return {
        "group_a": tuple(name for name in right if downsampled[name] <= RIGHT),
        "group_b": tuple(name for name in right if downsampled[name] > RIGHT),
    }


def accuracy_on(scores: Mapping[str, float], ids: Collection[str], clusters: Mapping[str, str]) -> Interval:
    """Mean score of some questions in percent with its interval; without questions the mean is NaN.

    Args:
        scores: question id -> sample score in [0, 1].
        clusters: question id -> label of its cluster, mostly the image.
    """
    if missing := [name for name in ids if name not in scores]:
        raise UserError(f"{len(missing):,} questions of the group have no score, the first is {missing[0]}.")
    if not ids:
        return Interval(math.nan, None, None, "n/a: no question is in the group")
    return interval(accuracy_terms({name: scores[name] for name in ids}, clusters))


# -- differences by group --------------------------------------------------------------------------------------------

OTHERS = "the others"


def groups_of(score: Score, by: str, title: str) -> dict[str, list[str]]:
    """Group -> ids of its questions, in the order of the groups.

    Args:
        by: a breakdown, or BREAKDOWN=GROUP,GROUP for the questions of these groups together, and all others.
        title: of the data set, for the error.

    Raises:
        UserError: the benchmark has no such breakdown, or no such group.
    """
    kind, chosen_some, listed = by.partition("=")
    there = {name: of for name, of in score.kinds.items() if any(question in score.correct for question in of)}
    if not there:
        raise UserError(f"{title} has no breakdown into groups of questions; leave out --by.")
    if kind not in there:
        raise unknown("breakdown", kind, there)
    members: dict[Any, list[str]] = {}
    for question, value in there[kind].items():
        for group in value if isinstance(value, list | tuple) else [value]:
            if question in score.correct:
                members.setdefault(group, []).append(question)
    groups = {str(group): members[group] for group in sorted(members)}
    if not chosen_some:
        return groups
    wanted = [name.strip() for name in listed.split(",")]
    for name in wanted:
        if name not in groups:
            raise unknown(f"group of {kind}", name, groups)
    chosen = {question for name in wanted for question in groups[name]}
    rest = [question for question in there[kind] if question in score.correct and question not in chosen]
    found = {", ".join(wanted): [question for question in there[kind] if question in chosen], OTHERS: rest}
    return {name: ids for name, ids in found.items() if ids}


def by_group(
    a: Score, b: Score, groups: Mapping[str, Collection[str]], clusters: Mapping[str, str]
) -> tuple[dict[str, Comparison], Comparison | None]:
    """The mean sample score of a minus that of b in every group; and, of two groups, the first such difference minus
    the second.

    That one group's difference is significant and another's is not does not show that they differ; the second value
    tests that. P-values of the groups are corrected by Holm, intervals are not.

    Args:
        groups: name -> ids of questions, as `groups_of` returns them.
        clusters: question id -> label of its cluster, mostly the image.
    """
    found = {}
    for name, ids in groups.items():
        own = [terms_of(Score({}, {}, {one: score.correct[one] for one in ids}), clusters) for score in (a, b)]
        found[name] = compare(own[0], own[1])
    corrected = holm([one.p for one in found.values()])
    found = {name: replace(one, p=p) for (name, one), p in zip(found.items(), corrected, strict=True)}
    if len(groups) != 2:
        return found, None
    first, second = groups.values()
    return found, compare(between(a, first, second, clusters), between(b, first, second, clusters))


def between(
    score: Score, first: Collection[str], second: Collection[str], clusters: Mapping[str, str]
) -> SufficientStatistics:
    """The sufficient statistics of the mean sample score of one group minus that of another, in points of percent."""
    groups = (frozenset(first), frozenset(second))
    names = sorted(groups[0] | groups[1])
    rows = [[part for own in groups for part in (score.correct[one] * (one in own), one in own)] for one in names]

    def value(sums: Array) -> Array:
        means = divide(sums[..., 0::2], sums[..., 1::2])
        return 100 * (means[..., 0] - means[..., 1])

    labels = tuple(clusters[one] for one in names)
    unit = "image" if len(set(labels)) < len(labels) else "question"
    return SufficientStatistics(unit, tuple(names), labels, np.array(rows, dtype=float), value)
