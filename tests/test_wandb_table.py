"""The W&B run of a paper table, read back from its offline file."""

import json
from pathlib import Path

import pytest
from PIL import Image

from eval.tracking import log_table_run
from eval.tracking.table_run import GALLERY, TABLE, TOKENS_PLOT, TTFT_PLOT, figure, slug
from tests.read_wandb import OfflineRun, find_runs, read_run, without_wandb

POINTS = [
    {"method": "full", "budget": 576, "tokens": 576.0, "ttft_ms": 300.0, "score": 61.9},
    {"method": "consensusdrop", "budget": 128, "tokens": 128.5, "ttft_ms": None, "score": 60.0},
    {"method": "consensusdrop", "budget": 64, "tokens": 64.0, "ttft_ms": 110.0, "score": 58.0},
    {"method": "fastv", "budget": 64, "tokens": 64.0, "ttft_ms": 120.0, "score": None},
]
COLUMNS = ("method", "budget", "GQA", "percent of full")
ROWS = [["full", 576, 61.9, 100.0], ["consensusdrop", 64, 58.0, None]]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    without_wandb(monkeypatch, tmp_path / "nobody")


def log(folder: Path, mode: str = "offline", **changes) -> None:
    folder.mkdir(exist_ok=True)
    files = [folder / "table.md", folder / "table.csv"]
    for file in files:
        file.write_text(f"content of {file.name}")
    picture = folder / "kept.png"
    Image.new("RGB", (8, 8)).save(picture)
    arguments = {
        "about": {"benchmark": "gqa", "model": "fake", "budgets": [64, 128]},
        "columns": COLUMNS,
        "rows": ROWS,
        "files": files,
        "points": POINTS,
        "pictures": {"kept by consensusdrop": picture},
    }
    log_table_run(mode, folder, "LLaVA 1.5", **(arguments | changes))


def read_all(folder: Path) -> list[OfflineRun]:
    return [read_run(path) for path in find_runs(folder)]


def test_a_table_reads_back_with_its_files_plots_and_pictures(tmp_path, capsys):
    log(tmp_path / "t")
    (logged,) = read_all(tmp_path / "t")
    assert f"wandb sync {logged.folder}" in capsys.readouterr().out
    assert (logged.job_type, logged.group, logged.exit_code) == ("table", "LLaVA 1.5", 0)
    assert logged.tags == ("LLaVA 1.5", "gqa", "fake")
    assert logged.config["table"] == "LLaVA 1.5" and logged.config["budgets"] == [64, 128]
    content = logged.table(TABLE)
    assert content["columns"] == list(COLUMNS) and content["data"] == ROWS
    assert logged.artifact_types["table-LLaVA-1.5"] == "table"
    assert logged.metadata["table-LLaVA-1.5"]["benchmark"] == "gqa"
    files = logged.artifacts["table-LLaVA-1.5"]
    assert {name: path.read_text() for name, path in files.items()} == {
        "table.md": "content of table.md",
        "table.csv": "content of table.csv",
    }
    plot = json.loads(logged.media(TOKENS_PLOT).read_text())
    assert {line["name"]: (line["x"], line["y"]) for line in plot["data"]} == {
        "full": ([576], [61.9]),
        "consensusdrop": ([64, 128.5], [58, 60]),
    }, "lines go from few tokens to many, and a cell without a score is no point"
    plot = json.loads(logged.media(TTFT_PLOT).read_text())
    assert {line["name"]: line["x"] for line in plot["data"]} == {"full": [300], "consensusdrop": [110]}
    assert plot["layout"]["xaxis"]["title"]["text"] == "time to first token of a batch (ms)"
    assert logged.last(GALLERY)["captions"] == ["kept by consensusdrop"]
    assert (logged.summary["rows"], logged.summary["points"]) == (2, 4)


def test_the_same_table_again_continues_its_run_with_a_later_step(tmp_path):
    for _ in range(3):  # in one second, too: W&B then adds -1 and so on to the folder's name
        log(tmp_path / "t")
    parts = read_all(tmp_path / "t")
    assert len(parts) == 3 and len({one.name for one in parts}) == 1
    steps = [[row["_step"] for row in one.history if TABLE in row] for one in parts]
    assert sorted(steps) == [[0], [1], [2]], "W&B drops rows whose step is not above the last one"


def test_two_tables_in_one_folder_are_two_runs(tmp_path):
    log(tmp_path / "t")
    log_table_run("offline", tmp_path / "t", "ablation", {}, COLUMNS, ROWS, [], [])
    first, second = read_all(tmp_path / "t")
    assert {first.group, second.group} == {"LLaVA 1.5", "ablation"} and first.name != second.name
    bare = next(one for one in (first, second) if one.group == "ablation")
    assert TOKENS_PLOT not in bare.keys and GALLERY not in bare.keys, "nothing to draw"


def test_numbers_that_nobody_measured_make_no_plot(tmp_path):
    log(tmp_path / "t", points=[point | {"ttft_ms": None} for point in POINTS])
    (logged,) = read_all(tmp_path / "t")
    assert TOKENS_PLOT in logged.keys and TTFT_PLOT not in logged.keys


def test_a_missing_file_is_one_line_and_no_error(tmp_path, capsys):
    log(tmp_path / "t", files=[tmp_path / "gone.tex"])
    err = capsys.readouterr().err
    assert err.startswith("W&B logging stopped (") and err.count("\n") == 1 and "gone.tex" in err


def test_switched_off_nothing_is_written(tmp_path):
    log(tmp_path / "t", mode="disabled")
    assert not (tmp_path / "t" / "wandb").exists() and not list((tmp_path / "t").glob("wandb_id*"))


def test_scores_of_two_benchmarks_are_two_lines():
    points = [point | {"benchmark": name} for point in POINTS[:3] for name in ("GQA", "POPE")]
    lines = figure(points, "tokens", "tokens", "t").to_plotly_json()["data"]
    assert [line["name"] for line in lines] == [
        "full, GQA", "full, POPE", "consensusdrop, GQA", "consensusdrop, POPE"
    ]  # fmt: skip
    assert [len(line["x"]) for line in lines] == [1, 1, 2, 2]


def test_plots_hold_plain_lists():
    """plotly writes arrays as base64, which older viewers draw as nothing."""
    assert "bdata" not in json.dumps(figure(POINTS[:3], "tokens", "tokens", "t").to_plotly_json(), default=str)


@pytest.mark.parametrize(
    ("name", "expected"), [("LLaVA 1.5", "LLaVA-1.5"), ("../x", "x"), ("表", "table"), ("a/b", "a-b")]
)
def test_names_become_file_names(name, expected):
    assert slug(name) == expected
