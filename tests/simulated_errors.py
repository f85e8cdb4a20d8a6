"""How often intervals cover and tests err in simulated answer files: the tables of docs/statistics.md.

python -m tests.simulated_errors {intervals,differences,averages,gains,shares,gain_shares} [TRIALS]

scripts/bench/coverage.sh runs all.
"""

import math
import sys
from functools import partial

import numpy as np
from scipy import stats

from eval.metrics import SufficientStatistics, divide
from eval.results.statistics import Interval, compare, interval
from eval.statistics import relative
from eval.statistics.gain import gain_kept, mixture
from eval.tables import markdown
from llava.errors import UserError

# -- intervals of a score, a difference and an average ----------------------------------------------------------------

CLUSTERS, RIGHT = (10, 20, 30, 100), (0.6, 0.9, 0.99)
# Questions per image, and the correlation of their answers within it.
SHAPES = ((1, 0.0), (4, 0.2), (5, 0.2), (10, 0.2))
KEPT, GAINED = 0.95, 0.2  # of full, in pairs whose difference is looked for

# -- tests of "99 % of full" -----------------------------------------------------------------------------------------

SHARE, LEVEL, RESAMPLES = 0.99, 0.05, 500
# Images, questions per image, accuracy of full, probability that the method is right where full is wrong, correlation
# of these events within an image.
SETTINGS = [
    (300, 1, 0.9, 0.0, 0.0),
    (300, 1, 0.96, 0.05, 0.0),
    (1000, 1, 0.96, 0.0, 0.0),
    (150, 6, 0.9, 0.0, 0.2),
    (150, 6, 0.96, 0.05, 0.2),
    (400, 6, 0.96, 0.0, 0.2),
    (400, 6, 0.96, 0.2, 0.0),
    (400, 6, 0.6, 0.2, 0.2),
    (500, 3, 0.9, 0.05, 0.2),
    (100, 20, 0.9, 0.0, 0.2),
    (50, 20, 0.9, 0.0, 0.2),
]
HEADER = ("images x questions", "full", "gained", "correlation", "tilting", "t-test", "percentile bootstrap")


def accuracy(sums):
    return 100 * divide(sums[..., 0], sums[..., 1])


def terms(right) -> SufficientStatistics:
    """An accuracy from [clusters, questions] of right and wrong."""
    right = np.asarray(right, float)
    rows = np.stack([right.sum(1), np.full(len(right), right.shape[1])], 1)
    names = tuple(map(str, range(len(right))))
    return SufficientStatistics("image", names, names, rows.astype(float), accuracy, proportion=True)


def f1(sums):
    return 200 * divide(sums[..., 0], sums[..., 1] + sums[..., 2])


def f1_terms(said, actual, per: int = 4) -> SufficientStatistics:
    """F1, no mean of anything, of yes/no answers [questions], `per` to an image: (true positives, said yes, actual)."""
    names = tuple(map(str, range(len(said))))
    sums = np.stack([actual & said, said, actual], 1).astype(float)
    return SufficientStatistics("question", names, tuple(str(i // per) for i in range(len(said))), sums, f1)


def chance(random, clusters: int, p: float, together: float):
    """[clusters, 1] probabilities with the mean p; answers drawn with them correlate by `together` in a cluster."""
    if not together or not p:
        return np.full((clusters, 1), p)
    return random.beta(p * (1 / together - 1), (1 - p) * (1 / together - 1), (clusters, 1))


def simulated(random, clusters: int, per: int, right: float, gained: float, together: float, share: float = SHARE):
    """Answers of a method and of full; the expected score of the method is exactly the share of full's.

    Args:
        right: accuracy of full.
        gained: probability that the method is right where full is wrong.
        together: correlation of these events within a cluster.
    """
    full = random.random((clusters, per)) < chance(random, clusters, right, together)
    lose = chance(random, clusters, (1 - share) + gained * (1 - right) / right, together)
    gain = chance(random, clusters, gained, together)
    method = np.where(full, random.random(full.shape) >= lose, random.random(full.shape) < gain)
    return method, full


def of_score(random, clusters: int, per: int, right: float, together: float):
    """The interval of one simulated score, and the true value."""
    answers = random.random((clusters, per)) < chance(random, clusters, right, together)
    return interval(terms(answers)), 100 * right


def of_difference(random, clusters: int, per: int, right: float, together: float):
    """The interval of one simulated difference, and the true value."""
    method, full = simulated(random, clusters, per, right, GAINED, together, KEPT)
    return compare(terms(method), terms(full), resamples=999), 100 * right * (KEPT - 1)


def of_average(random, clusters: int, per: int, right: float, together: float):
    """The interval of one simulated average over an accuracy and an F1, and the true value."""
    scores = {"accuracy": tuple(map(terms, simulated(random, clusters, per, right, GAINED, together, KEPT)))}
    actual = np.arange(clusters * per) % 2 == 0
    both = simulated(random, clusters, per, right, GAINED, together, KEPT)
    scores["f1"] = tuple(f1_terms(np.where(one.ravel(), actual, ~actual), actual, per) for one in both)
    try:
        return relative.relative_mean(scores), 100 * KEPT
    except UserError:  # full scores 0, which happens with ten questions
        return Interval(math.nan, None, None), 100 * KEPT


BLIND, SEEN = 0.3, 0.9  # accuracy of the blind model, and share of its gain that a method keeps


def of_gain(random, clusters: int, per: int, right: float, together: float):
    """The interval of one simulated visual gain, and the true value."""
    found = gain_kept(*three(random, clusters, per, right, together, SEEN))
    return found, 100 * SEEN


def three(random, clusters: int, per: int, right: float, together: float, kept: float):
    """A method, full and a blind model; the method sees what full sees in this share of the questions, else nothing."""
    blind = random.random((clusters, per)) < chance(random, clusters, BLIND, together)
    full = random.random((clusters, per)) < chance(random, clusters, right, together)
    sees = random.random((clusters, per)) < chance(random, clusters, kept, together)
    return terms(np.where(sees, full, blind)), terms(full), terms(blind)


def coverage(draw, setting, trials: int, seed: int = 5) -> tuple[float, float, float]:
    """Percent of trials without an interval, percent of the intervals that hold the true value, and percent of all
    trials whose interval misses it."""
    random, printed, held = np.random.default_rng(seed), 0, 0
    for _ in range(trials):
        found, true = draw(random, *setting)
        if found.low is not None:
            printed += 1
            held += found.low - 1e-9 <= true <= found.high + 1e-9
    return 100 * (1 - printed / trials), 100 * held / max(1, printed), 100 * (printed - held) / trials


def coverages(draw, trials: int) -> str:
    """Table: coverage where most samples get an interval, elsewhere how often none is printed and one misses."""
    rows = []
    for per, together in SHAPES:
        for clusters in CLUSTERS:
            row = [f"{clusters} x {per}", f"{together:g}"]
            for right in RIGHT:
                withheld, covered, missed = coverage(draw, (clusters, per, right, together), trials)
                if withheld > 50:
                    row.append("withheld" if withheld > 99.95 else f"withheld {withheld:.1f} %, {missed:.1f} % miss")
                else:
                    row.append(f"{covered:.1f} %" + (f" (withheld {withheld:.1f} %)" if withheld >= 0.05 else ""))
            rows.append(row)
    return markdown(("images x questions", "correlation", *(f"{100 * right:g} %" for right in RIGHT)), rows)


def others(found: relative.Pairs, random) -> tuple[float, float]:
    """p of the t-test with the delta method's standard error, and of the percentile bootstrap."""
    n, observed = found.clusters, float(relative.difference(found, found.counts, SHARE))
    influence = n * relative.influences(found, SHARE)
    error = float(np.sqrt(found.counts @ influence**2 / (n - 1) / n))
    student = stats.t.sf(observed / error, n - 1) if error > 0 else float(observed <= 0)
    method, full = next(found.draws(found.counts / n, n, RESAMPLES, random))
    return float(student), float((method - SHARE * full <= 0).mean())


def errors(setting, trials: int, seed: int = 7) -> list[float]:
    """Percent of trials that pass, by each of the three tests."""
    random, passed = np.random.default_rng(seed), np.zeros(3)
    for trial in range(trials):
        method, full = simulated(random, *setting)
        found = relative.pair(terms(method), terms(full))
        tilting = relative.p_value(found, SHARE, RESAMPLES, trial)
        passed += np.array([tilting, *others(found, random)]) <= LEVEL
    return list(100 * passed / trials)


def shares(trials: int) -> str:
    """Table: percent of trials that pass the tests of "99 % of full", which is exactly what the method keeps."""
    rows = []
    for setting in SETTINGS:
        clusters, per, right, gained, together = setting
        about = [f"{clusters:,} x {per}", f"{100 * right:.0f} %", f"{100 * gained:.0f} %", f"{together:g}"]
        rows.append([*about, *(f"{share:.1f} %" for share in errors(setting, trials))])
    return markdown(HEADER, rows)


def gain_shares(trials: int, seed: int = 7) -> str:
    """Table: percent of trials that pass the test of a share of the visual gain, which is exactly what is kept."""
    rows = []
    for clusters, per, together in ((100, 1, 0.0), (300, 1, 0.0), (100, 5, 0.2), (400, 6, 0.2)):
        for right in (0.6, 0.9):
            row = [f"{clusters:,} x {per}", f"{100 * right:.0f} %"]
            for share in (0.5, 0.9, 0.99):
                random, passed = np.random.default_rng(seed), 0
                for trial in range(trials):
                    method, full, blind = three(random, clusters, per, right, together, share)
                    found = relative.pair(method, mixture(full, blind, share))
                    passed += relative.p_value(found, 1.0, RESAMPLES, trial, whole=True) <= LEVEL
                row.append(f"{100 * passed / trials:.1f} %")
            rows.append(row)
    return markdown(("images x questions", "full", "50 %", "90 %", "99 %"), rows)


TABLES = {
    "intervals": (partial(coverages, of_score), 10_000),
    "differences": (partial(coverages, of_difference), 1000),
    "averages": (partial(coverages, of_average), 1000),
    "gains": (partial(coverages, of_gain), 1000),
    "shares": (shares, 2000),
    "gain_shares": (gain_shares, 1000),
}

if __name__ == "__main__":
    table, usual = TABLES[sys.argv[1]]
    print(table(int(sys.argv[2]) if len(sys.argv) > 2 else usual))
