"""How sure an accuracy is: bootstrap intervals, by question or by image, and paired comparisons.

Questions about one image are not independent: a picture the model misreads costs several of them. Clusters by image
resample whole images; the interval by question is the one most papers would print.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from eval.metrics import Array, Terms
from llava.errors import UserError

RESAMPLES = 10_000
# Drawn indices held in memory at once: 4 M int64 are 32 MB.
DRAWS_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % percentile interval, in the unit of the values."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """a minus b over the same questions.

    Attributes:
        p: two-sided bootstrap p-value of "no difference"; never 0, its floor is set by the number of resamples.
    """

    difference: float
    low: float
    high: float
    p: float


def bootstrap(
    values: Sequence[float], clusters: Sequence[Hashable] | None = None, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """95 % interval of the mean of `values`.

    Args:
        clusters: one label per value; values with equal labels are drawn together. None draws each alone.
    """
    total, size = cluster_sums(values, clusters)
    means = resampled_means(total, size, resamples, seed)
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(float(total.sum() / size.sum()), float(low), float(high))


def paired_bootstrap(
    a: Mapping[str, float],
    b: Mapping[str, float],
    clusters: Mapping[str, Hashable] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """Compare two methods on the same questions.

    Args:
        a, b: question id -> credit, over the same ids.
        clusters: question id -> label, as in `bootstrap`.
    """
    if a.keys() != b.keys():
        raise UserError(
            f"Both answer sets must cover the same questions; {len(a.keys() - b.keys()):,} are only in the first and "
            f"{len(b.keys() - a.keys()):,} only in the second."
        )
    names = sorted(a)
    labels = None if clusters is None else [clusters[name] for name in names]
    total, size = cluster_sums([a[name] - b[name] for name in names], labels)
    means = resampled_means(total, size, resamples, seed)
    low, high = np.quantile(means, (0.025, 0.975))
    tail = min((means <= 0).sum(), (means >= 0).sum())
    p = min(1.0, 2 * (int(tail) + 1) / (resamples + 1))
    return Comparison(float(total.sum() / size.sum()), float(low), float(high), p)


def interval_of(terms: Terms, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """95 % interval of a number that is a function of sums over units: clusters are drawn with replacement."""
    sums = summed_by_cluster(terms)
    values = np.concatenate([terms.value(drawn @ sums) for drawn in multiplicities(len(sums), resamples, seed)])
    low, high = np.quantile(values, (0.025, 0.975))
    return Interval(float(terms.value(sums.sum(0))), float(low), float(high))


def compare_terms(a: Terms, b: Terms, resamples: int = RESAMPLES, seed: int = 0) -> Comparison:
    """a minus b over the same units.

    The interval draws clusters, the p-value is that of a permutation test: without a difference, what both answered
    about a cluster could as well be exchanged.
    """
    if a.names != b.names or a.clusters != b.clusters:
        raise UserError("Both answer sets must cover the same questions in the same version of the data.")
    first, second = summed_by_cluster(a), summed_by_cluster(b)
    gaps = [a.value(drawn @ first) - b.value(drawn @ second) for drawn in multiplicities(len(first), resamples, seed)]
    low, high = np.quantile(np.concatenate(gaps), (0.025, 0.975))
    seen = float(a.value(first.sum(0)) - b.value(second.sum(0)))
    random, beyond = np.random.default_rng(seed), 0
    rows = max(1, DRAWS_AT_ONCE // len(first))
    for start in range(0, resamples, rows):
        keep = random.integers(2, size=(min(rows, resamples - start), len(first))).astype(np.float64)
        moved = keep @ (first - second)
        gap = a.value(second.sum(0) + moved) - b.value(first.sum(0) - moved)
        beyond += int((np.abs(gap) >= abs(seen) - 1e-9).sum())
    return Comparison(seen, float(low), float(high), (beyond + 1) / (resamples + 1))


def summed_by_cluster(terms: Terms) -> Array:
    """[clusters, terms], clusters in order of first appearance."""
    if not len(terms.names):
        raise UserError("There is nothing to resample: no questions were scored.")
    number: dict[str, int] = {}
    index = np.array([number.setdefault(label, len(number)) for label in terms.clusters])
    sums = np.zeros((len(number), terms.sums.shape[1]))
    np.add.at(sums, index, terms.sums)
    return sums


def multiplicities(clusters: int, resamples: int, seed: int) -> Iterator[Array]:
    """How often each cluster is drawn, [rows, clusters] at a time."""
    random = np.random.default_rng(seed)
    rows = max(1, DRAWS_AT_ONCE // clusters)
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        yield random.multinomial(clusters, np.full(clusters, 1 / clusters), size=size).astype(np.float64)


def cluster_sums(values: Sequence[float], clusters: Sequence[Hashable] | None) -> tuple[Array, Array]:
    """Sum and number of the values of each cluster, clusters in order of first appearance."""
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise UserError("There is nothing to resample: no questions were scored.")
    if clusters is None:
        return array, np.ones_like(array)
    if len(clusters) != len(array):
        raise ValueError(f"one cluster label per value is needed, got {len(clusters)} for {len(array)}")
    number: dict[Hashable, int] = {}
    index = np.array([number.setdefault(label, len(number)) for label in clusters])
    return np.bincount(index, array), np.bincount(index).astype(np.float64)


def resampled_means(total: Array, size: Array, resamples: int, seed: int) -> Array:
    """[resamples]: mean over as many clusters as there are, drawn with replacement."""
    random = np.random.default_rng(seed)
    count = len(total)
    rows = max(1, DRAWS_AT_ONCE // count)
    means = []
    for start in range(0, resamples, rows):
        drawn = random.integers(count, size=(min(rows, resamples - start), count))
        means.append(total[drawn].sum(1) / size[drawn].sum(1))
    return np.concatenate(means)


def holm(values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: p-values that hold for all comparisons of a family together."""
    order = sorted(range(len(values)), key=values.__getitem__)
    corrected, highest = [0.0] * len(values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * values[index]))
        corrected[index] = highest
    return corrected


def all_pairs(
    credits: Mapping[str, Mapping[str, float]],
    clusters: Mapping[str, Hashable],
    resamples: int = 5 * RESAMPLES,  # the smallest p must stay small when it is multiplied by the number of pairs
    seed: int = 0,
) -> dict[tuple[str, str], Comparison]:
    """Every method against every other on the same questions, p-values corrected by Holm over all pairs.

    The p-value is that of a sign-flip test over clusters: if two methods are equally good, the difference on an image
    is as likely to be the other way round. Unlike a bootstrap's its floor does not depend on how clear a case is.

    Args:
        credits: method -> question id -> credit.
        clusters: question id -> label.

    Returns:
        (a, b) -> a minus b, for a before b in `credits`.
    """
    methods = list(credits)
    names = sorted(credits[methods[0]])
    if any(sorted(credits[method]) != names for method in methods):
        raise UserError("All methods must have answered the same questions.")
    labels = [clusters[name] for name in names]
    sums = np.stack([cluster_sums([credits[m][n] for n in names], labels)[0] for m in methods])
    size = cluster_sums([0.0] * len(names), labels)[1]
    pairs = [(i, j) for i in range(len(methods)) for j in range(i + 1, len(methods))]
    gaps = np.stack([sums[i] - sums[j] for i, j in pairs])  # [pairs, clusters]
    seen = np.abs(gaps.sum(1))
    random = np.random.default_rng(seed)
    beyond, means = np.zeros(len(pairs)), []
    for _ in range(0, resamples, 500):
        flips = random.choice([-1.0, 1.0], size=(500, len(size)))
        beyond += (np.abs(flips @ gaps.T) >= seen - 1e-9).sum(0)
        drawn = random.multinomial(len(size), np.full(len(size), 1 / len(size)), size=500)
        means.append((drawn @ gaps.T) / (drawn @ size)[:, None])
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975), axis=0)
    total = 500 * len(means)
    p = holm([float((count + 1) / (total + 1)) for count in beyond])
    return {
        (methods[i], methods[j]): Comparison(float(gaps[k].sum() / size.sum()), float(low[k]), float(high[k]), p[k])
        for k, (i, j) in enumerate(pairs)
    }
