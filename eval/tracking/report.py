"""Save a W&B report with the panels of the workspace and a sentence on each.

vtr wandb report my-team/visual-token-reduction
vtr wandb report my-team/visual-token-reduction --table llava15 --dry-run
"""

import sys
from collections.abc import Sequence
from typing import Any

from eval.command import exit_on_user_error
from eval.tracking.dashboard import GROUPING, JOB_TYPES, SECTIONS, Panel, build
from eval.tracking.publishing import make_flags, publish

TITLE = "Visual token reduction"
COLUMNS = 24  # of a report's grid
HEIGHT = 10
ABOUT = {
    "Accuracy against cost": "One point per group of runs. Tokens are the mean over decoder layers; TTFT is the median "
    "over batches, so compare runs of one device and batch size only.",
    "Percent of full": "The score as a percentage of the score with all visual tokens, on the same questions.",
    "Tables": "The tables as they were written, with their points.",
    "Samples": "Dropped tokens are dim and grey, merged tokens lie in the outline of their group.",
}


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    p = make_flags("eval.tracking.report", __doc__, "report", TITLE)
    return publish(p.parse_args(arguments), report, load, "report")


def report(entity: str, project: str, name: str, table: str | None = None) -> Any:
    """The report, not saved.

    Args:
        table: show only the runs of this paper table.
    """
    import wandb_workspaces.reports.v2 as wr

    blocks: list[Any] = [wr.TableOfContents()]
    for section, panels in SECTIONS.items():
        blocks += [wr.H1(section), wr.P(ABOUT[section])]
        blocks.append(wr.PanelGrid(runsets=runsets(panels, table), panels=placed(panels)))
    return wr.Report(entity=entity, project=project, title=name, blocks=blocks, width="fluid")


def runsets(panels: Sequence[Panel], table: str | None) -> list[Any]:
    """The runs that a section shows. No project is named: the report's own is meant, and nothing is looked up."""
    import wandb_workspaces.expr as expr
    import wandb_workspaces.reports.v2 as wr

    jobs = [job for job in JOB_TYPES if any(panel.job == job for panel in panels)]
    wanted = [expr.Metric("JobType").isin(jobs)]
    if table is not None:
        wanted.append(expr.Config("table") == table)
    grouped = [f"config.{key}" for key in GROUPING] if all(panel.kind in ("scatter", "bar") for panel in panels) else []
    return [wr.Runset(name=", ".join(jobs), filters=expr.And(*wanted), groupby=grouped)]


def placed(panels: Sequence[Panel]) -> list[Any]:
    """Plots beside each other; a table over the whole width below them."""
    plots = [panel for panel in panels if panel.kind != "table"]
    width = COLUMNS // max(1, len(plots))
    found = [build(panel, x=width * number, y=0, w=width, h=HEIGHT) for number, panel in enumerate(plots)]
    tables = [panel for panel in panels if panel.kind == "table"]
    return found + [
        build(panel, x=0, y=HEIGHT * (number + 1), w=COLUMNS, h=HEIGHT) for number, panel in enumerate(tables)
    ]


def load(url: str) -> Any:
    """A saved report."""
    import wandb_workspaces.reports.v2 as wr

    return wr.Report.from_url(url)


if __name__ == "__main__":
    sys.exit(main())
