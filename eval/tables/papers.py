"""The pages of VisionDrop and AttnMix: one factor at a time on `val`, and budgets beside their controls on `testdev`.

    python -m eval.tables.papers visiondrop
    python -m eval.tables.papers attnmix

Writes docs/<method>.md and docs/tables/<method>_{ablation,budgets}.csv. Answers are kept under results/sweep, so that
an interrupted command goes on where it stopped.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.config import DEFAULT_DATA, DEFAULT_MODEL, ROOT
from eval.results.statistics import compare_scores
from eval.sweep import CachingLlava, Setting, sweep
from eval.tables.ablation import TABLES, Ablation, Factors, ablate, fits, image_of, interval, write_csv
from eval.tables.page import csv_numbers, difference_text, insert, markdown, score_text
from llava.errors import UserError
from llava.model.builder import load

BUDGETS = (64, 32)
ABLATION_BUDGETS = (64,)


@dataclass(frozen=True)
class Paper:
    """What a page shows.

    Attributes:
        factors: of the ablation.
        rows: label -> (method, options) of the table of budgets; the first is what the others are compared with.
    """

    factors: Factors
    rows: dict[str, tuple[str, dict[str, str]]]


def choices(name: str, *values: str) -> list[dict[str, str]]:
    return [{name: value} for value in values]


PAPERS = {
    "visiondrop": Paper(
        factors=(
            ("decoder score", choices("attention", "causal", "visual", "bidirectional")),
            (
                "early-token bias of the score",
                [
                    {"average": "all"},
                    {"average": "viewers"},
                    {"diagonal": "false"},
                    {"average": "viewers", "diagonal": "false"},
                ],
            ),
            ("scale of merged tokens", choices("merge", "mean", "target_plus_mean", "none")),
            ("metric of merging", choices("metric", "rotated", "unrotated", "hidden")),
            ("position ids", choices("positions", "renumber", "original")),
            ("CLS token", choices("keep_cls", "true", "false")),
            ("encoder score", choices("encoder_score", "cls", "received")),
            ("place of contextual tokens", choices("order", "appended", "raster")),
            ("dominant for one contextual", choices("ratio", "0", "1", "3", "7", "15")),
            ("first stage, times the budget; 1: encoder alone", choices("start", "1", "1.25", "1.5", "2", "3")),
            ("decoder stages before layers", choices("layers", "", "1,3,5", "2,4", "4")),
            ("the release", choices("official", "false", "true")),
        ),
        rows={
            "visiondrop": ("visiondrop", {}),
            "official": ("visiondrop", {"official": "true"}),
            "score over viewers": ("visiondrop", {"average": "viewers"}),
            "original positions": ("visiondrop", {"positions": "original"}),
            "visionzip (encoder stage alone)": ("visionzip", {}),
            "uniform": ("uniform", {}),
        },
    ),
    "attnmix": Paper(
        factors=(
            ("split", choices("mix", "adaptive", "t2i", "cls", "half")),
            ("floor of each ranking", choices("floor", "0", "0.125", "0.25", "0.375", "0.5")),
            ("temperature", choices("temperature", "0.001", "0.01", "0.1", "1")),
            ("text", choices("text", "question", "instruction", "after")),
            ("tower block", choices("block", "-1", "-2", "-3")),
            ("position ids", choices("positions", "renumber", "original")),
            ("the release", choices("official", "false", "true")),
        ),
        rows={
            "attnmix": ("attnmix", {}),
            "official": ("attnmix", {"official": "true"}),
            "text to image only": ("attnmix", {"mix": "t2i"}),
            "CLS only": ("attnmix", {"mix": "cls"}),
            "half and half": ("attnmix", {"mix": "half"}),
            "uniform": ("uniform", {}),
        },
    ),
}


def budget_table(name: str, paper: Paper, model: CachingLlava, budgets: Sequence[int], output: Path) -> None:
    """Accuracy of every row at every budget, and its difference to the first row."""
    wanted = {(label, b): Setting(method, b, o) for label, (method, o) in paper.rows.items() for b in budgets}
    wanted = {key: setting for key, setting in wanted.items() if fits(setting, model)}
    found = dict(zip(wanted, sweep(list(wanted.values()), model, DEFAULT_DATA, "testdev", output), strict=True))
    groups = image_of("testdev")
    rows: list[list[str]] = []
    numbers: list[list[object]] = []
    for label in paper.rows:
        cells = []
        for budget in budgets:
            credit, base = found.get((label, budget)), found[name, budget]
            if credit is None:
                cells.append("n/a")
                continue
            score = interval(credit, groups)
            text, line = score_text(score), ["0", "0", "0"]
            if label != name:
                gap = compare_scores(credit, base, groups)
                text += f"; {difference_text(gap)}"
                line = csv_numbers(gap.difference, gap.low, gap.high)
            cells.append(text)
            numbers.append([label, budget, *csv_numbers(score.mean, score.low, score.high), *line])
        rows.append([label, *cells])
    insert(page_of(name), "budgets", markdown(["row", *(f"{b} tokens" for b in budgets)], rows))
    header = ["row", "budget", "accuracy", "low", "high", "difference", "difference_low", "difference_high"]
    write_csv(TABLES / f"{name}_budgets.csv", header, numbers)


def page_of(name: str) -> Path:
    return ROOT / "docs" / f"{name}.md"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=tuple(PAPERS))
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "sweep")
    args = parser.parse_args()
    try:
        model, paper = CachingLlava(load(args.model, device=args.device)), PAPERS[args.method]
        ablate(Ablation(args.method, paper.factors, page_of(args.method)), model, ABLATION_BUDGETS, args.output)
        budget_table(args.method, paper, model, BUDGETS, args.output)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"Tables are in docs/{args.method}.md and docs/tables/.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
