"""One W&B run per paper table: the table, its files as an artifact, accuracy against cost, and kept tokens."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.tracking.opening import start

if TYPE_CHECKING:
    import plotly.graph_objects as go

# Keys of the run; the workspace and the report show them.
TABLE = "table"
GALLERY = "kept tokens"
TOKENS_PLOT = "accuracy against tokens"
TTFT_PLOT = "accuracy against TTFT"
# Number of a point -> key of the plot and title of its axis.
AXES = {
    "tokens": (TOKENS_PLOT, "visual tokens, mean over decoder layers"),
    "ttft_ms": (TTFT_PLOT, "time to first token of a batch (ms)"),
}
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "star")


def log_table_run(
    mode: str,
    folder: Path,
    name: str,
    about: Mapping[str, Any],
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    files: Sequence[Path],
    points: Sequence[Mapping[str, Any]],
    pictures: Mapping[str, Path] | None = None,
) -> None:
    """Log a finished table as one W&B run; the same table in the same folder continues its run.

    Args:
        mode: as of `start`.
        folder: where the table's results are; its W&B files go below it.
        name: of the table, the `--table` of the runs that it was made from.
        about: settings of the table, such as benchmark and model; the run's configuration and the artifact's metadata.
        columns, rows: the table.
        files: the table as it was written (md, csv, tex, html).
        points: one per cell: `method`, `budget`, `tokens`, `ttft_ms`, `score` and, in a table of several benchmarks,
            `benchmark`; those without the number of an axis or without a score are left out of its plot.
        pictures: caption -> image file of kept tokens.

    A failure of W&B, or a file that is not there, is reported on standard error and changes nothing else.
    """
    tags = [name, *(value for key in ("benchmark", "model") if isinstance(value := about.get(key), str))]
    id_file = f"wandb_id-table-{slug(name)}"
    tracker = start(mode, folder, {**about, "table": name}, "table", tags, id_file, group=name)

    def log(wandb: Any, run: Any) -> None:
        content: dict[str, Any] = {TABLE: wandb.Table(columns=list(columns), data=[list(row) for row in rows])}
        for key, (plot, axis) in AXES.items():
            if any(is_placed(point, key) for point in points):
                content[plot] = wandb.Plotly(figure(points, key, axis, name))
        if pictures:
            content[GALLERY] = [wandb.Image(str(path), caption=caption) for caption, path in pictures.items()]
        run.log(content, step=earlier_parts(run))
        run.summary.update({"rows": len(rows), "points": len(points)})

    def log_files(wandb: Any, run: Any) -> None:
        artifact = wandb.Artifact(f"table-{slug(name)}", type="table", metadata=dict(about) | {"table": name})
        for path in files:
            artifact.add_file(str(path), name=path.name)
        run.log_artifact(artifact)

    tracker.send(log)
    if files:
        tracker.send(log_files)
    tracker.close(failed=False)


def slug(name: str) -> str:
    """The name in characters that files and artifacts may have."""
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.") or "table"


def earlier_parts(run: Any) -> int:
    """Starts of this run before this one, by the folders that W&B made: the step, which must not go back."""
    folder = Path(run.dir).parent
    return sum(file.parent != folder for file in folder.parent.glob(f"*run-*/run-{run.id}.wandb"))


def is_placed(point: Mapping[str, Any], key: str) -> bool:
    """Whether a point has a place in the plot of `key`."""
    return point.get(key) is not None and point.get("score") is not None


def label_of(point: Mapping[str, Any]) -> str:
    """The line of a plot that a point belongs to: scores of two benchmarks are never joined."""
    return ", ".join(str(point[key]) for key in ("method", "benchmark") if point.get(key) is not None)


def figure(points: Sequence[Mapping[str, Any]], key: str, axis: str, title: str) -> "go.Figure":
    """Score against the number `key`: one line per method and benchmark, one point per budget."""
    import plotly.graph_objects as go

    placed = [point for point in points if is_placed(point, key)]
    plot = go.Figure()
    for number, label in enumerate(dict.fromkeys(map(label_of, placed))):
        line = sorted((point for point in placed if label_of(point) == label), key=lambda point: point[key])
        plot.add_scatter(
            # Lists of plain numbers: plotly writes arrays in a form that older viewers cannot read.
            x=[float(point[key]) for point in line],
            y=[float(point["score"]) for point in line],
            customdata=[[str(point["budget"])] for point in line],
            name=label,
            mode="lines+markers",
            marker={"symbol": SYMBOLS[number % len(SYMBOLS)], "size": 9},
            hovertemplate="%{fullData.name}, budget %{customdata[0]}<br>%{x:.1f}, %{y:.2f}<extra></extra>",
        )
    plot.update_layout(title=title, xaxis_title=axis, yaxis_title="score", template="simple_white")
    return plot
