"""MMBench: letters as the official rules read them, groups of rotations, both sources and the files to upload."""

import base64
import csv
import io
import json
from pathlib import Path

import openpyxl
import pytest

from eval import benchmarks
from eval.benchmarks import mmbench
from eval.benchmarks.llava_files import LETTER, LETTER_CN
from eval.score import score_file
from llava.errors import UserError
from tests.benchmark_files import cell, png, write_hub, write_lines

TABLE = json.loads((Path(__file__).parent / "data" / "mmbench" / "infer_table.json").read_text())
COLUMNS = ["index", "question", "hint", *"ABCD", "answer", "category", "image", "source", "l2-category", "comment"]


@pytest.mark.parametrize("row", TABLE["rows"], ids=lambda row: repr(row["prediction"]))
def test_letters_are_read_as_by_the_official_rules(row):
    assert (mmbench.infer(row["prediction"], TABLE["choices"]) or False) == row["vlmevalkit"]
    assert (mmbench.infer_lmms(row["prediction"], TABLE["choices"]) or False) == row["lmms_eval"]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B because it has long ears and a tail", ""),  # the letter is not among the last four words
        ("B one two three", "B"),
        ("B one two three four", ""),
        ("The answer is a dog", "A"),  # case is ignored after "answer is"
        ("The correct answer is **B** as anybody can see in it", "B"),
        ("I'm sorry, but without the image provided: A", "Z"),
        ("cat " * 20, ""),  # longer than twice all options
    ],
)
def test_quirks_of_vlmevalkits_rules(text, letter):
    assert mmbench.infer(text, TABLE["choices"]) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [("A is what I would say", ""), ("A) is what I would say", "A"), ("It is :D.", "D"), ("cat " * 20, "C")],
)
def test_quirks_of_lmms_evals_rules(text, letter):
    assert mmbench.infer_lmms(text, TABLE["choices"]) == letter


def items(*indices: int) -> dict[str, mmbench.MmbenchReference]:
    choices = {"A": "cat", "B": "dog"}
    return {str(i): mmbench.MmbenchReference(i, "A", choices, f"category {i % 2}", "both") for i in indices}


def test_a_group_counts_if_every_pass_is_right():
    rows = items(1, 2, 3, 1_000_001, 1_000_002, 2_000_002)
    score = mmbench.evaluate(rows, dict.fromkeys(rows, "A") | {"2000002": "B"})
    assert score.values["accuracy"] == pytest.approx(200 / 3)
    assert score.values["vanilla_accuracy"] == 100
    assert score.groups == {
        "category": {"category 0": (0, 1), "category 1": (100, 2)},
        "l2-category": {"both": (pytest.approx(200 / 3), 3)},
    }
    assert score.terms.unit == "group" and score.terms.names == ("1", "2", "3")
    assert score.terms.value(score.terms.sums.sum(0)) == pytest.approx(score.values["accuracy"])
    assert sum(score.correct.values()) == 5


def test_unread_answers_are_wrong_and_counted():
    rows = items(1, 2, 1_000_001, 1_000_002)
    score = mmbench.evaluate(rows, {"1": "hm", "2": "hm", "1000001": "A", "1000002": "B"})
    assert (score.values["accuracy"], score.values["unmatched"]) == (0, 2)
    assert any("no rule reads (unmatched): 2" in note for note in score.notes)


def test_groups_without_their_first_pass_are_left_out():
    score = mmbench.evaluate(items(1, 1_000_002), {"1": "A", "1000002": "B"})
    assert score.values["accuracy"] == 100
    assert any("left out: 1" in note for note in score.notes)


def rows(answers: bool = True) -> list[dict[str, str]]:
    """Two groups of two passes: one with a hint over two lines, one whose third option is "None"."""
    red, blue = (base64.b64encode(png(colour, 40)).decode() for colour in ("red", "blue"))
    first = {"question": 'Which "one"?', "hint": "Line one.\nLine\ttwo.", "image": red, "category": "identity"}
    second = {"question": "哪个?\u2028", "C": "None", "D": "never shown", "image": blue, "category": "place"}
    base = {"source": "s", "l2-category": "perception"}
    table = [
        base | first | {"index": "7", "A": "cat", "B": "dog", "answer": "B"},
        base | second | {"index": "8", "A": "hill", "B": "lake", "answer": "A"},
        base | first | {"index": "1000007", "A": "dog", "B": "cat", "answer": "A"},
        # A short image is the index of the row that has it.
        base | second | {"index": "1000008", "A": "lake", "B": "hill", "answer": "B", "image": "8"},
    ]
    return table if answers else [{k: v for k, v in row.items() if k != "answer"} for row in table]


def write_tsv(path: Path, answers: bool = True, split: str = "dev") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = [*(name for name in COLUMNS if answers or name != "answer"), "split"]
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns, restval="", delimiter="\t", lineterminator="\n")
        table.writeheader()
        table.writerows([row | {"split": split} for row in rows(answers)])
    return path


def load(data: Path, name: str = "mmbench", split: str = "dev", profile: str = "llava", source: str = "auto"):
    return benchmarks.get(name).load(data, split, profile, source)


@pytest.fixture
def data(tmp_path) -> Path:
    write_tsv(tmp_path / "mmbench" / "mmbench_dev_20230712.tsv")
    return tmp_path


def test_llavas_wording(data):
    dataset = load(data)
    first, second = dataset.questions[:2]
    assert first.question == 'Line one.\nLine\ttwo.\nWhich "one"?\nA. cat\nB. dog'
    assert first.message == f"{first.question}\n{LETTER}"
    # The options end at the first empty one, and pandas takes "None" for empty.
    assert second.question == "哪个?\u2028\nA. hill\nB. lake"
    assert (first.id, first.answer, dataset.max_new_tokens) == ("7", "B", 1024)
    assert dataset.facts["rows"] == 4 and dataset.facts["groups"] == 2
    assert dataset.facts["source"] == "mmbench_dev_20230712.tsv"


def test_images_stay_in_the_file_until_they_are_opened(data):
    dataset = load(data)
    dataset.check_images(dataset.questions)
    colours = [dataset.sample(question).image.getpixel((0, 0)) for question in dataset.questions]
    assert colours == [(255, 0, 0), (0, 0, 255), (255, 0, 0), (0, 0, 255)]
    assert [question.images for question in dataset.questions] == [("7",), ("8",), ("7",), ("8",)]
    assert dataset.images.fetch("7") == png("red", 40)


def test_a_row_may_name_a_row_whose_image_is_that_of_an_earlier_one(data, monkeypatch):
    red, place = rows()[0]["image"], {"A": "hill", "B": "lake", "answer": "A", "question": "Which?"}
    table = [place | {"index": "7", "image": red}, place | {"index": "8", "image": red}]
    monkeypatch.setattr(f"{__name__}.rows", lambda answers=True: [*table, place | {"index": "1000008", "image": "8"}])
    write_tsv(data / "mmbench" / "mmbench_dev_20230712.tsv")
    assert [question.images for question in load(data).questions] == [("7",)] * 3


def test_lmms_evals_wording(data):
    dataset = load(data, profile="lmms")
    assert dataset.questions[0].message == (
        f'Line one.\nLine\ttwo. Which "one"? There are several options:\nA. cat\nB. dog\n\n{LETTER}'
    )
    # It goes on after an empty option.
    assert dataset.questions[1].question.endswith("There are several options:\nA. hill\nB. lake\nD. never shown")
    assert dataset.max_new_tokens == 1024


def write_mirror(folder: Path, config: str = "en", split: str = "dev") -> Path:
    """As the hub has it: the word "nan" for cells that are empty."""
    table = []
    for row in rows():
        cells = {name: row.get(name, "nan") for name in ("question", "hint", *"ABCDE", "answer", "category", "source")}
        cells["answer"] = cells["answer"] if split == "dev" else "nan"
        more = {"index": int(row["index"]), "L2-category": row["l2-category"], "split": split, "comment": None}
        table.append(cells | more | {"image": cell("red" if row["index"].endswith("7") else "blue")})
    return write_hub(folder, "lmms-lab/MMBench", split, table, config)


def test_the_mirror_under_llavas_profile_is_the_official_file(data, tmp_path):
    mirror = load(write_mirror(tmp_path), source="mirror")
    official = load(data)
    assert [q.message for q in mirror.questions] == [q.message for q in official.questions]
    assert [q.answer for q in mirror.questions] == [q.answer for q in official.questions]
    assert mirror.sample(mirror.questions[1]).image.getpixel((0, 0)) == (0, 0, 255)
    texts = {"7": "B", "8": "A", "1000007": "A", "1000008": "B"}
    assert sheet(mirror, texts) == sheet(official, texts)
    assert mirror.score(list(texts), texts).values["accuracy"] == 100


def test_lmms_eval_takes_the_mirrors_nan_for_an_option(tmp_path):
    dataset = load(write_mirror(tmp_path), profile="lmms")
    assert "nan" not in dataset.questions[1].question
    names = [question.id for question in dataset.questions]
    # "banana" contains the "nan" of both empty options besides "a dog": three candidates, so none.
    score = dataset.score(names, dict.fromkeys(names, "a dog with a banana"))
    assert score.values["unmatched"] == 4


def test_the_chinese_edition(tmp_path):
    write_mirror(tmp_path, "cn")
    dataset = load(tmp_path, "mmbench_cn")
    assert dataset.questions[0].suffix == LETTER_CN
    lmms = load(tmp_path, "mmbench_cn", profile="lmms")
    # lmms-eval's Chinese prompt keeps the word the mirror has for "no hint".
    assert lmms.questions[1].message.startswith("nan 哪个")
    assert lmms.questions[1].message.endswith("\n\n请直接使用所提供的选项字母作为答案回答。")
    assert lmms.max_new_tokens == 256


def sheet(dataset, texts) -> list[list]:
    (content,) = dataset.submission(texts).values()
    return [list(row) for row in openpyxl.load_workbook(io.BytesIO(content)).active.iter_rows(values_only=True)]


def test_the_file_to_upload_is_that_of_llavas_conversion(data):
    dataset = load(data)
    texts = {"7": "B", "8": "=1+1", "1000007": "A\x07"}
    assert list(dataset.submission(texts)) == ["mmbench_dev_20230712.xlsx"]
    header, *table = sheet(dataset, texts)
    assert header == ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    assert table[0] == [7, 'Which "one"?', "cat", "dog", None, None, "B", "B", "dev"]
    # A formula stays text, a character that no Excel file can hold is left out, a missing answer is an empty cell.
    assert [row[6] for row in table] == ["B", "=1+1", "A", None]


def test_lmms_evals_file(data):
    dataset = load(data, profile="lmms")
    assert list(dataset.submission({"7": "B"})) == ["mmbench_en_dev_results.xlsx"]
    header, row = sheet(dataset, {"7": " B "})
    assert header[:4] == ["index", "question", "answer", "prediction"] and header[-3:] == ["C", "D", "E"]
    assert row[:4] == [7, 'Which "one"?', "B", "B"] and row[-1] == "nan"


def test_llavas_answer_file_is_scored(data, tmp_path):
    dataset = load(data)
    texts = {"7": "B", "8": "A", "1000007": "A", "1000008": "A"}
    path = write_lines(
        tmp_path / "answers.jsonl",
        [{"question_id": int(name), "round_id": 0, "text": text} for name, text in texts.items()],
    )
    record = score_file(path, dataset)
    assert record["metrics"] == {"accuracy": 50, "vanilla_accuracy": 100, "unmatched": 0}
    assert record["confidence"]["accuracy"]["unit"] == "group"
    assert any("2 groups, the release" in note and "1,176" in note for note in record["notes"])


def test_a_split_without_answers_is_for_the_server(tmp_path):
    write_tsv(tmp_path / "mmbench" / "mmbench_test_20230712.tsv", answers=False, split="test")
    dataset = load(tmp_path, split="test")
    score = dataset.score(["7"], {"7": "A"})
    assert score.values == {"accuracy": None} and dataset.sample_score is None
    assert any("upload mmbench_test_20230712.xlsx" in note for note in score.notes)
    assert sheet(dataset, {})[0] == ["index", "question", "A", "B", "C", "D", "prediction", "split"]


@pytest.mark.parametrize("column", [True, False])
def test_scoring_needs_no_images(data, tmp_path, monkeypatch, column):
    """`vtr score mmbench` refused a file without images, which it does not look at; asking still does."""
    bare = [{name: cell for name, cell in row.items() if name != "image"} for row in rows()]
    monkeypatch.setattr(f"{__name__}.rows", lambda answers=True: bare)
    if not column:
        monkeypatch.setattr(f"{__name__}.COLUMNS", [name for name in COLUMNS if name != "image"])
    write_tsv(data / "mmbench" / "mmbench_dev_20230712.tsv")
    path = write_lines(
        tmp_path / "answers.jsonl", [{"question_id": row["index"], "text": row["answer"]} for row in bare]
    )
    record = score_file(path, load(data))
    assert record["metrics"]["accuracy"] == 100
    assert any("4 images are not there" in note for note in record["notes"])
    with pytest.raises(UserError, match="4 of 4 images are not in "):
        load(data).check_images(load(data).questions)


def test_a_damaged_image_is_named(data):
    path = data / "mmbench" / "mmbench_dev_20230712.tsv"
    path.write_text(path.read_text().replace("iVBOR", "iVB*R"))
    dataset = load(data)
    with pytest.raises(UserError, match="index 7, has no readable image"):
        dataset.sample(dataset.questions[0])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("index\tquestion", "index\ttext", "no column question"),
        ("\n1000008\t", "\n8\t", "the index 8, which"),
        ("\n1000008\t", "\neight\t", "the index 'eight'"),
        ("\n8\t", f"\n{'9' * 5000}\t", "at most 18 digits"),
        ("\t\tdev\n1000008", "\n1000008", "12 cells, .* 14 columns"),
        ("\t8\ts\t", "\t99\ts\t", "row '99'"),
        ("\tB\tidentity", "\tZ\tidentity", "should have a letter from A to E as answer, got 'Z'"),
        ("\tB\tidentity", "\tb\tidentity", "got 'b'"),
        ("\tB\tidentity", "\tD\tidentity", "answer D, .* empty"),
        ("\tB\tidentity", "\t\tidentity", "without an answer"),
    ],
)
def test_bad_tables_and_answers_that_no_model_can_give_are_refused(data, old, new, message):
    """Rows whose answer is Z, in lower case or an empty option scored 0 % without a word."""
    path = data / "mmbench" / "mmbench_dev_20230712.tsv"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        load(data)


def test_answers_to_the_english_set_are_not_scored_as_chinese(tmp_path):
    """Both editions share their ids, and the recorded prompts were not looked at."""
    root = Path(__file__).parents[1] / "assets" / "eval"
    toy, chinese = load(root), load(root, "mmbench_cn")
    assert {q.id for q in toy.questions} == {q.id for q in chinese.questions}
    rows = [{"question_id": q.id, "prompt": q.message, "text": q.answer} for q in toy.questions]
    path = write_lines(tmp_path / "answers.jsonl", rows)
    assert score_file(path, toy)["metrics"]["accuracy"] == 100
    with pytest.raises(UserError, match=r"other questions .* MMBench-CN"):
        score_file(path, chinese)
