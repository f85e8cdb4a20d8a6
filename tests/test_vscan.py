"""VScan: windows, global picks and merging against their definition; both stages; the release's missing tokens."""

import pytest
import torch
import torch.nn.functional as F

from baselines.vscan import DEEP, SHALLOW, VScan, keep_top_of_windows, windows
from llava.errors import UserError
from llava.pipeline.prefill import prefill
from llava.reduction import registry
from llava.reduction.merging import merge_plan
from llava.reduction.reducer import PromptState
from llava.reduction.token_layout import ModelSpec, PatchGrid
from tests.conftest import samples

LLAVA_15 = ModelSpec(576, 32, PatchGrid(24, 24), 24)
GRID = PatchGrid(24, 24)


def stage_one_by_the_book(shallow, deep, first: int, side: int = 6) -> list[int]:
    """One image of 24 x 24 patches: equally many of each window, then the best of what is left."""
    kept = []
    for top in range(0, 24, side):
        for left in range(0, 24, side):
            inside = [(top + y) * 24 + left + x for y in range(side) for x in range(side)]
            kept += sorted(inside, key=lambda i: -shallow[i])[: first // 2 // (24 // side) ** 2]
    rest = [i for i in range(576) if i not in kept]
    return sorted(kept + sorted(rest, key=lambda i: -deep[i])[: first - first // 2])


def merge_by_the_book(tokens, kept: list[int]) -> torch.Tensor:
    """One image: every dropped token is averaged into the kept one of highest cosine."""
    groups = {i: [tokens[i]] for i in kept}
    for i in range(len(tokens)):
        if i not in groups:
            groups[max(kept, key=lambda k: F.cosine_similarity(tokens[i], tokens[k], dim=0).item())].append(tokens[i])
    return torch.stack([sum(groups[i]) / len(groups[i]) for i in kept])


def state_of(batch: int = 2, width: int = 12, **changes) -> PromptState:
    known = {
        "ids": tuple("abc"[:batch]),
        "spec": LLAVA_15,
        "features": torch.randn(batch, 576, 8),
        "tokens": torch.randn(batch, 576, width),
        "scores": {SHALLOW: torch.rand(batch, 576), DEEP: torch.rand(batch, 576)},
        "layout": GRID,
    }
    return PromptState(**{**known, **changes})


@pytest.mark.parametrize("budget", [64, 128, 192])
def test_the_first_stage_equals_the_definition(budget):
    state = state_of()
    reduction = VScan(budget=budget).prompt(state)
    outputs = reduction.apply(state.tokens)
    for row in range(2):
        kept = stage_one_by_the_book(state.scores[SHALLOW][row], state.scores[DEEP][row], 3 * budget // 2)
        assert reduction.kept[row].tolist() == kept
        torch.testing.assert_close(outputs[row], merge_by_the_book(state.tokens[row], kept), atol=1e-5, rtol=1e-5)


def test_planted_patches_are_kept():
    """Planted: one loud patch per window for the shallow block, a loud corner for the deep one."""
    shallow, deep = torch.zeros(1, 576), torch.zeros(1, 576)
    local = [(6 * row + row) * 24 + 6 * column + 5 - column for row in range(4) for column in range(4)]
    corner = [0, 1, 2, 3, 24, 25, 26, 27, 48, 49, 50, 51, 72, 73, 74, 75]
    shallow[0, local], deep[0, corner] = 1.0, 1.0
    state = state_of(1, scores={SHALLOW: shallow, DEEP: deep})
    kept = set(VScan(budget=22).prompt(state).kept[0].tolist())  # 33 in the first stage: 16 + 17
    assert set(local) | set(corner) <= kept and len(kept) == 33


def test_a_patch_is_not_chosen_twice():
    """Both blocks look at the same patches: the second half must go to others."""
    loud = torch.rand(1, 576)
    state = state_of(1, scores={SHALLOW: loud, DEEP: loud})
    assert len(set(VScan(budget=64).prompt(state).kept[0].tolist())) == 96


def test_windows_of_grids_that_do_not_divide():
    window, count = windows(PatchGrid(4, 5), 3)
    assert window.view(4, 5).tolist() == [[0, 0, 0, 1, 1]] * 3 + [[2, 2, 2, 3, 3]] and count == 4
    assert windows(GRID, 6)[1] == 16


def test_every_window_has_its_share():
    """Seven tokens of three windows, one of which holds a single token."""
    score = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.1, 0.2, 0.3, 0.4, 0.05]])
    window = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2])
    assert keep_top_of_windows(score, window, 3, 3)[0].tolist() == [0, 7, 8]
    assert sorted(keep_top_of_windows(score, window, 4, 3)[0].tolist()) == [0, 1, 7, 8], "the better of the second best"
    assert sorted(keep_top_of_windows(score, window, 9, 3)[0].tolist()) == list(range(9))


@pytest.mark.parametrize(("budget", "first", "second"), [(64, 96, 32), (128, 192, 64), (192, 288, 96)])
def test_published_schedule(budget, first, second):
    """96 tokens, from layer 16 on 32, is what the release calls 64; others in proportion."""
    for official in ("false", "true"):
        reducer = registry.build("vscan", budget, {"official": official})
        assert reducer.tokens_per_layer(LLAVA_15) == (first,) * 16 + (second,) * 16


def test_every_budget_is_met():
    for spec in (LLAVA_15, ModelSpec(576, 40, GRID, 24), ModelSpec(16, 5, PatchGrid(4, 4), 3)):
        for budget in range(1, spec.visual_tokens + 1):
            reducer = VScan(budget=budget)
            reducer.check(spec)
            entering = reducer.tokens_per_layer(spec)
            assert min(entering) >= 1 and max(entering) <= spec.visual_tokens
            assert abs(sum(entering) / len(entering) - budget) <= 0.5, (spec, budget, entering)


@pytest.mark.parametrize(("budget", "lacking"), [(50, 5), (60, 13), (64, 0), (70, 4)])
def test_the_release_lacks_tokens_where_the_windows_do_not_divide(budget, lacking):
    """37 local tokens over 16 windows are 2 each: 5 are never chosen."""
    ours, theirs = VScan(budget=budget), VScan(budget=budget, official=True)
    assert ours.tokens_per_layer(LLAVA_15)[0] - theirs.tokens_per_layer(LLAVA_15)[0] == lacking
    state = state_of(1)
    kept = theirs.prompt(state).kept[0].tolist()
    assert kept == stage_one_by_the_book(state.scores[SHALLOW][0], state.scores[DEEP][0], 3 * budget // 2)
    assert len(ours.prompt(state).kept[0]) == 3 * budget // 2


@torch.inference_mode()
def test_the_second_stage_ranks_by_the_last_tokens_attention(tiny):
    """Planted in the model: what the next layer's own eager attention looks at from the last prompt token."""
    seen = []

    class Probe(VScan):
        def decoder(self, state):
            reduction = super().decoder(state)
            hidden, layer = state.sequence.hidden, state.llm.layers[state.layer]
            mask = torch.full((hidden.shape[1],) * 2, -torch.inf).triu(1)[None, None]
            layer.self_attn.config._attn_implementation = "eager"
            rotary = state.llm.rotary_emb(hidden, state.sequence.position)
            weights = layer.self_attn(layer.input_layernorm(hidden), position_embeddings=rotary, attention_mask=mask)[1]
            layer.self_attn.config._attn_implementation = "sdpa"
            start, stop = state.sequence.images[0]
            seen.append((reduction.kept[0], weights[0, :, -1, start:stop].mean(0)))
            return reduction

    prefill(tiny, samples(1), Probe(budget=8))
    ((kept, attention),) = seen
    assert len(attention) == 12 and kept.tolist() == sorted(attention.topk(4).indices.tolist())


def test_merging_is_a_plain_average():
    """Groups count every member once, the kept one too."""
    tokens = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [2.0, 0.1], [3.0, 0.1], [0.1, 5.0]]])
    kept, rest = torch.tensor([[0, 1]]), torch.tensor([[2, 3, 4]])
    merged = merge_plan(kept, rest, 0, torch.zeros(1, 5), tokens, "retained", "mean").apply(tokens)
    torch.testing.assert_close(merged, torch.tensor([[[2.0, 0.2 / 3], [0.05, 3.0]]]))


def test_signals_follow_the_depth_of_the_tower():
    assert [SHALLOW.index(depth) for depth in (24, 12, 6, 3, 1)] == [5, 3, 1, 1, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "vscan.window must be at least 1, got 0"),
        ({"layers": (3, 4)}, "vscan.layers must be one decoder layer"),
        ({"layers": (0,)}, "vscan.layers must be one decoder layer of at least 1"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(UserError, match=message):
        VScan(budget=8, **options)


def test_models_that_cannot_be_served(tiny):
    with pytest.raises(UserError, match=r"must be below 4 \(decoder layers\), got 4"):
        VScan(budget=8, layers=(4,)).check(tiny.spec)
    with pytest.raises(UserError, match="CLS token"):
        VScan(budget=8).check(ModelSpec(576, 32, GRID, 24, has_cls=False))
