"""Data sets of the hub from local copies, GQA's mirror, and the look at a data folder."""

import io
import json

import pytest
from PIL import Image

from eval import benchmarks, show
from eval.benchmarks.hub import open_table
from eval.benchmarks.records import NotRequired, TypedDict
from llava.errors import UserError
from tests.eval_fakes import write_gqa

datasets = pytest.importorskip("datasets")


def png(colour: str) -> dict[str, bytes]:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def write_table(data, name: str, rows: list[dict], split: str = "test", images: tuple[str, ...] = ("image",)) -> None:
    """A local copy as the hub has it: one parquet file per split."""
    table = datasets.Dataset.from_list(rows)
    for column in images:
        listed = isinstance(rows[0][column], list)
        table = table.cast_column(column, datasets.List(datasets.Image()) if listed else datasets.Image())
    path = data / "hub" / name / "data"
    path.mkdir(parents=True, exist_ok=True)
    table.to_parquet(path / f"{split}-00000-of-00001.parquet")


class Row(TypedDict):
    q: str
    z: NotRequired[str]


class Answered(Row):
    answer: str


def test_rows_and_pictures(tmp_path):
    write_table(tmp_path, "new/X", [{"q": "a", "image": png("red")}, {"q": "b", "image": png("blue")}])
    table = open_table(tmp_path, ("new/X", "old/X"), None, "test")
    assert table.id == "new/X" and table.records(Row) == [{"q": "a"}, {"q": "b"}]
    pictures = table.pictures()
    assert pictures.missing(["0/image", "2/image"]) == ["2/image"]
    assert pictures.open("1/image").getpixel((0, 0)) == (0, 0, 255)


def test_the_old_owners_copy_is_found_and_lists_of_pictures_are_read(tmp_path):
    write_table(tmp_path, "old/X", [{"q": "a", "image": [png("red"), png("lime")]}])
    table = open_table(tmp_path, ("new/X", "old/X"), None, "test")
    assert table.id == "old/X" and table.pictures().open("0/image/1").getpixel((0, 0)) == (0, 255, 0)


def test_missing_copies_columns_and_splits_are_named(tmp_path):
    with pytest.raises(UserError, match=r"No copy of new/X or old/X below .*hf download new/X"):
        open_table(tmp_path, ("new/X", "old/X"), None, "test")
    write_table(tmp_path, "new/X", [{"q": "a", "image": png("red")}])
    with pytest.raises(UserError, match="has no column answer; it has q, image"):
        open_table(tmp_path, ("new/X",), None, "test").records(Answered)
    with pytest.raises(UserError, match="Cannot read split val of"):
        open_table(tmp_path, ("new/X",), None, "val")


def write_gqa_mirror(data) -> None:
    folder = data / "hub" / "lmms-lab" / "GQA"
    for config, rows in {
        "testdev_balanced_instructions": [
            {"id": "1", "question": "Is it red?", "answer": "yes", "imageId": "n1"},
            {"id": "2", "question": "Which colour?", "answer": "blue", "imageId": "n0"},
        ],
        "testdev_balanced_images": [{"id": "n0", "image": png("blue")}, {"id": "n1", "image": png("red")}],
    }.items():
        table = datasets.Dataset.from_list(rows)
        if "image" in rows[0]:
            table = table.cast_column("image", datasets.Image())
        (folder / config).mkdir(parents=True)
        table.to_parquet(folder / config / "testdev-00000-of-00001.parquet")
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: testdev\n    path: {name}/testdev-*\n"
        for name in ("testdev_balanced_instructions", "testdev_balanced_images")
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")


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
    assert show.check_data_command([str(data), "gqa", "--json", str(tmp_path / "r.json")]) == 1
    out = capsys.readouterr().out
    assert "testdev_balanced_questions.json is missing: questions1.2.zip of https" in out and "licence: " in out
    assert json.loads((tmp_path / "r.json").read_text())[0]["state"] == "incomplete"
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
