"""PyramidDrop: what the last prompt token attends to in the layer that comes next, three times."""

from types import SimpleNamespace

import pytest
import torch

from baselines.pyramiddrop import PyramidDrop
from llava.errors import UserError
from llava.pipeline.prefill import prefill
from llava.reduction.token_layout import ModelSpec, PatchGrid
from tests.attention_maps import eager_maps, real
from tests.conftest import samples

LLAVA_15 = ModelSpec(576, 32, PatchGrid(24, 24), 24)


def run(tiny, reducer, batch):
    return prefill(tiny, batch, reducer)


class FirstStages(PyramidDrop):
    """Stops behind `stages_run` stages, so that the next layer still sees what the next stage would rank."""

    stages_run = 0

    def decoder(self, state):
        return super().decoder(state) if state.layer <= self.stages_run else None


@pytest.mark.parametrize("done", [0, 1, 2])
def test_each_stage_keeps_what_the_map_of_the_next_layer_says(tiny, done):
    """On the tiny model the stages are layers 1, 2 and 3; the maps are of a run that stops in front of a stage."""
    batch, whole = samples(), PyramidDrop(budget=8)
    assert whole.tokens_per_layer(tiny.spec) == (16, 9, 4, 2)
    keep = whole.tokens_per_layer(tiny.spec)[done + 1]
    partial = type("Partial", (FirstStages,), {"stages_run": done})(budget=8)
    _, record = run(tiny, whole, batch)
    with eager_maps(tiny) as maps:
        state, _ = run(tiny, partial, batch)
    for i in (0, 1, 2, 4):
        weights = real(maps, done + 1, i, state.lengths[done + 1][i])
        start = tiny.prompt(batch[i]).ids.index(-200)
        count = state.visual[done + 1][i]
        score = [sum(weights[h, -1, start + token].item() for h in range(4)) for token in range(count)]
        best = sorted(sorted(range(count), key=lambda token: -score[token])[:keep])
        assert record.steps[i][done].place == f"layer {done + 1}"
        assert record.steps[i][done].reduction.kept[0].tolist() == best


def test_planted_tokens_are_kept():
    """Plant the answer: the last row looks at two tokens."""
    weights = torch.full((1, 2, 1, 6), 0.1)
    weights[0, 0, 0, 4] = weights[0, 1, 0, 1] = 0.6
    asked = []
    state = SimpleNamespace(tokens=torch.zeros(1, 6, 4), attention=lambda rows: asked.append(rows) or (weights, None))
    assert PyramidDrop(budget=2).reduce(state, 2).kept.tolist() == [[1, 4]] and asked == ["last"]


@pytest.mark.parametrize(("budget", "first"), [(192, 312), (128, 184), (64, 56)])
def test_exact_halving_meets_the_mean_on_llava_15(budget, first):
    planned = PyramidDrop(budget=budget).tokens_per_layer(LLAVA_15)
    assert planned == (576,) * 2 + (first,) * 8 + (first // 2,) * 10 + (first // 4,) * 12
    assert sum(planned) == 32 * budget


def test_the_published_schedule_has_a_mean_of_270():
    """PyramidDrop issues 10 and 27 ask for schedules of 192, 128 and 64 tokens; only this one is published."""
    planned = PyramidDrop(budget=270, schedule="paper").tokens_per_layer(LLAVA_15)
    assert planned == (576,) * 8 + (288,) * 8 + (144,) * 8 + (72,) * 8 and sum(planned) == 32 * 270
    with pytest.raises(UserError, match=r"schedule=paper has a mean of 270 .* ask for a budget of 270"):
        PyramidDrop(budget=192, schedule="paper").check(LLAVA_15)


def test_the_third_partys_128_is_rounded_down():
    """576 * .32 is 184.3; with it the shares .32, .16, .08 are the same as exact halving at 128 tokens."""
    third, ours = (PyramidDrop(budget=128, schedule=s).tokens_per_layer(LLAVA_15) for s in ("third_party", "mean"))
    assert third == ours and third[2] == 184


def test_positions_are_contiguous_behind_each_stage(tiny):
    seen = []

    class Watch(PyramidDrop):
        def decoder(self, state):
            seen.append((state.sequence.position, state.sequence.lengths))
            return super().decoder(state)

    run(tiny, Watch(budget=8), samples())
    assert len(seen) == 3
    for position, lengths in seen:
        for row, length in zip(position, lengths, strict=True):
            assert row[-length:].tolist() == list(range(length))


@pytest.mark.parametrize("layers", [(2, 10), (10, 2, 20), (0, 10, 20), (2, 10, 32)])
def test_layers_must_be_three_that_ascend_and_exist(layers):
    with pytest.raises(UserError, match="layers"):
        PyramidDrop(budget=128, layers=layers).check(LLAVA_15)


@pytest.mark.parametrize(("budget", "reason"), [(30, "all 576 enter"), (400, "fixed shares")])
def test_out_of_reach_budgets_are_refused_with_the_range(budget, reason):
    with pytest.raises(UserError, match=f"{reason}.* 36.94 to 324"):
        PyramidDrop(budget=budget).check(LLAVA_15)


def test_kept_counts_the_layers_behind_the_first_stage():
    planned = PyramidDrop(budget=30, schedule="kept").tokens_per_layer(LLAVA_15)
    assert abs(sum(planned[2:]) / 30 - 30) <= 0.5 and planned[:2] == (576, 576)
