"""Data sets of the hub from local copies, GQA's mirror, and the look at a data folder."""

import pytest

from eval import benchmarks, show
from eval.benchmarks.hub import open_table
from eval.benchmarks.records import NotRequired, TypedDict
from llava.errors import UserError
from tests.benchmark_files import cell, write_hub
from tests.eval_fakes import write_gqa


class Row(TypedDict):
    q: str
    z: NotRequired[str]


class Answered(Row):
    answer: str


def test_rows_and_pictures(tmp_path):
    write_hub(tmp_path, "new/X", "test", [{"q": "a", "image": cell()}, {"q": "b", "image": cell("blue")}])
    table = open_table(tmp_path, ("new/X", "old/X"), None, "test")
    assert table.id == "new/X" and table.records(Row) == [{"q": "a"}, {"q": "b"}]
    pictures = table.pictures()
    assert pictures.missing(["0/image", "2/image"]) == ["2/image"]
    assert pictures.open("1/image").getpixel((0, 0)) == (0, 0, 255)


def test_the_old_owners_copy_is_found_and_lists_of_pictures_are_read(tmp_path):
    write_hub(tmp_path, "old/X", "test", [{"q": "a", "image": [cell(), cell("lime")]}])
    table = open_table(tmp_path, ("new/X", "old/X"), None, "test")
    assert table.id == "old/X" and table.pictures().open("0/image/1").getpixel((0, 0)) == (0, 255, 0)


def test_missing_copies_columns_and_splits_are_named(tmp_path):
    with pytest.raises(UserError, match=r"No copy of new/X or old/X below .*hf download new/X"):
        open_table(tmp_path, ("new/X", "old/X"), None, "test")
    write_hub(tmp_path, "new/X", "test", [{"q": "a", "image": cell()}])
    with pytest.raises(UserError, match="has no column answer; it has q, image"):
        open_table(tmp_path, ("new/X",), None, "test").records(Answered)
    with pytest.raises(UserError, match="Cannot read split val of"):
        open_table(tmp_path, ("new/X",), None, "val")


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
    assert "incomplete\n    1 of 5 images are not in" in capsys.readouterr().out
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


def test_check_names_a_wrong_folder_and_a_wrong_name(tmp_path, capsys):
    assert show.check_data_command([str(tmp_path / "none")]) == 2 and "No folder at" in capsys.readouterr().err
    assert show.check_data_command([str(tmp_path), "gqq"]) == 2 and "Did you mean 'gqa'" in capsys.readouterr().err


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
