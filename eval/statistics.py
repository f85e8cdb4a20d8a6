"""How sure an accuracy is: bootstrap intervals, by question or by image, and paired comparisons.

Questions about one image are not independent: a picture the model misreads costs several of them. Clusters by image
resample whole images; the interval by question is the one most papers would print.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llava.errors import UserError

Array = NDArray[np.float64]

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
