"""Confidence intervals of a score, and paired tests between two scores on the same questions.

Every score is a function of sums over units, the metric's `SufficientStatistics`. Units that share a cluster label,
mostly an image, are drawn together, because answers about one image are not independent. Reports, tables and sweeps use
one function for intervals, `interval`, and one for differences, `compare`. docs/statistics.md states the rules for
readers.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import ROUND_HALF_UP, Decimal
from typing import TypeVar

import numpy as np
from scipy import stats

from eval.metrics import Array, Score, SufficientStatistics, ratio_terms
from llava.errors import UserError

LEVEL = 0.95
# Random draws of every test. The smallest p-value is then 1 / 10,001. Holm's correction multiplies it by the number of
# comparisons. With more than 500 nothing could be significant, so each test then draws PER_PAIR times their number.
RESAMPLES, PER_PAIR = 10_000, 40
# With fewer clusters, or fewer that decide the spread, no interval has the coverage it promises (docs/statistics.md).
FEWEST_CLUSTERS, FEWEST_DECIDING = 20, 3
# Random numbers held in memory at once; 2 million float64 are 16 MB.
DRAWS_AT_ONCE = 2_000_000
# Relative step of the numeric derivatives, and the distance up to which two test statistics count as equal. Derivatives
# have errors of about 1e-9, and ties decide p-values of small samples.
STEP, TIE = 1e-5, 1e-6
# A standard error up to this share of the score counts as zero; errors of derivatives and rounding are this large.
NO_SPREAD = 1e-7

Value = Callable[[Array], Array]
Name = TypeVar("Name")


@dataclass(frozen=True)
class Interval:
    """A score and its 95 % confidence interval, in the unit of the score.

    Attributes:
        low, high: None if the units do not allow an interval; `method` says why.
        method: "Wilson", "Student" or "Jeffreys"; or the reason why there is no interval.
    """

    mean: float
    low: float | None
    high: float | None
    method: str = "Wilson"


@dataclass(frozen=True)
class Comparison:
    """Score a minus score b over the same units.

    Attributes:
        low, high: 95 % confidence interval, which contains 0 exactly if `p` is above 0.05; None by the same rules as
            for `interval`.
        p: two-sided p-value of a paired permutation test of "no difference".
        note: why there is no interval, or "".
    """

    difference: float
    low: float | None
    high: float | None
    p: float
    note: str = ""


def interval(terms: SufficientStatistics) -> Interval:
    """95 % confidence interval of a score, from the spread of its clusters; docs/statistics.md reports its coverage.

    The standard error comes from the delta method: near its sums the score is linear, and a cluster's share is its row
    times the slopes. It is multiplied by Student's quantile with Satterthwaite's degrees of freedom,
    2 / (1 / d - 1 / n) for n clusters of which d are `deciding`. A score with a largest value gets Wilson's interval,
    which stays between 0 and that value (as Korn and Graubard 1998 do for samples of clusters); any other score gets a
    symmetric interval. If every cluster is one right-or-wrong question, the interval is Jeffreys' (Brown, Cai and
    DasGupta 2001).
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
    """The number of clusters that decide a spread, n / kurtosis; about the wrong ones, if nearly all are right.

    Args:
        shares: of each cluster, or kind of clusters, in a score; their mean is 0.
        counts: number of clusters of each kind.
    """
    fourth = float((counts * shares**4).sum())
    return float((counts * shares**2).sum()) ** 2 / fourth if fourth > 0 else 0.0


def bound(terms: SufficientStatistics, rows: Array) -> str:
    """An exact one-sided bound of a proportion, in words; "" if there is none, or if it is 0 or 100.

    If at least half of the answers are right, this is Clopper and Pearson's lower bound of the share of clusters
    without an error. For clusters of equal size this share is not above the accuracy. Otherwise it is their upper bound
    of the share of clusters with a right answer, which is not below the accuracy.

    Args:
        rows: [clusters, 2], sum of the sample scores and number of questions.
    """
    if not terms.proportion or not rows[:, 1].any():
        return ""
    if len(rows) == 1:
        return f"; one {terms.unit} alone cannot show how far to trust the score"
    right, asked = rows[rows[:, 1] > 0].T
    if right.sum() * 2 >= asked.sum():
        test = stats.binomtest(int((right == asked).sum()), len(asked), alternative="greater")
        low = 100 * test.proportion_ci(LEVEL).low
        return f"; at least {low:.1f} with {100 * LEVEL:g} % confidence" if low > 0 else ""
    test = stats.binomtest(int((right > 0).sum()), len(asked), alternative="less")
    high = 100 * test.proportion_ci(LEVEL).high
    return f"; at most {high:.1f} with {100 * LEVEL:g} % confidence" if high < 100 else ""


def compare(a: SufficientStatistics, b: SufficientStatistics, resamples: int = RESAMPLES, seed: int = 0) -> Comparison:
    """Score a minus score b over the same units, with a p-value and an interval from one paired permutation test.

    If there is no difference, the answers of a and b about a cluster can be exchanged. The test statistic is the
    difference divided by its standard error; both are recomputed for every exchange. p is the share of exchanges at
    least as far from zero as the observed value. The interval is the difference plus or minus its standard error times
    the critical value of the same test, so it excludes 0 exactly if p is at most 0.05.

    With up to 13 clusters all exchanges are enumerated; with more, `resamples` of them are drawn. The p-value is valid
    for any number of clusters. The interval is missing for the same reasons as for a score: no spread, fewer than
    FEWEST_CLUSTERS clusters, or fewer than FEWEST_DECIDING that decide the spread.
    """
    if a.names != b.names or a.clusters != b.clusters:
        raise UserError("Both answer sets must cover the same questions in the same version of the data.")
    rows = summed_by_cluster(a), summed_by_cluster(b)
    exchanges = Exchanges(*rows, a.value, b.value)
    shares = rows[0] @ slope(a.value, rows[0].sum(0)) - rows[1] @ slope(b.value, rows[1].sum(0))
    p, critical = exchanges.test(1 - LEVEL, resamples, DRAWS_AT_ONCE, seed)
    difference, error = exchanges.difference, exchanges.standard_error
    units = f"{exchanges.clusters} {plural(a.unit, exchanges.clusters)}"
    if error == 0:
        note = f"n/a: the difference is the same for every {a.unit}"
    elif exchanges.clusters < FEWEST_CLUSTERS:
        note = f"n/a: {units}, an interval needs {FEWEST_CLUSTERS}"
    elif deciding(shares - shares.mean()) < FEWEST_DECIDING:
        note = f"n/a: fewer than {FEWEST_DECIDING} of {units} decide the spread"
    else:
        # 0 + removes the sign of a zero.
        low, high = (0.0 + round(difference + side * critical * error, 9) for side in (-1, 1))
        return Comparison(difference, low, high, p)
    return Comparison(difference, None, None, p, note)


def accuracy_terms(
    scores: Mapping[str, float], clusters: Mapping[str, str], unit: str = "image"
) -> SufficientStatistics:
    """The sufficient statistics of an accuracy.

    Args:
        scores: question id -> sample score in [0, 1].
        clusters: question id -> label of its cluster.
    """
    return ratio_terms({name: scores[name] for name in sorted(scores)}, clusters, unit, proportion=True)


def terms_of(score: Score, labels: Mapping[str, str], name: str = "") -> SufficientStatistics:
    """The sufficient statistics of a number: the metric's own units, or questions clustered by image.

    Args:
        labels: as eval.benchmarks.base.Dataset.labels returns them.
        name: of the number in `other_terms`; the main number by default.
    """
    terms = score.other_terms.get(name, score.terms)
    if terms is None:
        own = {question: labels[question] for question in score.correct}
        return accuracy_terms(score.correct, own, "question" if set(own) == set(own.values()) else "image")
    clusters = tuple(labels.get(label, label) for label in terms.clusters)
    merged = len(set(clusters)) < len(set(terms.clusters)) and terms.unit != "video"
    return replace(terms, clusters=clusters, unit="image" if merged else terms.unit)


def summed_by_cluster(terms: SufficientStatistics) -> Array:
    """The sums of each cluster, [clusters, terms], in order of first appearance."""
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


def rounded(value: float, digits: int = 1, sign: str = "") -> str:
    """A number as every table and sentence prints it; 90.25 is "90.3", and "+90.3" with the sign "+".

    Ties are rounded away from zero. Python's own formatting rounds them to even digits: 90.25 is "90.2" and 93.75 is
    "93.8". Ties are common, because a score of 400 questions is a multiple of 0.25.
    """
    exact = Decimal(repr(round(float(value), 9) + 0.0))  # 90.24999999999999 is a tie too; + 0.0 takes the sign of -0.0
    return f"{exact.quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP):{sign}f}"


def p_text(p: float) -> str:
    """A p-value as "0.0341" or "< 0.0001", because a share of drawn exchanges is never 0."""
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}"


def holm(values: Sequence[float]) -> list[float]:
    """P-values after Holm's step-down correction, valid for all comparisons of a family together."""
    order = sorted(range(len(values)), key=values.__getitem__)
    corrected, highest = [0.0] * len(values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * values[index]))
        corrected[index] = highest
    return corrected


def all_pairs(
    scores: Mapping[Name, SufficientStatistics], resamples: int = RESAMPLES
) -> dict[tuple[Name, Name], Comparison]:
    """`compare` every score with every other on the same questions; p-values are corrected by Holm over all pairs.

    The intervals are not corrected.

    Returns:
        (a, b) -> a minus b, for a before b in `scores`.
    """
    pairs = list(itertools.combinations(scores, 2))
    if len(pairs) >= resamples * (1 - LEVEL):
        resamples = PER_PAIR * len(pairs)
    found = {(a, b): compare(scores[a], scores[b], resamples) for a, b in pairs}
    corrected = holm([comparison.p for comparison in found.values()])
    return {pair: replace(one, p=p) for (pair, one), p in zip(found.items(), corrected, strict=True)}


# -- the studentised permutation test of two scores on the same clusters --------------------------------------------


class Exchanges:
    """Two scores, and what they become when the answers of a and b about some clusters are exchanged.

    An exchange is a vector of signs s: +1 for a cluster that stays, -1 for one whose two rows change places. With m the
    mean of the two rows and h half their difference, the rows become m + s h and m - s h. All sums are therefore linear
    in the signs, and one matrix product computes many exchanges.
    """

    def __init__(self, a: Array, b: Array, value_a: Value, value_b: Value):
        self.values = value_a, value_b
        self.clusters, self.terms = a.shape
        middle, half = (a + b) / 2, (a - b) / 2
        self.differing = int((half != 0).any(1).sum())
        self._total = middle.sum(0)
        self._middle_middle, self._half_half = middle.T @ middle, half.T @ half
        cross = (middle[:, :, None] * half[:, None, :]).reshape(self.clusters, -1)
        self._linear = np.concatenate([half, cross], axis=1)  # [clusters, terms + terms^2], times the signs
        difference, error = self._measure(np.ones(self.clusters))
        self.difference, self.standard_error = float(difference), float(error)
        self._observed = float(ratio(abs(difference), error))

    def test(self, alpha: float, resamples: int, draws_at_once: int, seed: int) -> tuple[float, float]:
        """The p-value, and the critical value that the observed statistic exceeds exactly if p <= alpha.

        p is the share of exchanges whose statistic is at least the observed one. Infinite statistics (a difference
        without spread) count as equal. If exchanges are drawn, the observed one is added to them, so p is never 0.
        """
        if self.clusters < 2:
            return 1.0, float("inf")
        if 2**self.clusters <= resamples:
            known = self.statistic(np.array(list(itertools.product((1.0, -1.0), repeat=self.clusters))))
        else:
            random, at_once = np.random.default_rng(seed), max(1, draws_at_once // self.clusters)
            sizes = [min(at_once, resamples - start) for start in range(0, resamples, at_once)]
            drawn = [self.statistic(random.choice((-1.0, 1.0), (size, self.clusters))) for size in sizes]
            known = np.concatenate([*drawn, [self._observed]])
        return float((known >= self._observed).mean()), self._critical(known, alpha)

    def _critical(self, known: Array, alpha: float) -> float:
        """Half way between the largest value that is not significant and the smallest that is.

        With few differing clusters the statistic takes few values, so these two can be far apart. With five or fewer
        no value is significant; Student's quantile is then used, because the interval would otherwise end at 0.
        """
        largest = float(np.sort(known)[math.ceil(round((1 - alpha) * len(known), 6)) - 1])
        above = known[(known > largest * (1 + TIE) + TIE) & np.isfinite(known)]
        if above.size:
            return (largest + float(above.min())) / 2
        return max(largest, float(stats.t.ppf(1 - alpha / 2, max(1, self.differing - 1))))

    def statistic(self, signs: Array) -> Array:
        """|difference| / standard error for exchanges [..., clusters]; near ties become equal to the observed value."""
        found = ratio(*(abs(part) for part in self._measure(signs)))
        return np.where(np.isclose(found, self._observed, rtol=TIE, atol=TIE), self._observed, found)

    def _measure(self, signs: Array) -> tuple[Array, Array]:
        """Difference and standard error for signs [..., clusters], by the delta method."""
        sums = signs @ self._linear
        half, cross = sums[..., : self.terms], sums[..., self.terms :]
        cross = cross.reshape(*cross.shape[:-1], self.terms, self.terms)
        a, b = self._total + half, self._total - half
        slope_a, slope_b = slope(self.values[0], a), slope(self.values[1], b)
        # A cluster's share in the difference is p m + s q h.
        p, q = slope_a - slope_b, slope_a + slope_b
        squares = (
            np.einsum("...i,ij,...j", p, self._middle_middle, p)
            + 2 * np.einsum("...i,...ij,...j", p, cross, q)
            + np.einsum("...i,ij,...j", q, self._half_half, q)
        )
        shares = (p * self._total).sum(-1) + (q * half).sum(-1)
        n = self.clusters
        error = np.sqrt(np.maximum(0.0, squares - shares**2 / n) * n / max(1, n - 1))
        found = self.values[0](a), self.values[1](b)
        return found[0] - found[1], np.where(error <= NO_SPREAD * np.maximum(1.0, np.abs(found).max(0)), 0.0, error)


def ratio(above: Array, below: Array) -> Array:
    """above / below; where `below` is 0: 0 if `above` is 0 too, otherwise infinite."""
    above, below = np.asarray(above, float), np.asarray(below, float)
    found = np.full(np.broadcast(above, below).shape, np.inf)
    found[above <= 1e-9] = 0.0
    np.divide(above, below, out=found, where=below > 0)
    return found


def slope(value: Value, sums: Array) -> Array:
    """The derivatives of a score with respect to each of its sums, [..., terms], by central differences."""
    found = np.empty_like(sums)
    for term in range(sums.shape[-1]):
        step = STEP * (1 + np.abs(sums[..., term]))
        up, down = sums.copy(), sums.copy()
        up[..., term] += step
        down[..., term] -= step
        found[..., term] = (value(up) - value(down)) / (2 * step)
    return found
