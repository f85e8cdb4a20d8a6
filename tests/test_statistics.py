"""Bootstrap intervals against their definition and against theory."""

import time

import numpy as np
import pytest

from eval.results import statistics
from llava.errors import UserError


def means_by_the_book(values, clusters, resamples, seed):
    """Draw clusters one by one and average the values in them."""
    names = list(dict.fromkeys(clusters))
    random = np.random.default_rng(seed)
    means = []
    for _ in range(resamples):
        picked = [names[i] for i in random.integers(len(names), size=len(names))]
        sample = [value for name in picked for value, label in zip(values, clusters, strict=True) if label == name]
        means.append(sum(sample) / len(sample))
    return means


@pytest.mark.parametrize("at_once", [1, 50, 10**6])
@pytest.mark.parametrize("clustered", [False, True])
def test_interval_is_the_percentile_interval_of_the_definition(monkeypatch, clustered, at_once):
    monkeypatch.setattr(statistics, "DRAWS_AT_ONCE", at_once)
    random = np.random.default_rng(3)
    values = random.integers(0, 2, 23).astype(float).tolist()
    clusters = random.integers(0, 6, 23).tolist() if clustered else None
    expected = means_by_the_book(values, clusters or list(range(23)), 200, seed=5)
    interval = statistics.bootstrap(values, clusters, resamples=200, seed=5)
    assert interval.mean == pytest.approx(sum(values) / 23)
    assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(expected, (0.025, 0.975))), abs=1e-12)


def test_width_is_what_the_binomial_says():
    values = [1.0] * 1824 + [0.0] * 176
    interval = statistics.bootstrap(values)
    half = 1.96 * (0.912 * 0.088 / 2000) ** 0.5
    assert interval.low == pytest.approx(0.912 - half, abs=0.001)
    assert interval.high == pytest.approx(0.912 + half, abs=0.001)


def test_clusters_widen_the_interval_when_answers_go_together():
    """Ten identical answers per image carry the information of one."""
    random = np.random.default_rng(0)
    per_image = random.integers(0, 2, 50)
    values = np.repeat(per_image, 10).astype(float).tolist()
    images = np.repeat(np.arange(50), 10).tolist()
    alone, together = statistics.bootstrap(values), statistics.bootstrap(values, images)
    ratio = (together.high - together.low) / (alone.high - alone.low)
    assert ratio == pytest.approx(10**0.5, rel=0.1)


def test_same_seed_same_interval_other_seed_other_interval():
    values = np.random.default_rng(0).random(80).tolist()
    assert statistics.bootstrap(values, seed=1) == statistics.bootstrap(values, seed=1)
    assert statistics.bootstrap(values, seed=1) != statistics.bootstrap(values, seed=2)


def test_paired_comparison_sees_what_two_intervals_would_miss():
    """b loses 2 % of the questions that a gets and gains none: the intervals overlap, the pairs do not."""
    a = {str(i): float(i < 800) for i in range(1000)}
    b = {str(i): float(i < 780) for i in range(1000)}
    result = statistics.paired_bootstrap(a, b)
    assert result.difference == pytest.approx(0.02)
    assert 0.01 < result.low < 0.02 < result.high < 0.03
    assert 0 < result.p < 0.001
    back = statistics.paired_bootstrap(b, a)
    assert (back.difference, back.low, back.high) == pytest.approx((-0.02, -result.high, -result.low))


def test_paired_comparison_against_the_definition():
    a = {str(i): float(i % 5 < 3) for i in range(40)}
    b = {str(i): float(i % 2 == 0) for i in range(40)}
    ordered = sorted(a)
    means = means_by_the_book([a[n] - b[n] for n in ordered], ordered, 500, seed=9)
    result = statistics.paired_bootstrap(a, b, resamples=500, seed=9)
    assert (result.low, result.high) == pytest.approx(tuple(np.quantile(means, (0.025, 0.975))), abs=1e-12)
    # Two-sided: twice the smaller tail, one added to both counts so that it is never 0.
    tail = min(sum(mean <= 0 for mean in means), sum(mean >= 0 for mean in means))
    assert tail > 5 and result.p == pytest.approx(2 * (tail + 1) / 501)


def test_paired_comparison_of_equals_is_not_significant():
    a = {str(i): float(i % 3 == 0) for i in range(300)}
    same = statistics.paired_bootstrap(a, a)
    assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)


def test_paired_comparison_can_go_by_image():
    a = {str(i): float(i < 40) for i in range(100)}
    b = {str(i): float(i < 20) for i in range(100)}
    images = {str(i): i // 20 for i in range(100)}
    by_question, by_image = statistics.paired_bootstrap(a, b), statistics.paired_bootstrap(a, b, images)
    assert by_image.high - by_image.low > 2 * (by_question.high - by_question.low)
    assert by_image.p > 0.05 > by_question.p


def test_paired_comparison_refuses_other_questions():
    with pytest.raises(UserError, match="1 are only in the first and 2 only in the second"):
        statistics.paired_bootstrap({"1": 1, "2": 0}, {"2": 1, "3": 1, "4": 0})


def test_nothing_to_resample_is_a_sentence():
    with pytest.raises(UserError, match="no questions were scored"):
        statistics.bootstrap([])


def test_fast_enough_for_the_whole_of_gqa():
    start = time.process_time()
    statistics.bootstrap([0.0, 1.0] * 6289)
    assert time.process_time() - start < 10


def test_holm_by_the_book():
    """Holm 1979: the smallest p times m, the next times m - 1, never below an earlier one, never above 1."""
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.6, 0.7]) == [1.0, 1.0]


def test_all_pairs_finds_the_planted_difference_and_no_other():
    random = np.random.default_rng(3)
    names = [f"q{i}" for i in range(600)]
    images = {name: int(name[1:]) // 3 for name in names}
    base = {name: float(random.random() < 0.6) for name in names}
    same = {name: value if random.random() < 0.9 else 1 - value for name, value in base.items()}
    worse = {name: value * (random.random() < 0.7) for name, value in base.items()}
    found = statistics.all_pairs({"base": base, "same": same, "worse": worse}, images, resamples=4000)
    assert set(found) == {("base", "same"), ("base", "worse"), ("same", "worse")}
    gap = found["base", "worse"]
    assert gap.difference > 0 and gap.p < 0.01 and gap.low < gap.difference < gap.high
    assert found["base", "same"].p > 0.05
    paired = statistics.paired_bootstrap(base, worse, images)
    assert gap.difference == pytest.approx(paired.difference)
    assert (gap.low, gap.high) == pytest.approx((paired.low, paired.high), abs=0.01)


def test_all_pairs_needs_the_same_questions():
    with pytest.raises(UserError, match="same questions"):
        statistics.all_pairs({"a": {"q": 1.0}, "b": {"r": 1.0}}, {"q": 0, "r": 0})
