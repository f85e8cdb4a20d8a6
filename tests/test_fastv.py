"""FastV: what the last prompt token attends to in an early layer."""

from types import SimpleNamespace

import pytest
import torch

from baselines.fastv import FastV
from llava.errors import UserError
from llava.pipeline.accounting import mean_visual_tokens
from llava.pipeline.generate import generate
from llava.pipeline.prefill import prefill
from llava.reduction import registry
from llava.reduction.token_layout import ModelSpec, PatchGrid
from tests.attention_maps import eager_maps, real
from tests.conftest import samples

LLAVA_15 = ModelSpec(576, 32, PatchGrid(24, 24), 24)
TOY_MODEL = ModelSpec(576, 8, PatchGrid(24, 24), 6)


def run(tiny, reducer, batch):
    return prefill(tiny, batch, reducer)


def fastv_by_the_book(whole: torch.Tensor, start: int, stop: int, keep: int) -> list[int]:
    """Attention map [H, L, L] of one prompt -> kept visual tokens, plain loops."""
    heads = range(len(whole))
    score = {token: sum(whole[h, -1, start + token].item() for h in heads) for token in range(stop - start)}
    return sorted(sorted(score, key=lambda token: -score[token])[:keep])


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("budget", [1, 5, 12])
def test_keeps_what_the_map_of_the_layer_before_says(tiny, layer, budget):
    batch = samples()
    with eager_maps(tiny) as maps:
        state, record = run(tiny, FastV(budget=budget, layer=layer, schedule="kept"), batch)
    for i in (0, 1, 2, 4):
        length = state.lengths[0][i]
        start = tiny.prompt(batch[i]).ids.index(-200)
        (step,) = record.steps[i]
        assert step.place == f"layer {layer}"
        whole = real(maps, layer - 1, i, length)
        assert step.reduction.kept[0].tolist() == fastv_by_the_book(whole, start, start + 16, budget)


def test_planted_tokens_are_kept():
    """Plant the answer: the last row of two pictures looks at three tokens each, every head at another."""
    weights = torch.full((2, 3, 1, 12), 0.01)
    for head, (first, second) in enumerate(zip((2, 5, 11), (0, 1, 7), strict=True)):
        weights[0, head, 0, first] = weights[1, head, 0, second] = 0.5
    asked = []
    state = SimpleNamespace(
        tokens=torch.zeros(2, 12, 4), attention=lambda rows, at: asked.append((rows, at)) or (weights, None)
    )
    assert FastV(budget=3).reduce(state, 3).kept.tolist() == [[2, 5, 11], [0, 1, 7]]
    assert asked == [("last", "previous")]


@pytest.mark.parametrize(("budget", "keep"), [(192, 166), (128, 98), (64, 30)])
def test_equal_means_on_llava_15(budget, keep):
    assert FastV(budget=budget).tokens_per_layer(LLAVA_15) == (576,) * 2 + (keep,) * 30


@pytest.mark.parametrize(("budget", "mean"), [(192, 216), (128, 156), (64, 96), (144, 171)])
def test_kept_tokens_are_not_the_mean(budget, mean):
    """SparseVLMs issue 12: K=2 with 144 kept tokens is 171 tokens per layer, not 144; tables mix the two counts."""
    planned = FastV(budget=budget, schedule="kept").tokens_per_layer(LLAVA_15)
    assert planned == (576,) * 2 + (budget,) * 30 and mean_visual_tokens(planned) == mean


def test_the_published_half_at_layer_three():
    """Of the README: K=3, R=50 %."""
    assert FastV(budget=288, layer=3, schedule="kept").tokens_per_layer(LLAVA_15) == (576,) * 3 + (288,) * 29


def test_the_layer_in_front_is_run_and_cached_once(tiny):
    """FastV issues 18, 46: the release runs layer K-1 twice on one cache, which then holds each of its keys doubly."""
    state, _ = run(tiny, FastV(budget=10, layer=2), samples(2))
    prompt = max(state.lengths[0])
    widths = [layer.keys.shape[-2] for layer in state.cache.layers]
    assert widths[:2] == [prompt, prompt] and widths[2] == widths[3] == prompt - 16 + state.visual[2][0]


def test_positions_stay_and_the_next_token_follows_the_whole_prompt(tiny):
    """The release gives kept tokens the positions they had, and decodes behind the unpruned prompt."""
    state, _ = run(tiny, FastV(budget=7), samples(2))
    assert all(part.next_position[:, 0].tolist() == list(state.lengths[0]) for part in state.segments)


def test_prunes_in_the_prefill_only(tiny):
    """The release without a cache prunes again at every generated token; its README says that answers then differ."""
    _, record = run(tiny, FastV(budget=7), samples(1))
    before = list(record.steps[0])
    answer = generate(tiny, samples(1), FastV(budget=7), max_new_tokens=4).answers[0]
    assert len(before) == 1 and [step.place for step in answer.trace] == [step.place for step in before]


def test_full_budget_is_the_dense_model_to_the_bit(tiny):
    dense, _ = run(tiny, registry.build("full", 16), samples())
    same, record = run(tiny, FastV(budget=16), samples())
    assert torch.equal(dense.hidden, same.hidden) and not any(record.steps)


def test_a_budget_below_what_the_first_layer_costs_is_refused():
    with pytest.raises(UserError, match=r"mean of 64 .* reaches 72.88 to 576. Set fastv.schedule=kept"):
        FastV(budget=64).check(TOY_MODEL)
    FastV(budget=64, schedule="kept").check(TOY_MODEL)
    FastV(budget=73).check(TOY_MODEL)


@pytest.mark.parametrize(("layer", "message"), [(-1, "ascend from 1"), (32, "32 layers"), (40, "32 layers")])
def test_layers_that_do_not_exist_are_refused(layer, message):
    with pytest.raises(UserError, match=message):
        FastV(budget=64, layer=layer).check(LLAVA_15)
