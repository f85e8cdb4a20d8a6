"""DART: pivots, and what resembles them least."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from baselines.dart import Dart, hash_order, highest, pick_different, shares
from llava.errors import UserError
from llava.pipeline.prefill import prefill
from llava.pipeline.sequence import Sequence
from llava.reduction.states import DecoderState
from llava.reduction.token_layout import ModelSpec, PatchGrid
from tests.conftest import samples

LLAVA_15 = ModelSpec(576, 32, PatchGrid(24, 24), 24)


def dart_by_the_book(similarity: torch.Tensor, pivots: list[int], picks: tuple[int, ...]) -> list[int]:
    """One picture, plain loops."""
    kept = set(pivots)
    for turn, count in enumerate(picks):
        left = [token for token in range(similarity.shape[1]) if token not in kept]
        kept |= set(sorted(left, key=lambda token: similarity[turn, token].item())[:count])
    return sorted(kept)


@pytest.mark.parametrize("picks", [(0,) * 8, (1, 0, 0, 0, 0, 0, 0, 0), (2,) * 8, (3, 3, 3, 2, 2, 2, 2, 2)])
@pytest.mark.parametrize("tokens", [30, 57])
def test_the_batched_choice_is_the_greedy_one(tokens, picks):
    similarity = torch.rand(3, 8, tokens)
    pivots = torch.stack([torch.randperm(tokens)[:4] for _ in range(3)])
    found = pick_different(similarity, pivots, picks)
    assert found.shape == (3, 4 + sum(picks))
    for row in range(3):
        assert found[row].tolist() == dart_by_the_book(similarity[row], pivots[row].tolist(), picks)


def planted_state(text: int = 6) -> DecoderState:
    """Two prompts: 2 tokens, 10 visual ones, `text` words; the visual tokens 3 and 5 point away from everything."""
    hidden = torch.zeros(2, 12 + text, 4)
    hidden[..., 0] = 1 + torch.rand(2, 12 + text)
    hidden[:, 2 + 3] = torch.tensor([-1.0, 0, 0, 0])
    hidden[:, 2 + 5] = torch.tensor([-3.0, 0.1, 0, 0])
    keys = torch.ones(2, 2, 12 + text, 3)
    # Large keys, of either sign: visual tokens 9, 0, 1, 8 in this order, and the last words.
    for size, token in zip((9, 8, 7, 6), (9, 0, 1, 8), strict=True):
        keys[:, 1, 2 + token] = -size
    keys[:, 0, -4:] = 5
    span = ((12, 12 + text),) * 2
    sequence = Sequence(
        hidden, torch.arange(12 + text).expand(2, -1), (12 + text,) * 2, (((2, 12),),) * 2, span, span, span
    )
    return DecoderState(
        ids=("a", "b"),
        tokens=hidden[:, 2:12],
        sequence=sequence,
        llm=SimpleNamespace(norm=nn.Identity()),
        layer=1,
        entered=sequence,
        keys=keys,
        start=sequence,
    )


def test_planted_outsiders_are_kept_beside_the_pivots():
    """Plant the answer: pivots by the largest keys, and the two tokens that are unlike them."""
    assert Dart(budget=6).reduce(planted_state(), 6).kept.tolist() == [[0, 1, 3, 5, 8, 9]] * 2


def test_planted_outsiders_are_those_behind_the_final_norm():
    """Plant the answer: a norm that blanks the channel of the outsiders above, so that others stick out."""
    state = planted_state()
    state.sequence.hidden[..., 2] = 0.1
    state.sequence.hidden[:, [2 + 4, 2 + 7], 2] = -0.1
    state.llm.norm = lambda hidden: hidden * torch.tensor([0.0, 0, 1, 1])
    assert Dart(budget=6).reduce(state, 6).kept.tolist() == [[0, 1, 4, 7, 8, 9]] * 2


def test_fewer_tokens_than_pivots_are_the_best_pivots():
    assert Dart(budget=3).reduce(planted_state(), 3).kept.tolist() == [[0, 1, 9]] * 2
    assert Dart(budget=1).reduce(planted_state(), 1).kept.tolist() == [[9]] * 2


def test_pivots_take_turns_by_falling_key_norm_image_first():
    """The original goes through a Python set: the order of its pivots is that of integer hashes, and what is kept hangs
    on it. Two pivots that would like the same token show who comes first."""
    similarity = torch.tensor([[[9.0, 0.0, 0.1, 0.2], [9.0, 0.0, 0.3, 0.1]]])
    pivots = torch.tensor([[0]])
    assert pick_different(similarity, pivots, (1, 1)).tolist() == [[0, 1, 3]]
    assert pick_different(similarity.flip(1), pivots, (1, 1)).tolist() == [[0, 1, 2]]
    image, columns = Dart(budget=6)._pivots(planted_state(), 4)
    assert image.tolist() == [[9, 0, 1, 8]] * 2 and columns.tolist() == [[11, 2, 3, 10, 14, 15, 16, 17]] * 2


def test_official_pivots_come_in_the_order_of_a_set():
    """A set of eight integers is run through by their value modulo 32: 32 comes before 1, whatever was put in first."""
    columns = torch.tensor([[9, 3, 32, 1, 40, 70, 31, 52]])
    unpadded = SimpleNamespace(padding=lambda sample: 0)
    assert hash_order(columns, unpadded).tolist() == [[32, 1, 3, 70, 40, 9, 52, 31]]
    padded = SimpleNamespace(padding=lambda sample: 5)
    assert hash_order(columns + 5, padded).tolist() == [[37, 6, 8, 75, 45, 14, 57, 36]]


def test_official_keeps_up_to_four_more():
    """It takes T // 8 tokens for each of its eight pivots, and the four image pivots beside."""
    for budget, keep in ((192, 196), (128, 132), (64, 68), (70, 68), (7, 4)):
        assert Dart(budget=budget, official=True).tokens_per_layer(LLAVA_15) == (576,) * 2 + (keep,) * 30


def test_equal_scores_go_to_the_lower_index():
    assert highest(torch.tensor([[1.0, 2, 2, 1, 2]]), 4).tolist() == [[1, 2, 4, 0]]
    assert pick_different(torch.zeros(1, 1, 5), torch.tensor([[1]]), (2,)).tolist() == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("tokens", "expected"), [(162, (21, 21, *(20,) * 6)), (64, (8,) * 8), (3, (1, 1, 1, *(0,) * 5))]
)
def test_shares_add_up(tokens, expected):
    assert shares(tokens, 8) == expected and sum(expected) == tokens


@pytest.mark.parametrize(("budget", "keep"), [(192, 166), (128, 98), (64, 30)])
def test_keeps_exactly_what_the_budget_asks(budget, keep):
    """The original keeps 8 * (T // 8) + 4: at 192 tokens behind layer 2 it is 196, a mean of 219.75."""
    assert Dart(budget=budget).tokens_per_layer(LLAVA_15) == (576,) * 2 + (keep,) * 30
    assert Dart(budget=budget, schedule="kept").tokens_per_layer(LLAVA_15) == (576,) * 2 + (budget,) * 30
    assert sum(Dart(budget=196, schedule="kept").tokens_per_layer(LLAVA_15)) / 32 == 219.75


def test_keys_and_hidden_states_of_the_model_decide(tiny):
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
        expected = dart_by_the_book(similarity, [place - start for place in image], shares(keep - 4, 8))
    assert reduction.kept[0].tolist() == expected


def test_too_little_text_is_refused():
    with pytest.raises(UserError, match="4 pivots from the text after the image; a prompt has 3"):
        Dart(budget=6).reduce(planted_state(text=3), 6)


def test_out_of_reach_budgets_name_the_way_out():
    with pytest.raises(UserError, match=r"36.94 to 576. Set dart.schedule=kept"):
        Dart(budget=36).check(LLAVA_15)
    with pytest.raises(UserError, match="acts before layer 9"):
        Dart(budget=100, layer=9).check(dataclasses.replace(LLAVA_15, layers=8))
