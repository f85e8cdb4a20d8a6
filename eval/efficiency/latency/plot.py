"""The time to the first token by stage, one bar for each method, and its oracle as a line across the bar."""

from pathlib import Path
from typing import Any

from eval.config import FULL
from eval.efficiency.latency.measure import PARTS
from llava.errors import UserError

COLOURS = ("#56B4E9", "#D55E00", "#E69F00", "#0072B2")  # of PARTS, readable with every kind of colour vision


def plot(path: Path, result: dict[str, Any]) -> None:
    """Draw the first batch size of a result.

    Raises:
        UserError: nothing fitted into the memory, so there is nothing to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    batch = result["batches"][0]
    rows = {name: row for name, row in batch["methods"].items() if row["fits"] and not name.startswith("oracle of")}
    if not rows:
        raise UserError("No method fitted into the memory, so there is nothing to draw; leave --plot out.")
    names = sorted(rows, key=lambda name: (name == FULL, rows[name]["ttft"]), reverse=True)
    figure, axes = plt.subplots(figsize=(8.6, 1.4 + 0.32 * len(names)), dpi=150)
    left = [0.0] * len(names)
    for part, colour in zip(PARTS, COLOURS, strict=True):
        widths = [1000 * rows[name]["seconds"][part] for name in names]
        axes.barh(names, widths, left=left, color=colour, label=part, height=0.7)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for place, name in enumerate(names):
        oracle, end = batch["methods"].get(rows[name]["oracle"] or "", {}), left[place]
        if oracle.get("fits"):
            label = "its oracle" if place == 0 or not axes.lines else None
            end = max(end, 1000 * oracle["ttft"])
            axes.plot(
                [1000 * oracle["ttft"]] * 2, [place - 0.42, place + 0.42], color="black", linewidth=2, label=label
            )
        found = rows[name].get("ratios")
        text = (
            "" if found is None or name == FULL else f" {found['ttft']:.2f}x, {100 * found['realised']:.0f} % realised"
        )
        axes.text(end, place, text, va="center", fontsize=7.5)
    axes.set_xlim(0, 1.3 * max(left))
    asked = "one question" if batch["batch_size"] == 1 else f"batches of {batch['batch_size']} questions"
    of = f"{result['model'].rpartition('/')[2]} at {result['budget']} tokens, {asked}"
    axes.set_title(f"Time to the first token, {of}", fontsize=10)
    layers = f"{result['layers']} decoder layer{'s' * (result['layers'] > 1)}"
    axes.set_xlabel(f"milliseconds ({result['device']}, {layers}, {result['dtype']})")
    axes.set_ylabel("method")
    axes.grid(axis="x", alpha=0.25)
    axes.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
