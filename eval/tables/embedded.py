"""All methods at equal budgets on the toy GQA test split: accuracy, cost, and which differences are significant.

    python -m eval.tables.embedded answers [--budgets 64,32]   # runs, spread over the ranks
    python -m eval.tables.embedded tables                      # needs all answers; measures the time to first token

Writes docs/embedded.md, docs/tables/embedded_main.{csv,tex}, docs/tables/embedded_pairs.csv and
docs/images/embedded_cost.png.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.answers.reuse import check_table
from eval.config import DEFAULT_DATA, DEFAULT_MODEL, ROOT, TOY_BANNER
from eval.efficiency.measure import measure
from eval.efficiency.shapes import QUESTION, noise
from eval.results.statistics import LEVEL, Comparison, Interval, all_pairs
from eval.sweep import CachingLlava, Credits, Setting, credits_of, folder_of, sweep
from eval.tables.common import TABLES, fits, image_of, interval, write_csv
from eval.tables.page import csv_numbers, insert, latex, markdown, score_text
from llava.errors import UserError
from llava.model.builder import load
from llava.model.llava_arch import Llava
from llava.processing.prompt import Sample
from llava.reduction import registry

PAGE = ROOT / "docs" / "embedded.md"
IMAGES = ROOT / "docs" / "images"
BUDGETS = (192, 128, 64, 32)
SHOWN = 64  # whose costs are in the page; the CSV file has all
SPLIT = "testdev"
# Where a budget is out of reach as a mean over layers, the row counts kept tokens as papers do, and says so.
BY_KEPT = {"schedule": "kept"}
MARK = "‡"


@dataclass(frozen=True)
class Cell:
    """One method at one budget.

    Attributes:
        tokens: visual tokens that entered a layer, mean over layers.
        kv_bytes: per question.
        flops: per question, tower to first token, as the batches of the sweep computed them.
        ttft: seconds on the bundled toy model, batch size 1; NaN before it was measured.
        by_kept: the budget counts tokens kept after the pruning layer, not the mean.
    """

    setting: Setting
    credit: Credits
    accuracy: Interval
    tokens: float
    kv_bytes: float
    flops: float
    by_kept: bool
    ttft: float = math.nan


def setting_of(name: str, budget: int, model: Llava) -> Setting | None:
    """The method at this budget; by kept tokens if the mean is out of reach; None if it cannot run at all."""
    options: list[dict[str, str]] = [{}, BY_KEPT] if "schedule" in registry.options_of(registry.method(name)) else [{}]
    for choice in options:
        setting = Setting(name, budget, choice)
        try:
            if fits(setting, model):
                return setting
        except UserError:
            continue
    return None


def settings(budgets: Sequence[int], model: Llava) -> list[Setting]:
    names = [name for name in registry.names() if name != "full"]
    found = [setting_of(name, budget, model) for budget in budgets for name in names]
    return [setting for setting in found if setting is not None]


def read_cell(setting: Setting, model: Llava, output: Path, groups: dict[str, str]) -> Cell:
    """The numbers of a finished run."""
    folder = folder_of(output, model, "gqa", SPLIT, setting)
    if not (folder / "result.json").is_file():
        raise UserError(f"{folder} holds no result; run `python -m eval.tables.embedded answers` first.")
    result = json.loads((folder / "result.json").read_text())
    credit = credits_of(folder, DEFAULT_DATA, SPLIT)
    audit = result["audit"]
    return Cell(
        setting,
        credit,
        interval(credit, groups),
        audit["mean_tokens_per_layer"],
        audit["kv_bytes_per_sample"],
        result["flops"]["as_batched_per_question"],
        setting.options == BY_KEPT,
    )


def times(found: Sequence[Setting], model: Llava, repeats: int) -> list[float]:
    """Seconds to the first token, all settings in turns in one process, tower included."""
    reducers = {
        str(i): registry.build(s.method, s.budget or model.visual_tokens, s.options) for i, s in enumerate(found)
    }
    question = [Sample("s", QUESTION, image=noise(0))]
    measured = measure(model, reducers, lambda turn: question, repeats)
    return [math.nan if (one := measured[str(i)]) is None else one.ttft for i in range(len(found))]


def verdicts(cells: dict[str, Cell], groups: dict[str, str]) -> dict[tuple[str, str], Comparison]:
    return all_pairs({name: cell.credit for name, cell in cells.items()}, groups)


def standing(name: str, pairs: dict[tuple[str, str], Comparison]) -> tuple[list[str], list[str]]:
    """Methods significantly worse than `name`, and those significantly better."""
    beats: list[str] = []
    beaten: list[str] = []
    for (a, b), found in pairs.items():
        if name in (a, b) and found.p <= 1 - LEVEL:
            winner = a if found.difference > 0 else b
            (beats if winner == name else beaten).append(b if name == a else a)
    return beats, beaten


def budget_table(full: Cell, cells: dict[str, Cell], pairs: dict[tuple[str, str], Comparison]) -> str:
    """Markdown of one budget, best method first."""
    rows = [_row("full", full, full, "")]
    for name, cell in sorted(cells.items(), key=lambda item: -item[1].accuracy.mean):
        beats, beaten = standing(name, pairs)
        top = "" if beaten else " **top**"
        rows.append(_row(name + (f" {MARK}" if cell.by_kept else ""), cell, full, f"{len(beats)} / {len(beaten)}{top}"))
    header = ["method", "accuracy [95 % CI]", "of full", "tokens per layer", "TTFT", "KV", "GFLOP", "beats / loses to"]
    return markdown(header, rows)


def _row(label: str, cell: Cell, full: Cell, verdict: str) -> list[str]:
    found = cell.accuracy
    return [
        label,
        score_text(found),
        f"{100 * found.mean / full.accuracy.mean:.1f} %",
        f"{cell.tokens:.1f}",
        f"{1000 * cell.ttft:.0f} ms",
        f"{cell.kv_bytes / 1e6:.2f} MB",
        f"{cell.flops / 1e9:.2f}",
        verdict,
    ]


def overview(full: Cell, cells: dict[int, dict[str, Cell]]) -> tuple[list[str], list[list[str]]]:
    """Accuracy of every method at every budget, by mean over the budgets it can run at."""
    names = [name for name in registry.names() if name != "full"]

    def text(cell: Cell | None) -> str:
        return "n/a" if cell is None else f"{cell.accuracy.mean:.1f}" + (f" {MARK}" if cell.by_kept else "")

    order = sorted(names, key=lambda n: -min(cells[b][n].accuracy.mean if n in cells[b] else 0.0 for b in BUDGETS))
    rows = [["full (576)", *[f"{full.accuracy.mean:.1f}"] * len(BUDGETS)]]
    rows += [[name, *(text(cells[b].get(name)) for b in BUDGETS)] for name in order]
    return ["method", *(f"{b} tokens" for b in BUDGETS)], rows


def sentences(cells: dict[int, dict[str, Cell]], pairs: dict[int, dict[tuple[str, str], Comparison]]) -> str:
    """In words, what is significant at each budget."""
    lines = []
    for budget in BUDGETS:
        found = pairs[budget]
        clear = sum(comparison.p <= 1 - LEVEL for comparison in found.values())
        top = [name for name in cells[budget] if not standing(name, found)[1]]
        top.sort(key=lambda name: -cells[budget][name].accuracy.mean)
        told = f"{clear} of {len(found)} pairs differ significantly. "
        lines.append(f"* **{budget} tokens**: {told}No method is significantly better than: {', '.join(top)}.")
    return "\n".join(lines)


def write(full: Cell, cells: dict[int, dict[str, Cell]], groups: dict[str, str]) -> None:
    """All files from the cells."""
    from eval.tables.plots import cost_plot

    pairs = {budget: verdicts(cells[budget], groups) for budget in cells}
    header, rows = overview(full, cells)
    insert(PAGE, "overview", markdown(header, rows))
    insert(PAGE, "significance", sentences(cells, pairs))
    insert(PAGE, f"budget {SHOWN}", budget_table(full, cells[SHOWN], pairs[SHOWN]))
    (TABLES / "embedded_main.tex").write_text(f"% {TOY_BANNER}\n{latex(header, rows)}")
    columns = ["method", "budget", "accuracy", "low", "high", "of_full", "tokens_per_layer", "ttft_ms", "kv_bytes"]
    lines = [_numbers("full", 576, full, full)]
    lines += [_numbers(name, b, cell, full) for b in cells for name, cell in cells[b].items()]
    write_csv(TABLES / "embedded_main.csv", [*columns, "flops", "counts_kept_tokens"], lines)
    compared = [
        [b, one, two, *csv_numbers(c.difference, c.low, c.high), f"{c.p:.2g}"]
        for b in pairs
        for (one, two), c in pairs[b].items()
    ]
    write_csv(TABLES / "embedded_pairs.csv", ["budget", "a", "b", "a_minus_b", "low", "high", "p_holm"], compared)
    points = {
        name: [(c.flops / 1e9, c.accuracy) for b in BUDGETS if (c := cells[b].get(name))]
        for name in registry.names()
        if name != "full"
    }
    cost_plot(IMAGES / "embedded_cost.png", (full.flops / 1e9, full.accuracy), points)


def _numbers(name: str, budget: int, cell: Cell, full: Cell) -> list[object]:
    found = cell.accuracy
    return [
        name,
        budget,
        *csv_numbers(found.mean, found.low, found.high, 100 * found.mean / full.accuracy.mean, cell.tokens),
        f"{1000 * cell.ttft:.2f}",
        f"{cell.kv_bytes:.0f}",
        f"{cell.flops:.0f}",
        str(cell.by_kept).lower(),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("answers", "tables"))
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--budgets", help="comma-separated, for `answers`; default 192,128,64,32 and full")
    parser.add_argument("--repeats", type=int, default=15, help="of the timing")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "sweep")
    args = parser.parse_args()
    try:
        model = load(args.model, device=args.device)
        if args.part == "answers":
            budgets = tuple(map(int, args.budgets.split(","))) if args.budgets else BUDGETS
            wanted = [*([] if args.budgets else [Setting("full", None)]), *settings(budgets, model)]
            sweep(wanted, CachingLlava(model), DEFAULT_DATA, SPLIT, args.output)
            return 0
        build_tables(model, args.output, args.repeats)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"Tables are in {PAGE.relative_to(ROOT)} and {TABLES.relative_to(ROOT)}/.")
    return 0


def build_tables(model: Llava, output: Path, repeats: int) -> None:
    """Read all runs, time them, write everything."""
    from dataclasses import replace

    groups = image_of(SPLIT)
    found = [Setting("full", None), *settings(BUDGETS, model)]
    read = [read_cell(setting, model, output, groups) for setting in found]
    check_table([folder_of(output, model, "gqa", SPLIT, setting) for setting in found], model.fingerprint)
    seconds = times(found, model, repeats)
    full, *rest = (replace(cell, ttft=ttft) for cell, ttft in zip(read, seconds, strict=True))
    cells = {b: {c.setting.method: c for c in rest if c.setting.budget == b} for b in BUDGETS}
    write(full, cells, groups)


if __name__ == "__main__":
    sys.exit(main())
