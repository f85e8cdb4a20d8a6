"""Tokens needed, hard questions, loyalty and averages, each against its definition."""

import math
import re
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from eval import benchmarks
from eval.metrics import SufficientStatistics
from eval.statistics import gain
from eval.statistics.answers import hard_questions, loyalty, plain
from eval.statistics.relative import lower_bound, p_value, pair, relative_mean
from eval.statistics.relative import tokens_needed as needed
from llava.errors import UserError
from llava.places import ASSETS as BUNDLED
from tests.simulated_errors import chance, coverage, f1_terms, of_gain, simulated, terms, three

ASSETS = BUNDLED / "eval"


def lost(count: int, of: int) -> SufficientStatistics:
    """Single questions of which the first are wrong."""
    return terms((np.arange(of) >= count)[:, None])


# -- the non-inferiority test ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("losses", [0, 1, 2, 5])
def test_single_questions_that_the_method_only_loses_give_the_binomial_test(losses):
    """Where full is right everywhere, the null distribution loses each question with 1 %."""
    found = p_value(pair(lost(losses, 500), lost(0, 500)), 0.99, resamples=20_000)
    assert found == pytest.approx(stats.binom.cdf(losses, 500, 0.01), abs=0.01)


def test_p_is_the_share_of_draws_from_the_tilted_clusters():
    """The tilt by bisection in plain Python, the draws one cluster at a time."""
    random = np.random.default_rng(0)
    full = random.random((60, 3)) < 0.9
    method = np.where(random.random((60, 3)) < 0.1, random.random((60, 3)) < 0.8, full)
    share = 0.98
    a = [(float(m.sum()), float(f.sum())) for m, f in zip(method, full, strict=True)]
    worst = max(f - m for m, f in a)
    a.append((3 - min(3.0, 2 * worst), 3.0))
    mean = sum(m - share * f for m, f in a) / len(a)

    def weights(tilt):
        found = [math.exp(tilt * (m - share * f - mean)) for m, f in a]
        return [w / sum(found) for w in found]

    low, high = -20.0, 20.0
    for _ in range(200):
        middle = (low + high) / 2
        gap = sum(w * (m - share * f) for w, (m, f) in zip(weights(middle), a, strict=True))
        low, high = (middle, high) if gap < 0 else (low, middle)
    observed = sum(m - share * f for m, f in a[:-1])
    drawn = [random.choice(len(a), size=60, p=weights(low)) for _ in range(4000)]
    reached = [sum(a[i][0] - share * a[i][1] for i in row) >= observed - 1e-9 for row in drawn]
    found = p_value(pair(terms(method), terms(full)), share)
    assert found == pytest.approx(np.mean(reached), abs=0.025) and 0.02 < found < 0.98


@pytest.mark.parametrize("setting", [(300, 1, 0.96, 0.05, 0.0), (50, 20, 0.9, 0.0, 0.2), (400, 6, 0.6, 0.2, 0.0)])
def test_at_the_margin_the_test_passes_about_one_in_twenty(setting):
    """docs/statistics.md has 2,000 trials of eleven settings (tests/simulated_errors.py)."""
    random, trials, passed = np.random.default_rng(1), 200, 0
    for trial in range(trials):
        method, full = simulated(random, *setting)
        found = pair(terms(method), terms(full))
        passed += p_value(found, 0.99, resamples=400, seed=trial) <= 0.05
    assert passed / trials <= 0.05 + 3 * (0.05 * 0.95 / trials) ** 0.5


def test_a_method_that_keeps_every_answer_is_shown_to_do_so_by_enough_images():
    """Without a lost question nothing varies; a test with a standard error has no answer then."""
    for count, shown in ((200, False), (320, True)):
        assert (needed(lost(10, count), {448: lost(10, count)}).tokens == 448) is shown


def test_the_lower_bound_is_the_share_that_is_just_rejected():
    found = pair(lost(25, 800), lost(10, 800))
    low = lower_bound(found, 0.05)
    assert 0.95 < low < 775 / 790
    assert p_value(found, low - 0.002) <= 0.05 < p_value(found, low + 0.002)
    assert lower_bound(pair(lost(800, 800), lost(10, 800)), 0.05) == 0


def test_scores_that_are_no_proportion_are_tested_too():
    right = np.arange(1600) % 2 == 0  # the label is yes for every second one
    full = right.copy()
    full[:40] ^= True
    worse = full.copy()
    worse[60:160] ^= True
    found = needed(f1_terms(full, right), {256: f1_terms(full, right), 64: f1_terms(worse, right)})
    assert found.tokens == 256 and found.tests[64].p > 0.9
    assert found.tests[256].of_full == 100 and 99 < found.tests[256].low < 100


# -- tokens needed ---------------------------------------------------------------------------------------------------


def test_the_smallest_budget_that_passes_with_all_larger_ones_is_named():
    found = needed(lost(10, 1000), {32: lost(90, 1000), 64: lost(11, 1000), 128: lost(10, 1000)})
    assert (found.tokens, found.text, list(found.tests)) == (64, "64", [128, 64, 32])
    assert [test.passed for test in found.tests.values()] == [True, True, False]
    assert found.tests[64].of_full == pytest.approx(100 * 989 / 990)
    for test in found.tests.values():
        assert (test.low >= 99) == test.passed and test.low < test.of_full


def test_a_failure_ends_the_sequence_even_if_a_smaller_budget_is_better():
    """A method that does better with fewer tokens is not shown to need few: the sequence began at the largest."""
    found = needed(lost(10, 1000), {64: lost(10, 1000), 128: lost(60, 1000)})
    assert (found.tokens, found.text) == (None, "more than 128")
    assert found.tests[64].p < 0.05 and not found.tests[64].passed


def test_tokens_needed_refuses_what_cannot_be_tested():
    for full, by_budget, problem in (
        (lost(1, 9), {}, "at least one measured budget"),
        (lost(1, 9), {8: lost(1, 8)}, "same questions"),
        (lost(9, 9), {8: lost(1, 9)}, "scores 0"),
    ):
        with pytest.raises(UserError, match=problem):
            needed(full, by_budget)
    with pytest.raises(UserError, match="share should be"):
        needed(lost(1, 9), {8: lost(1, 9)}, share=99)


# -- visual gain -----------------------------------------------------------------------------------------------------


def test_gain_is_that_of_the_definition():
    """Its interval is near that of images drawn by hand, the same for all three."""
    random, values = np.random.default_rng(3), []
    scores = three(random, 80, 3, 0.9, 0.2, 0.7)
    m, f, b = (one.sums[:, 0] for one in scores)
    for _ in range(3000):
        rows = random.integers(80, size=80)
        values.append(100 * (m[rows].sum() - b[rows].sum()) / (f[rows].sum() - b[rows].sum()))
    found = gain.gain_kept(*scores)
    assert found.mean == pytest.approx(100 * (m.sum() - b.sum()) / (f.sum() - b.sum()))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(values, (0.025, 0.975))), abs=1.2)
    # The delta method, by differences: how far one image of each kind moves the ratio.
    weights = np.ones(80) + 1e-6 * np.eye(80)
    moves = (100 * (weights @ (m - b)) / (weights @ (f - b)) - found.mean) / 1e-6
    spread = (np.var(moves, ddof=1) * 80) ** 0.5
    few = np.sum(np.square(moves)) ** 2 / np.sum(np.power(moves, 4))
    assert found.high - found.mean == pytest.approx(stats.t.ppf(0.975, 2 / (1 / few - 1 / 80)) * spread, rel=1e-3)


def test_full_keeps_all_of_the_gain_and_blind_none():
    method, full, blind = three(np.random.default_rng(1), 40, 2, 0.9, 0.2, 0.5)
    assert [gain.gain_kept(one, full, blind).mean for one in (full, blind)] == [pytest.approx(100), pytest.approx(0)]
    assert gain.gain_kept(full, full, blind).method == "n/a: every image keeps the same share"
    assert gain.gain_kept(method, full, blind).low is not None


def test_there_is_no_gain_to_keep_unless_full_is_shown_to_be_above_blind():
    method, full, blind = three(np.random.default_rng(1), 40, 2, 0.9, 0.2, 0.5)
    few = [terms(one.sums[:19, :1] > 0) for one in (method, full, blind)]
    for scores, reason in (
        ((method, full, full), r"n/a: full is not shown to be above blind \(p 1\)"),
        ((method, blind, full), "n/a: full is not shown to be above blind"),
        (few, "n/a: 19 images, needs 20"),
    ):
        found = gain.gain_kept(*scores)
        assert math.isnan(found.mean) and found.low is None and re.match(reason, found.method), found
    with pytest.raises(UserError, match="same questions"):
        gain.mixture(full, few[2], 0.5)


def test_the_test_of_a_share_looks_at_the_three_scores_together():
    """The score is m - s f - (1 - s) b; for a score that is no proportion it is put together from both."""
    method, full, blind = three(np.random.default_rng(4), 60, 3, 0.9, 0.2, 0.9)
    m, f, b = (one.sums[:, 0].sum() / 1.8 for one in (method, full, blind))
    for share in (0.25, 0.9, 1.2):
        mixed = gain.mixture(full, blind, share)
        assert float(mixed.value(mixed.sums.sum(0))) == pytest.approx(share * f + (1 - share) * b)
    record = gain.blind_record(["x"], {"x": {64: method, 448: full}}, full, blind, 0.5, None)
    assert record["gain_needed"]["x"]["text"] == "64" and m - 0.5 * f - 0.5 * b > 0
    assert p_value(pair(method, gain.mixture(full, blind, 0.5)), 1.0) < 0.01
    assert p_value(pair(method, gain.mixture(full, blind, 0.99)), 1.0) > 0.5
    actual = np.arange(240) % 2 == 0
    flips = [np.random.default_rng(i).random(240) < wrong for i, wrong in enumerate((0.2, 0.1, 0.5))]
    method, full, blind = (f1_terms(actual ^ flip, actual) for flip in flips)
    mixed = gain.mixture(full, blind, 0.3)
    both = [float(one.value(one.sums.sum(0))) for one in (full, blind)]
    assert float(mixed.value(mixed.sums.sum(0))) == pytest.approx(0.3 * both[0] + 0.7 * both[1])
    found = gain.gain_kept(method, full, blind)
    assert found.mean == pytest.approx(100 * (f1_of(method) - both[1]) / (both[0] - both[1])) and found.low is not None


def f1_of(one) -> float:
    return float(one.value(one.sums.sum(0)))


def test_a_share_of_the_gain_passes_about_one_in_twenty_at_the_margin():
    """Half of the methods passed at 99 % on single questions: most images differ a little from a mixture, unlost."""
    random, passed = np.random.default_rng(1), 0
    for trial in range(100):
        method, full, blind = three(random, 100, 1, 0.9, 0.0, 0.99)
        record = pair(method, gain.mixture(full, blind, 0.99))
        passed += p_value(record, 1.0, resamples=200, seed=trial, whole=True) <= 0.05
    assert passed <= 12
    record = gain.blind_record(["x"], {"x": {64: full}}, full, blind, 0.99, None)
    assert record["gain_needed"]["x"]["text"] == "more than 64", "100 questions without a loss cannot show 99 %"


@pytest.mark.parametrize("setting", [(30, 5, 0.9, 0.2), (100, 1, 0.6, 0.0)])
def test_intervals_of_gains_cover(setting):
    """docs/statistics.md has 1,000 trials of more settings (tests/simulated_errors.py)."""
    withheld, covered, _ = coverage(of_gain, setting, 200)
    assert covered > 90 and withheld < 60


# -- the floor


@pytest.mark.parametrize(
    ("text", "letters"),
    [
        ("Which?\nA. red\nB. blue\nC. green", "ABC"),
        ("Which?\n(A) red\n(B) blue\n", "AB"),
        ("Which?\nOptions: A: red, B: blue, C: no, D: none", "ABCD"),
        ("Is A. Lincoln there?", ""),
        ("What is in B. and A. of it?", ""),
    ],
)
def test_options_are_read_from_the_question(text, letters):
    assert gain.options_of(text) == tuple(letters)


def test_the_floor_of_choices_is_guessing_and_that_of_open_questions_the_usual_answer_elsewhere():
    def floor(name, split, limit=None):
        data = benchmarks.get(name).load(ASSETS, split)
        asked = [question.id for question in data.questions[:limit]]
        return gain.floor_of(data, asked, ASSETS, split, None)

    assert floor("ai2d", "test") == gain.Floor(25, "1 / options")
    assert floor("mmmu", "validation").how == "1 / options; 12 of 60 questions list none and count as 0"
    # Every rotation has to be right; and MME's points are 50 for the answers and 25 for the pairs of a task.
    assert 0 < floor("mmbench", "dev").value < 8 and floor("mme", "test").value == pytest.approx(750, abs=15)
    open_ = floor("gqa", "testdev", 300)
    assert open_.how == "the most frequent answer to such questions in the split val"
    own, other = (benchmarks.get("gqa").load(ASSETS, split).questions for split in ("testdev", "val"))
    usual = {one.kind: Counter(q.answer for q in other if q.kind == one.kind).most_common(1) for one in own[:300]}
    right = sum(bool(usual[one.kind]) and usual[one.kind][0][0] == one.answer for one in own[:300])
    assert open_.value == pytest.approx(right / 3) and right > 30
    assert floor("chartqa", "test") == gain.Floor(None, gain.NO_OTHER_SPLIT)


# -- hard questions --------------------------------------------------------------------------------------------------


def test_groups_are_what_downsampling_makes_of_the_questions_that_full_answers_right():
    full = {"a": 1.0, "b": 1.0, "c": 0.0, "d": 0.6, "e": 0.5}
    small = {"a": 0.0, "b": 1.0, "c": 1.0, "d": 0.5, "e": 1.0}
    assert hard_questions(full, small) == {"group_a": ("a", "d"), "group_b": ("b",)}
    with pytest.raises(UserError, match="1 have an answer of one of them only"):
        hard_questions(full, {name: small[name] for name in "abcd"})


# -- loyalty ---------------------------------------------------------------------------------------------------------


def test_loyalty_is_the_share_of_equal_answers_in_normal_form():
    full = {"a": "Red.", "b": "two", "c": "yes", "d": "no"}
    texts = {"a": " red", "b": "2", "c": "no", "d": "No."}
    images = {"a": "x", "b": "x", "c": "y", "d": "y"}
    assert loyalty(texts, full, None, images)["loyalty"].mean == 50
    parts = loyalty(texts, full, {"a": 1.0, "b": 0.0, "c": 1.0, "d": 1.0}, images)
    assert [found.mean for found in parts.values()] == [50, pytest.approx(200 / 3), 0]
    own_form = loyalty(texts, full, dict.fromkeys(full, 1.0), images, lambda text: plain(text).replace("two", "2"))
    assert own_form["loyalty"].mean == 75
    assert math.isnan(own_form["loyalty_wrong"].mean) and own_form["loyalty_wrong"].low is None
    with pytest.raises(UserError, match="same questions"):
        loyalty({"a": "red"}, full, None, images)
    # One question lost and one gained: the accuracy is that of full, the loyalty is 0.
    lost_and_gained = loyalty({"a": "x", "b": "right"}, {"a": "right", "b": "x"}, None, images)
    assert lost_and_gained["loyalty"].mean == 0 and lost_and_gained["loyalty_right"] is None


# -- averages over benchmarks ----------------------------------------------------------------------------------------


def suite(seed: int = 0):
    """Five benchmarks of different size and difficulty: (method, full)."""
    random, found = np.random.default_rng(seed), {}
    for place, (clusters, per) in enumerate(((40, 1), (25, 4), (60, 2), (30, 3), (50, 1))):
        full = random.random((clusters, per)) < 0.9 - 0.08 * place
        method = full & (random.random(full.shape) < 0.95 - 0.1 * place)
        found[f"b{place}"] = terms(method), terms(full)
    return found


def test_averages_over_benchmarks_are_those_of_the_definition():
    """The interval is near that of drawing clusters by hand in each benchmark, the same for the method and for full.

    It was drawn itself, 2,000 times, which left its width uncertain by 4 %.
    """
    scores, random, values = suite(), np.random.default_rng(3), []
    for _ in range(3000):
        ratios = []
        for method, full in scores.values():
            rows = random.integers(len(method.sums), size=len(method.sums))
            ratios.append(100 * method.sums[rows, 0].sum() / full.sums[rows, 0].sum())
        values.append(float(np.mean(ratios)))
    found = relative_mean(scores)
    observed = [100 * method.sums[:, 0].sum() / full.sums[:, 0].sum() for method, full in scores.values()]
    assert found.mean == pytest.approx(float(np.mean(observed)))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(values, (0.025, 0.975))), abs=1.0)


@pytest.mark.parametrize("setting", [(30, 1, 0.0), (20, 5, 0.2), (100, 1, 0.0)])
def test_intervals_of_averages_cover(setting):
    """The percentile bootstrap covered 83 % of 30 single questions at 90 %."""
    clusters, per, together = setting
    random, right, held = np.random.default_rng(0), 0.9, []
    for _ in range(300):
        full = random.random((clusters, per)) < chance(random, clusters, right, together)
        method = np.where(full, random.random(full.shape) < 0.96, random.random(full.shape) < 0.2)
        found = relative_mean({"x": (terms(method), terms(full))})
        if found.low is not None:
            held.append(found.low <= 100 * (0.96 * right + 0.2 * (1 - right)) / right <= found.high)
    assert np.mean(held) > 0.9


def test_averages_refuse_what_has_no_relative_score():
    with pytest.raises(UserError, match="at least one benchmark"):
        relative_mean({})
    with pytest.raises(UserError, match="few: the full model scores 0"):
        relative_mean({"few": (lost(0, 3), lost(3, 3))})
    few = relative_mean({"few": (lost(1, 19), lost(2, 19))})
    assert few.mean > 100 and few.low is None and "few has 19 images" in few.method
    nearly = relative_mean({"x": (lost(2, 100), lost(0, 100))})
    assert nearly.low is None and nearly.method == "n/a: fewer than 3 of 100 clusters decide the spread"
    with pytest.raises(UserError, match="same questions"):
        relative_mean({"x": (lost(0, 3), lost(0, 4))})
    same = relative_mean({"x": (lost(0, 30), lost(0, 30))})
    assert (same.mean, same.low) == (100, None) and same.method.startswith("n/a")
