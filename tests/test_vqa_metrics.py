"""The EvalAI answer processor and the VQA accuracies against the official scripts' output."""

import json
from pathlib import Path

import pytest

from eval.metrics import vqa
from eval.metrics.accuracy import mean_score

VECTORS = Path(__file__).parent / "data" / "vqa"


def load(name: str):
    return json.loads((VECTORS / name).read_text())


@pytest.fixture(scope="module")
def annotations() -> list[dict]:
    return load("annotations.json")["annotations"]


@pytest.fixture(scope="module")
def answers(annotations) -> dict[str, list[str]]:
    return {str(row["question_id"]): [answer["answer"] for answer in row["answers"]] for row in annotations}


@pytest.fixture(scope="module")
def predictions() -> dict[str, str]:
    return {str(row["question_id"]): row["answer"] for row in load("results.json")}


def test_words_are_those_of_the_toolkit():
    tables = load("tables.json")
    assert tables["contractions"] == vqa.CONTRACTIONS and len(vqa.CONTRACTIONS) == 120
    assert tables["number_words"] == vqa.NUMBERS
    assert tables["punctuation_in_order"] == list(vqa.PUNCTUATION)
    assert set(tables["articles"]) == vqa.ARTICLES


def test_the_processor_on_every_string_of_the_table():
    table = load("evalai_processor_table.json")
    assert len(table) == 246
    assert {row["in"]: vqa.process(row["in"]) for row in table} == {row["in"]: row["out"] for row in table}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("what's", "what 's"),  # split before the contraction table is asked
        ("x-y - z", "xy z"),  # one dash beside a space deletes all dashes
        ("1,000-2", "1000 2"),  # no comma is left when digits are looked at
        ("it costs $5.99.", "it costs $5.99"),
        ("a." * 40, "a" * 32 + "a." * 8),  # at most 32 full stops
    ],
)
def test_oddities_of_the_processor(text, expected):
    assert vqa.process(text) == expected


def test_toolkit_and_processor_differ_on_digits_with_a_comma():
    """The toolkit keeps commas until then, so all marks of the text are deleted rather than replaced."""
    assert vqa.normalise("1,000-2") == "10002"


def test_official_toolkit_overall_per_type_and_per_question(annotations, answers, predictions):
    expected = load("expected.json")["official_vqa_eval"]
    kinds = {
        kind: {str(row["question_id"]): row[kind] for row in annotations} for kind in ("answer_type", "question_type")
    }
    score = mean_score(answers, predictions, vqa.vqa_eval, kinds)
    assert round(score.values["accuracy"], 2) == expected["overall"] == 59.40
    printed = {
        kind: {group: round(share, 2) for group, (share, _) in table.items()} for kind, table in score.groups.items()
    }
    assert printed == {"answer_type": expected["perAnswerType"], "question_type": expected["perQuestionType"]}
    credits = {name: round(100 * sample_score, 2) for name, sample_score in score.correct.items()}
    assert credits == expected["per_question_percent"] and len(credits) == 200


def test_m4c_overall_and_per_question(answers, predictions):
    expected = load("expected.json")["m4c_textvqa_evaluator"]
    score = mean_score(answers, predictions, vqa.m4c)
    assert score.values["accuracy"] == pytest.approx(expected["overall_percent"], abs=1e-9)
    assert f"{score.values['accuracy']:.2f}" == "69.90"
    assert score.correct == pytest.approx(expected["per_question"], abs=1e-12) and len(score.correct) == 200


@pytest.mark.parametrize(("same", "sample_score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_credit_by_number_of_people_who_said_the_same(same, sample_score):
    assert vqa.leave_one_out("cat", ["cat"] * same + ["dog"] * (10 - same)) == sample_score


def test_the_rules_differ_where_all_people_agree():
    """The toolkit compares strings there; LLaVA's uploads are safe because the processor ran before."""
    people = ["yes"] * 10
    assert vqa.vqa_eval("Yes", people) == vqa.vqa_eval("yes.", people) == 0
    assert vqa.vqa_eval(" yes\n", people) == 1
    assert vqa.m4c("Yes.", people) == vqa.lmms_vqa("Yes.", people) == vqa.vizwiz("Yes.", people) == 1
    assert vqa.after_processor(vqa.vqa_eval)("Yes.", people) == 1


def test_vizwiz_leaves_the_peoples_answers_as_they_stand():
    people = ["The Coke"] * 9 + ["soda"]
    assert vqa.vizwiz("coke", people) == 0
    assert vqa.m4c("coke", people) == 1


def test_lmms_takes_no_notice_of_a_possessive():
    """It leaves out the step that splits off 's, which the processor has."""
    people = ["man s"] * 5 + ["mans"] * 5
    assert vqa.lmms_vqa("man's", people) == 0
    assert vqa.process("man's") == "man 's" and vqa.normalise("man's") == "man's"
