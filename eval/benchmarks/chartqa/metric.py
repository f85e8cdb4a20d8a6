"""Relaxed accuracy of ChartQA as lmms-eval 0.7.3 computes it; equal to it on the vectors in tests/data/chartqa.

Quirks kept: a target of 0 is compared as text, so "0.0" is wrong for "0"; a percent sign divides by 100 on the side it
stands on alone, so "12%" is wrong for "12"; nothing is stripped and thousands separators are not read.
"""

from collections.abc import Mapping

from eval.metrics import Score
from eval.metrics.accuracy import check_coverage, grouped, percent

TOLERANCE = 0.05  # relative error that a number read off a chart may have


def relaxed(prediction: str, target: str) -> bool:
    """Whether the prediction is right: within 5 % of a number, else the same text but for case."""
    said, wanted = number(prediction), number(target)
    if said is None or not wanted:
        return prediction.lower() == target.lower()
    return abs(said - wanted) / abs(wanted) <= TOLERANCE


def number(text: str) -> float | None:
    """The value of "12", "1.2e1" or "1200%"; None for other texts."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def score(answers: Mapping[str, str], texts: Mapping[str, str], types: Mapping[str, str]) -> Score:
    """Percent of right answers over all questions and over each half.

    Args:
        answers: question id -> reference, of the questions that were asked.
        texts: question id -> the model's text; one for every question.
        types: question id -> "human_test", or "augmented_test" for questions a program made from captions.
    """
    check_coverage(answers, texts, set(answers))
    correct = {name: float(relaxed(texts[name], answer)) for name, answer in answers.items()}
    halves: dict[str, list[float]] = {"human": [], "augmented": []}
    for name, sample_score in correct.items():
        # As lmms-eval has it: what is not human is augmented.
        halves["human" if types[name] == "human_test" else "augmented"].append(sample_score)
    values = {name: percent(sample_scores) if sample_scores else None for name, sample_scores in halves.items()}
    return Score(
        {"relaxed_accuracy": percent(correct.values()), **values},
        {"type": grouped(correct, types)},
        correct,
        main="relaxed_accuracy",
    )
