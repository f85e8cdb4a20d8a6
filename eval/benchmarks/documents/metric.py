"""ANLS, average normalised Levenshtein similarity, as lmms-eval 0.7.3 and M4C's evaluator for ST-VQA compute it.

Written from descriptions of both; equal to both on the vectors in tests/data/anls. They differ where a text has white
space inside: lmms-eval makes it one space before counting edits, but divides by the length of the texts as they came.
"""

from collections.abc import Iterable, Mapping, Sequence

from eval.metrics import Score
from eval.metrics.accuracy import check_coverage, percent

THRESHOLD = 0.5  # below it an answer is taken for wrong rather than badly read


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


def anls(prediction: str, answers: Iterable[str]) -> float:
    """Similarity in [0, 1] to the nearest answer, as the DocVQA and InfographicVQA tasks of lmms-eval define it."""

    def folded(text: str) -> str:
        return " ".join(text.lower().split())

    # Lengths are those of the upper-case texts, as officially: "ß" counts as two letters there.
    length = len(prediction.upper())
    return cut(
        1 - share(edits(folded(answer), folded(prediction)), max(len(answer.upper()), length)) for answer in answers
    )


def anls_m4c(prediction: str, answers: Iterable[str]) -> float:
    """The same as M4C's evaluator has it: lower case and outer white space only, lengths after that."""
    prediction = prediction.strip().lower()
    answers = [answer.strip().lower() for answer in answers]
    return cut(1 - share(edits(answer, prediction), max(len(answer), len(prediction))) for answer in answers)


def share(distance: int, length: int) -> float:
    """distance / length; two empty texts are equal."""
    return distance / length if length else 0.0


def cut(similarities: Iterable[float]) -> float:
    """The best, 0 below the threshold."""
    best = max(similarities, default=0.0)
    return best if best >= THRESHOLD else 0.0


def score(
    answers: Mapping[str, Sequence[str]],
    texts: Mapping[str, str],
    kinds: Mapping[str, Sequence[str]] | None = None,
    breakdown: str = "question type",
) -> Score:
    """100 x mean ANLS.

    Args:
        answers: question id -> accepted answers, of the questions that were asked.
        texts: question id -> the model's text; one for every question.
        kinds: question id -> the groups it belongs to, which may be several.
    """
    check_coverage(answers, texts, set(answers))
    sample_score = {name: anls(texts[name], accepted) for name, accepted in answers.items()}
    plain = percent(anls_m4c(texts[name], accepted) for name, accepted in answers.items())
    groups = {breakdown: by_kind(sample_score, kinds)} if kinds else {}
    note = "anls_m4c is the variant of M4C's ST-VQA evaluator, which keeps white space inside a text"
    return Score(
        {"anls": percent(sample_score.values()), "anls_m4c": plain}, groups, sample_score, (note,), main="anls"
    )


def by_kind(sample_score: Mapping[str, float], kinds: Mapping[str, Sequence[str]]) -> dict[str, tuple[float, int]]:
    """Percent and number of questions per kind; a question counts in each of its kinds."""
    buckets: dict[str, list[float]] = {}
    for name, value in sample_score.items():
        for kind in kinds.get(name, ()):
            buckets.setdefault(kind, []).append(value)
    return {kind: (percent(buckets[kind]), len(buckets[kind])) for kind in sorted(buckets)}
