"""The W&B workspace and report: every key that they show is logged, and what would be sent is complete."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from eval.config import RunConfig
from eval.run import run
from eval.tracking import log_table_run
from eval.tracking.dashboard import COLUMNS, GROUPING, SECTIONS, report_command, workspace_command
from tests.eval_fakes import FakeLlava, FakeReducer, write_gqa
from tests.read_wandb import find_runs, read_run, without_wandb
from tests.test_wandb_table import COLUMNS as TABLE_COLUMNS
from tests.test_wandb_table import POINTS, ROWS

PANELS = [panel for section in SECTIONS for panel in section.panels]
KEYS = {key for panel in PANELS for key in panel.keys}
PLACE = "team/project"
COMMANDS = {"workspace": workspace_command, "report": report_command}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    without_wandb(monkeypatch, tmp_path / "nobody")


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
    log_table_run("offline", tmp_path / "t", "t", {}, TABLE_COLUMNS, ROWS, [], POINTS)
    logged = {
        "evaluation": read_run(find_runs(tmp_path / "b")[0]),
        "table": read_run(find_runs(tmp_path / "t")[0]),
    }
    for panel in PANELS:
        assert set(panel.keys) <= logged[panel.job].keys, panel
        assert logged[panel.job].job_type == panel.job
    assert set(COLUMNS) <= logged["evaluation"].keys
    assert set(GROUPING) <= logged["evaluation"].config.keys() and "table" in logged["table"].config


@pytest.mark.parametrize("name", COMMANDS)
def test_the_spec_shows_all_panels(name, capsys):
    spec = sent(name, capsys=capsys)
    assert shown(spec) == KEYS
    titles = {node["chartTitle"] for node in nodes(spec) if "chartTitle" in node}
    assert titles == {panel.title for panel in PANELS if panel.kind != "table"}


@pytest.mark.parametrize("name", COMMANDS)
def test_runs_are_grouped_and_filtered(name, capsys):
    sets = [node for node in nodes(sent(name, "--table", "llava-1.5", capsys=capsys)) if "runFeed" in node]
    grouped = [[key["name"] for key in one["grouping"]] for one in sets]
    assert [f"{key}.value" for key in GROUPING] in grouped
    for one in sets:
        filters = {leaf["key"]["name"]: leaf["value"] for leaf in one["filters"]["filters"]}
        assert filters["table"] == "llava-1.5" and set(filters["jobType"]) <= {"evaluation", "table"}
    (whole,) = [node for node in nodes(sent("workspace", capsys=capsys)) if "runFeed" in node]
    assert [leaf["key"]["name"] for leaf in whole["filters"]["filters"]] == ["jobType"]


def test_the_sections_of_the_workspace_are_in_order(capsys):
    spec = sent("workspace", "--name", "Mine", capsys=capsys)
    assert (spec["entity"], spec["project"], spec["displayName"]) == ("team", "project", "Mine")
    sections = spec["spec"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == [section.title for section in SECTIONS]
    assert all(section["isOpen"] for section in sections)


def test_panels_of_the_report_do_not_overlap(capsys):
    for grid in nodes(sent("report", capsys=capsys)):
        if grid.get("type") == "panel-grid":
            panels = [node["layout"] for node in nodes(grid) if "viewType" in node]
            cells = [
                (x, y) for p in panels for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])
            ]
            assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("place", ["project", "a/b/c", "a b/c", "https://wandb.ai/a/b", "/b"])
def test_a_wrong_place_is_one_sentence(name, place, capsys):
    assert COMMANDS[name]([place, "--dry-run"]) == 2
    assert capsys.readouterr().err.startswith("ENTITY/PROJECT should look like my-team/visual-token-reduction, got ")


@pytest.mark.parametrize("name", COMMANDS)
def test_without_a_key_nothing_is_tried(name, monkeypatch, capsys):
    monkeypatch.setattr("wandb.Api", lambda: pytest.fail("W&B would have asked for a key"))
    assert COMMANDS[name]([PLACE]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"W&B has no API key, so the {name} cannot be saved; ") and not printed.out


@pytest.mark.parametrize("name", COMMANDS)
def test_a_server_that_refuses_is_one_sentence_without_the_key(name, monkeypatch, capsys):
    def refuse() -> None:
        raise ConnectionError("cannot reach the server with s3cret\nand more")

    monkeypatch.setattr("wandb.Api", refuse)
    monkeypatch.setenv("WANDB_API_KEY", "s3cret")
    assert COMMANDS[name]([PLACE]) == 2
    expected = f"W&B did not save the {name} (ConnectionError: cannot reach the server with ***).\n"
    assert capsys.readouterr().err == expected


class Server:
    """Keeps the views that it is sent."""

    def __init__(self) -> None:
        self.views: dict[str, dict[str, Any]] = {}

    def projects(self, entity: str) -> list[Any]:
        return []

    def create_project(self, *names: str) -> None:
        pass

    def answer(self, api: Any, query: str, variables: dict[str, Any] | None = None) -> dict[str, Any]:
        given = variables or {}
        if "upsertView" in query:
            name = given.get("id") or ("Vmlldzox", "Vmlldzoy")[len(self.views)]  # "View:1", "View:2" in base64
            self.views[name] = given
            view = {"id": name, "name": given["name"], "displayName": given["displayName"], "spec": given["spec"]}
            project = {"name": given["projectName"], "entityName": given["entityName"]}
            more = {"description": given["description"], "project": project}
            return {"upsertView": {"view": view | more, "inserted": True}}
        (name, saved), *_ = self.views.items()
        node = {"id": name, "displayName": saved["displayName"], "spec": saved["spec"]}
        if "viewName" in given:
            return {"project": {"allViews": {"edges": [{"node": node}]}}}
        project = {"name": saved["projectName"], "entityName": saved["entityName"]}
        more = {"name": saved["name"], "description": saved["description"], "project": project}
        return {"view": node | more}


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("workspace", "https://wandb.example/team/project?nw=abc"),
        ("report", "https://wandb.example/team/project/reports/Visual-token-reduction--Vmlldzox"),
    ],
)
def test_saving_and_replacing(name, url, monkeypatch, capsys):
    server = Server()
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setattr("wandb.Api", lambda: server)
    for module in ("workspaces.internal", "reports.v2.interface"):
        monkeypatch.setattr(f"wandb_workspaces.{module}.execute_graphql", server.answer)
    for module in ("workspaces.interface", "reports.v2.interface"):
        monkeypatch.setattr(f"wandb_workspaces.{module}.get_app_url", lambda api: "https://wandb.example")
    assert COMMANDS[name]([PLACE]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{name}: https://wandb.example/team/project")
    (first,) = server.views.values()
    assert shown(json.loads(first["spec"])) == KEYS and first["displayName"] == "Visual token reduction"
    assert COMMANDS[name]([PLACE, "--update", url, "--name", "Second", "--table", "t"]) == 0
    (second,) = server.views.values()
    assert second["displayName"] == "Second" and '"t"' in second["spec"]
    assert shown(json.loads(second["spec"])) == KEYS
