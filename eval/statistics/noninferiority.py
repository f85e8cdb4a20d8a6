"""A one-sided test that a method reaches a share of the full model's score, and the lower bound of that share.

The null distribution is the one nearest to the data in which the method has exactly the share: the probability of each
cluster is multiplied by exp(t x its influence on the difference), with the t that makes the difference zero
(exponential tilting; Efron 1981, DiCiccio and Romano 1990). p is the probability of a difference at least as large as
the observed one when as many clusters are drawn from it. For single right-or-wrong questions of which the method only
loses some, this is nearly the binomial test.

A t-test and the percentile bootstrap pass too many methods here. Methods near 99 % lose few questions, so that a sample
that happens to lose fewer has both a larger difference and a smaller standard error (docs/statistics.md).
"""

from dataclasses import replace

import numpy as np
from scipy.optimize import brentq

from eval.metrics import Array
from eval.results.statistics import FEWEST_DECIDING, RESAMPLES, deciding, slope
from eval.statistics.pairs import Pairs

# Differences this close are equal: scores of the same counts differ by rounding alone.
TIE = 1e-9
# Steepest tilt that is tried; the influences have a standard deviation of about 1.
STEEPEST = 1e4
# Precision of the lower bound, as a share.
PRECISION = 1e-4


def p_value(pairs: Pairs, share: float, resamples: int = RESAMPLES, seed: int = 0) -> float:
    """One-sided p-value of "the score of the method is at most `share` times that of the full model".

    1 where no weighting of the clusters gives exactly that share.
    """
    supported = with_worst_cluster(pairs, share)
    weights = null_weights(supported, share)
    if weights is None:
        return 1.0
    observed, random = float(difference(pairs, pairs.counts, share)), np.random.default_rng(seed)
    reached = sum(
        int((method - share * full >= observed - TIE).sum())
        for method, full in supported.draws(weights, pairs.clusters, resamples, random)
    )
    return (1 + reached) / (1 + resamples)


def lower_bound(
    pairs: Pairs, level: float, passed: float | None = None, resamples: int = RESAMPLES, seed: int = 0
) -> float:
    """The largest share that the test rejects at `level`: a one-sided bound of method / full with confidence 1 - level.

    Args:
        passed: a share that is known to be rejected, which saves time.
    """
    method, full = pairs.scores(pairs.counts)
    high = float(method / full)

    def excess(share: float) -> float:
        return p_value(pairs, share, resamples, seed) - level

    low, step = passed, 0.02
    while low is None:
        candidate = high - step
        if candidate <= 0:
            return 0.0
        if excess(candidate) <= 0:
            low = candidate
        else:
            high, step = candidate, 2 * step
    if excess(high) <= 0:
        return high
    if excess(low) > 0:  # `passed` was not
        return low
    return float(brentq(excess, low, high, xtol=PRECISION))


def difference(pairs: Pairs, counts: Array, share: float) -> Array:
    """Score of the method minus `share` times that of the full model, for counts of kinds [..., kinds]."""
    method, full = pairs.scores(counts)
    return method - share * full


def with_worst_cluster(pairs: Pairs, share: float) -> Pairs:
    """The observed clusters and one that speaks against the method twice as much as any of them.

    Few clusters lose anything near 99 %, so the worst one that can occur is rarely among those observed. Where none
    speaks against the method, or fewer than FEWEST_DECIDING clusters decide the spread of the difference, the full
    model gets everything in the added cluster right and the method everything wrong. For single questions without a
    loss the test is then the exact one, p = 0.99^n.
    """
    few = deciding(influences(pairs, share), pairs.counts) < FEWEST_DECIDING
    if pairs.of_method.proportion and pairs.of_full.proportion:
        asked = float(pairs.counts @ pairs.full[:, 1]) / pairs.clusters
        most = float((pairs.full[:, 0] - pairs.method[:, 0]).max())
        lost = min(asked, 2 * most) if most > 0 and not few else asked
        return added(pairs, np.array([asked - lost, asked]), np.array([asked, asked]))
    of_method = pairs.method @ slope(pairs.of_method.value, pairs.counts @ pairs.method)
    of_full = pairs.full @ slope(pairs.of_full.value, pairs.counts @ pairs.full)
    worst = int(np.argmin(of_method - of_full))
    if of_method[worst] < of_full[worst] and not few:
        return added(pairs, 2 * pairs.method[worst], 2 * pairs.full[worst])
    return added(pairs, pairs.method[np.argmin(of_method)], pairs.full[np.argmax(of_full)])


def added(pairs: Pairs, method: Array, full: Array) -> Pairs:
    """The pairs and one more cluster."""
    rows = np.vstack([pairs.method, method]), np.vstack([pairs.full, full])
    return replace(pairs, method=rows[0], full=rows[1], counts=np.append(pairs.counts, 1.0))


def null_weights(pairs: Pairs, share: float) -> Array | None:
    """[kinds] the probabilities nearest to the observed shares under which the difference is zero; None without such.

    Nearest in the Kullback-Leibler divergence, up to the linearisation of the score in its sums.
    """
    influence = influences(pairs, share)
    spread = float(np.sqrt(pairs.counts @ influence**2 / pairs.clusters))
    if spread <= 0:
        return None
    scaled = influence / spread

    def weights(tilt: float) -> Array:
        logs = tilt * scaled
        found = pairs.counts * np.exp(logs - logs.max())
        return found / found.sum()

    def excess(tilt: float) -> float:
        return float(difference(pairs, pairs.clusters * weights(tilt), share))

    start = excess(0.0)
    if abs(start) <= TIE:
        return weights(0.0)
    end = -np.sign(start) / 64
    while excess(end) * start > 0:
        end *= 2
        if abs(end) > STEEPEST:
            return None
    return weights(float(brentq(excess, 0.0, end)))


def influences(pairs: Pairs, share: float) -> Array:
    """[kinds] how far one cluster of a kind moves the difference, to first order (delta method), mean zero."""
    slope_method = slope(pairs.of_method.value, pairs.counts @ pairs.method)
    slope_full = slope(pairs.of_full.value, pairs.counts @ pairs.full)
    found = pairs.method @ slope_method - share * (pairs.full @ slope_full)
    return found - pairs.counts @ found / pairs.clusters
