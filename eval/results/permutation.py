"""The studentised permutation test of two scores on the same clusters."""

import itertools
import math
from collections.abc import Callable

import numpy as np
from scipy import stats

from eval.metrics import Array

Value = Callable[[Array], Array]
# Relative step of the numeric derivatives, and how close two test statistics are to count as equal: derivatives carry
# errors of about 1e-9, and ties decide p-values of small samples.
STEP, TIE = 1e-5, 1e-6
# A standard error of this share of the score is what derivatives and rounding leave of none.
NO_SPREAD = 1e-7


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
        """The p-value, and the critical value of the test statistic: it is exceeded exactly if p <= alpha.

        p is the share of exchanges whose statistic is at least the observed one; an infinite one (a difference without
        spread) is equal to another. Where exchanges are drawn, the observed one is among them, so p is never 0.
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

        Test statistics of few differing clusters take few values, so that the two can be far apart. With five or fewer
        differing clusters no value is significant; the interval then takes Student's quantile, because its end would
        otherwise lie at 0.
        """
        largest = float(np.sort(known)[math.ceil(round((1 - alpha) * len(known), 6)) - 1])
        above = known[(known > largest * (1 + TIE) + TIE) & np.isfinite(known)]
        if above.size:
            return (largest + float(above.min())) / 2
        return max(largest, float(stats.t.ppf(1 - alpha / 2, max(1, self.differing - 1))))

    def statistic(self, signs: Array) -> Array:
        """|difference| / standard error of exchanges [..., clusters]; ties with the observed value are made exact."""
        found = ratio(*(abs(part) for part in self._measure(signs)))
        return np.where(np.isclose(found, self._observed, rtol=TIE, atol=TIE), self._observed, found)

    def _measure(self, signs: Array) -> tuple[Array, Array]:
        """Difference and standard error, by the delta method: the score is linear in each cluster near its sums."""
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
    """above / below; infinite for a difference without spread, 0 for none."""
    above, below = np.asarray(above, float), np.asarray(below, float)
    found = np.full(np.broadcast(above, below).shape, np.inf)
    found[above <= 1e-9] = 0.0
    return np.divide(above, below, out=found, where=below > 0)


def slope(value: Value, sums: Array) -> Array:
    """The derivatives of a score by each of its sums, [..., terms]."""
    found = np.empty_like(sums)
    for term in range(sums.shape[-1]):
        step = STEP * (1 + np.abs(sums[..., term]))
        up, down = sums.copy(), sums.copy()
        up[..., term] += step
        down[..., term] -= step
        found[..., term] = (value(up) - value(down)) / (2 * step)
    return found
