"""One W&B run per paper table: the table, its files as an artifact, accuracy against cost, and kept tokens."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.tracking import start

if TYPE_CHECKING:
    import plotly.graph_objects as go

# Keys under which the run logs; the workspace and the report show them.
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
    images: Mapping[str, Path] | None = None,
) -> None:
    """Log a finished table as one W&B run; the same table in the same folder continues its run.

    If W&B fails, or a file is missing, this is reported on standard error and changes nothing else.

    Args:
        mode: see `start`.
        folder: folder of the table's results; its W&B files go below it.
        name: name of the table, the `--table` of its runs.
        about: settings of the table, such as benchmark and model, for the run's configuration and the artifact.
        columns, rows: the table.
        files: the files that the table was written to (md, csv, tex, html).
        points: one per cell: `method`, `budget`, `tokens`, `ttft_ms`, `score` and, in a table of several benchmarks,
            `benchmark`. A plot leaves out points without a score or without the number of its axis.
        images: caption -> image file of kept tokens.
    """
    tags = [name, *(value for key in ("benchmark", "model") if isinstance(value := about.get(key), str))]
    id_file = f"wandb_id-table-{slug(name)}"
    tracker = start(mode, folder, {**about, "table": name}, "table", tags, id_file, group=name)

    def log(wandb: Any, run: Any) -> None:
        content: dict[str, Any] = {TABLE: wandb.Table(columns=list(columns), data=[list(row) for row in rows])}
        for key, (plot, axis) in AXES.items():
            if placed := [point for point in points if point[key] is not None and point["score"] is not None]:
                content[plot] = wandb.Plotly(figure(placed, key, axis, name))
        if images:
            content[GALLERY] = [wandb.Image(str(path), caption=caption) for caption, path in images.items()]
        # The step must not go back, so it is the number of earlier starts of this run, by the folders that W&B made.
        own = Path(run.dir).parent
        earlier = [file for file in own.parent.glob(f"*run-*/run-{run.id}.wandb") if file.parent != own]
        run.log(content, step=len(earlier))
        run.summary.update({"rows": len(rows), "points": len(points)})
        if files:
            artifact = wandb.Artifact(f"table-{slug(name)}", type="table", metadata=dict(about) | {"table": name})
            for path in files:
                artifact.add_file(str(path), name=path.name)
            run.log_artifact(artifact)

    tracker.send(log)
    tracker.close(failed=False)


def slug(name: str) -> str:
    """The name with only the characters that files and artifacts may have."""
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.") or "table"


def figure(points: Sequence[Mapping[str, Any]], key: str, axis: str, title: str) -> "go.Figure":
    """A plot of score against the number `key`: one line per method and benchmark, one point per budget."""
    import plotly.graph_objects as go

    lines: dict[str, list[Mapping[str, Any]]] = {}
    for point in points:  # scores of two benchmarks are never connected
        label = ", ".join(str(point[part]) for part in ("method", "benchmark") if point.get(part) is not None)
        lines.setdefault(label, []).append(point)
    plot = go.Figure()
    for number, (label, line) in enumerate(lines.items()):
        line.sort(key=lambda point: point[key])
        plot.add_scatter(
            # Lists of plain numbers, because plotly writes arrays in a form that older viewers cannot read.
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
