"""Means with intervals over images, their CSV files, and elements of figures."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.metrics import SufficientStatistics, ratio_terms
from eval.results.statistics import Comparison, Interval, compare, interval
from eval.tables import COLOURS, MARKERS, write_csv
from lab.findings.scores import Collected
from llava.places import WORK

DOCS = WORK / "docs"

Cell = Interval | Comparison
Cells = Mapping[str, Cell]
Values = Mapping[str, float]  # question (or image and word) -> number


def terms(values: Values, groups: Mapping[str, str], scale: float) -> SufficientStatistics:
    """The sufficient statistics of a mean over questions, which are clustered by image."""
    return ratio_terms({name: values[name] for name in sorted(values)}, groups, "image", scale)


def mean(values: Values, groups: Mapping[str, str], scale: float = 1) -> Interval:
    """The mean with its 95 % interval over images.

    Args:
        groups: name -> image; may have more names than `values`.
        scale: 100 for percent.
    """
    return interval(terms(values, groups, scale))


def difference(a: Values, b: Values, groups: Mapping[str, str], scale: float = 1) -> Comparison:
    """Mean of a minus mean of b over the names that both have, paired, with its 95 % interval."""
    both = a.keys() & b.keys()
    first, second = (terms({name: values[name] for name in both}, groups, scale) for values in (a, b))
    return compare(first, second)


def position_bias(drawn: Collected, counterpart: Collected, score: str, measure: str = "late") -> dict[str, float]:
    """Question id -> how much more than half of a score lies in the second half of the sequence, whatever is there.

    The upper and the lower half of the image each stand once in the first and once in the second half of the sequence.
    The mean of both layouts minus one half is 0 for a score that depends on content only, 0.5 for one that depends on
    the second half only, and -0.5 for the first.
    """
    a, b = drawn.of(score, measure), counterpart.of(score, measure)
    return {name: (a[name] + b[name]) / 2 - 0.5 for name in b if name in a}


def centre(cell: Cell) -> float:
    return cell.difference if isinstance(cell, Comparison) else cell.mean


def write_rows(out: Path, name: str, rows: Mapping[str, Mapping[str, Cell | None]]) -> None:
    """Write `tables/findings_NAME.csv` below a folder, with a line for each value that exists.

    Args:
        rows: row -> measure -> value.
    """
    lines = [
        [row, measure, *("" if x is None else f"{x:.4f}" for x in (centre(cell), cell.low, cell.high))]
        for row, cells in rows.items()
        for measure, cell in cells.items()
        if cell is not None
    ]
    write_csv(out / "tables" / f"findings_{name}.csv", ["row", "measure", "value", "low", "high"], lines)


# Figures.

STYLE: Any = {
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
}
LEVEL = {"color": "black", "linewidth": 1, "linestyle": "--"}  # of a line that marks the chance level, or zero


@contextmanager
def sheet(
    path: Path, columns: int, width: float, height: float, rows: int = 1, **settings: Any
) -> Iterator[Sequence[Any]]:
    """The panels of a figure, row by row. The file is written at the end of the context."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            rows, columns, figsize=(width, height), dpi=140, squeeze=False, layout="constrained", **settings
        )
        yield axes.flat
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        plt.close(figure)


def bars(cells: Sequence[Cell]) -> NDArray[np.float64]:
    """[2, n] distances from the values to the ends of their intervals; 0 if there is no interval."""
    ends = [(0.0, 0.0) if c.low is None or c.high is None else (centre(c) - c.low, c.high - centre(c)) for c in cells]
    return np.array(ends).T.clip(min=0)


def draw_line(panel: Any, x: Sequence[float], cells: Sequence[Cell], index: int, label: str, **style: Any) -> None:
    """Draw a line with intervals in the colour and marker of an index."""
    look = {"color": COLOURS[index], "marker": MARKERS[index], "markersize": 4.5, "linewidth": 1.6, "elinewidth": 0.8}
    panel.errorbar(x, [centre(cell) for cell in cells], yerr=bars(cells), label=label, capsize=2, **look, **style)


def draw_cells(
    panel: Any, cells: Sequence[Cell], places: NDArray[Any], index: int, label: str, size: float = 6
) -> None:
    """Draw values with horizontal intervals, one below another, in the colour and marker of an index."""
    look = {"fmt": MARKERS[index], "color": COLOURS[index], "markersize": size}
    panel.errorbar([centre(cell) for cell in cells], places, xerr=bars(cells), label=label, capsize=2, **look)


def name_rows(panel: Any, names: Sequence[str], level: float) -> None:
    """Put names on the left, the first one at the top, and draw a dashed vertical line at a level."""
    panel.axvline(level, **LEVEL)
    panel.set_yticks(range(len(names)), names)
    panel.invert_yaxis()


def legend_below(panel: Any, columns: int) -> None:
    """Put the legend of a panel below all panels."""
    handles, labels = panel.get_legend_handles_labels()
    panel.figure.legend(handles, labels, fontsize=9, loc="outside lower center", ncols=columns)
