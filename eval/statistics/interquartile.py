"""The interquartile mean of a method's relative scores over benchmarks, and their plain mean, with one interval.

Agarwal et al. (2021, "Deep reinforcement learning at the edge of the statistical precipice", the library rliable)
aggregate runs over tasks by the mean of the middle half and resample runs within each task. Here a task is a benchmark
and the resampled units are its clusters; a benchmark is never resampled itself. The interval covers the questions,
not the choice of benchmarks.
"""

from collections.abc import Callable, Mapping

import numpy as np
from scipy import stats

from eval.metrics import Array, SufficientStatistics
from eval.results.statistics import FEWEST_CLUSTERS, FEWEST_DECIDING, LEVEL, Interval, deciding, plural, slope
from eval.statistics.noninferiority import influences
from eval.statistics.pairs import pair
from llava.errors import UserError

Scores = Mapping[str, tuple[SufficientStatistics, SufficientStatistics]]
RESAMPLES = 2_000


def relative_iqm(scores: Scores, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Interquartile mean of method / full over benchmarks, in percent, with its 95 % interval.

    Args:
        scores: benchmark -> (method, full model) on the same questions.

    Raises:
        UserError: no benchmark, other questions, or a full model that scores 0.
    """
    return aggregate(interquartile_mean, scores, resamples, seed)


def relative_mean(scores: Scores, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Mean of method / full over benchmarks in percent, the average of the papers' tables, with its 95 % interval."""
    return aggregate(lambda values: values.mean(-1), scores, resamples, seed)


def aggregate(average: Callable[[Array], Array], scores: Scores, resamples: int, seed: int) -> Interval:
    """An average of the relative scores: its spread by a bootstrap over clusters, each benchmark by itself.

    Of n clusters n - 1 are drawn, so that the spread is that of the mean (Rao and Wu 1988). Quantile and degrees of
    freedom are those of `eval.results.statistics.interval`, and so are the reasons for no interval: few clusters in a
    benchmark, or few that decide the spread. (The percentiles of the draws cover 78 % with few of them.)
    """
    if not scores:
        raise UserError("An average over benchmarks needs at least one benchmark.")
    streams = np.random.default_rng(seed).spawn(len(scores))
    by_name = {name: pair(*scores[name]) for name in sorted(scores)}  # the order given changes nothing
    observed = [relative(name, *pairs.scores(pairs.counts)) for name, pairs in by_name.items()]
    mean = float(average(np.array(observed)))
    for name, pairs in by_name.items():
        if pairs.clusters < FEWEST_CLUSTERS:
            units = f"{pairs.clusters} {plural(pairs.of_method.unit, pairs.clusters)}"
            return Interval(mean, None, None, f"n/a: {name} has {units}, an interval needs {FEWEST_CLUSTERS}")
    drawn = []
    for (name, pairs), random in zip(by_name.items(), streams, strict=True):
        draws = pairs.draws(pairs.counts / pairs.clusters, pairs.clusters - 1, resamples, random)
        drawn.append(np.concatenate([relative(name, *found) for found in draws]))
    values = average(np.stack(drawn, -1))
    if np.ptp(values) <= 1e-9 * max(1.0, abs(mean)):
        return Interval(mean, None, None, "n/a: all resamples give the same number")
    parts = zip(by_name.values(), observed, slope(average, np.array(observed)), strict=True)
    shares = [
        weight / pairs.scores(pairs.counts)[1] * influences(pairs, float(value) / 100) for pairs, value, weight in parts
    ]
    counts = np.concatenate([pairs.counts for pairs in by_name.values()])
    few = deciding(np.concatenate(shares), counts)
    if few < FEWEST_DECIDING:
        reason = f"n/a: fewer than {FEWEST_DECIDING} of {counts.sum():,.0f} clusters decide the spread"
        return Interval(mean, None, None, reason)
    freedom = 2 / max(1 / few - 1 / counts.sum(), 1e-12)
    half = float(stats.t.ppf((1 + LEVEL) / 2, freedom) * values.std())
    return Interval(mean, mean - half, mean + half, "Student")


def relative(benchmark: str, method: Array, full: Array) -> Array:
    """100 x method / full; UserError where full is 0, which happens to sets of a few questions."""
    if (np.asarray(full) <= 0).any():
        raise UserError(
            f"{benchmark}: the full model scores 0 on these questions or on a resample of them, so that there is no "
            "relative score; leave this benchmark out."
        )
    return 100 * method / full


def interquartile_mean(values: Array) -> Array:
    """Mean of the middle half along the last axis.

    A quarter of the weight falls away at each end. Where that is no whole number of values, those at the ends count in
    part: of 5 values the second and fourth count 3/4.
    """
    count = values.shape[-1]
    edges = np.arange(count + 1) / count
    inside = np.minimum(edges[1:], 0.75) - np.maximum(edges[:-1], 0.25)
    weights = np.maximum(inside, 0.0) * 2
    return np.sort(values, -1) @ weights
