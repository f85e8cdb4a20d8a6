"""What most metrics share: coverage of the questions, percent, breakdowns, and short texts in normal form."""

from collections import defaultdict
from collections.abc import Iterable, Mapping

from eval.metrics import first_names
from llava.errors import UserError


def normalise(text: str) -> str:
    """A model's text as GQA compares it: LLaVA strips final full stops and lower-cases, nothing else."""
    return text.rstrip(".").lower()


def check_coverage(balanced: Iterable[str], predictions: Iterable[str], known: set[str]) -> None:
    """Every balanced question is answered and every answer belongs to a question."""
    predicted = set(predictions)
    if missing := [name for name in balanced if name not in predicted]:
        raise UserError(f"{counted(len(missing))} without a prediction: {first_names(missing)}.")
    if extra := sorted(predicted - known):
        noun = "prediction" if len(extra) == 1 else "predictions"
        raise UserError(f"{len(extra):,} {noun} for questions that are not in the question file: {first_names(extra)}.")


def percent(sample_scores: Iterable[float]) -> float:
    """100 x the mean, 0 for nothing, in the official order of operations so that the last digit agrees."""
    sample_scores = list(sample_scores)
    return sum(sample_scores) / len(sample_scores) * 100 if sample_scores else 0.0


def grouped(correct: Mapping[str, float], key: Mapping[str, str | int]) -> dict[str, tuple[float, int]]:
    """Percent correct and number of questions for each value of `key`, sorted by it."""
    buckets: dict[str | int, list[float]] = defaultdict(list)
    for name, sample_score in correct.items():
        buckets[key[name]].append(sample_score)
    return {str(value): (percent(buckets[value]), len(buckets[value])) for value in sorted(buckets)}


def counted(questions: int) -> str:
    """ "1 question", "2,000 questions"."""
    return f"{questions:,} question" if questions == 1 else f"{questions:,} questions"
