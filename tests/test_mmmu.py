"""The MMMU parser against the authors' on every vector, and what differs: draws that do not depend on order."""

import json
from pathlib import Path

import pytest

from eval.benchmarks import mmmu

TABLE = json.loads((Path(__file__).parent / "data" / "mmmu" / "parse_table.json").read_text())
OPTIONS = TABLE["options"]


def item(answer="A", subject="Art", options=OPTIONS) -> mmmu.Item:
    return mmmu.Item(answer, subject, options)


@pytest.mark.parametrize("row", TABLE["multiple_choice"], ids=lambda row: row["response"])
def test_letters_equal_the_authors(row):
    expected = None if row["parsed"] == "RANDOM" else row["parsed"]
    assert mmmu.find_letter(row["response"], OPTIONS) == expected


@pytest.mark.parametrize("row", TABLE["open"], ids=lambda row: row["response"])
def test_open_answers_equal_the_authors(row):
    assert sorted(map(str, mmmu.read_open(row["response"]))) == row["parsed"]


@pytest.mark.parametrize("row", TABLE["eval_open"], ids=lambda row: row["response"])
def test_credit_of_open_answers_equals_the_authors(row):
    assert mmmu.open_score(row["response"], row["gold"]) == row["correct"]


def test_two_rows_of_the_table_are_drawn():
    rows = {str(number): row["response"] for number, row in enumerate(TABLE["multiple_choice"])}
    score = mmmu.evaluate({name: item() for name in rows}, rows)
    assert score.values["drawn_at_random"] == 2 and "drawn_at_random" in score.points
    assert any(note.startswith("2 answers name no option") for note in score.notes)


def test_a_drawn_letter_belongs_to_its_question():
    draws = {name: mmmu.draw_letter(name, OPTIONS) for name in map(str, range(50))}
    assert set(draws.values()) == set("ABCD")
    assert draws == {name: mmmu.draw_letter(name, OPTIONS) for name in reversed(draws)}
    # Of Python's generator seeded with a text, which is the same on every machine.
    assert mmmu.draw_letter("validation_Art_1", OPTIONS) == "C"


def test_lmms_finds_a_letter_at_the_end_of_a_word_and_before_a_full_stop():
    for text, official, lmms in [("NASA is", None, "A"), ("D. None, I guess", None, "D"), ("(B", None, "B")]:
        assert mmmu.find_letter(text, OPTIONS) is official
        assert mmmu.find_letter(text, OPTIONS, mmmu.LMMS_FORMS) == lmms


def test_option_texts_are_looked_for_in_long_answers_only():
    assert mmmu.find_letter("a blue bicycle", OPTIONS) is None
    assert mmmu.find_letter("I am sure of a blue bicycle", OPTIONS) == "B"


def test_sentences_are_not_split_because_capitals_are_gone():
    assert mmmu.read_open("The answer is 4. It was 5") == {"4. it was 5", 4.0, 5.0}


def test_overall_is_weighted_by_questions_and_absent_subjects_are_named():
    items = {"1": item(), "2": item(), "3": item(), "4": item("C", "Physics"), "5": item("12", "Music", None)}
    score = mmmu.evaluate(items, {"1": "A", "2": "B", "3": "(A)", "4": "C.", "5": "It is 12."})
    assert score.values["accuracy"] == 80
    assert score.groups["subject"]["Art"] == (pytest.approx(200 / 3), 3)
    assert score.groups["domain"] == {"Art and Design": (75.0, 4), "Science": (100.0, 1)}
    assert score.groups["question type"] == {"multiple choice": (75.0, 4), "open": (100.0, 1)}
    assert score.notes[0].startswith("27 of 30 subjects have no question here: Art_Theory, Design, Accounting")


def test_thirty_subjects_in_six_domains():
    assert len(mmmu.DOMAINS) == 6 and len(mmmu.DOMAIN_OF) == 30
