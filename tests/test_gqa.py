"""The GQA metric against the official script's printed numbers, GQA's mirror, and the look at a data folder."""

import json
from pathlib import Path

import pytest

from eval import benchmarks, show
from eval.benchmarks import gqa
from eval.metrics import accuracy
from eval.results.report import score_lines, scored
from tests.benchmark_files import cell, write_hub
from tests.eval_fakes import write_gqa

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
    # "validity 0.00 %" was printed of what cannot be measured.
    assert bare.values["validity"] is bare.values["plausibility"] is None
    assert "validity       not measured" in score_lines(scored(bare, (), {name: name for name in questions}))
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


def write_gqa_mirror(data) -> None:
    rows = [
        {"id": "1", "question": "Is it red?", "answer": "yes", "imageId": "n1"},
        {"id": "2", "question": "Which colour?", "answer": "blue", "imageId": "n0"},
    ]
    write_hub(data, "lmms-lab/GQA", "testdev", rows, "testdev_balanced_instructions")
    shown = [{"id": "n0", "image": cell("blue")}, {"id": "n1", "image": cell()}]
    write_hub(data, "lmms-lab/GQA", "testdev", shown, "testdev_balanced_images")


def test_gqa_from_the_mirror(tmp_path):
    write_gqa_mirror(tmp_path)
    data = benchmarks.get("gqa").load(tmp_path, "testdev")
    data.check_images(data.questions)
    assert data.sample(data.questions[0]).image.getpixel((0, 0)) == (255, 0, 0)
    assert data.facts["source"] == "lmms-lab/GQA"
    assert data.score(["1", "2"], {"1": "Yes.", "2": "red"}).values == {"accuracy": 50}
    write_gqa(tmp_path)
    assert benchmarks.get("gqa").load(tmp_path, "testdev").facts["source"] == "official"
    assert benchmarks.get("gqa").load(tmp_path, "testdev", source="mirror").facts["source"] == "lmms-lab/GQA"
    loose = benchmarks.get("gqa").load(tmp_path, "testdev", "lmms", "mirror")
    assert loose.max_new_tokens == 16
    assert loose.score(["1", "2"], {"1": "yes!", "2": "Blue"}).values == {"accuracy": 100}


def test_check_says_complete_incomplete_and_absent(tmp_path, capsys):
    data = write_gqa(tmp_path / "data")
    assert show.check_data_command([str(data), "gqa"]) == 0
    assert "gqa            complete\n    GQA testdev: 40 questions about 5 images" in capsys.readouterr().out
    (data / "gqa" / "data" / "images" / "n3.jpg").unlink()
    assert show.check_data_command([str(data), "gqa"]) == 1
    assert "incomplete\n    1 of 5 images" in capsys.readouterr().out
    (data / "gqa" / "data" / "testdev_balanced_questions.json").unlink()
    assert show.check_data_command([str(data), "gqa"]) == 1
    out = capsys.readouterr().out
    assert "testdev_balanced_questions.json is missing: questions1.2.zip of https" in out and "licence: " in out
    (tmp_path / "empty").mkdir()
    assert show.check_data_command([str(tmp_path / "empty"), "gqa"]) == 1, "what is asked for and absent was fine"
    assert "gqa            absent" in capsys.readouterr().out
    assert show.check_data_command([str(tmp_path / "empty")]) == 1, "so was a folder with nothing"


def test_check_finds_a_copy_of_the_mirror(tmp_path, capsys):
    write_gqa_mirror(tmp_path)
    assert show.check_data_command([str(tmp_path), "gqa"]) == 0
    assert "gqa            complete (lmms-lab/GQA)" in capsys.readouterr().out
