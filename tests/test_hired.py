"""HiRED: the ranking, and the split of a budget over crops, against loops, planted answers and the release's strips."""

import pytest
import torch

from baselines.hired import HiRED, crop_budgets
from llava.layout import Layout
from llava.reducer import EncoderState, ModelFacts
from llava.signals import Signal


def encode(attention, budget):
    signals = {Signal("cls_attention"): attention}
    batch, tokens = attention.shape
    state = EncoderState(
        ids=("a",) * batch, features=torch.zeros(batch, tokens, 2), signals=signals, layout=Layout(4, 4)
    )
    return HiRED(budget=budget).encoder(state)


@pytest.mark.parametrize("budget", [1, 5, 15])
def test_equals_its_definition(budget):
    attention = torch.rand(3, 16)
    expected = [sorted(sorted(range(16), key=lambda i: -row[i])[:budget]) for row in attention.tolist()]
    assert encode(attention, budget).anchor.tolist() == expected


def test_planted_patches_are_kept():
    attention = torch.full((2, 16), 0.01)
    attention[0, [4, 9, 15]] = attention[1, [0, 1, 2]] = 0.2
    assert encode(attention, 3).anchor.tolist() == [[4, 9, 15], [0, 1, 2]]


def test_llava_15_keeps_its_budget_in_every_layer():
    assert HiRED(budget=64).entering(ModelFacts(576, 32, Layout(24, 24), 24)) == (64,) * 32
    assert encode(torch.rand(1, 16), 16) is None


def budgets_by_the_book(early, crops, salient, budget):
    """One picture, loops; no crop is full."""
    rows, columns = early.shape
    best = sorted(range(rows * columns), key=lambda i: (-early.flatten()[i].item(), i))[:salient]
    counts = [0] * (crops[0] * crops[1])
    for i in best:
        counts[(i // columns) * crops[0] // rows * crops[1] + (i % columns) * crops[1] // columns] += 1
    given = [budget * count // salient for count in counts]
    for crop in sorted(range(len(counts)), key=lambda c: (-counts[c], c))[: budget - sum(given)]:
        given[crop] += 1
    return given


@pytest.mark.parametrize("crops", [(2, 2), (1, 3), (4, 1)])
def test_split_equals_its_definition(crops):
    early = torch.rand(4, 12, 12)
    found = crop_budgets(early, crops, 50, 37)
    assert found.tolist() == [budgets_by_the_book(early[i], crops, 50, 37) for i in range(4)]
    assert (found.sum(1) == 37).all()


def test_planted_crop_gets_the_budget_and_not_a_strip_of_the_picture():
    """HiRED@502d6dd cuts the flat 24 x 24 map into four runs of six rows: what it takes for the upper right crop is a
    strip over the whole width. Here everything that is looked at lies in the right half of the upper twelve rows."""
    early = torch.zeros(1, 24, 24)
    early[0, :12, 12:] = 1.0
    assert crop_budgets(early, (2, 2), 144, 100).tolist() == [[0, 100, 0, 0]]
    strips = early.flatten().reshape(4, -1).sum(1)
    assert (strips[:2] == 72).all() and (strips[2:] == 0).all()  # the release would give 50, 50, 0, 0


def test_nothing_is_lost_by_rounding():
    """The release rounds every crop's share down: three equal crops of a budget of 8 would keep 6."""
    early = torch.arange(36.0).reshape(1, 6, 6) % 2
    assert crop_budgets(early, (3, 1), 18, 8).tolist() == [[3, 3, 2]]
    assert [8 * 6 // 18] * 3 == [2, 2, 2]
