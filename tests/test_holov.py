"""HoloV against definitions in loops, planted answers, and one test for each way in which the release departs."""

import math

import pytest
import torch
import torch.nn.functional as F

from baselines.holov import HoloV, deal, deal_as_released, reduction_as_released, token_scores
from llava.reduction.scores import TowerScore
from tests.drawn_images import state_with


def scores_by_the_book(tokens, attention, alpha):
    """One chunk: attention in thousandths plus alpha times the variance of cosines, scaled to the mean attention."""
    size = len(tokens)
    variance = []
    for i in range(size):
        cosine = [0.0 if i == j else F.cosine_similarity(tokens[i], tokens[j], dim=0).item() for j in range(size)]
        mean = sum(cosine) / (size - 1)
        variance.append(sum((c - mean) ** 2 for c in cosine) / (size - 1))
    looked = [1000 * a.item() for a in attention]
    scale = (sum(looked) / size) / (sum(variance) / size + 1e-6)
    return [a + alpha * v * scale for a, v in zip(looked, variance, strict=True)]


@pytest.mark.parametrize(("tokens", "chunks"), [(24, 4), (24, 12), (36, 1)])
def test_scores_equal_their_definition(tokens, chunks):
    values, attention = torch.randn(2, tokens, 7), torch.rand(2, tokens) / tokens
    actual = token_scores(values, attention, chunks, alpha=0.5)
    for i in range(2):
        parts = zip(values[i].chunk(chunks), attention[i].chunk(chunks), strict=True)
        expected = torch.tensor([scores_by_the_book(*part, 0.5) for part in parts])
        torch.testing.assert_close(actual[i], expected, atol=1e-3, rtol=1e-4)


def deal_by_the_book(score, size, budget):
    """One image: proportional shares; a chunk that would overflow is filled and the others share the rest anew."""
    full = set()
    while True:
        rest = budget - size * len(full)
        total = sum(s for p, s in enumerate(score) if p not in full)
        quota = {p: s * rest / total for p, s in enumerate(score) if p not in full}
        over = {p for p, q in quota.items() if q >= size}
        if not over:
            break
        full |= over
    given = [size if p in full else math.floor(quota[p]) for p in range(len(score))]
    for p in sorted(quota, key=lambda p: (-score[p], p))[: budget - sum(given)]:
        given[p] += 1
    return given


@pytest.mark.parametrize("power", [1, 4])
@pytest.mark.parametrize(("chunks", "size", "budget"), [(16, 36, 64), (16, 36, 192), (16, 36, 400), (5, 3, 14)])
def test_dealing_equals_its_definition_and_meets_the_budget(chunks, size, budget, power):
    score = torch.rand(20, chunks).pow(power) + 1e-3
    given = deal(score, size, budget)
    assert given.tolist() == [deal_by_the_book(row, size, budget) for row in score.double().tolist()]
    assert (given.sum(1) == budget).all() and given.max() <= size and given.min() >= 0


def test_a_budget_for_all_tokens_fills_every_chunk():
    assert deal(torch.rand(50, 5) ** 4, 4, 20).tolist() == [[4] * 5] * 50


def test_dealing_is_the_releases_where_no_chunk_overflows():
    score = 1 + torch.rand(50, 16)
    assert torch.equal(deal(score, 36, 64), deal_as_released(score, 64))


def test_a_chunk_without_attention_takes_what_no_other_can():
    assert deal(torch.tensor([[1.0, 0.0, 0.0]]), 4, 7).tolist() == [[4, 2, 1]]


def release_by_the_book(attention, given):
    """One image: chunk after chunk, best attention first, chunks that fit whole in raster order."""
    size, kept = attention.shape[1], []
    for p, count in enumerate(given):
        order = range(size)
        if count < size:
            order = sorted(order, key=lambda i: (-attention[p, i].item(), i))[:count]
        kept += [p * size + i for i in order]
    return kept


@pytest.mark.parametrize("power", [1, 6])
def test_official_order_and_zero_vectors_equal_their_definition(power):
    attention = torch.rand(8, 6, 5).pow(power)
    given = deal_as_released(attention.mean(-1), 20)
    plan = reduction_as_released(attention, given, 20)
    values = torch.randn(8, 30, 3)
    short = 0
    for i, merged in enumerate(plan.apply(values)):
        kept = release_by_the_book(attention[i], given[i].tolist())
        short += len(kept) < 20
        assert plan.kept[i, : len(kept)].tolist() == kept
        expected = torch.cat([values[i, kept], torch.zeros(20 - len(kept), 3)])
        torch.testing.assert_close(merged, expected)
    assert short > 0 or power == 1


def prompt(reducer, tokens, attention):
    return reducer.prompt(state_with(tokens, {TowerScore("cls_attention"): attention}, tokens=tokens))


def test_planted_attention_draws_the_budget_to_its_chunk():
    """One chunk has nearly all attention: it keeps all four of its tokens, and the rest of the budget goes round."""
    attention = torch.full((1, 16), 0.001)
    attention[0, 4:8] = 0.2
    attention[0, [1, 9, 15]] = 0.004
    plan = prompt(HoloV(budget=7, chunks=4, alpha=0.0), torch.randn(1, 16, 5), attention)
    assert plan.kept.tolist() == [[1, 4, 5, 6, 7, 9, 15]]


def test_overflow_goes_to_other_chunks_and_not_into_zero_vectors():
    """HoloV@1d2e65e fills up with zero vectors when a chunk is given more tokens than it has (28 of 64 were seen)."""
    attention = torch.full((1, 16), 0.001)
    attention[0, :4] = 0.2
    tokens = torch.ones(1, 16, 5)
    release = prompt(HoloV(budget=8, chunks=4, official=True), tokens, attention)
    assert (release.apply(tokens)[0] == 0).all(-1).sum() == 4
    assert len(set(release.kept[0].tolist())) == 8
    plan = prompt(HoloV(budget=8, chunks=4), tokens, attention)
    assert (plan.apply(tokens) == 1).all() and plan.kept.shape == (1, 8)


def test_variety_has_a_say_inside_a_chunk():
    """HoloV issue 15: alpha has no effect in the release, which chooses inside a chunk by attention alone."""
    # In each chunk the first token has the most varied cosines (1, -1, 0), the last one (0, 0, 0) the most attention.
    tokens = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]).repeat(4, 1)[None]
    attention = torch.tensor([[0.04, 0.04, 0.04, 0.05]]).repeat(1, 4)
    first, last = [0, 4, 8, 12], [3, 7, 11, 15]
    for official, alpha, kept in ((False, 0.0, last), (False, 5.0, first), (True, 0.0, last), (True, 5.0, last)):
        plan = prompt(HoloV(budget=4, chunks=4, alpha=alpha, official=official), tokens, attention)
        assert plan.kept.tolist() == [kept]


def test_keeping_takes_what_was_dealt():
    """The first chunk has twice the second one's attention: two tokens and one; equal ones go by index."""
    attention = torch.tensor([[0.02, 0.06, 0.04, 0.02, 0.02, 0.02]])
    assert prompt(HoloV(budget=3, chunks=2, alpha=0.0), torch.randn(1, 6, 5), attention).kept.tolist() == [[1, 2, 3]]
