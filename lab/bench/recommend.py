"""How often `vtr recommend` finds what a full sweep finds, what it asks, and how often it errs: docs/statistics.md.

python -m lab.bench.recommend sweep FULL FOLDER... [--draws 500]   draws pictures anew from answers of finished runs
python -m lab.bench.recommend tables [--draws 1000]   simulates tables (scripts/bench/recommend.sh runs both)
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from eval.answers.reuse import read_result
from eval.command import exit_on_user_error, make_parser, open_dataset
from eval.config import DEFAULT_DATA
from eval.metrics import Array
from eval.recommend.halving import Choice, halve, upper_bound
from eval.statistics.command import Run, read_run
from eval.tables import markdown

LEVEL = 0.95
QUESTIONS, TOLERATED = (200, 500, 1000, 2642), (2.0, 3.0)

# Simulated tables: pictures, questions per picture, accuracy of full, share of full's errors that a method corrects,
# correlation of these events within a picture.
SETTINGS = [
    (30, 8, 0.9, 0.0, 0.2),
    (60, 8, 0.96, 0.2, 0.1),
    (100, 8, 0.96, 0.0, 0.0),
    (100, 8, 0.6, 0.2, 0.2),
    (50, 20, 0.9, 0.0, 0.2),
    (300, 1, 0.9, 0.05, 0.0),
    (300, 8, 0.9, 0.05, 0.2),
    (1000, 1, 0.7, 0.1, 0.0),
]
# True losses in points of 16 configurations, where 2 points are tolerated: of four methods at four budgets; and all of
# them just too large, the worst there can be.
SPREAD = [20.0, 8.0, 3.0, 1.0, 16.0, 6.0, 2.1, 0.5, 12.0, 4.0, 2.2, 1.2, 9.0, 3.0, 2.1, 0.8]
LOSSES = {"spread": SPREAD, "all at 2.1": [2.1] * 16}


class Counted:
    """`ask` of halving.py for a table of losses; counts the questions."""

    def __init__(self, lost: Array, asked: Array):
        self.lost, self.asked, self.seen = lost, asked, np.zeros(len(lost))

    def __call__(self, which: Sequence[int], pictures: int) -> Array:
        self.seen[which] = self.asked[:pictures].sum()
        return self.lost[which, :pictures]


def swept(lost: Array, asked: Array, costs: Sequence[float], tolerated: float) -> int | None:
    """What the full sweep chooses: the cheapest of all configurations that passes the same test."""
    level = 1 - (1 - LEVEL) / len(lost)
    passed = [one for one, row in enumerate(lost) if upper_bound(row, asked, level) <= tolerated]
    return min(passed, key=lambda one: costs[one]) if passed else None


# -- draws from finished runs ----------------------------------------------------------------------------------------


def read(folders: Sequence[Path]) -> tuple[list[Run], Array, Array]:
    """The runs, [runs, pictures] sums of their sample scores, full first, and [pictures] numbers of questions."""
    settings = read_result(folders[0])["settings"]
    data = open_dataset(settings["benchmark"], str(DEFAULT_DATA), settings["split"], None, "auto")
    runs = [read_run(folder, data) for folder in folders]
    ids = [name for name in runs[0].texts if all(name in run.texts for run in runs)]
    labels = data.labels(runs[0].stored.images)
    _, about = np.unique([labels[name] for name in ids], return_inverse=True)
    scores = np.array([np.bincount(about, [(run.sample_scores or {})[name] for name in ids]) for run in runs])
    return runs, scores, np.bincount(about).astype(float)


def of_sweep(folders: Sequence[Path], draws: int) -> str:
    """Table: for each number of questions, how often sweep and halving find the true cheapest, agree and err."""
    runs, scores, all_asked = read(folders)
    costs = [run.stored.result["flops_per_question"] for run in runs]
    lost, budgets = scores[0] - scores[1:], [run.budget for run in runs[1:]]
    true, rows = 100 * lost.sum(1) / all_asked.sum(), []
    for tolerated in TOLERATED:
        within = [one for one in range(len(lost)) if true[one] <= tolerated]
        best = budgets[min(within, key=lambda one: costs[one + 1])] if within else None
        for questions in QUESTIONS:
            random, found = np.random.default_rng(7), []
            for _ in range(draws):
                drawn = random.integers(0, len(all_asked), round(questions / all_asked.mean()))
                table = Counted(lost[:, drawn], all_asked[drawn])
                choice = halve(table, table.asked, costs[1:], costs[0], tolerated, LEVEL).chosen
                sweep = swept(table.lost, table.asked, costs[1:], tolerated)
                one, all_of_them = (None if name is None else budgets[name] for name in (choice, sweep))
                wrong = choice is not None and true[choice] > tolerated
                share = (table.asked.sum() + table.seen.sum()) / (table.asked.sum() * len(runs))
                found.append([all_of_them == best, one == best, one == all_of_them, one is None, wrong, share])
            rows.append([f"{tolerated:g}", f"{questions:,}", *(f"{100 * value:.1f}" for value in np.mean(found, 0))])
    head = ["tolerated", "questions", "sweep finds", "halving finds", "same budget", "nothing shown", "wrong", "asked"]
    return markdown(head, rows)


# -- simulated tables --------------------------------------------------------------------------------------------------


def simulated(
    random: np.random.Generator, losses: Sequence[float], setting: tuple[int, int, float, float, float]
) -> Array:
    """[configurations, pictures] sums of full's right answers minus those of configurations with these true losses."""
    pictures, per, right, gained, together = setting

    def chance(mean: float) -> Array | float:
        if not together or mean in (0, 1):
            return mean
        more = (1 - together) / together
        return random.beta(mean * more, (1 - mean) * more, (pictures, 1))

    full = random.random((pictures, per)) < chance(right)
    rows = []
    for loss in losses:
        missed = (loss / 100 + gained * (1 - right)) / right
        lost = full & (random.random(full.shape) < chance(missed))
        won = ~full & (random.random(full.shape) < chance(gained))
        rows.append((lost.astype(float) - won).sum(1))
    return np.array(rows)


def of_tables(draws: int) -> str:
    """Table: how often a configuration is recommended that loses more than is tolerated, or one at all."""
    rows = []
    for setting in SETTINGS:
        pictures, per, right, gained, together = setting
        row = [f"{pictures:,} x {per}", f"{100 * right:.0f} %", f"{100 * gained:.0f} %", f"{together:g}"]
        for losses in LOSSES.values():
            wrong, some = 0, 0
            for choice in choices(losses, setting, draws):
                some += choice.chosen is not None
                wrong += choice.chosen is not None and losses[choice.chosen] > 2
            row += [f"{100 * wrong / draws:.1f}", f"{100 * some / draws:.1f}"][: 1 + (losses is SPREAD)]
        rows.append(row)
    head = [
        "pictures x questions",
        "full",
        "gained",
        "correlation",
        "spread: wrong",
        "spread: any",
        "all at 2.1: wrong",
    ]
    return markdown(head, rows)


def choices(
    losses: Sequence[float], setting: tuple[int, int, float, float, float], draws: int, seed: int = 3
) -> Iterator[Choice]:
    """What is recommended in simulated tables, where a configuration costs the less the more it loses."""
    random, asked = np.random.default_rng(seed), np.full(setting[0], float(setting[1]))
    for _ in range(draws):
        table = Counted(simulated(random, losses, setting), asked)
        yield halve(table, asked, [100 - loss for loss in losses], 1000, 2.0, LEVEL)


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    p = make_parser("lab.bench.recommend", __doc__)
    p.add_argument("what", choices=("sweep", "tables"))
    p.add_argument("folders", nargs="*", type=Path, help="of finished runs of one benchmark, that of full first")
    p.add_argument("--draws", type=int, default=500, help="of pictures, or of tables")
    args = p.parse_args(arguments)
    print(of_sweep(args.folders, args.draws) if args.what == "sweep" else of_tables(args.draws), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
