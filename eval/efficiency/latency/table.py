"""A result as Markdown: times of every method beside `full` and its oracle, then what was counted."""

from collections.abc import Sequence
from statistics import median
from typing import Any

from eval.config import FULL
from eval.efficiency.latency.measure import PARTS, percentile
from eval.efficiency.latency.scenarios import SCENARIOS
from eval.efficiency.peers.ratios import FEWEST
from eval.efficiency.quantities import size_text
from eval.tables.page import markdown

FAILED = "†"  # below the accuracy gate
BUSY = "≈"  # turns far apart
CLOCK_TEXT = {"wall": "wall clock", "cpu": "CPU time of the process"}


def page(result: dict[str, Any]) -> str:
    """All tables of a result, with the conditions of the measurement."""
    blocks = [conditions(result)]
    for batch in result["batches"]:
        rows = batch["methods"]
        title = "One question" if batch["batch_size"] == 1 else f"Batches of {batch['batch_size']} questions"
        blocks += [f"**{title}**", times(rows, result)]
    if any("counts" in row for row in result["batches"][0]["methods"].values()):
        blocks += ["**Counted, one question**", counted(result["batches"][0]["methods"])]
    if SCENARIOS[result["scenario"]].largest:
        blocks += ["**Largest batch that fits**", largest(result["batches"])]
    blocks += notes(result)
    return "\n\n".join(blocks)


def conditions(result: dict[str, Any]) -> str:
    """What was measured, where and how, in a sentence or two."""
    rows = [row for batch in result["batches"] for row in batch["methods"].values() if row["fits"]]
    kernels = " / ".join(sorted({", ".join(row["attention"]) for row in rows if row["attention"]})) or "unknown"
    lengths = ", ".join(map(str, result["lengths"]))
    answers = f"answers of {lengths} tokens" if lengths else "the prefill alone"
    threads, repeats = counted_noun(result["threads"], "thread"), counted_noun(result["repeats"], "turn")
    shared = result["distinct_layers"] and result["distinct_layers"] < result["layers"]
    distinct = f", {result['distinct_layers']} of them with their own weights" if shared else ""
    return (
        f"{result['model']}, budget {result['budget']}, {counted_noun(result['layers'], 'decoder layer')}{distinct}, "
        f"{result['dtype']}, {CLOCK_TEXT[result['clock']]}, "
        f"{result['device']} ({result['hardware']}), {threads}; scenario {result['scenario']}: "
        f"{SCENARIOS[result['scenario']].summary}, {answers}; median of {repeats} after a warm-up, "
        f"methods in turns; attention kernel of every row, full too: {kernels}."
    )


def counted_noun(number: int, noun: str) -> str:
    """ "1 turn", "5 turns"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def times(rows: dict[str, dict[str, Any]], result: dict[str, Any]) -> str:
    """Milliseconds by stage, and ratios to full and to the oracle."""
    lengths = result["lengths"]
    spread = SCENARIOS[result["scenario"]].differ
    header = ["", *(f"{part} ms" for part in PARTS), "TTFT ms", "TTFT x", "over oracle", "FLOPs x", "realised"]
    header += ["decode ms/token"] if any(length > 1 for length in lengths) else []
    header += [f"end to end {length} ms" for length in lengths]
    header += ["p90 ms"] if spread and lengths else []
    compiled = any("plain_over_compiled" in row for row in rows.values())
    header += ["plain / compiled TTFT", "decode", "compile s"] if compiled else []
    lines = []
    for name, row in rows.items():
        if not row["fits"]:
            lines.append([name, *["does not fit"], *["" for _ in header[2:]]])
            continue
        found = row.get("ratios")
        cells = [ms(row["seconds"][part]) for part in PARTS] + [ms(row["ttft"])]
        if found is None:
            cells += ["n/a"] * 4
        else:
            cells += [spanned(found["ttft"], found["ttft_interval"], "{:.2f}")]
            cells += [spanned(found["over_oracle"], found["over_oracle_interval"], "{:+.1%}").replace("%", " %")]
            cells += [f"{found['flops']:.2f}", f"{100 * found['realised']:.0f} %"]
        if any(length > 1 for length in lengths):
            cells.append("n/a" if row["decode"] is None else ms(row["decode"]))
        cells += [ms(median(row["end_to_end"][length])) for length in lengths]
        if spread and lengths:
            cells.append(ms(percentile(row["end_to_end"][lengths[-1]], 0.9)))
        if compiled:
            beside = row.get("plain_over_compiled", {})
            cells += [f"{beside[part]:.2f}" if beside.get(part) else "" for part in ("ttft", "decode")]
            cells.append(f"{row['compiling']:.0f}" if beside else "")
        lines.append([marked(name, row), *cells])
    return markdown(header, lines)


def spanned(value: float | None, interval: Sequence[float] | None, form: str) -> str:
    """A median of ratios and its interval, "2.06 (1.98 to 2.11)"; without brackets where all turns gave the same."""
    if value is None or interval is None:
        return "n/a"
    low, high = interval
    return form.format(value) + ("" if low == high else f" ({form.format(low)} to {form.format(high)})")


def marked(name: str, row: dict[str, Any]) -> str:
    """The name, with a mark for a failed gate and for turns far apart."""
    busy = not row.get("ratios", {}).get("calm", True)
    return name + (f" {FAILED}" if row.get("passes_gate") is False else "") + (f" {BUSY}" if busy else "")


def counted(rows: dict[str, dict[str, Any]]) -> str:
    """What depends on no clock: tokens, operations, bytes."""
    gate = any("accuracy" in row for row in rows.values())
    header = ["", "tokens per layer", "GFLOP", "formula", "KV MB", "KV KB per layer", "operations", "beside oracle"]
    header += ["kernels", "beside oracle", "waits", "peak MB", *(["accuracy"] if gate else [])]
    lines = []
    for name, row in rows.items():
        if "counts" not in row:
            continue
        own = row["counts"]
        oracle = rows.get(row["oracle"] or "", {}).get("counts")
        cells = [runs(own["tokens_per_layer"]), f"{own['flops'] / 1e9:.1f}", f"{own['formula'] / own['flops']:.3f}"]
        cells += [f"{sum(own['kv_bytes_per_layer']) / 1e6:.2f}"]
        cells += [runs([round(size / 1e3) for size in own["kv_bytes_per_layer"]])]
        for quantity in ("operations", "kernels"):
            cells += [str(own[quantity]), f"{own[quantity] - oracle[quantity]:+d}" if oracle else "n/a"]
        cells += ["n/a" if own["waits"] is None else str(own["waits"])]
        cells += [f"{row['peak_bytes'] / 1e6:.0f}" if row["fits"] else "n/a"]
        if gate:
            cells.append(f"{100 * row['accuracy']:.1f}" if "accuracy" in row else "")
        lines.append([marked(name, row), *cells])
    return markdown(header, lines)


def largest(batches: Sequence[dict[str, Any]]) -> str:
    """Questions per second at the largest batch that fits, and at the best one."""
    found: dict[str, dict[int, float]] = {}
    for batch in batches:
        for name, row in batch["methods"].items():
            if row["fits"] and row["throughput"]:
                found.setdefault(name, {})[batch["batch_size"]] = list(row["throughput"].values())[-1]
    full = found.get(FULL)
    lines = []
    for name, speeds in found.items():
        most, best = max(speeds), max(speeds, key=lambda size: speeds[size])
        beside = f"{speeds[most] / full[max(full)]:.2f}" if full else "n/a"
        lines.append([name, str(most), f"{speeds[most]:.3g}", beside, str(best), f"{speeds[best]:.3g}"])
    header = ["", "largest batch", "questions/s", "x full", "fastest batch", "questions/s"]
    return markdown(header, lines)


def notes(result: dict[str, Any]) -> list[str]:
    """What the marks mean, where there are any."""
    rows = [row for batch in result["batches"] for row in batch["methods"].values()]
    found, gate = [], result["gate"]
    if result["repeats"] > 1:
        found.append(
            "TTFT x and over oracle are medians of the ratios of every turn; in brackets the interval of that median "
            f"({'order statistics, 95 %' if result['repeats'] >= FEWEST else 'all turns: too few for 95 %'})."
        )
    counts = [row["counts"] for row in rows if "counts" in row]
    if counts:
        found.append(
            "Operations are those dispatched on this device. The steps of a greedy choice are none on a CPU, where "
            "they are arrays of numpy."
        )
    if any(one["waits"] is None for one in counts):
        found.append(
            "Waits n/a: on a CPU nothing waits. `vtr bench ops` counts those of the toy model on torch's meta device."
        )
    found += [too_large(batch) for batch in result["batches"] if batch["needed_bytes"]]
    if gate is not None:
        found.append(
            f"Accuracy on the first {gate['questions']} questions of {gate['title']}; {FAILED} marks less than "
            f"{100 * gate['share']:.0f} % of full, whose speed does not count."
        )
    if any(not row.get("ratios", {}).get("calm", True) for row in rows):
        found.append(f"{BUSY} The slowest turn of this method or of full took 25 % longer than the fastest, or more.")
    if result.get("compile"):
        found.append(
            "Compiled rows run tower, prefill and decoding as graphs; their TTFT x, over oracle and realised stand "
            "beside full and oracles that are compiled too. compile s, by the wall clock, is in no other time here; a "
            "graph that rows share counts in the first of them."
        )
    return found


def too_large(batch: dict[str, Any]) -> str:
    """What a batch was not tried for: on a CPU, memory that is used up ends the process."""
    needs = ", ".join(f"{name} {size_text(need)}" for name, need in batch["needed_bytes"].items())
    one = batch["batch_size"] == 1
    asked = (
        "One question does not fit, and was"
        if one
        else f"Batches of {batch['batch_size']} questions do not fit, and were"
    )
    return (
        f"{asked} not tried: expected beside the weights are {needs}, and {size_text(batch['free_bytes'])} may be used."
    )


def sentence(name: str, budget: int, found: dict[str, Any]) -> str:
    """What one method gains, for the end of a run of one method."""
    realised, choosing = 100 * found["realised"], 100 * found["selection"]
    return (
        f"{name} at {budget}: time to first token {found['ttft']:.2f}x faster than full at {found['flops']:.2f}x fewer "
        f"operations ({realised:.0f} % realised), selection and merging {choosing:.2f} % of TTFT, KV cache "
        f"{found['kv_bytes']:.2f}x smaller, peak memory {found['peak']:.2f} of full."
    )


def ms(seconds: float) -> str:
    """Milliseconds with three figures, or all digits before the point."""
    value = 1000 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def runs(values: Sequence[int]) -> str:
    """Equal values in a row once: "576 x2, 64 x30"."""
    found: list[list[int]] = []
    for value in values:
        if found and found[-1][0] == value:
            found[-1][1] += 1
        else:
            found.append([value, 1])
    if len(found) == 1:
        return str(found[0][0])
    return ", ".join(f"{value} x{count}" for value, count in found)
