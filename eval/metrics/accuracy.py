"""What most metrics share: coverage of the questions, means in percent, breakdowns, and matches of short texts."""

import re
import string
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from eval.metrics import Score, first_names
from llava.errors import UserError

Reference = TypeVar("Reference")

PUNCTUATION = str.maketrans("", "", string.punctuation)
WORD = re.compile(r"(?<!\w)-?\d+(?:[.,]\d+)*|\w+")


def check_coverage(balanced: Iterable[str], predictions: Iterable[str], known: set[str]) -> None:
    """Every balanced question is answered and every answer belongs to a question."""
    predicted = set(predictions)
    if missing := [name for name in balanced if name not in predicted]:
        noun = "question" if len(missing) == 1 else "questions"
        raise UserError(f"{len(missing):,} {noun} without a prediction: {first_names(missing)}.")
    if extra := sorted(predicted - known):
        noun = "prediction" if len(extra) == 1 else "predictions"
        raise UserError(f"{len(extra):,} {noun} for questions that are not in the question file: {first_names(extra)}.")


def percent(sample_scores: Iterable[float]) -> float:
    """100 x the mean, 0 for nothing, in the official order of operations so that the last digit agrees."""
    sample_scores = list(sample_scores)
    return sum(sample_scores) / len(sample_scores) * 100 if sample_scores else 0.0


def grouped(correct: Mapping[str, float], key: Mapping[str, Any]) -> dict[str, tuple[float, int]]:
    """Percent correct and number of questions for each value of `key`, sorted by it.

    Args:
        key: question id -> group, a text or a number, or a list of groups, in each of which the question counts;
            questions that are not in it are left out.
    """
    buckets: dict[Any, list[float]] = defaultdict(list)
    for name, sample_score in correct.items():
        values = key.get(name, ())
        for value in values if isinstance(values, list | tuple) else [values]:
            buckets[value].append(sample_score)
    return {str(value): (percent(buckets[value]), len(buckets[value])) for value in sorted(buckets)}


def mean_score(
    answers: Mapping[str, Reference],
    texts: Mapping[str, str],
    sample_score: Callable[[str, Reference], float | bool],
    kinds: Mapping[str, Mapping[str, Any]] | None = None,
    main: str = "accuracy",
) -> Score:
    """Percent of right answers.

    Args:
        answers: question id -> reference, of the questions that were asked.
        texts: question id -> the model's text; one for every question.
        sample_score: (text, reference) -> its score in [0, 1].
        kinds: name of a breakdown -> question id -> group, as `grouped` takes them; one without any is left out.
        main: name of the number.
    """
    check_coverage(answers, texts, set(answers))
    correct = {name: float(sample_score(texts[name], answer)) for name, answer in answers.items()}
    groups = {title: grouped(correct, key) for title, key in (kinds or {}).items() if key}
    return Score({main: percent(correct.values())}, groups, correct, main=main)


def normalise(text: str) -> str:
    """A model's text as GQA compares it: LLaVA strips final full stops and lower-cases, nothing else."""
    return text.rstrip(".").lower()


def bare(text: str) -> str:
    """The text in lower case without punctuation."""
    return text.lower().translate(PUNCTUATION)


def exact_match(text: str, answer: str) -> float:
    """1 if the text is the answer, but for case, final full stops and spaces around it."""
    return float(normalise(text.strip()) == normalise(answer.strip()))


def loose_match(text: str, answer: str) -> float:
    """1 if the text is the answer, but for case and punctuation: lmms-eval's exact_match with both switches on."""
    return float(bare(text) == bare(answer))


def words(text: str) -> tuple[str, ...]:
    """Lower-case words and numbers, signs kept, without punctuation: for matches that need no LLM judge."""
    return tuple(word.replace(",", "") for word in WORD.findall(text.lower()))


def contains(said: Sequence[str], element: Sequence[str]) -> bool:
    """Whether the words of `element` follow each other in `said`."""
    count = len(element)
    return count > 0 and any(said[start : start + count] == element for start in range(len(said) - count + 1))
