"""Exact match with one short answer, for sets that have no official script for short answers."""

import string
from collections.abc import Callable, Mapping

from eval.metrics import Score
from eval.metrics.accuracy import check_coverage, grouped, normalise, percent

PUNCTUATION = str.maketrans("", "", string.punctuation)


def sample_score(text: str, answer: str) -> float:
    """1 if the text is the answer, but for case, final full stops and spaces around it."""
    return float(normalise(text.strip()) == normalise(answer.strip()))


def loose_score(text: str, answer: str) -> float:
    """1 if the text is the answer, but for case and punctuation: lmms-eval's exact_match with both switches on."""
    return float(bare(text) == bare(answer))


def bare(text: str) -> str:
    return text.lower().translate(PUNCTUATION)


def score(
    answers: Mapping[str, str],
    texts: Mapping[str, str],
    types: Mapping[str, str],
    sample_score: Callable[[str, str], float] = sample_score,
) -> Score:
    """Percent of right answers.

    Args:
        answers: question id -> reference answer, of the questions that were asked.
        texts: question id -> the model's text; one for every question.
        types: question id -> its group in the breakdown; questions that are not in it are left out there.
        sample score: (text, answer) -> 1 if right.
    """
    check_coverage(answers, texts, set(answers))
    correct = {name: sample_score(texts[name], answer) for name, answer in answers.items()}
    typed = {name: value for name, value in correct.items() if name in types}
    groups = {"type": grouped(typed, types)} if typed else {}
    return Score({"accuracy": percent(correct.values())}, groups, correct)
