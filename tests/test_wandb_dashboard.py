"""The W&B run of a paper table, read back from its offline file; the workspace and report: what they show is logged."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import wandb
from PIL import Image

from eval.config import RunConfig
from eval.run import run
from eval.tracking import dashboard
from eval.tracking.dashboard import GROUPING, SECTIONS
from eval.tracking.table_run import GALLERY, TABLE, TOKENS_PLOT, TTFT_PLOT, log_table_run
from tests.eval_fakes import FakeLlava, FakeReducer, write_gqa
from tests.read_wandb import OfflineRun, find_runs, read_run, without_wandb

POINTS = [
    {"method": "full", "budget": 576, "tokens": 576.0, "ttft_ms": 300.0, "score": 61.9},
    {"method": "consensusdrop", "budget": 128, "tokens": 128.5, "ttft_ms": None, "score": 60.0},
    {"method": "consensusdrop", "budget": 64, "tokens": 64.0, "ttft_ms": 110.0, "score": 58.0},
    {"method": "fastv", "budget": 64, "tokens": 64.0, "ttft_ms": 120.0, "score": None},
]
COLUMNS = ("method", "budget", "GQA", "percent of full")
ROWS = [["full", 576, 61.9, 100.0], ["consensusdrop", 64, 58.0, None]]
PANELS = [panel for section in SECTIONS for panel in section.panels]
KEYS = {key for panel in PANELS for key in (panel.key, panel.x) if key}
PLACE = "team/project"
COMMANDS = {"workspace": dashboard.workspace_command, "report": dashboard.report_command}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    without_wandb(monkeypatch, tmp_path / "nobody")


# -- the run of a table ------------------------------------------------------------------------------------------------


def log(folder: Path, **changes) -> None:
    folder.mkdir(exist_ok=True)
    files = [folder / "table.md", folder / "table.csv"]
    for file in files:
        file.write_text(f"content of {file.name}")
    image = folder / "kept.png"
    Image.new("RGB", (8, 8)).save(image)
    arguments = {
        "about": {"benchmark": "gqa", "model": "fake", "budgets": [64, 128]},
        "columns": COLUMNS,
        "rows": ROWS,
        "files": files,
        "points": POINTS,
        "images": {"kept by consensusdrop": image},
    }
    log_table_run("offline", folder, "LLaVA 1.5", **(arguments | changes))


def read_all(folder: Path) -> list[OfflineRun]:
    return [read_run(path) for path in find_runs(folder)]


def test_a_table_reads_back_with_its_files_plots_and_images(tmp_path, capsys):
    log(tmp_path / "t")
    (logged,) = read_all(tmp_path / "t")
    assert f"wandb sync {logged.folder}" in capsys.readouterr().out
    assert (logged.job_type, logged.group, logged.exit_code) == ("table", "LLaVA 1.5", 0)
    assert logged.tags == ("LLaVA 1.5", "gqa", "fake")
    assert logged.config["table"] == "LLaVA 1.5" and logged.config["budgets"] == [64, 128]
    content = logged.table(TABLE)
    assert content["columns"] == list(COLUMNS) and content["data"] == ROWS
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


def test_a_missing_file_is_one_line_and_ends_the_run(tmp_path, capsys):
    """The run stayed open, and the next one of the process was never written."""
    log(tmp_path / "t", files=[tmp_path / "gone.tex"])
    err = capsys.readouterr().err
    assert err.startswith("W&B logging stopped (") and err.count("\n") == 1 and "gone.tex" in err
    (logged,) = read_all(tmp_path / "t")
    assert wandb.run is None and logged.exit_code == 1 and TABLE in logged.keys


# -- workspace and report ----------------------------------------------------------------------------------------------


def nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """Every object of a JSON tree."""
    if isinstance(tree, dict):
        yield tree
    for branch in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from nodes(branch)


def shown(spec: dict[str, Any]) -> set[str]:
    """The keys that the panels of a spec show."""
    found: set[str] = set()
    for node in nodes(spec):
        match node.get("viewType"):
            case "Scatter Plot":
                found |= {node["config"][axis].removeprefix("summary:") for axis in ("xAxis", "yAxis")}
            case "Bar Chart":
                found |= {name.removeprefix("summary_metrics.") for name in node["config"]["metrics"]}
            case "Media Browser":
                found |= set(node["config"]["mediaKeys"])
            case "Weave":
                found |= {inner["val"] for inner in nodes(node) if inner.get("nodeType") == "const"}
    return found


def sent(name: str, *words: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What a dry run prints."""
    assert COMMANDS[name]([PLACE, "--dry-run", *words]) == 0
    return json.loads(capsys.readouterr().out)


def test_every_key_of_a_panel_is_logged(tmp_path):
    """A panel with a misspelt key is empty, and nothing says why."""

    @dataclass(frozen=True)
    class Full(FakeReducer):
        name = "full"

    config = RunConfig(
        "first", 16, data=write_gqa(tmp_path / "data"), output=tmp_path / "a", batch_size=4, wandb="disabled"
    )
    run(config, FakeLlava(), Full())
    run(replace(config, output=tmp_path / "b", wandb="offline", table="t"), FakeLlava(), FakeReducer())
    log_table_run("offline", tmp_path / "t", "t", {}, COLUMNS, ROWS, [], POINTS)
    logged = {"evaluation": read_run(find_runs(tmp_path / "b")[0]), "table": read_run(find_runs(tmp_path / "t")[0])}
    for panel in PANELS:
        assert {panel.key, panel.x or panel.key} <= logged[panel.job].keys, panel
        assert logged[panel.job].job_type == panel.job
    assert set(dashboard.COLUMNS) <= logged["evaluation"].keys
    assert set(GROUPING) <= logged["evaluation"].config.keys() and "table" in logged["table"].config


@pytest.mark.parametrize("name", COMMANDS)
def test_all_panels_are_shown_of_runs_that_are_grouped_and_filtered(name, capsys):
    spec = sent(name, "--table", "llava-1.5", capsys=capsys)
    assert shown(spec) == KEYS
    titles = {node["chartTitle"] for node in nodes(spec) if "chartTitle" in node}
    assert titles == {panel.title for panel in PANELS if panel.kind != "table"}
    sets = [node for node in nodes(spec) if "runFeed" in node]
    grouped = [[key["name"] for key in one["grouping"]] for one in sets]
    assert [f"{key}.value" for key in GROUPING] in grouped
    for one in sets:
        filters = {leaf["key"]["name"]: leaf["value"] for leaf in one["filters"]["filters"]}
        assert filters["table"] == "llava-1.5" and set(filters["jobType"]) <= {"evaluation", "table"}


@pytest.mark.parametrize("place", ["project", "a b/c", "https://wandb.ai/a/b"])
def test_a_wrong_place_is_one_sentence(place, capsys):
    assert dashboard.report_command([place, "--dry-run"]) == 2
    assert capsys.readouterr().err.endswith(f"got {place!r}.\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_without_a_key_nothing_is_tried_and_a_server_that_refuses_is_one_sentence(name, monkeypatch, capsys):
    monkeypatch.setattr("wandb.Api", lambda: pytest.fail("W&B would have asked for a key"))
    assert COMMANDS[name]([PLACE]) == 2
    printed = capsys.readouterr()
    assert f"no API key, so the {name} " in printed.err and not printed.out

    def refuse() -> None:
        raise ConnectionError("cannot reach the server with s3cret\nand more")

    monkeypatch.setattr("wandb.Api", refuse)
    monkeypatch.setenv("WANDB_API_KEY", "s3cret")
    assert COMMANDS[name]([PLACE]) == 2
    expected = f"W&B did not save the {name} (ConnectionError: cannot reach the server with ***).\n"
    assert capsys.readouterr().err == expected
