"""Scores of one short answer, by the names that the files of eval/benchmarks/sets use.

`relaxed` is ChartQA's and `anls` DocVQA's; both are equal to lmms-eval's on the vectors in tests/data/chartqa and
tests/data/anls.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from eval.metrics import accuracy, vqa

TOLERANCE = 0.05  # relative error that a number read off a chart may have
THRESHOLD = 0.5  # below it an answer is taken for wrong rather than badly read


def relaxed(prediction: str, target: str) -> bool:
    """Whether the prediction is right: within 5 % of a number, else the same text but for case.

    Quirks kept: a target of 0 is compared as text, so "0.0" is wrong for "0"; a percent sign divides by 100 on the side
    it stands on alone, so "12%" is wrong for "12"; nothing is stripped and thousands separators are not read.
    """

    def number_of(text: str) -> float | None:
        try:
            return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
        except ValueError:
            return None

    said, wanted = number_of(prediction), number_of(target)
    if said is None or not wanted:
        return prediction.lower() == target.lower()
    return abs(said - wanted) / abs(wanted) <= TOLERANCE


def edits(first: str, second: str) -> int:
    """Levenshtein distance: insertions, deletions and replacements that make one text the other."""
    if first == second:
        return 0
    above = list(range(len(second) + 1))
    for row, left in enumerate(first, start=1):
        current = [row]
        for column, right in enumerate(second, start=1):
            replaced = above[column - 1] + (left != right)
            current.append(min(replaced, above[column] + 1, current[-1] + 1))
        above = current
    return above[-1]


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity to the nearest answer, in [0, 1]; 0 below the threshold.

    As lmms-eval defines it. Two empty texts are equal.
    """

    def folded(text: str) -> str:
        return " ".join(text.lower().split())

    best = 0.0
    for answer in answers:
        # Lengths are those of the upper-case texts as they came, as officially: "ß" counts as two letters there.
        length = max(len(answer.upper()), len(prediction.upper()))
        distance = edits(folded(answer), folded(prediction))
        best = max(best, 1 - (distance / length if length else 0.0))
    return best if best >= THRESHOLD else 0.0


def letter(text: str, answer: str) -> float:
    """1 if the letter that the text most probably means is the answer (lmms-eval's extractor)."""
    return float(accuracy.extract_letter(text, "ABCDEFGHIJ") == answer)


def best_of(score: Callable[[str, str], float | bool], text: str, answers: Sequence[str]) -> float:
    """The score of the accepted answer that fits best."""
    return max(float(score(text, answer)) for answer in answers)


# Name -> (text of the model, accepted answers) -> score in [0, 1].
METRICS: Mapping[str, Callable[[str, Sequence[str]], float]] = {
    "exact_match": partial(best_of, accuracy.exact_match),
    "loose_match": partial(best_of, accuracy.loose_match),
    "relaxed_match": partial(best_of, relaxed),
    "letter": partial(best_of, letter),
    "leading_letter": partial(best_of, accuracy.ai2d_score),
    "anls": anls,
    "vqa": vqa.m4c,
}
