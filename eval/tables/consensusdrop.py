"""ConsensusDrop on the toy benchmark: the paper's claims, and its budgets beside controls, on `testdev`.

    python -m eval.tables.consensusdrop

Writes the tables into docs/consensusdrop.md, the numbers to docs/tables/, the plots to docs/images/. Answers are kept
under results/sweep, so that an interrupted command goes on where it stopped.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from eval.config import DEFAULT_DATA, DEFAULT_MODEL, ROOT
from eval.results.statistics import LEVEL, Comparison, compare_scores
from eval.sweep import CachingLlava, Credits, Setting, describe, sweep
from eval.tables.common import TABLES, changed, defaults, image_of, interval, write_csv
from eval.tables.page import csv_numbers, difference_text, insert, markdown, score_text
from llava.errors import UserError
from llava.model.builder import load

PAGE = ROOT / "docs" / "consensusdrop.md"
IMAGES = ROOT / "docs" / "images"
BUDGETS = (192, 128, 64, 32)

# (claim, options of the first setting, options of the second)
CLAIMS: tuple[tuple[str, dict[str, str], dict[str, str]], ...] = (
    ("fused beats encoder only", {}, {"alpha": "1"}),
    ("fused beats cross-modal only", {}, {"alpha": "0"}),
    ("rank fusion beats the raw average", {}, {"fusion": "raw"}),
    ("merging beats dropping (same budget, all retained)", {}, {"merged_share": "0"}),
    ("merging beats bare anchors (same tokens, members dropped)", {}, {"weights": "none"}),
)

# (label, method, options)
CURVES: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("consensusdrop", "consensusdrop", {}),
    ("encoder only", "consensusdrop", {"alpha": "1"}),
    ("cross-modal only", "consensusdrop", {"alpha": "0"}),
    ("uniform", "uniform", {}),
    ("random", "random", {}),
    ("downsample", "downsample", {}),
)

# (label of CURVES, budget) -> sample scores
Curve = dict[tuple[str, int], Credits]


def claims(model: CachingLlava, budgets: Sequence[int], output: Path) -> None:
    """The paper's claims and the budget table, on the test split, defaults as they are."""
    usual = defaults("consensusdrop")
    full = Setting("full", None)
    curve = {
        (name, b): Setting(method, b, changed(o, usual) if o else {}) for name, method, o in CURVES for b in budgets
    }
    pairs = {
        (c, b): (Setting("consensusdrop", b, changed(x, usual)), Setting("consensusdrop", b, changed(y, usual)))
        for c, x, y in CLAIMS
        for b in budgets
    }
    settings = list(
        {
            (s.method, s.budget, describe(s)): s
            for s in [full, *curve.values(), *(s for p in pairs.values() for s in p)]
        }.values()
    )
    scores = {
        (s.method, s.budget, describe(s)): c
        for s, c in zip(settings, sweep(settings, model, DEFAULT_DATA, "testdev", output), strict=True)
    }

    def find(setting: Setting) -> Credits:
        return scores[setting.method, setting.budget, describe(setting)]

    groups = image_of("testdev")
    budget_table(find(full), {key: find(s) for key, s in curve.items()}, budgets, groups)
    claim_table({key: (find(a), find(b)) for key, (a, b) in pairs.items()}, budgets, groups)
    from eval.tables.plots import accuracy_plot

    points = {name: {b: interval(find(curve[name, b]), groups) for b in budgets} for name, _, _ in CURVES}
    accuracy_plot(IMAGES / "accuracy.png", interval(find(full), groups), points, model.visual_tokens)


def budget_table(full: Credits, curve: Curve, budgets: Sequence[int], groups: dict[str, str]) -> None:
    everything = interval(full, groups)
    rows = [["full (576)", *[score_text(everything)] * len(budgets)]]
    numbers: list[list[object]] = [["full", 576, *csv_numbers(everything.mean, everything.low, everything.high)]]
    for name, _, _ in CURVES:
        cells = []
        for budget in budgets:
            found = interval(curve[name, budget], groups)
            cells.append(score_text(found))
            numbers.append([name, budget, *csv_numbers(found.mean, found.low, found.high)])
        rows.append([name, *cells])
    insert(PAGE, "budgets", markdown(["method", *(f"{b} tokens" for b in budgets)], rows))
    write_csv(TABLES / "consensusdrop_budgets.csv", ["method", "budget", "accuracy", "low", "high"], numbers)


def claim_table(
    pairs: dict[tuple[str, int], tuple[Credits, Credits]], budgets: Sequence[int], groups: dict[str, str]
) -> None:
    rows: list[list[str]] = []
    numbers: list[list[object]] = []
    for claim, _, _ in CLAIMS:
        cells = []
        for budget in budgets:
            found = compare_scores(*pairs[claim, budget], groups)
            verdict = verdict_of(found)
            cells.append(f"{difference_text(found)} {verdict}")
            values = csv_numbers(found.difference, found.low, found.high)
            numbers.append([claim, budget, *values, f"{found.p:.2g}", verdict])
        rows.append([claim, *cells])
    insert(PAGE, "claims", markdown(["claim", *(f"{b} tokens" for b in budgets)], rows))
    write_csv(
        TABLES / "consensusdrop_claims.csv", ["claim", "budget", "difference", "low", "high", "p", "verdict"], numbers
    )


def verdict_of(found: Comparison) -> str:
    """Whether a claim of "better" is shown, refuted, or neither, at the level of the interval."""
    if found.p > 1 - LEVEL:
        return "open"
    return "holds" if found.difference > 0 else "fails"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--budgets", help="comma-separated; default 192,128,64,32")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "sweep")
    args = parser.parse_args()
    try:
        model = CachingLlava(load(args.model, device=args.device))
        budgets = tuple(map(int, args.budgets.split(","))) if args.budgets else BUDGETS
        claims(model, budgets, args.output)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"Tables are in {PAGE.relative_to(ROOT)} and {TABLES.relative_to(ROOT)}/.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
