"""Present results of the efficiency protocol as Markdown and as a plot. docs/efficiency.md defines every column."""

import argparse
import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.config import FULL
from eval.efficiency.measure import FEWEST, PARTS, SCENARIOS
from eval.results.statistics import plural
from eval.tables import markdown
from llava.errors import UserError

FAILED = "†"  # the method is below the accuracy gate
BUSY = "≈"  # the times of the rounds differ much
CLOCK_TEXT = {"wall": "wall clock", "cpu": "CPU time of the process"}
COLOURS = ("#56B4E9", "#D55E00", "#E69F00", "#0072B2")  # of PARTS; distinct for readers with any colour blindness

# Tables


def page(results: Sequence[dict[str, Any]]) -> str:
    """All tables of the results at one or several budgets, with the conditions of the measurement."""
    blocks = [conditions(results)]
    for result in results:
        blocks += [f"### Budget {result['budget']}"] if len(results) > 1 else []
        for batch in result["batches"]:
            rows = batch["methods"]
            title = "One question" if batch["batch_size"] == 1 else f"Batches of {batch['batch_size']} questions"
            blocks += [f"**{title}**", times(rows, result)]
            if batch["left_out"]:
                blocks.append(f"Without a turn before the deadline: {', '.join(batch['left_out'])}.")
        if any("counts" in row for row in result["batches"][0]["methods"].values()):
            blocks += ["**Counted, one question**", counted(result["batches"][0]["methods"])]
        if SCENARIOS[result["scenario"]].largest:
            blocks += ["**Largest batch that fits**", largest(result["batches"])]
    blocks += notes(results)
    return "\n\n".join(blocks)


def conditions(results: Sequence[dict[str, Any]]) -> str:
    """What was measured, where and how, in a sentence or two."""
    result, rows = results[0], [row for row in rows_of(results) if row["fits"]]
    budgets = ", ".join(str(one["budget"]) for one in results)
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    kernels = " / ".join(sorted({", ".join(row["attention"]) for row in rows if row["attention"]})) or "unknown"
    lengths = ", ".join(map(str, result["lengths"]))
    answers = f"answers of {lengths} tokens" if lengths else "the prefill alone"
    threads, repeats, layers = (
        f"{result[key]} {plural(noun, result[key])}"
        for key, noun in (("threads", "thread"), ("repeats", "turn"), ("layers", "decoder layer"))
    )
    shared = result["distinct_layers"] and result["distinct_layers"] < result["layers"]
    distinct = f", {result['distinct_layers']} of them with their own weights" if shared else ""
    return (
        f"{result['model']}, budget {budgets}, {layers}{distinct}, "
        f"{result['dtype']}, {CLOCK_TEXT[result['clock']]}, "
        f"{result['device']} ({result['hardware']}), {threads}; scenario {result['scenario']}: "
        f"{SCENARIOS[result['scenario']].summary}, {answers}; median of {repeats} after a warm-up, "
        f"methods in turns; attention kernel of every row, full too: {kernels}; {versions}, commit {result['commit']}."
    )


def rows_of(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The data of every row of every table."""
    return [row for result in results for batch in result["batches"] for row in batch["methods"].values()]


def cut(row: dict[str, Any], result: dict[str, Any]) -> bool:
    """Whether a deadline ended the row before all of its turns."""
    return bool(row["fits"] and len(row["ttfts"]) < result["repeats"])


def table(rows: Sequence[Sequence[tuple[str, str]]]) -> str:
    """A Markdown table from rows of (column title, cell); a shorter row gets empty cells at its end."""
    header = [title for title, _ in max(rows, key=len)]
    return markdown(header, [[cell for _, cell in row] + [""] * (len(header) - len(row)) for row in rows])


def times(rows: dict[str, dict[str, Any]], result: dict[str, Any]) -> str:
    """The table of times: milliseconds by stage, and ratios to full and to the oracle."""
    lengths, lines = result["lengths"], []
    short = any(cut(row, result) for row in rows.values())
    for name, row in rows.items():
        line = [("", marked(name, row))]
        lines.append(line)
        if not row["fits"]:
            line.append((f"{PARTS[0]} ms", "does not fit"))
            continue
        gain = row.get("ratios", {})
        over = spanned(gain.get("over_oracle"), gain.get("over_oracle_interval"), "{:+.1%}").replace("%", " %")
        line += [(f"{part} ms", ms(row["seconds"][part])) for part in PARTS]
        line += [
            ("TTFT ms", ms(row["ttft"])),
            ("TTFT x", spanned(gain.get("ttft"), gain.get("ttft_interval"), "{:.2f}")),
            ("over oracle", over),
            ("FLOPs x", f"{gain['flops']:.2f}" if gain else "n/a"),
            ("realised", f"{100 * gain['realised']:.0f} %" if gain else "n/a"),
        ]
        if any(length > 1 for length in lengths):
            line.append(("decode ms/token", "n/a" if row["decode"] is None else ms(row["decode"])))
        line += [(f"end to end {length} ms", ms(median(row["end_to_end"][length]))) for length in lengths]
        if SCENARIOS[result["scenario"]].differ and lengths:
            line.append(("p90 ms", ms(float(np.percentile(row["end_to_end"][lengths[-1]], 90)))))
        line.append(("peak MB", f"{row['peak_bytes'] / 1e6:.0f}"))
        line += [("turns", str(len(row["ttfts"])))] if short else []
    return table(lines)


def spanned(value: float | None, interval: Sequence[float] | None, form: str) -> str:
    """A median of ratios and its interval, "2.06 (1.98 to 2.11)"; without brackets if all turns gave the same."""
    if value is None or interval is None:
        return "n/a"
    low, high = interval
    return form.format(value) + ("" if low == high else f" ({form.format(low)} to {form.format(high)})")


def marked(name: str, row: dict[str, Any]) -> str:
    """The name, with marks for a failed accuracy gate and for rounds that differ much."""
    busy = not row.get("ratios", {}).get("calm", True)
    return name + (f" {FAILED}" if row.get("passes_gate") is False else "") + (f" {BUSY}" if busy else "")


def counted(rows: dict[str, dict[str, Any]]) -> str:
    """The table of what depends on no clock: tokens, operations, bytes."""
    lines = []
    for name, row in rows.items():
        if "counts" not in row:
            continue
        own, oracle = row["counts"], rows.get(row["oracle"] or "", {}).get("counts")
        line = [
            ("", marked(name, row)),
            ("tokens per layer", runs(own["tokens_per_layer"])),
            ("GFLOP", f"{own['flops'] / 1e9:.1f}"),
            ("formula", f"{own['formula'] / own['flops']:.3f}"),
            ("KV MB", f"{sum(own['kv_bytes_per_layer']) / 1e6:.2f}"),
            ("KV KB per layer", runs([round(size / 1e3) for size in own["kv_bytes_per_layer"]])),
        ]
        for quantity in ("operations", "kernels"):
            line.append((quantity, str(own[quantity])))
            line.append(("beside oracle", f"{own[quantity] - oracle[quantity]:+d}" if oracle else "n/a"))
        line.append(("synchronisations", "n/a" if own["synchronisations"] is None else str(own["synchronisations"])))
        line += [("accuracy", f"{100 * row['accuracy']:.1f}")] if "accuracy" in row else []
        lines.append(line)
    return table(lines)


def largest(batches: Sequence[dict[str, Any]]) -> str:
    """Questions per second at the largest batch that fits, and at the fastest one."""
    by_method: dict[str, dict[int, float]] = {}
    for batch in batches:
        for name, row in batch["methods"].items():
            if row["fits"] and row["throughput"]:
                by_method.setdefault(name, {})[batch["batch_size"]] = list(row["throughput"].values())[-1]
    full = by_method.get(FULL)
    lines = []
    for name, speeds in by_method.items():
        most, best = max(speeds), max(speeds, key=lambda size: speeds[size])
        beside = f"{speeds[most] / full[max(full)]:.2f}" if full else "n/a"
        lines.append([name, str(most), f"{speeds[most]:.3g}", beside, str(best), f"{speeds[best]:.3g}"])
    return markdown(["", "largest batch", "questions/s", "x full", "fastest batch", "questions/s"], lines)


def notes(results: Sequence[dict[str, Any]]) -> list[str]:
    """Sentences below the tables: what the marks in them mean, and how the intervals were made."""
    result, rows = results[0], rows_of(results)
    said, gate = [], result["gate"]
    if any(cut(row, one) for one in results for row in rows_of([one])):
        said.append(
            f"A deadline ended the measurement: the column turns says how many of the {result['repeats']} a row has. "
            "The same command goes on from its file."
        )
    if result["repeats"] > 1:
        said.append(
            "TTFT x and over oracle are medians of the ratios of every turn; in brackets the interval of that median "
            f"({'order statistics, 95 %' if result['repeats'] >= FEWEST else 'all turns: too few for 95 %'})."
        )
    if gate is not None:
        said.append(
            f"Accuracy on the first {gate['questions']} questions of {gate['title']}; {FAILED} marks less than "
            "90 % of full, whose speed does not count."
        )
    if any(not row.get("ratios", {}).get("calm", True) for row in rows):
        said.append(f"{BUSY} The slowest turn of this method or of full took 25 % longer than the fastest, or more.")
    return said


def ms(seconds: float) -> str:
    """Milliseconds with three significant figures, or whole from 100 on."""
    value = 1000 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def runs(values: Sequence[int]) -> str:
    """Values as text, with equal neighbours counted: "576 x2, 64 x30"."""
    groups = [(value, len(list(same))) for value, same in groupby(values)]
    return str(groups[0][0]) if len(groups) == 1 else ", ".join(f"{value} x{count}" for value, count in groups)


# Files


def write(args: argparse.Namespace, result: object, text: str) -> None:
    """Write the numbers to `args.json` and the tables to `args.markdown`, if these are given."""
    for path, content in ((args.json, json.dumps(result, indent=1)), (args.markdown, text)):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content + "\n")


def plot(path: Path, results: Sequence[dict[str, Any]]) -> None:
    """Draw the time to the first token by stage at the first batch size, one panel for each budget.

    Each method has a bar, and its oracle is a line across that bar.

    Raises:
        UserError: nothing fitted into the memory, so there is nothing to draw.
    """
    shown = [
        (result, rows)
        for result in results
        if (rows := {name: row for name, row in result["batches"][0]["methods"].items() if row["fits"]})
        and any(not name.startswith("oracle of") for name in rows)
    ]
    if not shown:
        raise UserError("No method fitted into the memory, so there is nothing to draw; leave --plot out.")
    tallest = max(len(rows) for _, rows in shown)
    figure = Figure(figsize=(7.0 * len(shown) + 1.6, 1.4 + 0.32 * tallest), dpi=150)
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, (result, rows) in zip(panels, shown, strict=True):
        bars(axes, rows)
        axes.set_title(f"{result['model'].rpartition('/')[2]} at {result['budget']} tokens", fontsize=10)
    result = shown[0][0]
    size, layers = result["batches"][0]["batch_size"], f"{result['layers']} {plural('decoder layer', result['layers'])}"
    asked = "one question" if size == 1 else f"batches of {size} questions"
    figure.supxlabel(
        f"milliseconds to the first token, {asked} ({result['device']}, {layers}, {result['dtype']})", fontsize=10
    )
    panels[0].set_ylabel("method")
    panels[-1].legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def bars(axes: Axes, rows: dict[str, dict[str, Any]]) -> None:
    """Draw one panel with a bar for each method: `full` at the bottom, above it the slowest to the fastest."""
    methods = [name for name in rows if not name.startswith("oracle of")]
    names = sorted(methods, key=lambda name: (name == FULL, rows[name]["ttft"]), reverse=True)
    left = [0.0] * len(names)
    for part, colour in zip(PARTS, COLOURS, strict=True):
        widths = [1000 * rows[name]["seconds"][part] for name in names]
        axes.barh(names, widths, left=left, color=colour, label=part, height=0.7)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for place, name in enumerate(names):
        oracle, end = rows.get(rows[name]["oracle"] or ""), left[place]
        if oracle:
            label = "its oracle" if not axes.lines else None
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
    axes.grid(axis="x", alpha=0.25)
