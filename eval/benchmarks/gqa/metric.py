"""The GQA metric, written from a description of the official script and equal to it on the vectors in tests/data/gqa.

Source of the definitions: the GQA evaluation script (https://cs.stanford.edu/people/dorarad/gqa/evaluate.html).
Differs from it: files that the test-dev release lacks (choices, all questions) are optional, and predictions must
match the questions exactly, so that a forgotten or repeated answer is an error instead of a silent 0.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from eval.metrics import Score, first_names
from eval.metrics.accuracy import check_coverage, counted, grouped, percent
from llava.errors import UserError

Question = Mapping[str, Any]

# Operations that name or check an object rather than reason a further step; matched inside "operation: argument".
NOT_A_STEP = ("exist", "query: name", "choose name")


def by_question(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """(id, text) pairs -> predictions by id; a repeated id is an error, the later answer must not win."""
    pairs = list(pairs)
    repeated = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if repeated:
        raise UserError(f"{counted(len(repeated))} answered more than once: {first_names(repeated)}.")
    return dict(pairs)


def score(
    questions: Mapping[str, Question],
    predictions: Mapping[str, str],
    choices: Mapping[str, Mapping[str, Any]] | None = None,
    all_questions: Mapping[str, Question] | None = None,
) -> Score:
    """The official numbers over the balanced questions.

    Args:
        questions: id -> official question record; only those with `isBalanced` are counted.
        predictions: id -> normalised prediction; one for every balanced question.
        choices: id -> {"valid": [...], "plausible": [...]}. Without it both are 0, as nothing can be looked up.
        all_questions: also the unbalanced ones, which balanced questions entail. Without it, or without predictions
            for them, consistency is None.
    """
    balanced = {name: question for name, question in questions.items() if question["isBalanced"]}
    check_coverage(balanced, predictions, {*questions, *(all_questions or ())})
    correct = {name: float(predictions[name] == question["answer"]) for name, question in balanced.items()}
    is_open = {name: question["types"]["structural"] == "query" for name, question in balanced.items()}
    notes = []
    if choices is None:
        notes.append("no choices file: validity and plausibility are 0 because they cannot be measured")
    consistency, reason = score_consistency(balanced, predictions, correct, all_questions)
    if reason:
        notes.append(reason)

    values = {
        "accuracy": percent(correct.values()),
        "binary": percent(correct[name] for name in balanced if not is_open[name]),
        "open": percent(correct[name] for name in balanced if is_open[name]),
        "consistency": consistency,
        "validity": percent(is_among(predictions[name], balanced, choices, name, "valid") for name in balanced),
        "plausibility": percent(is_among(predictions[name], balanced, choices, name, "plausible") for name in balanced),
        "distribution": distribution(balanced, predictions),
    }
    groups = {
        "structural type": grouped(correct, {n: q["types"]["structural"] for n, q in balanced.items()}),
        "semantic type": grouped(correct, {n: q["types"]["semantic"] for n, q in balanced.items()}),
        "steps number": grouped(correct, {n: count_steps(q) for n, q in balanced.items()}),
        "words number": grouped(correct, {n: len(q["question"].split()) for n, q in balanced.items()}),
    }
    return Score(values, groups, correct, tuple(notes), points=frozenset({"distribution"}))


def count_steps(question: Question) -> int:
    """Reasoning steps of the question's program."""
    steps = (f"{step['operation']}: {step['argument']}" for step in question["semantic"])
    return sum(not any(word in step for word in NOT_A_STEP) for step in steps)


def is_among(
    prediction: str,
    questions: Mapping[str, Question],
    choices: Mapping[str, Mapping[str, Any]] | None,
    name: str,
    kind: str,
) -> float:
    """1 if the prediction is one of the question's `kind` ("valid" or "plausible") answers."""
    if choices is None:
        return 0.0
    if name not in choices:
        raise UserError(f"The choices file has no entry for question {name}.")
    # "What do these have in common" is answered by an attribute's name, whatever the choices list.
    common = "Common" in questions[name]["types"]["detailed"]
    return float(prediction in (("color", "material", "shape") if common else choices[name][kind]))


def distribution(questions: Mapping[str, Question], predictions: Mapping[str, str]) -> float:
    """Chi-square between answer and prediction counts within each question group, group-size weighted, / 100."""
    expected: dict[str, Counter[str]] = defaultdict(Counter)
    observed: dict[str, Counter[str]] = defaultdict(Counter)
    for name, question in questions.items():
        group = question["groups"]["global"]
        if group is not None:
            expected[group][question["answer"]] += 1
            observed[group][predictions[name]] += 1
    weighted = sum(
        counts.total() * sum((observed[group][answer] - count) ** 2 / count for answer, count in counts.items())
        for group, counts in expected.items()
    )
    total = sum(counts.total() for counts in expected.values())
    return weighted / total / 100 if total else 0.0


def score_consistency(
    balanced: Mapping[str, Question],
    predictions: Mapping[str, str],
    correct: Mapping[str, float],
    all_questions: Mapping[str, Question] | None,
) -> tuple[float | None, str | None]:
    """Percent, or None and the reason: of the questions entailed by a correct answer, how many are right too."""
    if all_questions is None:
        return None, "no file with all questions: consistency is not measured"
    per_question = []
    for name, question in balanced.items():
        entailed = [other for other in question["entailed"] if other != name]
        if not correct[name] or not entailed:
            continue
        if lost := [other for other in entailed if other not in predictions or other not in all_questions]:
            return None, f"consistency is not measured: no prediction for entailed questions such as {lost[0]}"
        hits = [predictions[other] == all_questions[other]["answer"] for other in entailed]
        per_question.append(sum(hits) / len(hits))
    return percent(per_question), None
