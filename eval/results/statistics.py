"""Confidence intervals of a score, and paired tests between two scores on the same questions.

Every score is a function of sums over units, the metric's `SufficientStatistics`. Units that share a cluster label,
mostly an image, are drawn together: answers about one image are not independent. There is one function for intervals,
`interval`, and one for differences, `compare`; reports, tables and sweeps use these two.
docs/evaluation.md states the rules for readers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from eval.metrics import Array, Score, SufficientStatistics, ratio_terms
from eval.results.permutation import NO_SPREAD, Exchanges, slope
from llava.errors import UserError

LEVEL = 0.95
RESAMPLES = 10_000
# No interval covers what it promises with fewer clusters, or with fewer that decide the spread (docs/statistics.md).
FEWEST_CLUSTERS, FEWEST_DECIDING = 20, 3
# Random numbers held in memory at once: 2 M float64 are 16 MB.
DRAWS_AT_ONCE = 2_000_000


@dataclass(frozen=True)
class Interval:
    """A score and its 95 % confidence interval, in the unit of the score.

    Attributes:
        low, high: None where the units cannot tell how far the score may be off; `method` says why.
        method: "Wilson", "Student" or "Jeffreys"; or the reason why there is no interval.
    """

    mean: float
    low: float | None
    high: float | None
    method: str = "Wilson"

    @property
    def bars(self) -> tuple[float, float]:
        """Distances to the two ends, for error bars; zero where there is no interval."""
        return (0.0, 0.0) if self.low is None or self.high is None else (self.mean - self.low, self.high - self.mean)


@dataclass(frozen=True)
class Comparison:
    """Score a minus score b over the same units.

    Attributes:
        low, high: 95 % confidence interval; it holds 0 exactly if `p` is above 0.05. None where there is none.
        p: two-sided p-value of a paired permutation test of "no difference".
        note: why there is no interval, or "".
    """

    difference: float
    low: float | None
    high: float | None
    p: float
    note: str = ""


def interval(terms: SufficientStatistics) -> Interval:
    """95 % confidence interval of a score, from the spread of its clusters; docs/statistics.md has its coverage.

    The standard error is that of the delta method: near its sums the score is linear, and a cluster's share is its row
    times the slopes. Student's quantile has Satterthwaite's degrees of freedom, 2 / (1 / d - 1 / n) for n clusters of
    which d are `deciding`. With both, a score that has a largest value gets Wilson's interval, which stays between 0
    and that value (Korn and Graubard 1998 do so for samples of clusters), another one a symmetric interval. One
    right-or-wrong question per cluster gets Jeffreys' interval (Brown, Cai and DasGupta 2001).
    """
    rows = summed_by_cluster(terms)
    sums, count = rows.sum(0), len(rows)
    mean, units = float(terms.value(sums)), f"{count:,} {plural(terms.unit, count)}"
    shares = rows @ slope(terms.value, sums)
    shares -= shares.mean()
    square = float((shares**2).sum())
    if square**0.5 <= NO_SPREAD * max(1.0, abs(mean)):
        return Interval(mean, None, None, f"n/a: {units} without spread{bound(terms, rows)}")
    if count < FEWEST_CLUSTERS:
        return Interval(mean, None, None, f"n/a: {units}, an interval needs {FEWEST_CLUSTERS}")
    few = deciding(shares)
    if few < FEWEST_DECIDING:
        reason = f"n/a: fewer than {FEWEST_DECIDING} of {units} decide the spread"
        return Interval(mean, None, None, reason + bound(terms, rows))
    if terms.proportion and (rows[:, 1] == 1).all() and np.isin(rows[:, 0], (0, 1)).all():
        low, high = stats.beta.ppf(((1 - LEVEL) / 2, (1 + LEVEL) / 2), sums[0] + 0.5, count - sums[0] + 0.5)
        return Interval(mean, 100 * float(low), 100 * float(high), "Jeffreys")
    freedom = 2 / max(1 / few - 1 / count, 1e-12)
    half = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * (square * count / (count - 1)) ** 0.5
    most = 100.0 if terms.proportion else terms.most
    if most is None:
        return Interval(mean, mean - half, mean + half, "Student")
    share, half = mean / most, half / most
    bend = half**2 / (share * (1 - share))
    ends = [(share + bend / 2 + side * (half**2 + bend**2 / 4) ** 0.5) / (1 + bend) for side in (-1, 1)]
    return Interval(mean, most * ends[0], most * ends[1])


def deciding(shares: Array, counts: Array | float = 1.0) -> float:
    """How many clusters decide a spread: n / kurtosis, about the number of wrong ones where nearly all are right.

    Args:
        shares: of each cluster, or kind of clusters, in a score; their mean is 0.
        counts: clusters of each kind.
    """
    fourth = float((counts * shares**4).sum())
    return float((counts * shares**2).sum()) ** 2 / fourth if fourth > 0 else 0.0


def bound(terms: SufficientStatistics, rows: Array) -> str:
    """Where nearly every cluster of a proportion is right (or wrong) there is still an exact one-sided bound.

    Clopper and Pearson's, of the share of clusters without an error (or with one right answer), which is not above (or
    below) the accuracy of clusters of one size.

    Args:
        rows: [clusters, 2], sum of the sample scores and number of questions.
    """
    if not terms.proportion or not rows[:, 1].any():
        return ""
    right, asked = rows[rows[:, 1] > 0].T
    if right.sum() * 2 >= asked.sum():
        test = stats.binomtest(int((right == asked).sum()), len(asked), alternative="greater")
        return f"; at least {100 * test.proportion_ci(LEVEL).low:.1f} with {100 * LEVEL:g} % confidence"
    test = stats.binomtest(int((right > 0).sum()), len(asked), alternative="less")
    return f"; at most {100 * test.proportion_ci(LEVEL).high:.1f} with {100 * LEVEL:g} % confidence"


def compare(a: SufficientStatistics, b: SufficientStatistics, resamples: int = RESAMPLES, seed: int = 0) -> Comparison:
    """Score a minus score b over the same units, with a p-value and an interval from one paired permutation test.

    If there is no difference, the answers of a and b about a cluster can be exchanged. The test statistic is the
    difference divided by its standard error, both recomputed in every exchange. p is the share of exchanges that are at
    least as far from zero as the observed value; the interval is the difference plus or minus its standard error times
    the critical value of the same test. Hence the interval excludes 0 exactly if p is at most 0.05.

    Up to 13 clusters all exchanges are enumerated, above that `resamples` of them are drawn.
    """
    if a.names != b.names or a.clusters != b.clusters:
        raise UserError("Both answer sets must cover the same questions in the same version of the data.")
    exchanges = Exchanges(summed_by_cluster(a), summed_by_cluster(b), a.value, b.value)
    p, critical = exchanges.test(1 - LEVEL, resamples, DRAWS_AT_ONCE, seed)
    difference, error = exchanges.difference, exchanges.standard_error
    if error == 0:
        note = f"n/a: the difference is the same for every {a.unit}"
    elif not np.isfinite(critical * error):
        note = f"n/a: {exchanges.clusters} {plural(a.unit, exchanges.clusters)} cannot show a difference"
    else:
        # 0 + removes the sign of a zero.
        low, high = (0.0 + round(difference + side * critical * error, 9) for side in (-1, 1))
        return Comparison(difference, low, high, p)
    return Comparison(difference, None, None, p, note)


def compare_scores(
    a: Mapping[str, float], b: Mapping[str, float], clusters: Mapping[str, str], resamples: int = RESAMPLES
) -> Comparison:
    """`compare` of two accuracies in percent.

    Args:
        a, b: question id -> sample score in [0, 1], over the same ids.
        clusters: question id -> label of what is drawn together.
    """
    if a.keys() != b.keys():
        raise UserError(
            f"Both answer sets must cover the same questions; {len(a.keys() - b.keys()):,} are only in the first and "
            f"{len(b.keys() - a.keys()):,} only in the second."
        )
    return compare(accuracy_terms(a, clusters), accuracy_terms(b, clusters), resamples)


def accuracy_terms(
    scores: Mapping[str, float], clusters: Mapping[str, str], unit: str = "image"
) -> SufficientStatistics:
    """The sufficient statistics of an accuracy: question id -> sample score, drawn by cluster."""
    return ratio_terms({name: scores[name] for name in sorted(scores)}, clusters, unit, proportion=True)


def terms_of(score: Score, images: Mapping[str, str]) -> SufficientStatistics:
    """What is drawn for a score: the metric's own units, otherwise the images that its questions are about.

    Args:
        images: question id -> image, or the id itself for a question without one.
    """
    if score.terms is not None:
        return score.terms
    clusters = {name: images[name] for name in score.correct}
    return accuracy_terms(score.correct, clusters, "question" if set(clusters) == set(clusters.values()) else "image")


def summed_by_cluster(terms: SufficientStatistics) -> Array:
    """[clusters, terms], clusters in order of first appearance."""
    if not len(terms.names):
        raise UserError("There is nothing to resample: no questions were scored.")
    number: dict[str, int] = {}
    index = np.array([number.setdefault(label, len(number)) for label in terms.clusters])
    sums = np.zeros((len(number), terms.sums.shape[1]))
    np.add.at(sums, index, terms.sums)
    return sums


def plural(unit: str, count: int = 2) -> str:
    """ "image" -> "images"."""
    return unit if count == 1 else f"{unit}s"


def p_text(p: float) -> str:
    """ "0.0341", or "< 0.0001": a share of drawn exchanges is never "0.0000"."""
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}"


def holm(values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: p-values that hold for all comparisons of a family together."""
    order = sorted(range(len(values)), key=values.__getitem__)
    corrected, highest = [0.0] * len(values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * values[index]))
        corrected[index] = highest
    return corrected


def all_pairs(
    scores: Mapping[str, Mapping[str, float]],
    clusters: Mapping[str, str],
    resamples: int = 5 * RESAMPLES,  # the smallest p must stay small when it is multiplied by the number of pairs
) -> dict[tuple[str, str], Comparison]:
    """`compare` of every method with every other on the same questions; p-values corrected by Holm over all pairs.

    The intervals are those of single comparisons, without the correction.

    Args:
        scores: method -> question id -> sample score.
        clusters: question id -> label.

    Returns:
        (a, b) -> a minus b in points of accuracy, for a before b in `scores`.
    """
    methods = list(scores)
    if any(scores[method].keys() != scores[methods[0]].keys() for method in methods):
        raise UserError("All methods must have answered the same questions.")
    found = {
        (a, b): compare_scores(scores[a], scores[b], clusters, resamples)
        for place, a in enumerate(methods)
        for b in methods[place + 1 :]
    }
    corrected = holm([comparison.p for comparison in found.values()])
    return {
        pair: Comparison(one.difference, one.low, one.high, p, one.note)
        for (pair, one), p in zip(found.items(), corrected, strict=True)
    }
