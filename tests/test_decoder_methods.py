"""Methods that drop tokens between decoder layers, against attention maps, loops, planted answers and the releases."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from baselines import dart
from baselines.dart import Dart, hash_order, pick_different
from baselines.fastv import FastV
from baselines.pyramiddrop import PyramidDrop
from baselines.vscan import DEEP, SHALLOW, VScan, keep_top_of_windows, windows
from llava.errors import UserError
from llava.pipeline.accounting import mean_visual_tokens
from llava.pipeline.generate import prefill
from llava.pipeline.sequence import PromptBatch
from llava.reduction import gather_tokens, registry
from llava.reduction.reducer import PromptState
from llava.reduction.states import DecoderState
from llava.reduction.token_layout import ModelSpec, PatchGrid
from tests.attention_maps import eager_maps, real
from tests.conftest import samples
from tests.drawn_images import state_with

GRID = PatchGrid(24, 24)
LLAVA_15 = ModelSpec(576, 32, GRID, 24)


def best_by_the_book(whole: torch.Tensor, start: int, tokens: int, keep: int) -> list[int]:
    """Attention map [H, L, L] of one prompt -> the visual tokens that its last row looks at most, plain loops."""
    heads = range(len(whole))
    score = [sum(whole[h, -1, start + token].item() for h in heads) for token in range(tokens)]
    return sorted(sorted(range(tokens), key=lambda token: -score[token])[:keep])


# FastV


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("budget", [1, 5, 12])
def test_fastv_keeps_what_the_map_of_the_layer_before_says(tiny, layer, budget):
    batch = samples()
    with eager_maps(tiny) as maps:
        state, record = prefill(tiny, batch, FastV(budget=budget, layer=layer, schedule="kept"))
    for i in (0, 1, 2, 4):
        length = state.lengths[0][i]
        start = tiny.prompt(batch[i]).ids.index(-200)
        (step,) = record.steps[i]
        assert step.place == f"layer {layer}"
        whole = real(maps, layer - 1, i, length)
        assert step.reduction.kept[0].tolist() == best_by_the_book(whole, start, 16, budget)


def test_fastv_planted_tokens_are_kept():
    """Plant the answer: the last row of two images looks at three tokens each, every head at another."""
    weights = torch.full((2, 3, 1, 12), 0.01)
    for head, (first, second) in enumerate(zip((2, 5, 11), (0, 1, 7), strict=True)):
        weights[0, head, 0, first] = weights[1, head, 0, second] = 0.5
    asked = []
    state = SimpleNamespace(
        tokens=torch.zeros(2, 12, 4), attention=lambda rows, at: asked.append((rows, at)) or (weights, None)
    )
    assert FastV(budget=3).reduce(state, 3).kept.tolist() == [[2, 5, 11], [0, 1, 7]]
    assert asked == [("last", "previous")]


@pytest.mark.parametrize(("budget", "mean"), [(192, 216), (128, 156), (64, 96), (144, 171)])
def test_fastv_kept_tokens_are_not_the_mean(budget, mean):
    """SparseVLMs issue 12: K=2 with 144 kept tokens is 171 tokens per layer, not 144; tables mix the two counts."""
    planned = FastV(budget=budget, schedule="kept").tokens_per_layer(LLAVA_15)
    assert planned == (576,) * 2 + (budget,) * 30 and mean_visual_tokens(planned) == mean


def test_fastv_the_layer_in_front_is_run_and_cached_once(tiny):
    """FastV issues 18, 46: the release runs layer K-1 twice on one cache, which then holds each of its keys doubly."""
    state, _ = prefill(tiny, samples(2), FastV(budget=10, layer=2))
    prompt = max(state.lengths[0])
    widths = [layer.keys.shape[-2] for layer in state.cache.layers]
    assert widths[:2] == [prompt, prompt] and widths[2] == widths[3] == prompt - 16 + state.visual[2][0]


def test_fastv_positions_stay_and_the_next_token_follows_the_whole_prompt(tiny):
    """The release gives kept tokens the positions they had, and decodes behind the unpruned prompt."""
    state, _ = prefill(tiny, samples(2), FastV(budget=7))
    assert all(part.next_position[:, 0].tolist() == list(state.lengths[0]) for part in state.segments)


# PyramidDrop


class FirstStages(PyramidDrop):
    """Stops behind `stages_run` stages, so that the next layer still sees what the next stage would rank."""

    stages_run = 0

    def decoder(self, state):
        return super().decoder(state) if state.layer <= self.stages_run else None


@pytest.mark.parametrize("done", [0, 1, 2])
def test_pyramiddrop_each_stage_keeps_what_the_map_of_the_next_layer_says(tiny, done):
    """On the tiny model the stages are layers 1, 2 and 3; the maps are of a run that stops in front of a stage."""
    batch, whole = samples(), PyramidDrop(budget=8)
    assert whole.tokens_per_layer(tiny.spec) == (16, 9, 4, 2)
    keep = whole.tokens_per_layer(tiny.spec)[done + 1]
    partial = type("Partial", (FirstStages,), {"stages_run": done})(budget=8)
    _, record = prefill(tiny, batch, whole)
    with eager_maps(tiny) as maps:
        state, _ = prefill(tiny, batch, partial)
    for i in (0, 1, 2, 4):
        weights = real(maps, done + 1, i, state.lengths[done + 1][i])
        start = tiny.prompt(batch[i]).ids.index(-200)
        best = best_by_the_book(weights, start, state.visual[done + 1][i], keep)
        assert record.steps[i][done].place == f"layer {done + 1}"
        assert record.steps[i][done].reduction.kept[0].tolist() == best


def test_pyramiddrop_planted_tokens_are_kept():
    """Plant the answer: the last row looks at two tokens."""
    weights = torch.full((1, 2, 1, 6), 0.1)
    weights[0, 0, 0, 4] = weights[0, 1, 0, 1] = 0.6
    asked = []
    state = SimpleNamespace(tokens=torch.zeros(1, 6, 4), attention=lambda rows: asked.append(rows) or (weights, None))
    assert PyramidDrop(budget=2).reduce(state, 2).kept.tolist() == [[1, 4]] and asked == ["last"]


@pytest.mark.parametrize(("budget", "first"), [(192, 312), (128, 184), (64, 56)])
def test_pyramiddrop_exact_halving_meets_the_mean_on_llava_15(budget, first):
    planned = PyramidDrop(budget=budget).tokens_per_layer(LLAVA_15)
    assert planned == (576,) * 2 + (first,) * 8 + (first // 2,) * 10 + (first // 4,) * 12
    assert sum(planned) == 32 * budget


def test_pyramiddrop_the_published_schedule_has_a_mean_of_270():
    """PyramidDrop issues 10 and 27 ask for schedules of 192, 128 and 64 tokens; only this one is published."""
    planned = PyramidDrop(budget=270, schedule="paper").tokens_per_layer(LLAVA_15)
    assert planned == (576,) * 8 + (288,) * 8 + (144,) * 8 + (72,) * 8 and sum(planned) == 32 * 270


def test_pyramiddrop_the_third_partys_128_is_rounded_down():
    """576 * .32 is 184.3; with it the shares .32, .16, .08 are the same as exact halving at 128 tokens."""
    third, ours = (PyramidDrop(budget=128, schedule=s).tokens_per_layer(LLAVA_15) for s in ("third_party", "mean"))
    assert third == ours and third[2] == 184


# DART


def dart_by_the_book(similarity: torch.Tensor, pivots: list[int], picks: tuple[int, ...]) -> list[int]:
    """One image, plain loops."""
    kept = set(pivots)
    for turn, count in enumerate(picks):
        left = [token for token in range(similarity.shape[1]) if token not in kept]
        kept |= set(sorted(left, key=lambda token: similarity[turn, token].item())[:count])
    return sorted(kept)


@pytest.mark.parametrize("picks", [(0,) * 8, (1, 0, 0, 0, 0, 0, 0, 0), (2,) * 8, (3, 3, 3, 2, 2, 2, 2, 2)])
@pytest.mark.parametrize("tokens", [30, 57])
def test_dart_the_batched_choice_is_the_greedy_one(tokens, picks):
    similarity = torch.rand(3, 8, tokens)
    pivots = torch.stack([torch.randperm(tokens)[:4] for _ in range(3)])
    found = pick_different(similarity, pivots, picks)
    assert found.shape == (3, 4 + sum(picks))
    for row in range(3):
        assert found[row].tolist() == dart_by_the_book(similarity[row], pivots[row].tolist(), picks)


def planted_state(text: int = 6, visual: int = 10) -> DecoderState:
    """Two prompts: 2 tokens, `visual` ones, `text` words; the visual tokens 3 and 5 point away from everything."""
    stop = 2 + visual
    hidden = torch.zeros(2, stop + text, 4)
    hidden[..., 0] = 1 + torch.rand(2, stop + text)
    hidden[:, 2 + 3] = torch.tensor([-1.0, 0, 0, 0])
    hidden[:, 2 + 5] = torch.tensor([-3.0, 0.1, 0, 0])
    keys = torch.ones(2, 2, stop + text, 3)
    # Large keys, of either sign: visual tokens 9, 0, 1, 8 in this order, and the last words.
    for size, token in zip((9, 8, 7, 6), (9, 0, 1, 8), strict=True):
        keys[:, 1, 2 + token] = -size
    keys[:, 0, -4:] = 5
    span = ((stop, stop + text),) * 2
    sequence = PromptBatch(
        hidden, torch.arange(stop + text).expand(2, -1), (stop + text,) * 2, (((2, stop),),) * 2, span, span, span
    )
    return DecoderState(
        ids=("a", "b"),
        tokens=hidden[:, 2:stop],
        sequence=sequence,
        llm=SimpleNamespace(norm=nn.Identity()),
        layer=1,
        entered=sequence,
        keys=keys,
        start=sequence,
    )


def test_dart_planted_outsiders_are_kept_beside_the_pivots():
    """Plant the answer: pivots by the largest keys, and the two tokens that are unlike them."""
    assert Dart(budget=6).reduce(planted_state(), 6).kept.tolist() == [[0, 1, 3, 5, 8, 9]] * 2


def test_dart_fewer_tokens_than_pivots_are_the_best_pivots():
    assert Dart(budget=3).reduce(planted_state(), 3).kept.tolist() == [[0, 1, 9]] * 2
    assert Dart(budget=1).reduce(planted_state(), 1).kept.tolist() == [[9]] * 2


def picked(monkeypatch, state: DecoderState, keep: int) -> tuple[list, list, list]:
    """Columns of all pivots, indices of the image's, and how many tokens each picks."""
    seen = []
    monkeypatch.setattr(dart, "gather_tokens", lambda *given: seen.append(given[1].tolist()) or gather_tokens(*given))
    monkeypatch.setattr(
        dart,
        "pick_different",
        lambda _, *given: seen.extend((given[0].tolist(), given[1])) or pick_different(_, *given),
    )
    Dart(budget=1).reduce(state, keep)
    return tuple(seen)


def test_dart_pivots_take_turns_by_falling_key_norm_image_first(monkeypatch):
    """The original goes through a Python set: the order of its pivots is that of integer hashes, and what is kept hangs
    on it. Two pivots that would like the same token show who comes first."""
    similarity = torch.tensor([[[9.0, 0.0, 0.1, 0.2], [9.0, 0.0, 0.3, 0.1]]])
    pivots = torch.tensor([[0]])
    assert pick_different(similarity, pivots, (1, 1)).tolist() == [[0, 1, 3]]
    assert pick_different(similarity.flip(1), pivots, (1, 1)).tolist() == [[0, 1, 2]]
    columns, image, _ = picked(monkeypatch, planted_state(), 6)
    assert image == [[9, 0, 1, 8]] * 2 and columns == [[11, 2, 3, 10, 14, 15, 16, 17]] * 2


def test_dart_official_pivots_come_in_the_order_of_a_set():
    """A set of eight integers is run through by their value modulo 32: 32 comes before 1, whatever was put in first."""
    columns = torch.tensor([[9, 3, 32, 1, 40, 70, 31, 52]])
    unpadded = SimpleNamespace(padding=lambda sample: 0)
    assert hash_order(columns, unpadded).tolist() == [[32, 1, 3, 70, 40, 9, 52, 31]]
    padded = SimpleNamespace(padding=lambda sample: 5)
    assert hash_order(columns + 5, padded).tolist() == [[37, 6, 8, 75, 45, 14, 57, 36]]


def test_dart_official_keeps_up_to_four_more():
    """It takes T // 8 tokens for each of its eight pivots, and the four image pivots beside."""
    for budget, keep in ((192, 196), (128, 132), (64, 68), (70, 68), (7, 4)):
        assert Dart(budget=budget, official=True).tokens_per_layer(LLAVA_15) == (576,) * 2 + (keep,) * 30


def test_dart_equal_scores_go_to_the_lower_index(monkeypatch):
    state = planted_state()
    state.keys[:] = 1.0
    state.keys[:, :, [2 + 1, 2 + 2, 2 + 4]] = 2.0
    columns, image, _ = picked(monkeypatch, state, 6)
    assert image == [[1, 2, 4, 0]] * 2 and columns == [[3, 4, 6, 2, 12, 13, 14, 15]] * 2
    assert pick_different(torch.zeros(1, 1, 5), torch.tensor([[1]]), (2,)).tolist() == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("tokens", "expected"), [(162, (21, 21, *(20,) * 6)), (64, (8,) * 8), (3, (1, 1, 1, *(0,) * 5))]
)
def test_dart_shares_add_up(tokens, expected, monkeypatch):
    *_, picks = picked(monkeypatch, planted_state(visual=tokens + 20), 4 + tokens)
    assert tuple(picks) == expected and sum(expected) == tokens


@pytest.mark.parametrize(("budget", "keep"), [(192, 166), (128, 98), (64, 30)])
def test_dart_and_fastv_keep_exactly_what_the_budget_asks(budget, keep):
    """DART's release keeps 8 * (T // 8) + 4: at 192 tokens behind layer 2 it is 196, a mean of 219.75."""
    for method in (Dart, FastV):
        assert method(budget=budget).tokens_per_layer(LLAVA_15) == (576,) * 2 + (keep,) * 30
        assert method(budget=budget, schedule="kept").tokens_per_layer(LLAVA_15) == (576,) * 2 + (budget,) * 30
    assert sum(Dart(budget=196, schedule="kept").tokens_per_layer(LLAVA_15)) / 32 == 219.75


def test_dart_keys_and_hidden_states_of_the_model_decide(tiny):
    """Against the definition on a real decoder: keys of the layer before, final norm, cosine."""
    batch, seen = samples(1), []

    class Watch(Dart):
        def reduce(self, state, keep):
            seen.append((state, super().reduce(state, keep)))
            return seen[-1][1]

    with torch.inference_mode():
        prefill(tiny, batch, Watch(budget=10))
        state, reduction = seen[0]
        layer, entered = tiny.llm.layers[0], state.entered
        (start, stop), words = state.sequence.images[0], range(*state.sequence.after[0])
        keys = layer.self_attn.k_proj(layer.input_layernorm(entered.hidden[0]))
        cos, sin = tiny.llm.rotary_emb(entered.hidden, entered.position)
        size = []
        for place, key in enumerate(keys):
            total = 0.0
            for head in key.view(2, -1):
                half = len(head) // 2
                turned = head * cos[0, place] + torch.cat([-head[half:], head[:half]]) * sin[0, place]
                total += turned.abs().sum().item()
            size.append(total)
        image = sorted(range(start, stop), key=lambda place: -size[place])[:4]
        text = sorted(words, key=lambda place: -size[place])[:4]
        final = tiny.llm.norm(state.sequence.hidden[0])
        similarity = torch.stack([torch.cosine_similarity(final[p], final[start:stop], dim=-1) for p in image + text])
        keep = reduction.kept.shape[1]
        picks = [(keep - 4 - turn + 7) // 8 for turn in range(8)]
        expected = dart_by_the_book(similarity, [place - start for place in image], picks)
    assert reduction.kept[0].tolist() == expected


def test_dart_too_little_text_is_refused():
    with pytest.raises(UserError, match=r"4 pivots .* has 3"):
        Dart(budget=6).reduce(planted_state(text=3), 6)


# VScan


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


def scored(batch: int = 2, scores=()) -> PromptState:
    drawn = {SHALLOW: torch.rand(batch, 576), DEEP: torch.rand(batch, 576)}
    tokens = torch.randn(batch, 576, 12)
    return state_with(tokens, drawn | dict(scores), tokens=tokens, layout=GRID, spec=LLAVA_15)


@pytest.mark.parametrize("budget", [64, 128, 192])
def test_vscan_the_first_stage_equals_the_definition(budget):
    state = scored()
    reduction = VScan(budget=budget).prompt(state)
    outputs = reduction.apply(state.tokens)
    for row in range(2):
        kept = stage_one_by_the_book(state.scores[SHALLOW][row], state.scores[DEEP][row], 3 * budget // 2)
        assert reduction.kept[row].tolist() == kept
        torch.testing.assert_close(outputs[row], merge_by_the_book(state.tokens[row], kept), atol=1e-5, rtol=1e-5)


def test_vscan_planted_patches_are_kept():
    """Planted: one loud patch per window for the shallow block, a loud corner for the deep one."""
    shallow, deep = torch.zeros(1, 576), torch.zeros(1, 576)
    local = [(6 * row + row) * 24 + 6 * column + 5 - column for row in range(4) for column in range(4)]
    corner = [0, 1, 2, 3, 24, 25, 26, 27, 48, 49, 50, 51, 72, 73, 74, 75]
    shallow[0, local], deep[0, corner] = 1.0, 1.0
    state = scored(1, {SHALLOW: shallow, DEEP: deep})
    kept = set(VScan(budget=22).prompt(state).kept[0].tolist())  # 33 in the first stage: 16 + 17
    assert set(local) | set(corner) <= kept and len(kept) == 33


def test_vscan_windows_of_grids_that_do_not_divide():
    window, count = windows(PatchGrid(4, 5), 3)
    assert window.view(4, 5).tolist() == [[0, 0, 0, 1, 1]] * 3 + [[2, 2, 2, 3, 3]] and count == 4
    assert windows(GRID, 6)[1] == 16


def test_vscan_every_window_has_its_share():
    """Seven tokens of three windows, one of which holds a single token."""
    score = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.1, 0.2, 0.3, 0.4, 0.05]])
    window = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2])
    assert keep_top_of_windows(score, window, 3, 3)[0].tolist() == [0, 7, 8]
    assert sorted(keep_top_of_windows(score, window, 4, 3)[0].tolist()) == [0, 1, 7, 8], "the better of the second best"
    assert sorted(keep_top_of_windows(score, window, 9, 3)[0].tolist()) == list(range(9))


@pytest.mark.parametrize(("budget", "first", "second"), [(64, 96, 32), (128, 192, 64), (192, 288, 96)])
def test_vscan_published_schedule(budget, first, second):
    """96 tokens, from layer 16 on 32, is what the release calls 64; others in proportion."""
    for official in ("false", "true"):
        reducer = registry.build("vscan", budget, {"official": official})
        assert reducer.tokens_per_layer(LLAVA_15) == (first,) * 16 + (second,) * 16


def test_vscan_every_budget_is_met():
    for spec in (LLAVA_15, ModelSpec(576, 40, GRID, 24), ModelSpec(16, 5, PatchGrid(4, 4), 3)):
        for budget in range(1, spec.visual_tokens + 1):
            reducer = VScan(budget=budget)
            reducer.check(spec)
            entering = reducer.tokens_per_layer(spec)
            assert min(entering) >= 1 and max(entering) <= spec.visual_tokens
            assert abs(sum(entering) / len(entering) - budget) <= 0.5, (spec, budget, entering)


@pytest.mark.parametrize(("budget", "lacking"), [(50, 5), (60, 13), (64, 0), (70, 4)])
def test_vscan_the_release_lacks_tokens_where_the_windows_do_not_divide(budget, lacking):
    """37 local tokens over 16 windows are 2 each: 5 are never chosen."""
    ours, theirs = VScan(budget=budget), VScan(budget=budget, official=True)
    assert ours.tokens_per_layer(LLAVA_15)[0] - theirs.tokens_per_layer(LLAVA_15)[0] == lacking
    state = scored(1)
    kept = theirs.prompt(state).kept[0].tolist()
    assert kept == stage_one_by_the_book(state.scores[SHALLOW][0], state.scores[DEEP][0], 3 * budget // 2)
    assert len(ours.prompt(state).kept[0]) == 3 * budget // 2


@torch.inference_mode()
def test_vscan_the_second_stage_ranks_by_the_last_tokens_attention(tiny):
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
