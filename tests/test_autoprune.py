"""AutoPrune, against recorded runs and schedules of the release, its words in loops, and planted answers."""

import math
from types import SimpleNamespace

import pytest
import torch

from baselines._recycling import recycled
from baselines.autoprune import AutoPrune, mutual_information
from llava.errors import UserError
from llava.pipeline.generate import prefill
from llava.reduction.token_layout import ModelSpec, PatchGrid
from tests.conftest import samples
from tests.vectors import vectors

SPEC = ModelSpec(576, 32, PatchGrid(24, 24), 24)


def entering(method: AutoPrune, information: float, spec: ModelSpec = SPEC) -> list[int]:
    """Tokens of a sample that enter each layer."""
    counts = [spec.visual_tokens, method.first(spec)]
    for keep in method.plan(information, spec):
        dropped = counts[-1] - keep
        counts.append(keep + (recycled(dropped)[1] if dropped else 0))
    return counts[: spec.layers]  # what the last layer leaves enters none


def state(weights, tokens, layer: int, memory, spec: ModelSpec = SPEC, tower=None, rows: int | None = None):
    """What a stage reads: attention [B, H, T, N] of the text, of which `rows` exist, and tokens [B, N, D]."""
    exists = (torch.arange(weights.shape[2]) < (rows or weights.shape[2])).expand(len(weights), -1)
    return SimpleNamespace(
        attention=lambda rows, at: {("after", "previous"): (weights, exists)}[rows, at],
        tokens=tokens,
        spec=spec,
        layer=layer,
        memory=memory,
        tower=lambda score: tower,
    )


def test_the_release_gives_a_sample_the_same_tokens_in_every_layer():
    """15 recorded schedules, whose mean is not the budget that they are for."""
    schedules = vectors("autoprune")[0]["schedules"]
    for case in schedules:
        found = entering(AutoPrune(budget=case["budget"], official=True), case["information"])
        assert found == case["entering"] and 11 < sum(found) / 32 - case["budget"] < 18
    assert len(schedules) == 15


@pytest.mark.parametrize("number", range(3))
def test_stages_leave_what_the_release_left(number):
    """A whole prefill of random layers: the same tokens and clusters enter every layer."""
    about, arrays = vectors("autoprune")
    case = about["cases"][number]
    name, spec = case["case"], ModelSpec(case["tokens"], case["layers"], PatchGrid(1, case["tokens"]), 24)
    method, memory = AutoPrune(budget=case["budget"], official=True), ({},)
    for layer in range(1, case["layers"]):
        weights, tokens = (arrays[f"{name}_{kind}{layer - 1}"][None] for kind in ("attention", "tokens"))
        reduction = method.decoder(state(weights, tokens, layer, memory, spec, arrays[f"{name}_cls"][None]))
        found = tokens if reduction is None else reduction.apply(tokens)
        assert found.shape[1] == case["counts"][layer]
        found, entered = found[0], arrays[f"{name}_entered{layer}"]
        if reduction is not None and not reduction.merges:  # a single recycled token stays in its place here
            found, entered = (one[one[:, 0].argsort()] for one in (found, entered))
        torch.testing.assert_close(found, entered, atol=1e-5, rtol=0)


def test_mutual_information_is_that_of_the_release_and_of_its_words():
    about, arrays = vectors("autoprune")
    weights = arrays["attention"][None, None]
    found = mutual_information(weights, torch.ones(1, 9, dtype=torch.bool))
    assert found.item() == pytest.approx(about["mutual_information"], abs=1e-12)
    # Two prompts and two heads, of which the second prompt has two rows of padding.
    weights, exists = torch.rand(2, 2, 5, 7).double() / 7, torch.ones(2, 5, dtype=torch.bool)
    exists[1, 3:] = False
    for row, rows in enumerate((5, 3)):
        bits = 0.0
        for head in weights[row, :, :rows]:
            for column in range(7):
                share = sum(head[i, column].item() / rows for i in range(rows))
                for i in range(rows):
                    joint = head[i, column].item() / rows
                    bits += joint * math.log2(max(joint / (share / rows + 1e-6), 1e-6))
        assert mutual_information(weights, exists)[row].item() == pytest.approx(bits, abs=1e-9)


@pytest.mark.parametrize("tokens, layers", [(576, 32), (576, 40), (2880, 32), (576, 8), (64, 8), (16, 4), (30, 3)])
def test_the_mean_of_every_sample_is_the_budget(tokens, layers):
    """At any budget that every method of this kind can meet, and any mutual information."""
    spec = ModelSpec(tokens, layers, PatchGrid(1, tokens), 24)
    tried = 0
    for budget in sorted({*range(1, 30), 64, 128, 192, 320, 500, tokens // 2, tokens - 1} & set(range(1, tokens))):
        method = AutoPrune(budget=budget)
        try:
            method.check(spec)
        except UserError:
            assert budget < tokens / layers + 1
            continue
        for information in (0, 0.05, 0.3, 0.8, 1.5, 1.9, 2.5):
            counts, tried = entering(method, information, spec), tried + 1
            assert abs(sum(counts) / layers - budget) <= method.rounding, (budget, information, counts)
            assert counts == sorted(counts, reverse=True) and counts[-1] >= 1
    assert tried


def test_the_first_stage_leaves_five_halves_of_what_the_layers_after_it_have():
    method = AutoPrune(budget=64)
    assert method.first(SPEC) == int(2.5 * (64 * 32 - 576) / 31) == 118
    assert AutoPrune(budget=64, official=True).first(SPEC) == 160
    assert AutoPrune(budget=500).first(SPEC) == 576


def test_more_information_spreads_tokens_to_later_layers():
    """Options: no steepness is as many tokens in every layer; a curve that falls later; how much a bit counts."""
    method = AutoPrune(budget=64)
    flat = entering(AutoPrune(budget=64, k0=0.0), 0)
    assert flat == entering(method, 2) == entering(method, 9) and max(flat[3:]) - min(flat[3:]) <= 1
    late = [sum(entering(method, information)[20:]) for information in (0, 0.5, 1, 1.5, 2)]
    assert late == sorted(late) and late[0] < late[-1]
    assert entering(AutoPrune(budget=64, gamma=0.0), 2) == entering(method, 0)
    assert entering(AutoPrune(budget=64, gamma=0.4), 1) == entering(method, 2)
    # The layer that keeps half of what the first ones keep, shifted by the steepness as in the release.
    for x0 in (10, 20):
        counts = entering(AutoPrune(budget=64, x0=x0), 0)
        half = min(range(2, 32), key=lambda layer: abs(counts[layer] - counts[2] / 2))
        assert abs(half - 1 - x0 - 0.4) <= 2


def test_the_curve_is_stretched_to_other_depths_but_not_in_the_release():
    deep = ModelSpec(576, 64, PatchGrid(24, 24), 24)
    counts = entering(AutoPrune(budget=64), 0, deep)
    half = min(range(2, 64), key=lambda layer: abs(counts[layer] - counts[2] / 2))
    assert abs(half - 1 - 2 * 15.3) <= 2
    counts = entering(AutoPrune(budget=64, official=True), 0, deep)
    half = min(range(2, 64), key=lambda layer: abs(counts[layer] - counts[2] / 2))
    assert half < 26, "at 15.3 but for the stages that already keep all that the first one left"


def test_planted_tokens_are_kept():
    """Two samples: the text looks at tokens 3 and 7, or at 0 and 9; the first stage reads the tower, too."""
    spec = ModelSpec(12, 6, PatchGrid(3, 4), 24)
    weights = torch.full((2, 2, 3, 12), 0.01)
    for row, (first, second) in enumerate(((3, 7), (0, 9))):  # each word looks at one of them
        weights[row, :, 0, first] = weights[row, :, 1:, second] = 0.3
    method, tokens = AutoPrune(budget=3), torch.randn(2, 12, 4)
    assert method.first(spec) == 2
    tower = torch.full((2, 12), 0.01)
    assert method.decoder(state(weights, tokens, 1, ({}, {}), spec, tower)).kept.tolist() == [[3, 7], [0, 9]]
    tower[:, 5] = 1
    assert all(5 in row for row in method.decoder(state(weights, tokens, 1, ({}, {}), spec, tower)).kept.tolist())
    padded = torch.cat([weights, torch.eye(12)[5].expand(2, 2, 4, 12)], 2)  # padding that looks at token 5
    memory = ({"keeps": [2, 2, 1]}, {"keeps": [2, 1, 1]})
    kept = method.decoder(state(padded, tokens, 3, ({"keeps": [0, 2]},) * 2, spec, rows=3)).kept
    assert kept[:, :2].tolist() == [[3, 7], [0, 9]]
    first, second = method.decoder(state(weights, tokens, 3, memory, spec))
    assert first.kept[0, :2].tolist() == [3, 7] and second.kept[0, 0] in (0, 9)
    assert first.appended == second.appended == 1


def test_the_text_counts_beside_the_tower_by_its_information():
    """Three tenths of the mean attention times the mutual information of all heads per row of text."""
    spec, weights = ModelSpec(12, 6, PatchGrid(3, 4), 24), torch.rand(1, 2, 3, 12).softmax(-1)
    exists, seen = torch.ones(1, 3, dtype=torch.bool), weights.mean((1, 2))[0]
    text = 0.3 * mutual_information(weights, exists) / 3 * seen
    method, low, high = AutoPrune(budget=3), int(seen.argmin()), int(seen.argmax())
    for size, kept in ((0.9, high), (1.1, low)):  # the tower prefers the other token by a little less, or more
        tower = torch.full((1, 12), -1.0)
        tower[0, low], tower[0, high] = size * (text[high] - text[low]), 0
        spared = type("One", (AutoPrune,), {"first": lambda self, spec: 1})(budget=3)
        assert spared.decoder(state(weights, torch.zeros(1, 12, 2), 1, ({},), spec, tower)).kept.tolist() == [[kept]]
    assert method.scores()[0].kind == "cls_attention"


def test_samples_of_a_batch_have_curves_of_their_own(tiny):
    """The mean of each sample is the budget, and the curve is fitted once for a sample."""
    asked = samples(4, text_only=())
    for budget in (8, 12):
        method = AutoPrune(budget=budget)
        state, record = prefill(tiny, asked, method)
        for account in record.accounting(state):
            assert abs(account.mean - budget) <= method.rounding
    spec = ModelSpec(100, 6, PatchGrid(10, 10), 24)
    weights = torch.stack([torch.full((2, 4, 60), 1 / 60), torch.eye(60)[None, :4].repeat(2, 1, 1)])
    memory = ({}, {})
    method = AutoPrune(budget=40)
    found = method.decoder(state_of_layer_2 := _state(weights, memory, spec))
    assert memory[0]["keeps"] == method.plan(0, spec) and memory[1]["keeps"] == method.plan(4, spec)
    assert isinstance(found, list) and len(found) == 2 and state_of_layer_2.layer == 2


def _state(weights, memory, spec):
    return state(weights, torch.randn(2, 60, 3), 2, memory, spec)


@pytest.mark.parametrize("budget, said", [(18, "all 576 enter layer 0 of 32 layers.*official=true"), (577, "1 to 576")])
def test_budgets_below_one_token_a_layer_are_refused(budget, said):
    with pytest.raises(UserError, match=said):
        AutoPrune(budget=budget).check(SPEC)
    AutoPrune(budget=18, official=True).check(SPEC)
    AutoPrune(budget=19).check(SPEC)
