"""ChartQA's relaxed accuracy against lmms-eval's."""

import json
from pathlib import Path

import pytest

from eval.benchmarks import hub_sets

TABLE = json.loads((Path(__file__).parent / "data" / "chartqa" / "table.json").read_text())


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row['prediction']!r} for {row['target']!r}")
def test_every_row_equals_lmms_evals(row):
    assert hub_sets.relaxed(row["prediction"], row["target"]) is row["relaxed_correct"]


def test_eighteen_of_them_are_right():
    answers = {str(number): row["target"] for number, row in enumerate(TABLE)}
    texts = {str(number): row["prediction"] for number, row in enumerate(TABLE)}
    types = {name: "human_test" if int(name) < 20 else "augmented_test" for name in answers}
    score = hub_sets.chartqa_score(answers, texts, types)
    assert sum(score.correct.values()) == 18
    assert score.values["relaxed_accuracy"] == pytest.approx(100 * 18 / 39)
    human = sum(row["relaxed_correct"] for row in TABLE[:20])
    assert score.values["human"] == pytest.approx(100 * human / 20)
    assert score.values["augmented"] == pytest.approx(100 * (18 - human) / 19)
    assert score.groups["type"]["human_test"] == (score.values["human"], 20)


def test_zero_is_compared_as_text():
    assert hub_sets.relaxed("0", "0") and not hub_sets.relaxed("0.0", "0")


def test_a_percent_sign_divides_the_side_it_stands_on():
    assert not hub_sets.relaxed("12%", "12") and hub_sets.relaxed("0.12", "12%")


def test_a_half_that_was_not_asked_has_no_value():
    assert hub_sets.chartqa_score({"1": "5"}, {"1": "5"}, {"1": "human_test"}).values["augmented"] is None
