"""Benchmarks that are a file of YAML: the example of CONTRIBUTING.md from the table to the score, and wrong files."""

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

from eval import benchmarks
from eval.__main__ import main
from eval.benchmarks import plain
from eval.config import ROOT
from eval.metrics.short_answers import METRICS
from llava.errors import UserError
from tests.benchmark_files import cell

SUFFIX = "Answer with the option's letter from the given choices directly."
ROWS = [
    {"sign_id": "s7", "text": "What must a driver do?", "choices": ["stop", "turn"], "label": 0, "shape": "octagon"},
    {"sign_id": "s8", "text": "What is ahead?", "choices": ["bend", "school", "ice"], "label": 2, "shape": "triangle"},
    {"sign_id": "s9", "text": "How fast?", "choices": ["30", "50"], "label": 1, "shape": "circle"},
]  # fmt: skip


def example() -> str:
    """The file that CONTRIBUTING.md shows."""
    page = (ROOT / "CONTRIBUTING.md").read_text().partition("## A benchmark in 25 lines of YAML\n")[2]
    return re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def written(folder: Path, **changes: Any) -> Path:
    """The example in a file, with changes; a key that becomes None is left out."""
    path = folder / "signs.yaml"
    content = yaml.safe_load(example()) | changes
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    return path


def write_table(data: Path, rows=ROWS) -> None:
    """The split that the hub calls validation; the first two questions are about one photo."""
    rows = [row | {"photo": cell((max(number, 1), 0, 0))} for number, row in enumerate(rows)]
    table = datasets.Dataset.from_list(rows).cast_column("photo", datasets.Image())
    folder = data / "hub" / "my-name" / "signs" / "data"
    folder.mkdir(parents=True)
    table.to_parquet(folder / "validation-00000-of-00001.parquet")


def test_the_example_runs_from_the_table_to_the_score(tiny_path, tmp_path, monkeypatch, capsys):
    path = tmp_path / "signs.yaml"
    path.write_text(example())
    assert len(example().splitlines()) <= 25
    write_table(tmp_path)
    monkeypatch.setattr(plain, "BENCHMARKS", (*plain.BENCHMARKS, plain.read(path)))
    benchmarks.registry.cache_clear()
    try:
        words = ["--benchmark", "signs", "--method", "full", "--data", str(tmp_path), "--output", str(tmp_path / "o")]
        assert main([*words, "--model", str(tiny_path), "--device", "cpu", "--wandb", "disabled"]) == 0
        data = benchmarks.get("signs").load(tmp_path, "val")
    finally:
        monkeypatch.undo()
        benchmarks.registry.cache_clear()
    assert "Signs val" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "o" / "answers.jsonl").read_text().splitlines()]
    assert [line["question_id"] for line in lines] == ["s7", "s8", "s9"]
    assert lines[1]["prompt"] == f"What is ahead?\nA. bend\nB. school\nC. ice\n{SUFFIX}"
    result = json.loads((tmp_path / "o" / "result.json").read_text())
    assert result["main"] == "accuracy" and result["settings"]["max_new_tokens"] == 16
    assert set(result["groups"]["shape"]) == {"circle", "octagon", "triangle"}
    # The random model's answers say nothing about the score.
    assert [question.images for question in data.questions] == [("0/photo",), ("0/photo",), ("2/photo",)]
    assert [question.answer for question in data.questions] == ["A", "C", "B"]
    found = data.score(["s7", "s8", "s9"], {"s7": "A", "s8": "(B) school", "s9": "The answer is B."})
    assert found.values == {"accuracy": pytest.approx(200 / 3)} and found.notes == ()
    assert found.groups == {"shape": {"circle": (100.0, 1), "octagon": (100.0, 1), "triangle": (0.0, 1)}}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"anwser": "label"}, r"Unknown key 'anwser'\. Did you mean 'answer'"),
        ({"metric": "lettre"}, r"Unknown metric 'lettre'\. Did you mean 'letter'"),
        ({"profiles": {"lava": {}}}, r"Unknown profile 'lava'\. Did you mean 'llava'"),
        ({"profiles": {"llava": {"sufix": "x"}}}, r"Unknown key 'sufix'\. Did you mean 'suffix'"),
        ({"profiles": {}}, r"profiles: .* at least 1 item"),
        ({"splits": {"test": {"questions": "many"}}}, r"splits\.test\.questions: .* integer"),
        ({"hub": "my-name/signs"}, r"hub: .* tuple"),
        ({"answer_is": "number"}, r"answer_is: Input should be 'text', 'texts', 'letter' or 'index'"),
        ({"optional": ["shap"]}, r"column under optional 'shap'\. Did you mean 'shape'"),
        ({"options": None}, r"answer_is: index needs options"),
        ({"licence": None}, r"licence: Field required"),
        ({"upload": {"file": "a.json", "server": "s", "splits": ["tets"]}}, r"split under upload 'tets'"),
        ({"upload": {"file": "a.json", "server": "s", "splits": ["test"]}, "id": None}, r"upload needs id"),
        ({"parts": {"round": {"shape": "circle", "text": "x"}}}, r"part round .* one column"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_one_sentence(tmp_path, changes, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        plain.read(written(tmp_path, **changes))
    assert "signs.yaml" in str(error.value) and "\n" not in str(error.value)


def test_a_name_that_another_benchmark_has_is_refused(tmp_path, monkeypatch):
    """The file would have stood in place of the benchmark without a word."""
    taken = written(tmp_path).rename(tmp_path / "gqa.yaml")
    monkeypatch.setattr(plain, "BENCHMARKS", (*plain.BENCHMARKS, plain.read(taken)))
    with pytest.raises(UserError, match="benchmarks are called gqa"):
        benchmarks.registry.__wrapped__()


@pytest.mark.parametrize(
    ("changes", "row", "sentence"),
    [
        ({"answer": "labl"}, {}, r"has no column labl; it has .*\. Did you mean 'label'"),
        ({"groups": {"shape": "shpe"}}, {}, r"has no column shpe; it has .*\. Did you mean 'shape'"),
        ({"image": "foto"}, {}, r"has no column foto; it has .*\. Did you mean 'photo'"),
        ({}, {"label": 2}, r"row 0 has answer '2', expected an index of its 2 options"),
        ({"answer_is": "letter", "answer": "shape"}, {}, r"row 0 has answer 'octagon', expected one of A, B"),
        ({"question": "shape"}, {"shape": ""}, r"row 0 has no shape"),
    ],
)
def test_a_table_that_does_not_fit_is_one_sentence(tmp_path, changes, row, sentence):
    write_table(tmp_path, [ROWS[0] | row, *ROWS[1:]])
    with pytest.raises(UserError, match=sentence) as error:
        plain.read(written(tmp_path, **changes)).load(tmp_path, "val")
    assert "\n" not in str(error.value)


def test_options_of_several_columns_and_several_accepted_answers(tmp_path):
    """A row may have fewer options than another, and the best of the accepted answers counts."""
    rows = [{"q": "Which?", "A": "left", "B": "right", "C": None, "right": ["B", "right"]}]
    rows.append({"q": "Where?", "A": "up", "B": "down", "C": "on", "right": ["C"]})
    write_table(tmp_path, rows)
    columns = {"question": "q", "options": ["A", "B", "C"], "answer": "right", "answer_is": "texts", "id": None}
    data = plain.read(written(tmp_path, **columns, metric="exact_match", groups={})).load(tmp_path, "val")
    assert [question.question for question in data.questions] == [
        "Which?\nA. left\nB. right", "Where?\nA. up\nB. down\nC. on",
    ]  # fmt: skip
    assert data.score(["0", "1"], {"0": "Right.", "1": "B"}).values == {"accuracy": 50}


def test_every_metric_of_a_short_answer_tells_right_from_wrong():
    for name, score in METRICS.items():
        right, wrong = (["B"], ["C"]) if "letter" in name else (["12"] * 10, ["7"] * 10)
        assert score("B" if "letter" in name else "12", right) == 1 and score("x", wrong) == 0, name
        assert score("B" if "letter" in name else "12", wrong) == 0, name
