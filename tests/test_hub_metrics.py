"""ANLS and ChartQA's relaxed accuracy against the official implementations' values."""

import json
from pathlib import Path

import pytest

from eval.benchmarks import hub_sets

DATA = Path(__file__).parent / "data"
ANLS = json.loads((DATA / "anls" / "table.json").read_text())
CHARTQA = json.loads((DATA / "chartqa" / "table.json").read_text())


@pytest.mark.parametrize("row", ANLS, ids=lambda row: row["prediction"] or "empty")
def test_anls_equals_both_official_values(row):
    assert hub_sets.anls(row["prediction"], row["answers"]) == row["lmms_eval_anls"]
    assert hub_sets.anls_m4c(row["prediction"], row["answers"]) == pytest.approx(row["m4c_stvqa_anls"], abs=1e-15)


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("abcd", "abxx          ", 1 - 2 / 14),  # two edits in texts of 4 and 14 characters as they came
        ("ab", "abcd", 0.5),  # half right counts, less does not
        ("ab", "abcde", 0),
        ("", "", 1),
        # The official script divides by len(text.upper()): "ß" is two letters there.
        ("gasse", "gaße", 1 - 2 / 5),
        ("straße x", "straße", 1 - 2 / 9),
    ],
)
def test_lmms_divides_by_the_raw_length(prediction, answer, expected):
    assert hub_sets.anls(prediction, [answer]) == pytest.approx(expected)


def test_m4c_divides_by_the_stripped_length():
    assert hub_sets.anls_m4c("abcd", ["abxx          "]) == 0.5 and hub_sets.anls_m4c(" ", [""]) == 1


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [("kitten", "sitting", 3), ("flaw", "lawn", 2), ("", "abc", 3), ("abc", "", 3), ("same", "same", 0)],
)
def test_edits_are_levenshteins(first, second, expected):
    assert hub_sets.edits(first, second) == expected


def test_the_score_is_the_mean_and_a_question_counts_in_each_of_its_kinds():
    kinds = {"1": ["form", "table/list"], "2": ["form"]}
    score = hub_sets.anls_score({"1": ["cat"], "2": ["1995"]}, {"1": "cat", "2": "1996"}, kinds)
    assert score.values == {"anls": 87.5, "anls_m4c": 87.5} and score.main == "anls"
    assert score.groups == {"question type": {"form": (87.5, 2), "table/list": (100.0, 1)}}
    assert score.correct == {"1": 1.0, "2": 0.75}


@pytest.mark.parametrize("row", CHARTQA, ids=lambda row: f"{row['prediction']!r} for {row['target']!r}")
def test_relaxed_accuracy_equals_lmms_evals(row):
    assert hub_sets.relaxed(row["prediction"], row["target"]) is row["relaxed_correct"]


def test_eighteen_of_them_are_right():
    answers = {str(number): row["target"] for number, row in enumerate(CHARTQA)}
    texts = {str(number): row["prediction"] for number, row in enumerate(CHARTQA)}
    types = {name: "human_test" if int(name) < 20 else "augmented_test" for name in answers}
    score = hub_sets.chartqa_score(answers, texts, types)
    human = sum(row["relaxed_correct"] for row in CHARTQA[:20])
    halves = {"human": 100 * human / 20, "augmented": 100 * (18 - human) / 19}
    assert score.values == pytest.approx({"relaxed_accuracy": 100 * 18 / 39, **halves})
    assert score.groups["type"]["human_test"] == (score.values["human"], 20)
    # A half that was not asked has no value.
    assert hub_sets.chartqa_score({"1": "5"}, {"1": "5"}, {"1": "human_test"}).values["augmented"] is None


@pytest.mark.parametrize(
    ("prediction", "target", "right"),
    [("0", "0", True), ("0.0", "0", False), ("12%", "12", False), ("0.12", "12%", True)],
)
def test_zero_is_compared_as_text_and_a_percent_sign_divides_its_own_side(prediction, target, right):
    assert hub_sets.relaxed(prediction, target) is right
