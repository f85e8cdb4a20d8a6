"""Save a W&B workspace: accuracy against tokens and TTFT, percent of full, tables and kept tokens.

Runs are grouped by table, model, method and budget.

vtr wandb workspace my-team/visual-token-reduction
vtr wandb workspace my-team/visual-token-reduction --table llava15 --dry-run
"""

import sys
from collections.abc import Sequence
from typing import Any

from eval.command import exit_on_user_error
from eval.tracking.dashboard import COLUMNS, GROUPING, JOB_TYPES, SECTIONS, build
from eval.tracking.publishing import make_flags, publish

TITLE = "Visual token reduction"


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    p = make_flags("eval.tracking.workspace", __doc__, "workspace", TITLE)
    return publish(p.parse_args(arguments), workspace, load, "workspace")


def workspace(entity: str, project: str, name: str, table: str | None = None) -> Any:
    """The workspace, not saved.

    Args:
        table: show only the runs of this paper table.
    """
    import wandb_workspaces.workspaces as ws

    wanted = [ws.Metric("JobType").isin(list(JOB_TYPES))]
    if table is not None:
        wanted.append(ws.Config("table") == table)
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[
            ws.Section(name=section, panels=[build(panel) for panel in panels], is_open=True)
            for section, panels in SECTIONS.items()
        ],
        settings=ws.WorkspaceSettings(max_runs=100),
        runset_settings=ws.RunsetSettings(
            filters=ws.And(*wanted),
            groupby=[ws.Config(key) for key in GROUPING],
            pinned_columns=[f"summary:{key}" for key in COLUMNS],
        ),
    )


def load(url: str) -> Any:
    """A saved workspace."""
    import wandb_workspaces.workspaces as ws

    return ws.Workspace.from_url(url)


if __name__ == "__main__":
    sys.exit(main())
