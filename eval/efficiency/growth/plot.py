"""Time, selection and memory against visual tokens, on logarithmic axes."""

from collections.abc import Sequence
from pathlib import Path

from eval.efficiency.growth.fit import fit
from eval.efficiency.growth.series import Point
from eval.tables.plots import COLOURS, MARKERS

PANELS = (
    ("ttft", 1e3, "time to the first token, ms"),
    ("selection", 1e3, "selection and merging, ms"),
    ("memory", 1e-6, "peak memory above the weights, MB"),
)


def plot(path: Path, points: Sequence[Point], title: str) -> None:
    """Draw the points of batch 1."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(13, 4.4), dpi=140)
    for axes, (field, scale, label) in zip(panels, PANELS, strict=True):
        for index, name in enumerate(dict.fromkeys(point.method for point in points)):
            own = [point for point in points if point.method == name and point.batch == 1]
            places, values = [point.tokens for point in own], [getattr(point, field) * scale for point in own]
            if min(values) <= 0:
                continue  # full selects nothing
            style = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
            slope = f", ~ N^{fit(places, values).last:.2f}" if len(places) >= 3 else ""
            axes.plot(places, values, label=f"{name}{slope}", linewidth=1.4, markersize=4, **style)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(places, [f"{place:,}" for place in places], fontsize=7.5)
        axes.minorticks_off()
        axes.set_xlabel("visual tokens N of the image, before any reduction")
        axes.set_ylabel(label)
        axes.set_title(label.partition(",")[0], fontsize=10)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=7.5)
    figure.suptitle(title, fontsize=10.5)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
