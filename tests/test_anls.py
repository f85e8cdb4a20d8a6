"""ANLS against the two official implementations' values."""

import json
from pathlib import Path

import pytest

from eval.benchmarks import hub_sets

TABLE = json.loads((Path(__file__).parent / "data" / "anls" / "table.json").read_text())


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row["prediction"] or "empty")
def test_every_row_equals_both_official_values(row):
    assert hub_sets.anls(row["prediction"], row["answers"]) == row["lmms_eval_anls"]
    assert hub_sets.anls_m4c(row["prediction"], row["answers"]) == pytest.approx(row["m4c_stvqa_anls"], abs=1e-15)


def test_lmms_divides_by_the_raw_length():
    """Two edits in texts of 4 and 14 characters as they came, of 4 and 4 as compared."""
    assert hub_sets.anls("abcd", ["abxx          "]) == pytest.approx(1 - 2 / 14)
    assert hub_sets.anls_m4c("abcd", ["abxx          "]) == 0.5


def test_half_right_counts_and_less_does_not():
    assert hub_sets.anls("ab", ["abcd"]) == 0.5
    assert hub_sets.anls("ab", ["abcde"]) == 0


def test_two_empty_texts_are_equal():
    assert hub_sets.anls("", [""]) == hub_sets.anls_m4c(" ", [""]) == 1


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [("kitten", "sitting", 3), ("flaw", "lawn", 2), ("", "abc", 3), ("abc", "", 3), ("same", "same", 0)],
)
def test_edits_are_levenshteins(first, second, expected):
    assert hub_sets.edits(first, second) == expected


def test_the_score_is_the_mean_and_a_question_counts_in_each_of_its_kinds():
    score = hub_sets.anls_score(
        {"1": ["cat"], "2": ["1995"]}, {"1": "cat", "2": "1996"}, {"1": ["form", "table/list"], "2": ["form"]}
    )
    assert score.values == {"anls": 87.5, "anls_m4c": 87.5} and score.main == "anls"
    assert score.groups == {"question type": {"form": (87.5, 2), "table/list": (100.0, 1)}}
    assert score.correct == {"1": 1.0, "2": 0.75}


def test_lengths_are_those_of_upper_case_texts():
    """The official script divides by len(text.upper()): "ß" is two letters there, the ligature "ﬁ" too."""
    assert hub_sets.anls("gasse", ["gaße"]) == pytest.approx(1 - 2 / 5)
    assert hub_sets.anls("straße x", ["straße"]) == pytest.approx(1 - 2 / 9)
