"""The GQA metric against the official script's printed numbers, and what it does with incomplete input."""

import json
from pathlib import Path

import pytest

from eval.benchmarks import gqa
from eval.metrics import accuracy

VECTORS = Path(__file__).parent / "data" / "gqa"


def load(name: str):
    return json.loads((VECTORS / name).read_text())


@pytest.fixture(scope="module")
def questions() -> dict:
    return load("synthetic_all_questions.json")


@pytest.fixture(scope="module")
def choices() -> dict:
    return load("synthetic_choices.json")


@pytest.fixture(scope="module")
def predictions() -> dict:
    lines = [json.loads(line) for line in (VECTORS / "synthetic_answers.jsonl").read_text().splitlines()]
    return {line["question_id"]: accuracy.normalise(line["text"]) for line in lines}


@pytest.fixture(scope="module")
def score(questions, predictions, choices):
    return gqa.evaluate(questions, predictions, choices, all_questions=questions)


def test_normalisation_is_llavas_conversion(predictions):
    assert predictions == {row["questionId"]: row["prediction"] for row in load("synthetic_predictions_expected.json")}


def test_every_number_equals_the_official_scripts(score):
    expected = load("expected_synthetic.json")
    printed = {name.capitalize(): f"{value:.2f}%" for name, value in score.values.items()}
    printed["Distribution"] = f"{score.values['distribution']:.2f} (lower is better)"
    for name, table in score.groups.items():
        printed[f"Accuracy / {name}"] = {k: f"{share:.2f}% ({count} questions)" for k, (share, count) in table.items()}
    assert printed == expected


def test_without_choices_and_all_questions_the_rest_is_unchanged(questions, predictions, score):
    bare = gqa.evaluate(questions, predictions)
    assert bare.values["validity"] == bare.values["plausibility"] == 0
    assert bare.values["consistency"] is None
    for name in ("accuracy", "binary", "open", "distribution"):
        assert bare.values[name] == score.values[name]
    assert bare.groups == score.groups
    assert any("choices" in note for note in bare.notes) and any("consistency" in note for note in bare.notes)


def test_consistency_needs_the_entailed_predictions(questions, predictions, choices):
    """A --limit run answers some questions only; a consistency over those would be another number."""
    balanced = {name for name, question in questions.items() if question["isBalanced"]}
    partial = gqa.evaluate(
        questions, {n: p for n, p in predictions.items() if n in balanced}, choices, all_questions=questions
    )
    assert partial.values["consistency"] is None
    assert any("entailed" in note for note in partial.notes)


def chi_square_by_the_book(pairs: list[tuple[str, str, str]]) -> float:
    """(group, answer, prediction): plain loops over the definition."""
    weighted = 0.0
    for group in {group for group, _, _ in pairs}:
        golds = [gold for g, gold, _ in pairs if g == group]
        said = [prediction for g, _, prediction in pairs if g == group]
        chi = sum((said.count(answer) - golds.count(answer)) ** 2 / golds.count(answer) for answer in set(golds))
        weighted += chi * len(golds)
    return weighted / len(pairs) / 100


def test_distribution_against_the_definition(questions, predictions, score):
    pairs = [
        (question["groups"]["global"], question["answer"], predictions[name])
        for name, question in questions.items()
        if question["isBalanced"] and question["groups"]["global"] is not None
    ]
    assert score.values["distribution"] == pytest.approx(chi_square_by_the_book(pairs), rel=1e-12)
