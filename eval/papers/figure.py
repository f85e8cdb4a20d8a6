"""The figure of a table: its scores against visual tokens, and against time to first token if that was measured.

For a table's W&B run, this module also draws what the methods keep of one image.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.benchmarks.base import Dataset
from eval.config import folder_name
from eval.feature_cache import without_memory
from eval.papers.runs import RowAtBudget
from eval.tables import BRIGHT, MARKERS
from llava.model.llava_arch import Llava
from llava.pipeline.generate import generate

GREY = "#bbbbbb"
NEW_TOKENS = 16
SIDE = 448  # longest side of an image


def draw(path: Path, points: Sequence[Mapping[str, Any]], title: str, ours: str, scores: str) -> bool:
    """Draw the points of a table. Returns False if there was nothing to draw.

    Args:
        points: method, budget (None for the unreduced model), tokens, ttft_ms (or None) and score of each line. If an
            interval is drawn, also its bars.
        title: which methods were measured, and on what.
        ours: label of the paper's method, drawn on top.
        scores: what the scores are.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    full = next((point for point in points if point["budget"] is None), {"score": 100})
    reduced = [point for point in points if point["budget"] is not None and point["score"] is not None]
    if not reduced:
        return False
    axes_of = [("tokens", "visual tokens, mean over decoder layers")]
    if any(point["ttft_ms"] for point in reduced):
        axes_of.append(("ttft_ms", "time to first token, ms"))
    size = (6.2 * len(axes_of), 4.6)
    figure, panels = plt.subplots(1, len(axes_of), figsize=size, dpi=140, sharey=True, squeeze=False)
    coloured = best(reduced, ours)
    for panel, (key, label) in zip(panels[0], axes_of, strict=True):
        for method in dict.fromkeys(point["method"] for point in reduced):
            line = sorted((p for p in reduced if p["method"] == method and p[key]), key=lambda p: (p[key], p["score"]))
            xs, ys = [p[key] for p in line], [p["score"] for p in line]
            bars = list(zip(*(p["bars"] for p in line if "bars" in p), strict=True))
            if method in coloured:
                place = coloured.index(method)
                style = {"color": BRIGHT[place], "marker": MARKERS[place], "label": method, "zorder": 10 - place}
                panel.plot(xs, ys, linewidth=2.4 if method == ours else 1.3, markersize=5, **style)
                if bars:
                    panel.errorbar(xs, ys, yerr=bars, fmt="none", ecolor=BRIGHT[place], elinewidth=0.7, capsize=2)
            else:
                panel.plot(xs, ys, color=GREY, linewidth=0.9, marker=".", markersize=4, zorder=1)
        panel.axhline(full["score"], color="black", linewidth=1, linestyle="--")
        panel.set_xlabel(label)
        if key == "tokens":
            panel.set_xscale("log", base=2)
            panel.set_xticks(sorted({p["budget"] for p in reduced if isinstance(p["budget"], int)}))
            panel.minorticks_off()
            panel.xaxis.set_major_formatter("{x:g}")
        else:
            panel.set_xlim(left=0)
        panel.grid(alpha=0.25)
    panels[0][0].set_ylabel(scores)
    if any(point["method"] not in coloured for point in reduced):
        panels[0][0].plot([], [], color=GREY, marker=".", label="other methods")
    panels[0][-1].legend(*panels[0][0].get_legend_handles_labels(), frameon=False, fontsize=8.5, loc="lower right")
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
    return True


def best(points: Sequence[Mapping[str, Any]], ours: str) -> list[str]:
    """The methods that get a colour: the paper's own, then those with the highest score at the smallest budget."""
    order = sorted(points, key=lambda point: (float(point["tokens"]), -point["score"]))
    smallest = order[0]["budget"]
    names = [p["method"] for p in sorted((p for p in points if p["budget"] == smallest), key=lambda p: -p["score"])]
    return list(dict.fromkeys([ours, *names, *(p["method"] for p in order)]))[: len(BRIGHT)]


def draw_kept(lines: Sequence[RowAtBudget], data: Dataset, model: Llava, folder: Path) -> dict[str, Path]:
    """Draw what each method keeps of a benchmark's first image at the table's smallest budget.

    Returns:
        Caption -> file; nothing if the first question has no image.
    """
    from eval.figures.overlay import beside, draw_answer

    sample = data.sample(data.questions[0])
    if not sample.images:
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    smallest = lines[-1].budget
    images = {}
    for line in lines:
        if line.reducer is None or line.budget not in (None, smallest):
            continue
        answer = generate(without_memory(model), [sample], line.reducer, max_new_tokens=NEW_TOKENS).answers[0]
        image = beside(draw_answer(sample, answer))
        image.thumbnail((SIDE * 2, SIDE))
        path = folder / f"{folder_name(line.title)}.jpg"
        image.save(path, quality=88)
        tokens = f"{answer.accounting.mean:.0f} of {answer.accounting.visual_tokens} tokens"
        images[f"{line.title}, {tokens}: {sample.question} {answer.text}"] = path
    return images
