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
from eval.results.permutation import Exchanges
from llava.errors import UserError

LEVEL = 0.95
RESAMPLES = 10_000
# Random numbers held in memory at once: 2 M float64 are 16 MB.
DRAWS_AT_ONCE = 2_000_000


@dataclass(frozen=True)
class Interval:
    """A score and its 95 % confidence interval, in the unit of the score.

    Attributes:
        low, high: None where the units cannot tell how far the score may be off; `method` says why.
        method: "bootstrap", "exact" (Clopper-Pearson), or the reason why there is no interval.
    """

    mean: float
    low: float | None
    high: float | None
    method: str = "bootstrap"

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


def interval(terms: SufficientStatistics, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """95 % confidence interval of a score.

    Percentile bootstrap over clusters (`scipy.stats.bootstrap`). Two cases of a proportion (`terms.proportion`) get the
    exact binomial interval instead, because resampling does not see what was not observed: one right-or-wrong question
    per cluster, and scores of 0 or 100 %, where the bootstrap returns a single point. The number of trials is the
    number of clusters. For other scores that do not vary between resamples there is no interval.

    Takes 0.1 s for 400 images and about 5 s for the 40,504 images of VQAv2 val (one core).
    """
    rows = summed_by_cluster(terms)
    mean = float(terms.value(rows.sum(0)))
    if terms.proportion and (ends := exact_interval(rows)) is not None:
        return Interval(mean, *ends, method="exact")
    if len(rows) < 2:
        return Interval(mean, None, None, f"n/a: one {terms.unit} shows no spread")
    columns = np.ascontiguousarray(rows.T)

    def resampled(index: Array, axis: int = -1) -> Array:
        """The score of drawn clusters; scipy hands over their numbers, [..., clusters]."""
        sums = np.stack([column.take(index).sum(axis) for column in columns], axis=-1)
        return terms.value(sums)

    found = stats.bootstrap(
        (np.arange(len(rows)),),
        resampled,
        n_resamples=resamples,
        batch=max(1, DRAWS_AT_ONCE // len(rows)),
        vectorized=True,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    if np.ptp(found.bootstrap_distribution) <= 1e-9 * max(1.0, abs(mean)):
        return Interval(mean, None, None, f"n/a: all {len(rows):,} {plural(terms.unit)} give the same number")
    low, high = found.confidence_interval
    return Interval(mean, float(low), float(high))


def exact_interval(rows: Array) -> tuple[float, float] | None:
    """Clopper-Pearson interval of a proportion in percent; None where the clusters are no binomial trials.

    A cluster counts as one trial. With several questions per cluster this is possible only if all of them are right or
    all are wrong; the bound is then that of the share of clusters without an error, which is at most the accuracy.

    Args:
        rows: [clusters, 2], sum of the sample scores and number of questions.
    """
    right, asked = rows.sum(0)
    single = bool((rows[:, 1] == 1).all() and np.isin(rows[:, 0], (0, 1)).all())
    if single:
        trials, hits = len(rows), int(right)
    elif right in (0, asked):
        trials = int((rows[:, 1] > 0).sum())
        hits = trials if right else 0
    else:
        return None
    if not trials:
        return None
    found = stats.binomtest(hits, trials).proportion_ci(LEVEL, method="exact")
    return 100 * float(found.low), 100 * float(found.high)


def compare(a: SufficientStatistics, b: SufficientStatistics, resamples: int = RESAMPLES, seed: int = 0) -> Comparison:
    """Score a minus score b over the same units, with a p-value and an interval from one paired permutation test.

    If there is no difference, the answers of a and b about a cluster can be exchanged. The test statistic is the
    difference divided by its standard error, both recomputed in every exchange. p is the share of exchanges that are at
    least as far from zero as the observed value; the interval is the difference plus or minus its standard error times
    the critical value of the same test. Hence the interval excludes 0 exactly if p is at most 0.05.

    Up to 13 clusters all exchanges are enumerated (`scipy.stats.permutation_test`), above that `resamples` of them are
    drawn (`scipy.stats.monte_carlo_test`, because `permutation_test` needs minutes for 40,000 clusters).
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
