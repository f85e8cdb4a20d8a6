"""Figures of the documentation, drawn from measured numbers only."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from eval.results.statistics import Interval

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
    below, above = full.bars
    axes.fill_between([0, 2 * tokens], full.mean - below, full.mean + above, color="black", alpha=0.08, linewidth=0)
    budgets = sorted({budget for points in curves.values() for budget in points})
    for index, (name, points) in enumerate(curves.items()):
        places = sorted(points)
        # A small shift keeps overlapping intervals apart on the logarithmic axis.
        shifted = [place * (1 + 0.012 * (index - len(curves) / 2)) for place in places]
        means = [points[place].mean for place in places]
        spread = list(zip(*(points[place].bars for place in places), strict=True))
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
    axes.set_title(title or "Toy GQA test set, bundled toy model (95 % intervals over images)", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


# Panels of the cost plot; what is in none of them goes into the last.
FAMILIES = (
    ("the three papers and controls", ("consensusdrop", "visiondrop", "attnmix", "random", "uniform", "downsample")),
    ("by saliency, after the tower", ("fastervlm", "visionzip", "hired", "holov", "prumerge", "prumerge_plus")),
    ("by diversity or question, after the tower", ("vispruner", "divprune", "scope", "cdpruner", "trim", "tome")),
    ("inside the language model", ("fastv", "pyramiddrop", "sparsevlm", "dart", "vscan")),
)


def cost_plot(path: Path, full: tuple[float, Interval], points: Mapping[str, Sequence[tuple[float, Interval]]]) -> None:
    """Accuracy against operations to the first token, one panel per family, all other methods in grey."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 8), dpi=140, sharex=True, sharey=True)
    for panel, (title, names) in zip(axes.flat, FAMILIES, strict=True):
        for name, line in points.items():
            if name not in names and line:
                panel.plot([x for x, _ in line], [y.mean for _, y in line], color="#dddddd", linewidth=1, zorder=1)
        for index, name in enumerate(name for name in names if points.get(name)):
            x, y = [x for x, _ in points[name]], [y for _, y in points[name]]
            spread = list(zip(*(v.bars for v in y), strict=True))
            panel.errorbar(
                x, [v.mean for v in y], yerr=spread, label=name, color=COLOURS[index], marker=MARKERS[index],
                markersize=5, linewidth=1.6, capsize=2, elinewidth=0.7, zorder=3,
            )  # fmt: skip
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:g}")
        panel.axhline(full[1].mean, color="black", linewidth=1, linestyle="--")
        panel.plot([full[0]], [full[1].mean], color="black", marker="*", markersize=10)
        panel.set_title(title, fontsize=10)
        panel.grid(alpha=0.25)
        if panel.get_legend_handles_labels()[1]:
            panel.legend(frameon=False, fontsize=8.5, loc="lower right")
    for panel in axes[1]:
        panel.set_xlabel("GFLOP per question, tower to first token")
    for panel in axes[:, 0]:
        panel.set_ylabel("accuracy, %")
    figure.suptitle("Toy GQA test split, bundled toy model, budgets 192, 128, 64, 32; star: full", fontsize=11)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
