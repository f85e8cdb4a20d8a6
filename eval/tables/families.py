"""All methods on the bundled toy LLaVA-NeXT and toy Video-LLaVA: accuracy at a few budgets.

    python -m eval.tables.families next answers [--budgets 320]   # runs, spread over the ranks
    python -m eval.tables.families next tables                    # needs all answers

Both take --budgets and --limit, the number of questions; a table says which it is of.

Writes a table of docs/methods.md and docs/tables/embedded_<family>.csv.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eval import benchmarks
from eval.answers import result_folder
from eval.answers.reuse import check_table
from eval.command import exit_on_user_error
from eval.config import ROOT
from eval.results.statistics import Interval
from eval.sweep import CachingLlava, Credits, Setting, credits_of, folder_of, sweep
from eval.tables.common import TABLES, interval, write_csv
from eval.tables.embedded import BY_KEPT, MARK, setting_of
from eval.tables.page import csv_numbers, insert, markdown, score_text
from llava.errors import UserError, unknown
from llava.model.builder import load
from llava.model.llava_arch import Llava
from llava.reduction import registry

PAGE = ROOT / "docs" / "methods.md"


@dataclass(frozen=True)
class Family:
    """One bundled toy model and its benchmark.

    Attributes:
        budgets: visual tokens per image or video; tables are sorted by the first.
        batch_size: questions at once; unreduced runs are long.
    """

    model: Path
    data: Path
    benchmark: str
    split: str
    budgets: tuple[int, ...]
    batch_size: int


FAMILIES = {
    "next": Family(ROOT / "assets/tinyllava_next", ROOT / "assets/eval_next", "gqa", "testdev", (320, 640, 160), 16),
    "video": Family(ROOT / "assets/tinyllava_video", ROOT / "assets/eval_video", "video_qa", "test", (136, 256), 16),
}


def settings(family: Family, budgets: Sequence[int], model: Llava) -> list[Setting]:
    """Every method at every budget that it can meet, by kept tokens where the mean is out of reach."""
    names = [name for name in registry.names() if name != "full"]
    found = [setting_of(name, budget, model) for budget in budgets for name in names]
    # Reducing inside the tower needs whole tiles, and unpadding cuts them.
    return [s for s in found if s is not None and s.method not in ("tome", "downsample")]


def answers(name: str, budgets: Sequence[int], limit: int | None, output: Path) -> None:
    """Run what is not there yet."""
    family, model = FAMILIES[name], CachingLlava(load(FAMILIES[name].model))
    wanted = [*settings(family, budgets, model), Setting("full", None)]
    sweep(wanted, model, family.data, family.split, output, family.batch_size, family.benchmark, limit)


def tables(name: str, budgets: Sequence[int], limit: int | None, output: Path) -> None:
    """The table of docs/methods.md, methods by their accuracy at the first budget."""
    family, model = FAMILIES[name], CachingLlava(load(FAMILIES[name].model))
    data = benchmarks.get(family.benchmark).load(family.data, family.split)
    groups = {question.id: question.image for question in data.questions[:limit]}

    places: list[Path] = []

    def read(setting: Setting) -> tuple[Credits, float]:
        folder = folder_of(output, model, family.benchmark, family.split, setting, family.data)
        places.append(result_folder(folder, len(groups), len(data.questions)))
        path = places[-1] / "result.json"
        if not path.is_file():
            raise UserError(f"{folder} holds no result; run `python -m eval.tables.families {name} answers` first.")
        audit = json.loads(path.read_text())["audit"]
        credits = credits_of(folder, family.data, family.split, family.benchmark, limit)
        if len(credits) < len(groups):
            raise UserError(f"{folder} answers {len(credits):,} of {len(groups):,} questions; run the answers first.")
        return credits, audit["mean_tokens_per_layer"]

    full, tokens = read(Setting("full", None))
    found = {(s.method, s.budget): (s, *read(s)) for s in settings(family, budgets, model)}
    check_table(places, model.fingerprint)
    methods = dict.fromkeys(method for method, _ in found)
    mean = {key: sum(credit.values()) / len(credit) for key, (_, credit, _) in found.items()}
    order = sorted(methods, key=lambda method: -mean.get((method, budgets[0]), 0.0))
    rows = [[f"`full` ({tokens:.0f} tokens)", *([score_text(interval(full, groups))] * len(budgets))]]
    lines: list[list[object]] = [["full", "", f"{tokens:.1f}", *numbers(interval(full, groups))]]
    for method in order:
        cells = []
        for budget in budgets:
            if (method, budget) not in found:
                cells.append("n/a")
                continue
            setting, credit, kept = found[method, budget]
            cells.append(score_text(interval(credit, groups)) + (MARK if setting.options == BY_KEPT else ""))
            lines.append([method, budget, f"{kept:.1f}", *numbers(interval(credit, groups))])
        rows.append([f"`{method}`", *cells])
    header = ["method", *(f"{budget} tokens" for budget in budgets)]
    pictures = f"{len(set(groups.values())):,} {data.pictures.noun}"
    counted = f"{len(groups):,} of {len(data.questions):,} questions, about {pictures}.\n\n"
    insert(PAGE, f"embedded {name}", counted + markdown(header, rows))
    write_csv(TABLES / f"embedded_{name}.csv", ["method", "budget", "tokens", "accuracy", "low", "high"], lines)


def numbers(found: Interval) -> list[str]:
    return csv_numbers(found.mean, found.low, found.high)


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", help=", ".join(FAMILIES))
    parser.add_argument("step", choices=("answers", "tables"))
    parser.add_argument("--budgets", help="some of the family's budgets, separated by commas; all if left out")
    parser.add_argument("--limit", type=int, help="the first LIMIT questions; all if left out")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "sweep")
    args = parser.parse_args(arguments)
    if args.family not in FAMILIES:
        raise unknown("family", args.family, FAMILIES)
    known = FAMILIES[args.family].budgets
    budgets = tuple(int(part) for part in args.budgets.split(",")) if args.budgets else known
    if not set(budgets) <= set(known):
        raise UserError(f"--budgets should be some of {', '.join(map(str, known))}, got {args.budgets}.")
    if args.step == "answers":
        answers(args.family, budgets, args.limit, args.output)
    else:
        tables(args.family, budgets, args.limit, args.output)
        print(f"Table is in {PAGE.relative_to(ROOT)}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
