"""Benchmarks that exist on the hub only: what they ask and upload on tiny copies, their metrics by official values."""

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import openpyxl
import pytest
from huggingface_hub import constants

from eval import benchmarks
from eval.benchmarks import hub_sets, mmmu
from eval.benchmarks.base import Dataset
from eval.benchmarks.hub import open_table
from eval.benchmarks.llava_files import LETTER, SHORT
from eval.benchmarks.records import NotRequired, TypedDict
from eval.config import DEFAULT_DATA, ROOT
from eval.metrics import accuracy, short_answers
from eval.show import ABSENT, COMPLETE, check_folder
from llava.errors import UserError
from tests import benchmark_files
from tests.benchmark_files import cell, write_hub
from tests.checkpoint_files import hub_cache

VECTORS = Path(__file__).parent / "data"
ANLS = json.loads((VECTORS / "anls" / "table.json").read_text())
CHARTQA = json.loads((VECTORS / "chartqa" / "table.json").read_text())
MMMU_TABLE = json.loads((VECTORS / "mmmu" / "parse_table.json").read_text())
MMMU_OPTIONS = MMMU_TABLE["options"]


@pytest.fixture(autouse=True)
def no_network(tmp_path, monkeypatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    yield


def load(data: Path, name: str, profile: str | None = None, split: str | None = None) -> Dataset:
    found = benchmark_files.load(name, data, profile, split)
    found.check_images(found.questions)
    return found


def score(data: Dataset, *texts: str):
    answers = {question.id: text for question, text in zip(data.questions, texts, strict=True)}
    return data.score(list(answers), answers)


# -- the lmms-eval letter rules --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [("B", 1), ("b", 1), ("B.", 1), ("(B)", 1), (" B. the dog", 1), ("B the dog", 0), ("b. the dog", 0), ("B: x", 0)],
)
def test_ai2d_reads_a_leading_capital_with_full_stop_or_the_whole_answer(text, expected):
    assert accuracy.ai2d_score(text, "B") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("C", "C"),
        ("The answer is (B).", "B"),
        ("(A) or (C)", "C"),
        ("A. left, not B", "A"),
        ("I choose B because D is far", "D"),  # the last letter after a phrase, whatever it says of it
        ("A dog", "A"),
        ("NASA is right", "A"),  # letters inside words count where nothing better is there
        ("답은 D 입니다", "D"),
        ("c", ""),
        (" .", ""),
    ],
)
def test_extractor_ranks_forms_before_places(text, expected):
    assert accuracy.extract_letter(text) == expected


# -- ANLS and relaxed accuracy ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ANLS, ids=lambda row: row["prediction"] or "empty")
def test_anls_equals_the_official_values(row):
    assert short_answers.anls(row["prediction"], row["answers"]) == row["lmms_eval_anls"]


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("abcd", "abxx          ", 1 - 2 / 14),  # two edits in texts of 4 and 14 characters as they came
        # The official script divides by len(text.upper()): "ß" is two letters there.
        ("gasse", "gaße", 1 - 2 / 5),
        ("straße x", "straße", 1 - 2 / 9),
    ],
)
def test_anls_divides_by_the_raw_length(prediction, answer, expected):
    assert short_answers.anls(prediction, [answer]) == pytest.approx(expected)


@pytest.mark.parametrize("row", CHARTQA, ids=lambda row: f"{row['prediction']!r} for {row['target']!r}")
def test_relaxed_accuracy_equals_lmms_evals(row):
    assert short_answers.relaxed(row["prediction"], row["target"]) is row["relaxed_correct"]


# -- AI2D, ChartQA, RealWorldQA --------------------------------------------------------------------------------------


def ai2d_rows() -> list[dict[str, Any]]:
    options = ["leaf", "root", "stem"]
    return [
        {"question": "What grows?", "options": options, "answer": "1", "image": cell((1, 0, 0))},
        {"question": "What holds?", "options": options, "answer": "2", "image": cell((1, 0, 0))},
        {"question": "What eats?", "options": options, "answer": "0", "image": cell((2, 0, 0))},
    ]


def test_ai2d(tmp_path):
    write_hub(tmp_path, "lmms-lab/ai2d", "test", ai2d_rows())
    data = load(tmp_path, "ai2d")
    assert data.questions[0].message == f"What grows?\nA. leaf\nB. root\nC. stem\n{LETTER}"
    assert [question.answer for question in data.questions] == ["B", "C", "A"]
    assert [question.images for question in data.questions] == [("0/image",), ("0/image",), ("2/image",)]
    found = score(data, "B. root", "C", "root")
    assert found.main == "exact_match" and found.values["exact_match"] == pytest.approx(200 / 3)
    assert found.notes == ("the data set has 3 questions, published numbers are about 3,088",)
    assert data.max_new_tokens == 16 and data.facts["source"] == "lmms-lab/ai2d"
    assert data.sample_score is not None and data.sample_score(data.questions[0], "b") == 1


def test_ai2d_refuses_an_index_beyond_the_options(tmp_path):
    write_hub(tmp_path, "lmms-lab/ai2d", "test", [{**ai2d_rows()[0], "answer": "3"}])
    with pytest.raises(UserError, match="row 0 has answer '3'"):
        load(tmp_path, "ai2d")


def test_chartqa(tmp_path):
    rows = [
        {"type": "human_test", "question": "How many?", "answer": "100", "image": cell((1, 0, 0))},
        {"type": "augmented_test", "question": "Which?", "answer": "Blue", "image": cell((2, 0, 0))},
    ]
    write_hub(tmp_path, "lmms-lab-encoder/ChartQA", "test", rows)
    data = load(tmp_path, "chartqa")
    assert data.questions[0].message == "How many?\nAnswer the question with a single word."
    found = score(data, "104", "blue.")
    assert found.values == {"relaxed_accuracy": 50, "human": 100, "augmented": 0}
    assert data.submission({"0": "104"}) == {}


def test_realworldqa_asks_in_the_data_sets_words_and_keeps_the_instruction_apart(tmp_path):
    rows = [
        {"question": "Where?\n\nA. Left\nB. Right\nPlease answer directly with only the letter.", "answer": "B"},
        {"question": "How many cars? Please answer directly with a single word or number.\n", "answer": "2"},
    ]
    write_hub(tmp_path, "lmms-lab/RealWorldQA", "test", [{**row, "image": cell((1, 0, 0))} for row in rows])
    data = load(tmp_path, "realworldqa")
    assert [question.message for question in data.questions] == [row["question"].strip() for row in rows]
    assert data.questions[0].question == "Where?\n\nA. Left\nB. Right"
    assert data.questions[1].suffix == ""
    assert score(data, "(B)", "3").groups == {"answer type": {"letter": (100.0, 1), "word": (0.0, 1)}}


# -- DocVQA, InfographicVQA ------------------------------------------------------------------------------------------


def document_rows(answers: Sequence[Sequence[str] | None]) -> list[dict[str, Any]]:
    return [
        {
            "questionId": str(337 + row),
            "question": "Which year?",
            "question_types": ["form", "layout"] if row else ["form"],
            "image": cell((0, 0, 0)),
            "ucsf_document_id": "rnbx0223",
            "ucsf_document_page_no": "193" if row < 2 else "7",
            "answers": accepted,
        }
        for row, accepted in enumerate(answers)
    ]


def test_docvqa_scores_val(tmp_path):
    rows = document_rows([["1995"], ["0.28", "0.28%"], ["cat"]])
    write_hub(tmp_path, "lmms-lab/DocVQA", "validation", rows, "DocVQA")
    data = load(tmp_path, "docvqa")
    assert data.title == "DocVQA val" and data.questions[0].message == f"Which year?\n{SHORT}"
    assert [question.images[0] for question in data.questions] == ["0/image", "0/image", "2/image"]
    found = score(data, "1996", "0.28%", "dog")
    assert found.values["anls"] == pytest.approx(100 * 1.75 / 3) and found.main == "anls"
    assert found.groups["question type"]["layout"] == (50.0, 2)
    assert data.max_new_tokens == 32


def test_docvqa_test_is_a_file_for_the_server(tmp_path):
    write_hub(tmp_path, "lmms-lab/DocVQA", "test", document_rows([None, None]), "DocVQA")
    data = load(tmp_path, "docvqa", split="test")
    found = score(data, "1996", "12")
    assert found.values == {"anls": None} and not found.correct and data.sample_score is None
    assert "docvqa_test_for_submission.json" in found.notes[0]
    assert data.submission({"337": "1996", "338": "12"}) == {
        "docvqa_test_for_submission.json": [{"questionId": 337, "answer": "1996"}, {"questionId": 338, "answer": "12"}]
    }


def test_infovqa_reads_the_other_configuration(tmp_path):
    row = {"questionId": "1", "question": "Who?", "answers": ["Ann"], "answer_type": ["single span"]}
    rows = [{**row, "image": cell((1, 0, 0)), "image_url": "u"}]
    write_hub(tmp_path, "lmms-lab-encoder/DocVQA", "validation", rows, "InfographicVQA")
    found = score(load(tmp_path, "infovqa"), "ann")
    assert found.values["anls"] == 100 and found.groups == {"answer type": {"single span": (100.0, 1)}}
    with pytest.raises(UserError, match="configuration DocVQA, split validation"):
        load(tmp_path, "docvqa")


# -- OCRBench --------------------------------------------------------------------------------------------------------


def ocr_rows() -> list[dict[str, Any]]:
    rows = [
        ("IIIT5K", "Regular Text Recognition", ["CENTRE"]),
        ("HME100k", "Handwritten Mathematical Expression Recognition", ["x = Y"]),
        ("ESTVQA_cn", "Scene Text-centric VQA", ["ＡＢＣ　１"]),
    ]
    return [
        {"dataset": d, "question": " what? ", "question_type": t, "answer": a, "image": cell((n, 0, 0))}
        for n, (d, t, a) in enumerate(rows)
    ]


def test_ocrbench_counts_points(tmp_path):
    write_hub(tmp_path, "echo840/OCRBench", "test", ocr_rows())
    data = load(tmp_path, "ocrbench")
    assert data.questions[0].message == f" what? \n{SHORT}"
    found = score(data, "It says centre.", "x=Y", "abc 1")
    assert found.values == {"score": 2, "text_recognition": 1, "accuracy": pytest.approx(200 / 3)}
    assert found.main == "score" and {"score", "type"} <= found.points
    assert found.groups["type"]["Regular Text Recognition"] == (1.0, 1)
    assert found.terms is not None and found.terms.value(found.terms.sums.sum(0)) == 2


def test_ocrbench_in_lmms_eval_has_no_instruction_and_folds_full_width_ascii(tmp_path):
    write_hub(tmp_path, "echo840/OCRBench", "test", ocr_rows())
    data = load(tmp_path, "ocrbench", "lmms")
    assert data.questions[0].message == "what?"
    assert score(data, "", "x = y", "abc 1").values["score"] == 1  # formulas keep their case


def test_ocrbench_folds_nothing_in_formulas():
    assert not hub_sets.ocrbench_sample_score("x=1", hub_sets.TextItem(["x=１"], "HME100k"), fold=True)


# -- MMStar ----------------------------------------------------------------------------------------------------------


def test_mmstar_looks_at_first_characters_and_knows_few_openings():
    """Any word that begins with the letter is right."""
    for text in ("B", "blue", "(b) x", "Option B", "The answer is\nB", " B"):
        assert hub_sets.mmstar_sample_score(text, "B") == 1
    for text in ("the answer is (B)", "", "(", "option"):
        assert hub_sets.mmstar_sample_score(text, "B") == 0


def star_rows() -> list[dict[str, Any]]:
    details = ["image emotion", "image emotion", "geometry"]
    return [
        {
            "index": row,
            "question": "Which?\nOptions: A: a, B: b",
            "image": cell((row, 0, 0)),
            "answer": "A",
            "category": "math" if row == 2 else "coarse perception",
            "l2_category": detail,
            "meta_info": {"source": "AI2D", "split": "test", "image_path": "x"},
        }
        for row, detail in enumerate(details)
    ]


def test_mmstar_official(tmp_path):
    write_hub(tmp_path, "Lin-Chen/MMStar", "val", star_rows())
    data = load(tmp_path, "mmstar")
    assert data.questions[0].message == f"Which?\nOptions: A: a, B: b\n{LETTER}"
    found = score(data, "A", "B", "A dog")
    assert found.values == {"accuracy": pytest.approx(200 / 3)}
    assert found.groups["category"] == {"coarse perception": (50.0, 2), "math": (100.0, 1)}
    sheet = openpyxl.load_workbook(io.BytesIO(data.submission({"0": "A", "2": "C"})["MMStar.xlsx"])).active
    header, first, second = sheet.iter_rows(values_only=True)
    assert header == ("index", "question", "answer", "category", "l2_category", "bench", "prediction")
    assert first[0] == 0 and second[-2:] == ("AI2D", "C")


def test_mmstar_of_lmms_eval_averages_second_level_categories(tmp_path):
    write_hub(tmp_path, "Lin-Chen/MMStar", "val", star_rows())
    data = load(tmp_path, "mmstar", "lmms")
    assert data.questions[0].suffix == LETTER.removesuffix(".")
    found = score(data, "A", "B", "(A)")
    assert found.main == "average" and found.values == {"average": 75, "accuracy": pytest.approx(200 / 3)}
    assert found.terms is not None and found.terms.value(found.terms.sums.sum(0)) == 75
    # A draw without one of the categories averages over the others, many draws at once.
    assert found.terms.value(found.terms.sums[[[0, 0], [0, 1]]].sum(1)).tolist() == [100, 50]


# -- MMMU ------------------------------------------------------------------------------------------------------------


def mmmu_row(name: str, question: str, options: Sequence[str], answer: str, images: int = 1) -> dict[str, Any]:
    return {
        "id": f"validation_{name}",
        "question": question,
        "options": str(list(options)),
        "answer": answer,
        "question_type": "multiple-choice" if options else "open",
        **{f"image_{number}": cell((number, 0, 0)) if number <= images else None for number in range(1, 8)},
    }


def mmmu_rows() -> list[dict[str, Any]]:
    return [
        mmmu_row("Art_Theory_1", "Who made <image 1> and <image 3>?", ["Ann", "Bob"], "B", 3),
        mmmu_row("Music_1", "Which?", ["<image 1>", "<image 2>"], "A", 2),
        mmmu_row("Math_15", "How much in <image 1>?", [], "['24/7', '3.429']"),
    ]


def test_mmmu_official(tmp_path):
    write_hub(tmp_path, "lmms-lab/MMMU", "validation", mmmu_rows())
    data = load(tmp_path, "mmmu")
    choice, several, opened = data.questions
    assert choice.message == f"Who made <image 1> and <image 3>?\n(A) Ann\n(B) Bob\n\n{LETTER}"
    assert opened.message == f"How much in <image 1>?\n{SHORT}"
    assert (choice.images, several.images, opened.images) == (("0/image_1",), (), ("2/image_1",))
    assert data.facts["without_image_for_several_in_options"] == 1
    found = score(data, "(B)", "no idea", "It is 3.429")
    assert found.correct["validation_Math_15"] == 1 and found.values["drawn_at_random"] == 1
    assert data.submission({"validation_Math_15": "3.4", "validation_Art_Theory_1": "(A)."}) == {
        "total_val_output.json": {"validation_Math_15": "3.4", "validation_Art_Theory_1": "A"}
    }


def test_mmmu_of_lmms_eval_shows_the_images_that_the_prompt_names(tmp_path):
    write_hub(tmp_path, "lmms-lab-encoder/MMMU", "validation", mmmu_rows())
    data = load(tmp_path, "mmmu", "lmms")
    choice, several, opened = data.questions
    assert choice.message == f"Who made <image 1> and <image 3>?\nA. Ann\nB. Bob\n\n{LETTER}"
    assert opened.message == f"How much in <image 1>?\n\n{SHORT}"
    assert choice.images == ("0/image_1", "0/image_3") and several.images == ("1/image_1", "1/image_2")
    # The list's text is the answer there, which a right answer does not contain.
    assert score(data, "B", "A", "3.429").correct["validation_Math_15"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "validation_12"}, "validation_12"),
        ({"options": "['Ann', "}, "should be a list"),
        ({"options": "[]"}, "no options"),
        ({"answer": ""}, "1 rows of .* have no answer"),
    ],
)
def test_mmmu_names_what_is_wrong_with_a_row(tmp_path, change, message):
    write_hub(tmp_path, "lmms-lab/MMMU", "validation", [{**mmmu_rows()[0], **change}])
    with pytest.raises(UserError, match=message):
        load(tmp_path, "mmmu")


# MMMU's parser against the authors' on every vector, and what differs: draws that do not depend on order.


def item(answer="A", subject="Art", options=MMMU_OPTIONS) -> mmmu.MmmuReference:
    return mmmu.MmmuReference(answer, subject, options)


@pytest.mark.parametrize("row", MMMU_TABLE["multiple_choice"], ids=lambda row: row["response"])
def test_letters_equal_the_authors(row):
    expected = None if row["parsed"] == "RANDOM" else row["parsed"]
    assert mmmu.find_letter(row["response"], MMMU_OPTIONS) == expected


@pytest.mark.parametrize("row", MMMU_TABLE["open"], ids=lambda row: row["response"])
def test_open_answers_equal_the_authors(row):
    assert sorted(map(str, mmmu.read_open(row["response"]))) == row["parsed"]


@pytest.mark.parametrize("row", MMMU_TABLE["eval_open"], ids=lambda row: row["response"])
def test_credit_of_open_answers_equals_the_authors(row):
    assert mmmu.open_score(row["response"], row["gold"]) == row["correct"]


def test_two_rows_of_the_table_are_drawn():
    rows = {str(number): row["response"] for number, row in enumerate(MMMU_TABLE["multiple_choice"])}
    score = mmmu.evaluate({name: item() for name in rows}, rows)
    assert score.values["drawn_at_random"] == 2 and "drawn_at_random" in score.points
    assert any(note.startswith("2 answers name no option") for note in score.notes)


def test_a_drawn_letter_belongs_to_its_question():
    draws = {name: mmmu.draw_letter(name, MMMU_OPTIONS) for name in map(str, range(50))}
    assert set(draws.values()) == set("ABCD")
    assert draws == {name: mmmu.draw_letter(name, MMMU_OPTIONS) for name in reversed(draws)}
    # Of Python's generator seeded with a text, which is the same on every machine.
    assert mmmu.draw_letter("validation_Art_1", MMMU_OPTIONS) == "C"


def test_lmms_finds_a_letter_at_the_end_of_a_word_and_before_a_full_stop():
    for text, official, lmms in [("NASA is", None, "A"), ("D. None, I guess", None, "D"), ("(B", None, "B")]:
        assert mmmu.find_letter(text, MMMU_OPTIONS) is official
        assert mmmu.find_letter(text, MMMU_OPTIONS, mmmu.LMMS_FORMS) == lmms


def test_overall_is_weighted_by_questions_and_absent_subjects_are_named():
    items = {"1": item(), "2": item(), "3": item(), "4": item("C", "Physics"), "5": item("12", "Music", None)}
    score = mmmu.evaluate(items, {"1": "A", "2": "B", "3": "(A)", "4": "C.", "5": "It is 12."})
    assert score.values["accuracy"] == 80
    assert score.groups["subject"]["Art"] == (pytest.approx(200 / 3), 3)
    assert score.groups["domain"] == {"Art and Design": (75.0, 4), "Science": (100.0, 1)}
    assert score.groups["question type"] == {"multiple choice": (75.0, 4), "open": (100.0, 1)}
    assert score.notes[0].startswith("27 of 30 subjects have no question here: Art_Theory, Design")


# -- tables of the hub -----------------------------------------------------------------------------------------------


class Row(TypedDict):
    q: str
    z: NotRequired[str]


class Answered(Row):
    answer: str


def test_rows_images_and_lists_of_them_of_either_owner(tmp_path):
    write_hub(tmp_path, "new/X", "test", [{"q": "a", "image": cell()}, {"q": "b", "image": cell("blue")}])
    table = open_table(tmp_path, ("new/X", "old/X"), None, "test")
    assert table.id == "new/X" and table.records(Row) == [{"q": "a"}, {"q": "b"}]
    images = table.images()
    assert images.missing(["0/image", "2/image"]) == ["2/image"]
    assert images.open("1/image").getpixel((0, 0)) == (0, 0, 255)
    write_hub(tmp_path, "old/Y", "test", [{"q": "a", "image": [cell(), cell("lime")]}])
    table = open_table(tmp_path, ("new/Y", "old/Y"), None, "test")
    assert table.id == "old/Y" and table.images().open("0/image/1").getpixel((0, 0)) == (0, 255, 0)


def test_a_table_that_is_changed_in_place_is_read_again(tmp_path):
    """With the same size and time of modification it was not: a corrected table gave the old score in a new store."""
    write_hub(tmp_path, "new/X", "test", [{"q": "a"}])
    (file,) = (tmp_path / "hub").rglob("*.parquet")
    assert open_table(tmp_path, ("new/X",), None, "test").records(Row) == [{"q": "a"}]
    state = file.stat()
    write_hub(tmp_path, "new/X", "test", [{"q": "b"}])
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (state.st_size, state.st_mtime_ns)
    assert open_table(tmp_path, ("new/X",), None, "test").records(Row) == [{"q": "b"}]


def test_missing_copies_columns_and_splits_are_named(tmp_path):
    with pytest.raises(UserError, match=r"No copy of new/X or old/X below .*hf download new/X"):
        open_table(tmp_path, ("new/X", "old/X"), None, "test")
    write_hub(tmp_path, "new/X", "test", [{"q": "a", "image": cell()}])
    with pytest.raises(UserError, match="has no column answer; it has q, image"):
        open_table(tmp_path, ("new/X",), None, "test").records(Answered)
    with pytest.raises(UserError, match="split val of"):
        open_table(tmp_path, ("new/X",), None, "val")


# -- copies in the hub's cache ---------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of the hub that is empty, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub-cache"


def rows(*questions: str) -> list[dict]:
    return [{"q": question, "image": cell()} for question in questions]


@pytest.mark.parametrize("source", ["auto", "mirror"])
def test_a_snapshot_in_the_cache_of_the_hub_is_found_offline(tmp_path, cache, source):
    """`load_dataset` alone does not look there without a network, so a set that `hf download` had fetched was lost."""
    written = write_hub(tmp_path / "w", "old/X", "test", rows("a", "b")) / "hub" / "old" / "X"
    snapshot = hub_cache(cache, written, "datasets", "old/X")
    table = open_table(tmp_path, ("new/X", "old/X"), None, "test", source)
    assert (
        table.id == "old/X" and table.where == str(snapshot) and [row["q"] for row in table.records(Row)] == ["a", "b"]
    )
    assert table.images().open("1/image").size
    # Another commit is another table.
    shutil.rmtree(written)
    write_hub(tmp_path / "w", "old/X", "test", rows("c"))
    hub_cache(cache, written, "datasets", "old/X", commit="4567def")
    assert open_table(tmp_path, ("new/X", "old/X"), None, "test", source).records(Row) == [{"q": "c"}]
    # A copy that was put below DATA comes first.
    write_hub(tmp_path, "new/X", "test", rows("d", "e", "f"))
    assert open_table(tmp_path, ("new/X", "old/X"), None, "test", source).id == "new/X"


def test_what_is_not_in_the_cache_is_told_with_the_variables_that_say_so(tmp_path, cache):
    """Offline, the error named neither HF_HUB_OFFLINE nor HF_HOME."""
    for source in ("auto", "mirror"):
        with pytest.raises(UserError) as caught:
            open_table(tmp_path, ("new/X", "old/X"), None, "test", source)
        assert all(name in str(caught.value) for name in ("HF_HOME", str(cache), "hf download new/X")), source
    assert "HF_HUB_OFFLINE" in str(caught.value)


HALVES = {"test-00000-of-00002": ("a", "b"), "test-00001-of-00002": ("c",), "val-00000-of-00001": ("d",)}
PAGE = """---
configs:
- config_name: first
  data_files:
  - {split: train, path: first/train-*}
- config_name: default
  data_files:
  - {split: test, path: data/test-*}
  - {split: val, path: data/val-*}
%s---
"""
SIZES = """dataset_info:
  config_name: default
  features: [{name: q, dtype: string}]
  splits: [{name: test, num_bytes: 9, num_examples: 3}, {name: val, num_bytes: 9, num_examples: 1}]
"""


def tables(folder, *files: str, page: str = "") -> Path:
    """A data set of some of the files of HALVES."""
    (folder / "data").mkdir(parents=True)
    for name in files:
        datasets.Dataset.from_list([{"q": q} for q in HALVES[name]]).to_parquet(folder / "data" / f"{name}.parquet")
    if page:
        (folder / "README.md").write_text(page)
    return folder


@pytest.mark.parametrize("page", ["", PAGE % "", PAGE % SIZES], ids=["no page", "files", "files and sizes"])
def test_a_snapshot_of_some_splits_gives_those_that_it_has(tmp_path, cache, page):
    """`datasets` refuses a folder that lacks a split or a configuration that its page lists."""
    both = [name for name in HALVES if name.startswith("test")]
    hub_cache(cache, tables(tmp_path / "w", *both, page=page), "datasets", "me/set")
    config = "default" if page else None
    assert [row["q"] for row in open_table(tmp_path, ("me/set",), config, "test").records(Row)] == ["a", "b", "c"]
    with pytest.raises(UserError, match=r"split val of .*hf download me/set"):
        open_table(tmp_path, ("me/set",), config, "val")
    # The other owner's copy has it.
    other = tables(tmp_path / "o", "val-00000-of-00001", page=page)
    hub_cache(cache, other, "datasets", "you/set")
    assert open_table(tmp_path, ("me/set", "you/set"), config, "val").id == "you/set"


def test_a_split_that_is_smaller_than_its_page_says_is_refused(tmp_path, cache):
    """Read alone, a split is compared with nothing by `datasets`."""
    folder = tables(tmp_path / "w", "test-00001-of-00002", page=PAGE % SIZES)
    (folder / "data" / "test-00001-of-00002.parquet").rename(folder / "data" / "test-0.parquet")
    hub_cache(cache, folder, "datasets", "me/set")
    with pytest.raises(UserError, match="Cannot read"):
        open_table(tmp_path, ("me/set",), "default", "test")


@pytest.mark.parametrize("page", ["", PAGE % ""], ids=["no page", "files"])
@pytest.mark.parametrize("damage", ["part", "blob"])
def test_a_copy_that_lacks_a_part_of_a_table_is_refused(tmp_path, cache, page, damage):
    """Of an interrupted download, the parts that were there were read as the whole table: 2 of 3 rows, and no word."""
    snapshot = hub_cache(cache, tables(tmp_path / "w", *HALVES, page=page), "datasets", "me/set")
    lost = snapshot / "data" / "test-00001-of-00002.parquet"
    (lost if damage == "part" else lost.resolve()).unlink()
    config = "default" if page else None
    incomplete = r"incomplete.* data/test-00001-of-00002\.parquet\. hf download me/set --repo-type dataset"
    with pytest.raises(UserError, match=rf"{incomplete} fetches"):
        open_table(tmp_path, ("me/set",), config, "test")
    (tmp_path / "hub" / "me").mkdir(parents=True)
    (tmp_path / "hub" / "me" / "set").symlink_to(snapshot)
    with pytest.raises(UserError, match=rf"{incomplete} --local-dir .* fetches"):
        open_table(tmp_path, ("me/set",), config, "test")


def test_official_files_are_not_replaced_by_the_cache_unasked(tmp_path, cache):
    """With --source mirror it serves POPE; without, the error says that it could."""
    pope = benchmarks.get("pope")
    for name in pope.mirror:
        folder = DEFAULT_DATA / "hub" / name
        if folder.is_dir():
            hub_cache(cache, folder, "datasets", name)
    with pytest.raises(UserError, match="--source mirror"):
        pope.load(tmp_path, "test")
    loaded = pope.load(tmp_path, "test", source="mirror")
    assert loaded.questions == pope.load(DEFAULT_DATA, "test", source="mirror").questions
    loaded.sample(loaded.questions[0])


def test_check_data_shows_a_set_that_is_in_the_cache(tmp_path, cache):
    """Of sets that exist on the hub alone, which a run reads from there."""
    folder = DEFAULT_DATA / "hub" / "Lin-Chen" / "MMStar"
    assert check_folder(tmp_path, benchmarks.get("mmstar")).state == ABSENT
    hub_cache(cache, folder, "datasets", "Lin-Chen/MMStar")
    found = check_folder(tmp_path, benchmarks.get("mmstar"))
    assert found.state == COMPLETE and found.source.startswith("Lin-Chen/MMStar")


@pytest.mark.process
@pytest.mark.parametrize("cache_name", ["HF_HOME", "HF_HUB_CACHE"])
@pytest.mark.parametrize("offline", ["HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_the_variables_of_the_hub_are_those_that_count(tmp_path, cache_name, offline):
    home = tmp_path / "home"
    hub_cache(home / "hub", tables(tmp_path / "w", "val-00000-of-00001"), "datasets", "me/set")
    names = ("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    environment = {key: value for key, value in os.environ.items() if key not in names}
    environment |= {cache_name: str(home if cache_name == "HF_HOME" else home / "hub"), offline: "1"}
    environment["HF_DATASETS_CACHE"] = str(tmp_path / "arrow")
    program = (
        "from pathlib import Path; from eval.benchmarks.hub import open_table\n"
        "print(len(open_table(Path('none'), ('me/set',), None, 'val', 'mirror')))"
    )
    done = subprocess.run([sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "1", done.stderr


OFFICIAL = [name for name in benchmarks.names() if benchmarks.get(name).needs and benchmarks.get(name).mirror]


@pytest.mark.parametrize("name", OFFICIAL)
def test_missing_official_files_are_named_with_the_mirror(tmp_path, name):
    found = benchmarks.get(name)
    with pytest.raises(UserError, match=r"No .* questions at ") as error:
        found.load(tmp_path, found.splits[0], source="official")
    assert "--data should be the folder that holds" in str(error.value)
    if name != "activitynet_qa":
        with pytest.raises(UserError, match=rf"no copy of {found.mirror[0]} or {found.mirror[1]} below .*hub"):
            found.load(tmp_path, found.splits[0])
