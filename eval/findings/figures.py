"""The figures of docs/findings.md, drawn from measured numbers only."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.findings.summary import Cell
from eval.results.statistics import Comparison
from eval.tables.plots import COLOURS, MARKERS

SMALL = 8
RANKINGS = ("fused", "cross-modal only", "encoder only")
LABELS = {"late": "late preference", "other layers": "other layers, no noise"}  # of what changes the probe
Cells = Mapping[str, Cell]


@contextmanager
def sheet(
    path: Path, columns: int, width: float, height: float, rows: int = 1, **settings: Any
) -> Iterator[Sequence[Any]]:
    """Panels side by side, row after row; the file is written at the end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        rows, columns, figsize=(width, height), dpi=140, squeeze=False, layout="constrained", **settings
    )
    for panel in axes.flat:
        panel.grid(alpha=0.25)
        panel.tick_params(labelsize=SMALL)
        panel.spines[["top", "right"]].set_visible(False)
    yield axes.flat
    path.parent.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def centre(cell: Cell) -> float:
    return cell.difference if isinstance(cell, Comparison) else cell.mean


def bars(cells: Sequence[Cell]) -> NDArray[np.float64]:
    """[2, n] distances to the ends of the intervals; 0 where there is none."""
    ends = [(0.0, 0.0) if c.low is None or c.high is None else (centre(c) - c.low, c.high - centre(c)) for c in cells]
    return np.array(ends).T.clip(min=0)


def line(panel: Any, x: Sequence[float], cells: Sequence[Cell], index: int, label: str, **style: Any) -> None:
    """A line with intervals in the colour and marker of an index."""
    panel.errorbar(
        x, [centre(cell) for cell in cells], yerr=bars(cells), label=label, color=COLOURS[index % len(COLOURS)],
        marker=MARKERS[index % len(MARKERS)], markersize=4.5, linewidth=1.6, capsize=2, elinewidth=0.8, **style,
    )  # fmt: skip


def alignment(
    path: Path,
    words: Mapping[str, Cells],
    late: Mapping[str, Mapping[str, Cell | None]],
    profiles: Mapping[str, NDArray[np.float64]],
) -> None:
    """Three panels for AttnMix.

    Args:
        words: group of words -> what is compared -> AUROC.
        late: condition -> score -> late preference in points, None where it is 0 by definition.
        profiles: score -> [24] its share in every row of patches, 1 if even.
    """
    compared = list(next(iter(words.values())))
    with sheet(path, 3, 15, 4.4, width_ratios=(1.1, 1.25, 1.1)) as (left, middle, right):
        for index, (label, cells) in enumerate(words.items()):
            found = list(cells.values())
            places = np.arange(len(found)) + 0.12 * (2 * index - 1)
            left.errorbar(
                [centre(cell) for cell in found], places, xerr=bars(found), fmt=MARKERS[index], color=COLOURS[index],
                capsize=2, label=label, markersize=6,
            )  # fmt: skip
        left.axvline(0.5, color="black", linewidth=1, linestyle="--")
        left.set_yticks(range(len(compared)), compared)
        left.invert_yaxis()
        left.set_xlim(0.2, 1.03)
        left.set_xlabel("AUROC of the cosine (0.5: chance)", fontsize=SMALL + 1)
        left.set_title("Does a word's embedding find its object?", fontsize=10)
        left.legend(frameon=False, fontsize=SMALL, loc="lower right")
        names = list(next(iter(late.values())))
        for index, (condition, by_score) in enumerate(late.items()):
            known = [(place, cell) for place, name in enumerate(names) if (cell := by_score[name]) is not None]
            middle.errorbar(
                [centre(cell) for _, cell in known], [place + 0.16 * (2 * index - 1) for place, _ in known],
                xerr=bars([cell for _, cell in known]), fmt=MARKERS[index], color=COLOURS[index], capsize=2,
                label=condition,
            )  # fmt: skip
        middle.axvline(0, color="black", linewidth=1, linestyle="--")
        middle.set_yticks(range(len(names)), names)
        middle.invert_yaxis()
        middle.set_xlabel("late preference, points (0: none)", fontsize=SMALL + 1)
        middle.legend(frameon=False, fontsize=SMALL, loc="lower right")
        middle.set_title("Does the same content score more when late?", fontsize=10)
        for index, (label, rows) in enumerate(profiles.items()):
            right.plot(
                range(1, 25),
                rows,
                color=COLOURS[index],
                label=label,
                linewidth=1.8,
                marker=MARKERS[index],
                markersize=3,
            )
        right.axhline(1, color="black", linewidth=1, linestyle="--")
        right.set_ylim(0, None)
        right.set_xlabel("row of patches, top to bottom", fontsize=SMALL + 1)
        right.set_ylabel("share of the score (1: even)", fontsize=SMALL + 1)
        right.set_title("Score by row; each content once in each half", fontsize=10)
        right.legend(frameon=False, fontsize=SMALL)


def misalignment(
    path: Path, found: Mapping[str, Cells], kinds: Mapping[str, str], panels: Sequence[tuple[str, str, float | None]]
) -> None:
    """Measures over decoder layers, a panel each.

    Args:
        found: score, such as "last 3" -> measure -> value; "encoder" is drawn as a level.
        kinds: first word of a score -> label.
        panels: title, measure, and the value by chance or None.
    """
    with sheet(path, len(panels), 17, 4.2) as axes:
        for panel, (title, measure, chance) in zip(axes, panels, strict=True):
            for index, (kind, label) in enumerate(kinds.items()):
                known = {int(name.split()[1]): cells[measure] for name, cells in found.items() if is_of(name, kind)}
                line(panel, list(known), list(known.values()), index, label)
            panel.axhline(centre(found["encoder"][measure]), color=COLOURS[4], linewidth=1.5, label="CLS attention")
            if chance is not None:
                panel.axhline(chance, color="black", linewidth=1, linestyle="--", label="chance")
            panel.autoscale_view()  # a level just inside the old limits would lie on the panel's edge
            panel.set_title(title, fontsize=10)
            panel.set_xlabel("decoder layer", fontsize=SMALL + 1)
        handles, labels = axes[0].get_legend_handles_labels()
        axes[0].figure.legend(handles, labels, frameon=False, fontsize=SMALL + 1, loc="outside lower center", ncols=6)


def is_of(name: str, kind: str) -> bool:
    """Whether a score such as "last 3" is of a kind such as "last"."""
    return name.partition(" ")[0] == kind


def gains(path: Path, found: Mapping[int, Mapping[str, Cells]], titles: Sequence[str]) -> None:
    """Points that fusion gains over each score alone, by group of questions, a panel per comparison."""
    labels = list(next(iter(found.values())))
    with sheet(path, len(titles), 12, 5.6, sharey=True) as axes:
        for panel, title in zip(axes, titles, strict=True):
            for index, (budget, rows) in enumerate(found.items()):
                cells = [rows[label][title] for label in labels]
                places = np.arange(len(labels)) + 0.14 * (2 * index + 1 - len(found))
                panel.errorbar(
                    [centre(cell) for cell in cells], places, xerr=bars(cells), fmt=MARKERS[index],
                    color=COLOURS[index], capsize=2, markersize=5, label=f"{budget} tokens",
                )  # fmt: skip
            panel.axvline(0, color="black", linewidth=1, linestyle="--")
            budgets = " and ".join(map(str, found))
            panel.set_xlabel(f"{title}, points of accuracy at {budgets} tokens", fontsize=SMALL + 1)
        axes[0].set_yticks(range(len(labels)), labels)
        axes[0].invert_yaxis()
        if len(found) > 1:
            axes[-1].legend(frameon=False, fontsize=SMALL, loc="lower right")


def quality(path: Path, noisy: Mapping[str, Sequence[Cells]], layers: Mapping[str, Cells]) -> None:
    """Accuracy of the three rankings, by how well the probe finds the named things, by its layer, and by what is kept.

    Args:
        noisy: kind of noise -> cells, from the probe as it is to the most noise.
        layers: probe -> cells.
    """
    with sheet(path, 2, 12, 9.2, rows=2) as (smooth, white, by_layer, shares):
        for panel, kind in ((smooth, "smooth"), (white, "white")):
            accuracies(panel, [centre(cells["AUROC of the probe"]) for cells in noisy[kind]], noisy[kind])
            panel.invert_xaxis()
            panel.set_title(f"A probe with {kind} noise, 64 tokens, all by rank", fontsize=10)
            panel.set_xlabel(
                "AUROC of the probe on the named things (left: as it is, right: noise alone)", fontsize=SMALL + 1
            )
        accuracies(by_layer, range(len(layers)), list(layers.values()), 0.1, linestyle="none")
        found = [f"{centre(cells['AUROC of the probe']):.2f}" for cells in layers.values()]
        by_layer.set_xticks(range(len(layers)), [f"{name}\n{x}" for name, x in zip(layers, found, strict=True)])
        by_layer.set_xlabel("inputs of the probe, its decoder layer, its AUROC", fontsize=SMALL + 1)
        by_layer.set_title("Probes of other layers, no noise, 64 tokens, all by rank", fontsize=10)
        low, high = smooth.get_ylim()[0], max(panel.get_ylim()[1] for panel in (smooth, white, by_layer))
        for panel in (smooth, white):
            panel.set_ylim(low, high)
        kept(shares, {**noisy, "other layers": list(layers.values())})
        handles, labels = smooth.get_legend_handles_labels()
        smooth.figure.legend(handles, labels, frameon=False, fontsize=SMALL + 1, loc="outside lower center", ncols=3)


def accuracies(panel: Any, x: Sequence[float], rows: Sequence[Cells], apart: float = 0, **style: Any) -> None:
    """Accuracy of each ranking at places x; the encoder's, which no probe changes, is a level with a band.

    Args:
        apart: by how much the rankings are moved to the left and right of their place.
    """
    for index, (ranking, side) in enumerate(zip(RANKINGS[:2], (-apart, apart), strict=True)):
        line(panel, [place + side for place in x], [cells[f"{ranking}, %"] for cells in rows], index, ranking, **style)
    level = rows[0][f"{RANKINGS[2]}, %"]
    panel.axhline(centre(level), color=COLOURS[2], linewidth=1.6, label=f"{RANKINGS[2]} (band: 95 %)", zorder=1)
    below, above = bars([level])[:, 0]
    panel.axhspan(centre(level) - below, centre(level) + above, color=COLOURS[2], alpha=0.12, linewidth=0, zorder=0)
    panel.autoscale_view()
    panel.set_ylabel("accuracy, %", fontsize=SMALL + 1)


def kept(panel: Any, kinds: Mapping[str, Sequence[Cells]]) -> None:
    """Accuracy against the share of questions of whose every named thing a patch is kept; a marker for each kind."""
    for marker, (kind, rows) in zip("os^D", kinds.items(), strict=True):
        for index, ranking in enumerate(RANKINGS):
            x = [centre(cells[f"{ranking}: every named thing kept in part, %"]) for cells in rows]
            y = [centre(cells[f"{ranking}, %"]) for cells in rows]
            panel.scatter(x, y, color=COLOURS[index], marker=marker, s=26, alpha=0.8)
        panel.scatter([], [], color="grey", marker=marker, s=26, label=LABELS.get(kind, f"{kind} noise"))
    panel.set_xlabel("questions with at least one patch of every named thing kept, %", fontsize=SMALL + 1)
    panel.set_ylabel("accuracy, %", fontsize=SMALL + 1)
    panel.set_title("What accuracy follows: all arms of 64 tokens", fontsize=10)
    panel.legend(frameon=False, fontsize=SMALL, loc="lower right")
