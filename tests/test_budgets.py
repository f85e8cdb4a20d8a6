"""Adaptive methods beside fixed budgets: audit, mixing line and budget oracle, each against its definition."""

import itertools
import random
from functools import partial
from statistics import fmean

import numpy as np
import pytest
from scipy import stats

from eval.results.statistics import accuracy_terms, compare, interval
from eval.statistics import budgets
from eval.statistics.budgets import Spent, around, audit, beside_line, oracle, spent
from tests.eval_fakes import write_gqa
from tests.test_statistics_command import run, write_run


def made(label, budget, scores, tokens, labels, adaptive=False):
    """A run; scores and tokens by question, in a table of the same order as `labels`."""
    scores, tokens = dict(zip(labels, scores, strict=True)), dict(zip(labels, tokens, strict=True))
    return Spent(label, budget, accuracy_terms(scores, labels), scores, tokens, tokens, adaptive)


def drawn(seed, images=60, each=5):
    """Two fixed budgets, 64 and 128: questions of an image are alike, and the larger budget gains 10 points."""
    chance = np.random.default_rng(seed)
    labels = {f"{image}-{number}": f"i{image}" for image in range(images) for number in range(each)}
    hard = np.repeat(chance.normal(0, 0.5, images), each) + chance.normal(0, 1, len(labels))
    low, high = (hard < 0.9).astype(float), (hard + chance.normal(0, 0.4, len(labels)) < 1.6).astype(float)
    fixed = [
        made("m", budget, scores, [float(budget)] * len(labels), labels) for budget, scores in ((64, low), (128, high))
    ]
    return chance, labels, low, high, fixed


def choosing(at_high, low, high, labels):
    """The run of a rule that asks some questions at 128 tokens and the others at 64."""
    scores, tokens = np.where(at_high, high, low), np.where(at_high, 128.0, 64.0)
    return made("rule", 64, scores, tokens, labels, adaptive=True)


def test_a_random_rule_lies_on_the_line(monkeypatch):
    """The p-values of rules that toss a coin for every question, or for every image, are uniform."""
    monkeypatch.setattr(budgets, "compare", partial(compare, resamples=199))
    for each in (1, 5):
        found = []
        for seed in range(120):
            chance, labels, low, high, fixed = drawn(seed)
            coins = np.repeat(chance.random(len(labels) // each) < 0.4, each)
            rule = choosing(coins, low, high, labels)
            found.append(beside_line(rule, rule.tokens, *fixed, labels).gain.p)
        assert stats.kstest(found, "uniform").pvalue > 0.01, each
        assert 0.005 <= np.mean(np.array(found) <= 0.05) <= 0.11, each


def test_a_rule_that_knows_where_tokens_help_is_above_the_line_and_its_reverse_below():
    _, labels, low, high, fixed = drawn(1)
    for at_high, sign in ((high > low, 1), (high <= low, -1)):
        rule = choosing(at_high, low, high, labels)
        line = beside_line(rule, rule.tokens, *fixed, labels)
        assert line.weight == pytest.approx(at_high.mean())
        assert sign * line.gain.difference > 3 and line.gain.p < 0.01


def test_the_line_is_the_mean_over_all_choices_of_so_many_questions():
    """From the definition: every choice of 2 of 5 questions for the larger budget, equally likely."""
    labels = {name: name for name in "abcde"}
    low, high, own = (1, 0, 0, 1, 0), (1, 1, 0, 0, 1), (1, 1, 1, 0, 0)
    fixed = [made("m", budget, scores, [budget] * 5, labels) for budget, scores in ((64, low), (128, high))]
    method = made("rule", 64, own, [128, 64, 64, 64, 128], labels, adaptive=True)
    line = beside_line(method, method.tokens, *fixed, labels)
    choices = itertools.combinations(range(5), 2)
    means = [100 * fmean(high[one] if one in chosen else low[one] for one in range(5)) for chosen in choices]
    assert (line.weight, line.score) == (pytest.approx(0.4), pytest.approx(fmean(means)))
    assert line.gain.difference == pytest.approx(60 - fmean(means))


def test_the_spread_of_the_gain_is_that_of_leaving_out_one_image_at_a_time(monkeypatch):
    """The weight is estimated, too. Images have unequal numbers of questions, and the fixed budgets vary a little."""
    chance = np.random.default_rng(3)
    labels = {f"{image}-{number}": f"i{image}" for image in range(40) for number in range(1 + image % 4)}
    count, seen = len(labels), []
    low, high, own = (
        made("m", 0, chance.random(count) < share, chance.normal(mean, 9, count), labels)
        for share, mean in ((0.6, 64), (0.9, 128), (0.8, 90))
    )
    monkeypatch.setattr(budgets, "compare", lambda a, b: seen.append((a, b)) or compare(a, b))

    def gain(names):
        means = [fmean(one.tokens[name] for name in names) for one in (own, low, high)]
        scores = [100 * fmean(one.scores[name] for name in names) for one in (own, low, high)]
        weight = (means[0] - means[1]) / (means[2] - means[1])
        return scores[0] - (1 - weight) * scores[1] - weight * scores[2]

    assert beside_line(own, own.tokens, low, high, labels).gain.difference == pytest.approx(gain(list(labels)))
    left_out = [gain([name for name in labels if labels[name] != image]) for image in dict.fromkeys(labels.values())]
    (a, b), images = seen[0], 40
    mixed_questions = b.sums[:, 1]
    assert mixed_questions == pytest.approx(a.sums[:, 1]), "a mixture asks as many questions"
    influence = 100 * (a.sums[:, 0] - b.sums[:, 0]) / count - gain(list(labels)) * a.sums[:, 1] / count
    jackknife = (images - 1) / images * sum((one - fmean(left_out)) ** 2 for one in left_out)
    assert images / (images - 1) * float(influence @ influence) == pytest.approx(jackknife, rel=0.06)


def test_the_line_ends_at_the_nearest_budgets():
    labels = {"a": "a"}
    fixed = [made("m", budget, [1], [budget], labels) for budget in (192, 32, 64)]
    ends = [[run.budget for run in around(mean, fixed) or ()] for mean in (70, 64.4, 63.4, 31.6, 20, 200)]
    assert ends == [[64, 192], [64, 64], [32, 64], [32, 32], [], []]
    assert around(64, []) is None


def test_the_audit_is_about_questions():
    labels = {f"q{number}": f"i{number // 4}" for number in range(100)}
    tokens = [float(number) for number in range(1, 101)]
    random.Random(0).shuffle(tokens)
    found = audit(made("m", 64, [1] * 100, tokens, labels, True), labels)
    below = [sum(one < end for one in tokens) for end in (found.low, found.high)]
    assert (found.least, found.most, below) == (1, 100, [5, 95]) and found.mean.mean == found.paid == 50.5
    assert found.mean.low < 50.5 < found.mean.high and found.mean.high - found.mean.low < 25
    same = audit(made("m", 64, [1] * 100, [64.0] * 100, labels), labels)
    assert same.mean == interval(accuracy_terms(dict.fromkeys(labels, 0.64), labels)) or same.mean.low is None


def test_the_oracle_takes_the_smallest_budget_that_is_right():
    """Rows: right at all, from 64 on, at 32 and 128 alone, at 64 alone, and never."""
    labels = {name: name for name in "abcde"}
    right = {32: (1, 0, 1, 0, 0), 64: (1, 1, 0, 1, 0), 128: (1, 1, 1, 0, 0)}
    runs = [made("m", budget, scores, [budget] * 5, labels) for budget, scores in right.items()]
    best, stable = oracle(runs[::-1]), oracle(runs, stable=True)
    assert list(best.scores.values()) == [1, 1, 1, 1, 0] and best.tokens == fmean((32, 64, 32, 64, 32))
    assert list(stable.scores.values()) == [1, 1, 1, 0, 0] and stable.tokens == fmean((32, 64, 128, 32, 32))


def test_what_is_not_recorded_is_not_guessed():
    record = {"mean": 40.0, "paid": 50.0, "visual_tokens": 576, "planned": None}
    prose = record | {"mean": 0.0, "visual_tokens": 0, "planned": 0.0}
    about = ("m", 64, None, None)
    found = spent(*about, {"a": record, "b": prose})
    assert (found.tokens, found.paid, found.adaptive) == ({"a": 40.0}, {"a": 50.0}, True)
    old = {key: value for key, value in record.items() if key != "paid"}
    assert spent(*about, {"a": record, "b": old}).paid is None
    assert spent(*about, {"a": record, "b": {}}) is None and spent(*about, {"b": prose}) is None


def test_stats_prints_audit_line_and_oracle(tmp_path, capsys):
    data, count = write_gqa(tmp_path / "data", 200), 200

    def spending(tokens, planned, paid=0):
        return [{"mean": t, "paid": t + paid, "visual_tokens": 576, "planned": planned} for t in tokens]

    def at(name, budget, wrong, tokens, planned=1.0, paid=0, **options):
        found = {"config": {"budget": budget, **options}}
        return write_run(
            tmp_path / name,
            data,
            name.split("-")[0],
            budget,
            wrong,
            settings=found,
            records=spending(tokens, planned, paid),
        )

    full = at("full-576", 576, {0}, [576] * count)
    few, many = at("m-64", 64, range(60), [64] * count), at("m-128", 128, range(20), [128] * count)
    own = at("m-own", 64, range(30), [32 + number for number in range(count)], None, 20, own=True)
    other = at("d-64", 64, range(10), [64] * count), at("d-192", 192, range(5), [192] * count)
    run(data, full, few, many, own, *other)
    printed = capsys.readouterr().out
    assert "| m own=True | 64 | 131.5 [" in printed and " | 32.0 | 42.0 | 221.1 | 231.0 | 151.5 |" in printed, printed
    assert "m own=True at 64 has no line of its own: give runs of the same method at a fixed budget" in printed
    assert "below and one above 131.5 tokens." in printed
    assert "| m own=True | 131.5 | d | 53 % at 192, others at 64 | 96.3 | " in printed
    assert "| m own=True | 151.5 paid | d | 68 % at 192, others at 64 | 96.7 | " in printed
    assert "Budget oracle, which knows the right answers: a bound" in printed
    assert "| m | 64, 128, 576 | 99.5 " in printed
    run(data, full, few)
    assert "oracle" not in (plain := capsys.readouterr().out) and "Beside fixed" not in plain
