"""A method's score as a share of the full model's: a test of 99 %, tokens needed, and averages over benchmarks.

**Test.** The test is one-sided: does the method reach a given share of the full model's score? A lower bound of the
share comes with it. The null distribution is the one nearest to the data in which the method has exactly that share.
The probability of each cluster is multiplied by exp(t x its influence on the difference), with the t that makes the
difference zero (exponential tilting; Efron 1981, DiCiccio and Romano 1990). p is the probability of a difference at
least as large as the observed one when the same number of clusters is drawn from this distribution. For single
right-or-wrong questions of which the method only loses some, this is nearly the binomial test. A t-test and the
percentile bootstrap pass too many methods here: methods near 99 % lose few questions, so a sample that happens to lose
fewer has both a larger difference and a smaller standard error (docs/statistics.md).

**Tokens needed.** The smallest measured budget at which a method is shown to keep 99 % of the full model's score.
Budgets are tested from the largest to the smallest at the same level, and the first failure ends the sequence
(fixed-sequence testing). The probability of naming a budget that is below the share is then at most the level, without
a correction for the number of budgets.

**Averages over benchmarks.** The mean of a method's relative scores with its interval. As in Agarwal et al. (2021,
"Deep reinforcement learning at the edge of the statistical precipice"), each benchmark is a stratum in which clusters
vary, and the benchmarks themselves are fixed. The interval covers the questions, not the choice of benchmarks. The
standard error comes from the delta method, which needs no random numbers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats
from scipy.optimize import brentq

from eval.metrics import Array, SufficientStatistics
from eval.results import statistics
from eval.results.statistics import (
    DRAWS_AT_ONCE,
    FEWEST_CLUSTERS,
    FEWEST_DECIDING,
    NO_SPREAD,
    RESAMPLES,
    Interval,
    deciding,
    plural,
    slope,
    summed_by_cluster,
)
from llava.errors import UserError

SHARE, LEVEL = 0.99, 0.05
# Differences this close count as equal, because scores of the same counts can differ by rounding.
TIE = 1e-9
# The largest tilt t that is tried; influences are scaled to a standard deviation of 1.
STEEPEST = 1e4
# Precision of the lower bound, as a share.
PRECISION = 1e-4

Scores = Mapping[str, tuple[SufficientStatistics, SufficientStatistics]]


@dataclass(frozen=True)
class Pairs:
    """The sums of a method and of the full model by cluster; clusters with equal sums form one kind.

    Thousands of images with right-or-wrong questions give a few dozen kinds. A draw of clusters is then a multinomial
    draw of kinds, which is 10 to 100 times faster than drawing labels.

    Attributes:
        method, full: [kinds, terms] sums of one cluster of the kind.
        counts: [kinds] number of clusters of the kind.
        of_method, of_full: their `value` computes the scores from sums [..., terms].
    """

    method: Array
    full: Array
    counts: Array
    of_method: SufficientStatistics
    of_full: SufficientStatistics

    @property
    def clusters(self) -> int:
        """Number of clusters."""
        return int(self.counts.sum())

    def scores(self, counts: Array) -> tuple[Array, Array]:
        """Scores of the method and of the full model for counts of kinds [..., kinds]."""
        return self.of_method.value(counts @ self.method), self.of_full.value(counts @ self.full)

    def draws(
        self, weights: Array, clusters: int, resamples: int, random: np.random.Generator
    ) -> Iterator[tuple[Array, Array]]:
        """Both scores for `resamples` draws of clusters, in batches that fit into memory.

        Args:
            weights: [kinds] probability of each kind.
            clusters: number drawn each time.
        """
        at_once = max(1, DRAWS_AT_ONCE // len(weights))
        for start in range(0, resamples, at_once):
            size = min(at_once, resamples - start)
            yield self.scores(random.multinomial(clusters, weights, size).astype(float))


def pair(method: SufficientStatistics, full: SufficientStatistics) -> Pairs:
    """Pair the clusters of two scores; UserError if the scores are not about the same questions."""
    if method.names != full.names or method.clusters != full.clusters:
        raise UserError("The method and the full model must have answered the same questions in the same data.")
    rows = np.concatenate([summed_by_cluster(method), summed_by_cluster(full)], axis=1)
    kinds, counts = np.unique(rows, axis=0, return_counts=True)
    terms = method.sums.shape[1]
    return Pairs(kinds[:, :terms], kinds[:, terms:], counts.astype(float), method, full)


# -- the test of a share ----------------------------------------------------------------------------------------------


def p_value(pairs: Pairs, share: float, resamples: int = RESAMPLES, seed: int = 0, whole: bool = False) -> float:
    """One-sided p-value of "the method scores at most `share` times what the full model scores".

    It is 1 if no weighting of the clusters gives exactly that share.

    Args:
        whole: see `with_worst_cluster`.
    """
    supported = with_worst_cluster(pairs, share, whole)
    weights = null_weights(supported, share)
    if weights is None:
        return 1.0
    observed, random = float(difference(pairs, pairs.counts, share)), np.random.default_rng(seed)
    reached = sum(
        int((method - share * full >= observed - TIE).sum())
        for method, full in supported.draws(weights, pairs.clusters, resamples, random)
    )
    return (1 + reached) / (1 + resamples)


def lower_bound(pairs: Pairs, level: float, passed: float | None = None) -> float:
    """The largest share that the test rejects at `level`: a lower bound of method / full with confidence 1 - level.

    Args:
        passed: a share known to be rejected, where the search can start.
    """
    method, full = pairs.scores(pairs.counts)
    high = float(method / full)

    def excess(share: float) -> float:
        return p_value(pairs, share) - level

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
    """The method's score minus `share` times the full model's, for counts of kinds [..., kinds]."""
    method, full = pairs.scores(counts)
    return method - share * full


def with_worst_cluster(pairs: Pairs, share: float, whole: bool = False) -> Pairs:
    """Add a cluster that speaks against the method twice as much as any observed one.

    At a share near 99 % few clusters lose anything, so the worst possible one has rarely been observed. If no cluster
    speaks against the method, or fewer than FEWEST_DECIDING clusters decide the spread of the difference, then in the
    added cluster the full model has everything right and the method everything wrong. For n single questions without a
    loss this gives the exact test, p = 0.99^n.

    Args:
        whole: add that cluster in any case, for a comparison in which many clusters differ a little without a loss.
    """
    few = whole or deciding(influences(pairs, share), pairs.counts) < FEWEST_DECIDING
    if pairs.of_method.proportion and pairs.of_full.proportion:
        asked = float(pairs.counts @ pairs.full[:, 1]) / pairs.clusters
        most = float((pairs.full[:, 0] - pairs.method[:, 0]).max())
        lost = min(asked, 2 * most) if most > 0 and not few else asked
        method, full = np.array([asked - lost, asked]), np.array([asked, asked])
    else:
        of_method = pairs.method @ slope(pairs.of_method.value, pairs.counts @ pairs.method)
        of_full = pairs.full @ slope(pairs.of_full.value, pairs.counts @ pairs.full)
        worst = int(np.argmin(of_method - of_full))
        if of_method[worst] < of_full[worst] and not few:
            method, full = 2 * pairs.method[worst], 2 * pairs.full[worst]
        else:
            method, full = pairs.method[np.argmin(of_method)], pairs.full[np.argmax(of_full)]
    rows = np.vstack([pairs.method, method]), np.vstack([pairs.full, full])
    return replace(pairs, method=rows[0], full=rows[1], counts=np.append(pairs.counts, 1.0))


def null_weights(pairs: Pairs, share: float) -> Array | None:
    """The probabilities [kinds] nearest to the observed ones under which the difference is zero; None if none exist.

    Nearest by Kullback-Leibler divergence, with the score linearised in its sums.
    """
    influence = influences(pairs, share)
    spread = float(np.sqrt(pairs.counts @ influence**2 / pairs.clusters))
    if spread <= 0:
        return None
    scaled = influence / spread

    def weights(tilt: float) -> Array:
        logs = tilt * scaled
        found = pairs.counts * np.exp(logs - logs.max())
        shares: Array = found / found.sum()
        return shares

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
    """How far one cluster of each kind moves the difference, [kinds], to first order (delta method), with mean zero."""
    slope_method = slope(pairs.of_method.value, pairs.counts @ pairs.method)
    slope_full = slope(pairs.of_full.value, pairs.counts @ pairs.full)
    found = pairs.method @ slope_method - share * (pairs.full @ slope_full)
    return found - pairs.counts @ found / pairs.clusters


# -- tokens needed ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BudgetTest:
    """One budget against the full model.

    Attributes:
        of_full: score in percent of the full model's score.
        low: one-sided lower bound of `of_full` in percent, at the level of the test; None if not asked for.
        p: p-value of "at most the share", for this budget alone.
        passed: whether `p` is at most the level here and at all larger measured budgets.
    """

    of_full: float
    low: float | None
    p: float
    passed: bool


@dataclass(frozen=True)
class TokensNeeded:
    """The answer and the tests behind it.

    Attributes:
        tokens: the smallest budget that passed; None if the largest one already fails.
        tests: budget -> its test, from the largest budget down.
    """

    tokens: int | None
    share: float
    tests: dict[int, BudgetTest]

    @property
    def text(self) -> str:
        """The tokens needed as text: "192", or "more than 448" if the method did not pass at 448."""
        return f"more than {max(self.tests):,}" if self.tokens is None else f"{self.tokens:,}"


def tokens_needed(
    full: SufficientStatistics,
    by_budget: Mapping[int, SufficientStatistics],
    share: float = SHARE,
    bounds: bool = True,
    whole: bool = False,
) -> TokensNeeded:
    """The smallest budget at which, as at all larger ones, the score is shown to exceed `share` of the full model's.

    The probability of naming a budget at which the score is at most the share is at most LEVEL.

    Args:
        by_budget: visual tokens -> the method's score on the same questions.
        bounds: also compute the lower bounds, which takes ten times as long as the tests.
        whole: see `with_worst_cluster`; of the tests alone.

    Raises:
        UserError: there is no budget, the questions differ, or the full model scores 0.
    """
    if not by_budget:
        raise UserError("Tokens needed: at least one measured budget is needed.")
    if not 0 < share <= 1:
        raise UserError(f"The share should be above 0 and up to 1, got {share}.")
    tests: dict[int, BudgetTest] = {}
    tokens: int | None = None
    going_on = True
    for budget in sorted(by_budget, reverse=True):
        pairs = pair(by_budget[budget], full)
        of_method, of_full = map(float, pairs.scores(pairs.counts))
        if of_full <= 0:
            raise UserError(f"The full model scores {of_full:g} on these questions; a share of that says nothing.")
        p = p_value(pairs, share, whole=whole)
        going_on = going_on and p <= LEVEL
        low = 100 * lower_bound(pairs, LEVEL, share if p <= LEVEL else None) if bounds else None
        tests[budget] = BudgetTest(100 * of_method / of_full, low, p, going_on)
        tokens = budget if going_on else tokens
    return TokensNeeded(tokens, share, tests)


# -- averages over benchmarks -----------------------------------------------------------------------------------------


def relative_mean(scores: Scores) -> Interval:
    """Mean of method / full over benchmarks in percent, the average in papers' tables, with its 95 % interval.

    Benchmarks share no questions, so the variances of the relative scores are added. Each comes from the delta method:
    near its sums a ratio is linear, and a cluster's share in method / full is (m - method / full x f) / full, where m
    and f are the cluster's shares in the two scores. Quantile and degrees of freedom are the same as in
    `eval.results.statistics.interval`. So are the reasons for no interval: few clusters in a benchmark, no spread, or
    few clusters that decide it.

    Args:
        scores: benchmark -> (method, full model) on the same questions.

    Raises:
        UserError: there is no benchmark, the questions differ, or the full model scores 0.
    """
    if not scores:
        raise UserError("An average over benchmarks needs at least one benchmark.")
    by_name = {name: pair(*scores[name]) for name in sorted(scores)}  # sorted, so the given order changes nothing
    observed, of_full = [], []
    for name, pairs in by_name.items():
        method, full = map(float, pairs.scores(pairs.counts))
        if full <= 0:  # which happens with very few questions
            raise UserError(
                f"{name}: the full model scores 0 on these questions, so that there is no relative score; leave this "
                "benchmark out."
            )
        observed.append(100 * method / full)
        of_full.append(full)
    mean = float(np.mean(observed))
    for name, pairs in by_name.items():
        if pairs.clusters < FEWEST_CLUSTERS:
            units = f"{pairs.clusters} {plural(pairs.of_method.unit, pairs.clusters)}"
            return Interval(mean, None, None, f"n/a: {name} has {units}, an interval needs {FEWEST_CLUSTERS}")
    shares, variance = [], 0.0
    for pairs, value, full in zip(by_name.values(), observed, of_full, strict=True):
        # In percent of the mean over the benchmarks.
        share = 100 * influences(pairs, value / 100) / full / len(by_name)
        shares.append(share)
        variance += float(pairs.counts @ share**2) * pairs.clusters / (pairs.clusters - 1)
    counts = np.concatenate([pairs.counts for pairs in by_name.values()])
    same = "n/a: every cluster keeps the same share of full"
    return from_spread(mean, variance**0.5, np.concatenate(shares), counts, same)


def from_spread(mean: float, error: float, shares: Array, counts: Array, same: str) -> Interval:
    """The 95 % interval of a mean or ratio from its standard error, or why there is none.

    Args:
        shares: of one cluster of each kind in the value.
        counts: number of clusters of each kind.
        same: the reason if there is no spread.
    """
    if error <= NO_SPREAD * max(1.0, abs(mean)):
        return Interval(mean, None, None, same)
    few = deciding(shares, counts)
    if few < FEWEST_DECIDING:
        reason = f"n/a: fewer than {FEWEST_DECIDING} of {counts.sum():,.0f} clusters decide the spread"
        return Interval(mean, None, None, reason)
    freedom = 2 / max(1 / few - 1 / counts.sum(), 1e-12)
    half = float(stats.t.ppf((1 + statistics.LEVEL) / 2, freedom)) * error
    return Interval(mean, mean - half, mean + half, "Student")
