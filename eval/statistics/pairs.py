"""A method and the full model over the same clusters, and weighted bootstrap draws of the clusters."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from eval.metrics import Array, SufficientStatistics
from eval.results.statistics import DRAWS_AT_ONCE, summed_by_cluster
from llava.errors import UserError


@dataclass(frozen=True)
class Pairs:
    """Summed rows of a method and of the full model by cluster; clusters with equal rows are one kind.

    Right-or-wrong questions give a few dozen kinds for thousands of images. A bootstrap draw of clusters is a
    multinomial draw of kinds, which is 10 to 100 times faster than drawing labels.

    Attributes:
        method, full: [kinds, terms] sums of one cluster of the kind.
        counts: [kinds] clusters of the kind.
        of_method, of_full: the scores of summed rows [..., terms].
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
        """Score of the method and of the full model for counts of kinds [..., kinds]."""
        return self.of_method.value(counts @ self.method), self.of_full.value(counts @ self.full)

    def draws(
        self, weights: Array, clusters: int, resamples: int, random: np.random.Generator
    ) -> Iterator[tuple[Array, Array]]:
        """Both scores of `resamples` draws of clusters, in batches that fit into memory.

        Args:
            weights: [kinds] probability of each kind.
            clusters: drawn each time.
        """
        at_once = max(1, DRAWS_AT_ONCE // len(weights))
        for start in range(0, resamples, at_once):
            size = min(at_once, resamples - start)
            yield self.scores(random.multinomial(clusters, weights, size).astype(float))


def pair(method: SufficientStatistics, full: SufficientStatistics) -> Pairs:
    """The pairs of two scores; UserError if they are not of the same questions."""
    if method.names != full.names or method.clusters != full.clusters:
        raise UserError("The method and the full model must have answered the same questions in the same data.")
    rows = np.concatenate([summed_by_cluster(method), summed_by_cluster(full)], axis=1)
    kinds, counts = np.unique(rows, axis=0, return_counts=True)
    terms = method.sums.shape[1]
    return Pairs(kinds[:, :terms], kinds[:, terms:], counts.astype(float), method, full)
