"""PruMerge and PruMerge+ against definitions in loops, planted answers, and the release's count, order and failures."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from baselines.prumerge import (
    PruMerge,
    PruMergePlus,
    fixed_grid,
    left_over,
    outliers,
    released_budgets,
    released_grid,
    shares,
    spread,
)
from llava.errors import UserError
from llava.pipeline.prefill import prefill
from llava.reduction.reducer import EncoderState
from llava.reduction.scores import TowerScore
from llava.reduction.token_layout import ModelSpec, PatchGrid
from tests.conftest import samples

LLAVA = ModelSpec(576, 32, PatchGrid(24, 24), 24)
METHODS = (PruMerge, PruMergePlus)


def merge_by_the_book(features, kept, attention, keys, neighbours):
    """One image, plain loops: x + sum a_j x_j over the nearest of each kept token, then sum a_j x_j of all others."""
    everyone, out = range(len(features)), []
    for i in kept:
        cosine = {j: F.cosine_similarity(keys[i], keys[j], dim=0).item() for j in everyone if j != i}
        nearest = sorted(cosine, key=lambda j: -cosine[j])[:neighbours]
        out.append(features[i] + sum((attention[j] * features[j] for j in nearest), torch.zeros(features.shape[1])))
    rest = (attention[j] * features[j] for j in everyone if j not in kept)
    return torch.stack([*out, sum(rest, torch.zeros(features.shape[1]))])


@pytest.mark.parametrize(("tokens", "count", "neighbours"), [(40, 6, 5), (40, 11, 32), (12, 4, 32), (12, 0, 3)])
def test_merging_equals_its_definition(tokens, count, neighbours):
    features, attention, keys = torch.randn(3, tokens, 4), torch.rand(3, tokens), torch.randn(3, tokens, 6)
    kept = torch.stack([torch.randperm(tokens)[:count] for _ in range(3)])
    merged = shares(kept, attention, keys, neighbours) @ features
    for i in range(3):
        expected = merge_by_the_book(features[i], kept[i].tolist(), attention[i], keys[i], neighbours)
        torch.testing.assert_close(merged[i], expected, atol=1e-5, rtol=1e-5)


def encode(reducer, attention, keys=None, features=None):
    batch, tokens = attention.shape
    first, second = reducer.scores()
    signals = {first: attention, second: torch.randn(batch, tokens, 6) if keys is None else keys}
    features = torch.zeros(batch, tokens, 2) if features is None else features
    ids = tuple(map(str, range(batch)))
    return reducer.encoder(EncoderState(ids=ids, features=features, scores=signals, layout=PatchGrid(1, tokens)))


@pytest.mark.parametrize("cls", METHODS)
def test_default_is_the_releases_sum_divided_by_its_weights_in_raster_order(cls):
    attention, keys, features = torch.rand(2, 40) / 40, torch.randn(2, 40, 6), torch.randn(2, 40, 4)
    plan = encode(cls(budget=11), attention, keys, features)
    merged, ones = plan.apply(features), plan.apply(torch.ones(2, 40, 1))
    torch.testing.assert_close(ones, torch.ones(2, 11, 1))
    for i in range(2):
        kept = plan.kept[i, :-1].tolist()
        assert kept == sorted(set(kept)) and plan.kept[i, -1].item() not in kept
        book = lambda x, i=i, kept=kept: merge_by_the_book(x, kept, attention[i], keys[i], 32)  # noqa: E731
        torch.testing.assert_close(merged[i], book(features[i]) / book(torch.ones(40, 1)), atol=1e-5, rtol=1e-5)


def test_planted_tokens_are_kept_and_supplemented_by_their_twins():
    """CLS looks at tokens 2 and 7; 3 has the key of 2, 8 the key of 7, and all others end in the last token."""
    attention = torch.full((1, 10), 0.05)
    attention[0, [2, 7]] = 0.3
    keys = torch.eye(10)
    keys[3], keys[8] = keys[2], keys[7]
    features = torch.eye(10)[None]
    plan = encode(PruMerge(budget=3, neighbours=1), attention, keys[None], features)
    merged = plan.apply(features)[0]
    assert plan.kept[0, :2].tolist() == [2, 7]
    for row, own, twin in ((0, 2, 3), (1, 7, 8)):
        assert merged[row, own] == pytest.approx(1 / 1.05) and merged[row, twin] == pytest.approx(0.05 / 1.05)
    assert merged[2, [0, 1, 3, 4, 5, 6, 8, 9]].tolist() == pytest.approx([1 / 8] * 8) and merged[2, [2, 7]].sum() == 0


@pytest.mark.parametrize("budget", [192, 128, 64, 2, 1])
def test_default_meets_the_budget_extra_token_included(budget):
    attention = torch.rand(2, 576)
    for cls in METHODS:
        assert encode(cls(budget=budget), attention).kept.shape == (2, budget)
        assert cls(budget=budget).tokens_per_layer(LLAVA) == (budget,) * 32


def test_planted_attention_takes_a_quarter_of_plus_and_the_rest_is_spread():
    """Twelve kept tokens: three that CLS looks at, nine that stand as evenly as the others allow."""
    attention = torch.full((1, 30), 0.01)
    attention[0, [4, 5, 6]] = 0.2
    plan = encode(PruMergePlus(budget=13), attention)
    assert plan.kept[0, :-1].tolist() == [0, 3, 4, 5, 6, 9, 12, 15, 18, 21, 24, 27]


def test_spread_tokens_are_every_nth_of_what_is_left():
    assert spread(torch.tensor([[0, 2], [5, 1]]), 10, 4).tolist() == [[1, 4, 6, 8], [0, 3, 6, 8]]
    assert spread(torch.tensor([[0, 1]]), 4, 0).shape == (1, 0)


def test_outliers_equal_numpys_quartiles():
    attention = torch.rand(20, 576).pow(6)
    expected = []
    for row in attention.numpy():
        low, high = np.percentile(row, 25), np.percentile(row, 75)
        expected.append(int((row > high + 1.5 * (high - low)).sum()))
    assert outliers(attention).tolist() == expected and min(expected) > 0


def peaked(count, tokens=576):
    """[1, tokens] attention with `count` outliers, the highest first."""
    attention = torch.linspace(0.001, 0.0011, tokens)[None]
    attention[0, 100 : 100 + count] = torch.linspace(0.02, 0.01, count)
    return attention


def test_official_count_is_the_pictures_and_not_the_budgets():
    reducer = PruMerge(budget=64, official=True)
    attention = torch.cat([peaked(30), peaked(7)])
    first, second = encode(reducer, attention)
    assert [first.kept.shape, second.kept.shape] == [(1, 31), (1, 8)]
    assert first.kept[0, :-1].tolist() == list(range(100, 130)), "in the order of attention"
    assert reducer.tokens_per_layer(LLAVA) is None


def test_official_weights_are_attention_as_it_is():
    """The release leaves the division out, so the scale of a token depends on how much attention is near it."""
    attention, keys, features = torch.rand(1, 40) / 40, torch.randn(1, 40, 6), torch.randn(1, 40, 4)
    plan = encode(PruMerge(budget=9, official=True, fixed=True), attention, keys, features)
    kept = sorted(range(40), key=lambda i: -attention[0, i])[:8]
    assert plan.kept[0, :-1].tolist() == kept
    expected = merge_by_the_book(features[0], kept, attention[0], keys[0], 32)
    torch.testing.assert_close(plan.apply(features)[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("share", "about"), [(0.05, 120), (0.07, 176), (0.10, 232), (0.15, 337), (0.17, 576)])
def test_official_plus_keeps_about_four_times_the_outliers(share, about):
    """The counts that the release gives for these shares of outliers; how many of the grid are outliers varies."""
    (plan,) = encode(PruMergePlus(budget=64, official=True), peaked(int(576 * share)))
    assert abs(plan.kept.shape[1] - about) <= 6
    kept = plan.kept[0, :-1].tolist()
    assert len(set(kept)) == len(kept)


def test_official_plus_survives_a_picture_without_outliers():
    """The release divides by zero."""
    attention = torch.linspace(0.001, 0.0011, 576)[None]
    (plan,) = encode(PruMergePlus(budget=64, official=True), attention)
    assert outliers(attention).tolist() == [0] and plan.kept.tolist() == [[0, 575]]


def test_official_plus_survives_more_than_a_third_of_outliers():
    """The release's step is a third of one over the share, rounded down: 0 above a third, and arange fails.

    No picture gets there by quartiles, which leave at most a quarter above the third.
    """
    assert [len(released_grid(576, count)) for count in (97, 192, 193, 576)] == [575] * 4
    kept = PruMergePlus(budget=64, official=True).keep_adaptively(torch.rand(1, 576), 200)
    assert sorted(kept[0].tolist()) in (list(range(575)), list(range(576)))


def test_official_extra_token_is_zero_when_nothing_is_left():
    attention, features = torch.rand(1, 6), torch.randn(1, 6, 4)
    mix = shares(torch.arange(6)[None], attention, torch.randn(1, 6, 3), 2)
    assert (mix[:, -1] @ features == 0).all()


def test_fixed_branch_repeats_tokens_and_forgets_as_many():
    """The release's fixed grid is not held against the top tokens: a token can be there twice, and then the lowest
    position that was not kept is neither in the extra token nor anybody's neighbour."""
    attention = torch.full((1, 24), 0.01)
    attention[0, [4, 1, 20]] = torch.tensor([0.3, 0.2, 0.1])
    reducer = PruMergePlus(budget=7, official=True, fixed=True)
    assert reducer.keep_as_released(attention).tolist() == [[4, 1, 20, 4, 12, 20]]
    assert left_over(torch.tensor([[4, 1, 20, 4, 12, 20]]), 24)[0, 0] == 3, "0 and 2 are forgotten"
    plan = encode(reducer, attention, torch.eye(24)[None])
    assert (plan.merge_matrix[0, -1, [0, 2]] == 0).all() and (plan.merge_matrix[0, -1, 3] > 0).all()
    # The other copy is the nearest of a token that is there twice: its share is 1 + its own attention.
    assert plan.merge_matrix[0, 0, 4] == pytest.approx(1.3) and plan.merge_matrix[0, 3, 4] == pytest.approx(1.3)


def test_fixed_branch_knows_its_budgets():
    assert {65, 49, 129, 193} <= set(released_budgets(576)) and 64 not in released_budgets(576)
    assert list(fixed_grid(576, 32)) == list(range(9, 576, 18))
    PruMergePlus(budget=65, official=True, fixed=True).check(LLAVA)
    with pytest.raises(UserError, match="no such grid, near it are 55, 61, 65, 73"):
        PruMergePlus(budget=64, official=True, fixed=True).check(LLAVA)


@pytest.mark.parametrize("cls", METHODS)
def test_official_runs_through_the_model_with_a_count_of_its_own_per_picture(cls, tiny):
    reducer = cls(budget=8, official=True)
    state, record = prefill(tiny, samples(), reducer)
    for i, audit in enumerate(record.accounting(state)):
        tokens = record.steps[i][0].reduction.kept.shape[1] if i != 3 else 0
        assert audit.tokens_per_layer == (tokens,) * 4


@pytest.mark.parametrize("cls", METHODS)
def test_impossible_options_are_refused(cls):
    with pytest.raises(UserError, match="neighbours"):
        cls(budget=8, neighbours=-1)
    with pytest.raises(UserError, match="official=true"):
        cls(budget=8, fixed=True)
    with pytest.raises(UserError, match="spatial"):
        PruMergePlus(budget=8, spatial=1.5)


def test_signals_are_those_of_the_last_block():
    assert PruMerge(budget=8).scores() == (TowerScore("fused_cls_attention", -1), TowerScore("whole_keys", -1))
