"""Panels of the W&B workspace and of the report: which logged keys they show, and how runs are grouped."""

from dataclasses import dataclass
from typing import Any, Literal

from eval.tracking.table_run import GALLERY, TABLE, TOKENS_PLOT, TTFT_PLOT

SCORE = "score"
OF_FULL = "percent_of_full"
TOKENS = "tokens_per_layer"
TTFT = "timing/ttft/median_ms"
OPERATIONS = "flops/per_question"
# Configuration keys: runs of one table, model, method and budget are one line of the list.
GROUPING = ("table", "model", "method", "budget")
# Columns of the list of runs, beside the name.
COLUMNS = (SCORE, OF_FULL, TOKENS, TTFT)
JOB_TYPES = ("evaluation", "table")


@dataclass(frozen=True)
class Panel:
    """A panel.

    Attributes:
        x: key of the horizontal axis of a scatter plot.
        job: the kind of run that logs the keys.
    """

    kind: Literal["scatter", "bar", "table", "media"]
    title: str
    key: str
    x: str | None = None
    job: str = "evaluation"

    @property
    def keys(self) -> tuple[str, ...]:
        """The logged keys that the panel shows."""
        return (self.key,) if self.x is None else (self.key, self.x)


SECTIONS: dict[str, tuple[Panel, ...]] = {
    "Accuracy against cost": (
        Panel("scatter", "accuracy against tokens", SCORE, TOKENS),
        Panel("scatter", "accuracy against TTFT", SCORE, TTFT),
        Panel("scatter", "accuracy against operations", SCORE, OPERATIONS),
    ),
    "Percent of full": (
        Panel("bar", "percent of full, mean by method", OF_FULL),
        Panel("scatter", "percent of full against tokens", OF_FULL, TOKENS),
    ),
    "Tables": (
        Panel("table", "tables", TABLE, job="table"),
        Panel("media", "accuracy against tokens, by table", TOKENS_PLOT, job="table"),
        Panel("media", "accuracy against TTFT, by table", TTFT_PLOT, job="table"),
    ),
    "Samples": (
        Panel("media", "kept tokens", GALLERY),
        Panel("table", "samples", "samples"),
    ),
}


def build(panel: Panel, **layout: int) -> Any:
    """The panel as an object of wandb-workspaces.

    Args:
        layout: x, y, w and h in a report's grid of 24 columns.
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
