"""Figures of the documentation, drawn from measured numbers only."""

from collections.abc import Mapping
from pathlib import Path

from eval.statistics import Interval

# Okabe-Ito colours, readable with every kind of colour vision.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#999999", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP*X"


def accuracy_plot(
    path: Path, full: Interval, curves: Mapping[str, Mapping[int, Interval]], tokens: int, title: str | None = None
) -> None:
    """Accuracy against visual tokens, logarithmic, with 95 % intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8.6, 4.4), dpi=150)
    axes.axhline(full.mean, color="black", linewidth=1, linestyle="--")
    axes.fill_between([0, 2 * tokens], full.low, full.high, color="black", alpha=0.08, linewidth=0)
    budgets = sorted({budget for points in curves.values() for budget in points})
    for index, (name, points) in enumerate(curves.items()):
        places = sorted(points)
        # A small shift keeps overlapping intervals apart on the logarithmic axis.
        shifted = [place * (1 + 0.012 * (index - len(curves) / 2)) for place in places]
        means = [points[place].mean for place in places]
        spread = [[points[p].mean - points[p].low for p in places], [points[p].high - points[p].mean for p in places]]
        colour = COLOURS[index % len(COLOURS)]
        axes.errorbar(
            shifted, means, yerr=spread, label=name, color=colour, marker=MARKERS[index % len(MARKERS)], markersize=5,
            linewidth=2.2 if index == 0 else 1.3, capsize=2, elinewidth=0.8,
        )  # fmt: skip
    axes.text(budgets[0] * 0.93, full.mean + 0.6, f"full, {tokens} tokens", fontsize=8, va="bottom")
    axes.set_xscale("log", base=2)
    axes.set_xticks(budgets, [str(budget) for budget in budgets])
    axes.minorticks_off()
    axes.set_xlim(budgets[0] * 0.88, budgets[-1] * 1.14)
    axes.set_xlabel("visual tokens per image that enter the language model")
    axes.set_ylabel("accuracy, %")
    axes.set_title(title or "Embedded GQA test set, embedded model (95 % intervals over images)", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
