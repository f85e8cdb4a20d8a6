"""The W&B workspace and the W&B report, with the same panels; runs are grouped by table, model, method and budget.

vtr wandb workspace my-team/visual-token-reduction
vtr wandb report my-team/visual-token-reduction --table llava15 --dry-run
"""

import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any, Literal

from eval.command import exit_on_user_error, make_parser, value
from eval.tracking import has_key, one_line
from eval.tracking.table_run import GALLERY, TABLE, TOKENS_PLOT, TTFT_PLOT
from llava.errors import UserError

TITLE = "Visual token reduction"
PLACE = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
SCORE = "score"
OF_FULL = "percent_of_full"
TOKENS = "tokens_per_layer"
TTFT = "timing/ttft/median_ms"
OPERATIONS = "flops/per_question"
# Configuration keys by which the list groups its runs.
GROUPING = ("table", "model", "method", "budget")
# Columns of the list of runs, in addition to the name.
COLUMNS = (SCORE, OF_FULL, TOKENS, TTFT)
JOB_TYPES = ("evaluation", "table")
GRID, HEIGHT = 24, 10  # columns of a report's grid, and rows of a panel


@dataclass(frozen=True)
class Panel:
    """A panel.

    Attributes:
        key: what the panel shows, a key under which runs log.
        x: key of the horizontal axis of a scatter plot.
        job: the kind of run that logs these keys.
    """

    kind: Literal["scatter", "bar", "table", "media"]
    title: str
    key: str
    x: str | None = None
    job: str = "evaluation"


@dataclass(frozen=True)
class Section:
    """Panels under a heading.

    Attributes:
        about: what the report says about the panels.
    """

    title: str
    about: str
    panels: tuple[Panel, ...]


SECTIONS = (
    Section(
        "Accuracy against cost",
        "One point per group of runs. Tokens are the mean over decoder layers; TTFT is the median over batches, so "
        "compare runs of one device and batch size only.",
        (
            Panel("scatter", "accuracy against tokens", SCORE, TOKENS),
            Panel("scatter", "accuracy against TTFT", SCORE, TTFT),
            Panel("scatter", "accuracy against operations", SCORE, OPERATIONS),
        ),
    ),
    Section(
        "Percent of full",
        "The score as a percentage of the score with all visual tokens, on the same questions.",
        (
            Panel("bar", "percent of full, mean by method", OF_FULL),
            Panel("scatter", "percent of full against tokens", OF_FULL, TOKENS),
        ),
    ),
    Section(
        "Tables",
        "The tables as they were written, with their points.",
        (
            Panel("table", "tables", TABLE, job="table"),
            Panel("media", "accuracy against tokens, by table", TOKENS_PLOT, job="table"),
            Panel("media", "accuracy against TTFT, by table", TTFT_PLOT, job="table"),
        ),
    ),
    Section(
        "Samples",
        "Dropped tokens are dim and grey, merged tokens lie in the outline of their group.",
        (Panel("media", "kept tokens", GALLERY), Panel("table", "samples", "samples")),
    ),
)


@exit_on_user_error
def workspace_command(arguments: Sequence[str] | None = None) -> int:
    """Save a W&B workspace: accuracy against tokens and TTFT, percent of full, tables and kept tokens."""
    return publish("workspace", workspace, arguments, workspace_command.__doc__)


@exit_on_user_error
def report_command(arguments: Sequence[str] | None = None) -> int:
    """Save a W&B report with the panels of the workspace and a sentence on each."""
    return publish("report", report, arguments, report_command.__doc__)


def publish(thing: str, make: Callable[..., Any], arguments: Sequence[str] | None, documentation: str | None) -> int:
    """The command line that saves a `thing` in a W&B project, or prints it with --dry-run; returns the exit code.

    Args:
        make: (entity, project, name, table) -> an object of wandb-workspaces.

    Raises:
        UserError: there is no key, or W&B refuses or cannot be reached.
    """
    p = make_parser(f"eval.cli wandb {thing}", documentation)
    p.add_argument(
        "project",
        type=value(project_path),
        metavar="ENTITY/PROJECT",
        help="user or team, and project, as in the address of the project's page",
    )
    p.add_argument("--name", default=TITLE, help=f"name of the {thing}")
    p.add_argument("--table", metavar="NAME", help="only runs of this paper table")
    p.add_argument(
        "--dry-run", action="store_true", help="print what would be sent as JSON; needs no network and no key"
    )
    args = p.parse_args(arguments)
    new = make(*args.project.split("/"), args.name, args.table)
    if args.dry_run:
        print(json.dumps(json.loads(new._to_model().model_dump_json(by_alias=True, exclude_none=True)), indent=1))
        return 0
    if not has_key():
        raise UserError(
            f"W&B has no API key, so the {thing} cannot be saved; run `wandb login`, set WANDB_API_KEY, or look at it "
            "with --dry-run."
        )
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        with redirect_stdout(sys.stderr):
            new.save()
            address = new.url
    except Exception as error:  # network, server and login raise many kinds
        raise UserError(f"W&B did not save the {thing} ({one_line(error)}).") from error
    print(f"{thing}: {address}")
    return 0


def project_path(text: str) -> str:
    """Read ENTITY/PROJECT; ValueError for anything else."""
    if not PLACE.fullmatch(text):
        raise ValueError(f"should look like my-team/visual-token-reduction, got {text!r}")
    return text


def workspace(entity: str, project: str, name: str, table: str | None = None) -> Any:
    """The workspace, not saved.

    Args:
        table: show only the runs of this paper table.
    """
    import wandb_workspaces.workspaces as ws

    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[
            ws.Section(name=section.title, panels=[build(panel) for panel in section.panels], is_open=True)
            for section in SECTIONS
        ],
        settings=ws.WorkspaceSettings(max_runs=100),
        runset_settings=ws.RunsetSettings(
            filters=runs_of(JOB_TYPES, table),
            groupby=[ws.Config(key) for key in GROUPING],
            pinned_columns=[f"summary:{key}" for key in COLUMNS],
        ),
    )


def report(entity: str, project: str, name: str, table: str | None = None) -> Any:
    """The report, not saved. Its sets of runs name no project, so they use the report's own and need no network.

    Args:
        table: show only the runs of this paper table.
    """
    import wandb_workspaces.reports.v2 as wr

    blocks: list[Any] = [wr.TableOfContents()]
    for section in SECTIONS:
        jobs = [job for job in JOB_TYPES if any(panel.job == job for panel in section.panels)]
        plotted = all(panel.kind in ("scatter", "bar") for panel in section.panels)
        grouped = [f"config.{key}" for key in GROUPING] if plotted else []
        runs = wr.Runset(name=", ".join(jobs), filters=runs_of(jobs, table), groupby=grouped)
        blocks += [wr.H1(section.title), wr.P(section.about)]
        blocks.append(wr.PanelGrid(runsets=[runs], panels=placed(section.panels)))
    return wr.Report(entity=entity, project=project, title=name, blocks=blocks, width="fluid")


def runs_of(jobs: Sequence[str], table: str | None) -> Any:
    """The filter for runs of these job types and, if given, this table."""
    import wandb_workspaces.expr as expr

    wanted = [expr.Metric("JobType").isin(list(jobs))]
    if table is not None:
        wanted.append(expr.Config("table") == table)
    return expr.And(*wanted)


def placed(panels: Sequence[Panel]) -> list[Any]:
    """The panels in a report's grid: plots side by side, tables over the whole width below them."""
    plots = [panel for panel in panels if panel.kind != "table"]
    tables = [panel for panel in panels if panel.kind == "table"]
    width = GRID // len(plots)
    above = [build(panel, x=width * number, y=0, w=width, h=HEIGHT) for number, panel in enumerate(plots)]
    below = [build(panel, x=0, y=HEIGHT * number, w=GRID, h=HEIGHT) for number, panel in enumerate(tables, 1)]
    return above + below


def build(panel: Panel, **layout: int) -> Any:
    """The panel as an object of wandb-workspaces.

    Args:
        layout: x, y, w and h in a report's grid.
    """
    import wandb_workspaces.reports.v2 as wr

    place: dict[str, Any] = {"layout": wr.Layout(**layout)} if layout else {}
    match panel.kind:
        case "scatter":
            x, y = wr.SummaryMetric(panel.x or ""), wr.SummaryMetric(panel.key)
            return wr.ScatterPlot(title=panel.title, x=x, y=y, **place)
        case "bar":
            metrics: list[Any] = [wr.SummaryMetric(panel.key)]
            by = wr.Config("method")
            return wr.BarPlot(title=panel.title, metrics=metrics, groupby=by, groupby_aggfunc="mean", **place)
        case "table":
            return wr.WeavePanelSummaryTable(table_name=panel.key, **place)
        case "media":
            return wr.MediaBrowser(title=panel.title, media_keys=[panel.key], **place)
