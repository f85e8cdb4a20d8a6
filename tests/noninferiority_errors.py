"""How often tests of "99 % of full" pass a method whose expected score is just that: table of docs/statistics.md.

python -m tests.noninferiority_errors [TRIALS]
"""

import sys

import numpy as np
from scipy import stats

from eval.metrics import SufficientStatistics, divide
from eval.statistics import noninferiority, pairs
from eval.tables.page import markdown

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


def simulated(random, clusters: int, per: int, right: float, gained: float, together: float, share: float = SHARE):
    """Answers of a method and of full; the expected score of the method is exactly the share of full's.

    Args:
        right: accuracy of full.
        gained: probability that the method is right where full is wrong.
        together: correlation of these events within a cluster.
    """

    def chance(p):
        if not together or not p:
            return np.full((clusters, 1), p)
        return random.beta(p * (1 / together - 1), (1 - p) * (1 / together - 1), (clusters, 1))

    full = random.random((clusters, per)) < chance(right)
    lose = chance((1 - share) + gained * (1 - right) / right)
    gain = chance(gained)
    method = np.where(full, random.random(full.shape) >= lose, random.random(full.shape) < gain)
    return method, full


def others(found: pairs.Pairs, random) -> tuple[float, float]:
    """p of the t-test with the delta method's standard error, and of the percentile bootstrap."""
    n, observed = found.clusters, float(noninferiority.difference(found, found.counts, SHARE))
    influence = n * noninferiority.influences(found, SHARE)
    error = float(np.sqrt(found.counts @ influence**2 / (n - 1) / n))
    student = stats.t.sf(observed / error, n - 1) if error > 0 else float(observed <= 0)
    method, full = next(found.draws(found.counts / n, n, RESAMPLES, random))
    return float(student), float((method - SHARE * full <= 0).mean())


def errors(setting, trials: int, seed: int = 7) -> list[float]:
    """Percent of trials that pass, by each of the three tests."""
    random, passed = np.random.default_rng(seed), np.zeros(3)
    for trial in range(trials):
        method, full = simulated(random, *setting)
        found = pairs.pair(terms(method), terms(full))
        tilting = noninferiority.p_value(found, SHARE, RESAMPLES, trial)
        passed += np.array([tilting, *others(found, random)]) <= LEVEL
    return list(100 * passed / trials)


def main() -> None:
    trials = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    rows = []
    for setting in SETTINGS:
        clusters, per, right, gained, together = setting
        about = [f"{clusters:,} x {per}", f"{100 * right:.0f} %", f"{100 * gained:.0f} %", f"{together:g}"]
        rows.append([*about, *(f"{share:.1f} %" for share in errors(setting, trials))])
    print(markdown(HEADER, rows))


if __name__ == "__main__":
    main()
