"""VLM-Pruner against its release, a definition by the words, planted tokens and shares by hand; places of tokens."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from baselines import vlmpruner
from baselines.vlmpruner import VLMPruner, absorb, grow, pivots_of
from llava.pipeline.accounting import mean_visual_tokens
from llava.reduction.states import DecoderState
from llava.reduction.token_layout import ModelSpec, PatchGrid, TokenLayout, frames, single, stitched
from tests.vectors import vectors


def state_of(hidden: torch.Tensor, keys: torch.Tensor, layout: TokenLayout, **fields) -> DecoderState:
    """One image [N, D], keys [H, N, d], in a prompt that is this image alone."""
    prompt = SimpleNamespace(images=[(0, len(hidden))], take=lambda tensor, spans: tensor)
    fields = {"layouts": (layout,), "tokens": hidden[None], "keys": keys[None], **fields}
    return DecoderState(ids=("a",), sequence=prompt, llm=None, layer=2, entered=prompt, start=None, **fields)


def test_the_release_keeps_and_merges_the_same():
    about, arrays = vectors("vlmpruner")
    assert "get_retained_image_token" in about["source"] and len(about["cases"]) == 4
    for case in about["cases"]:
        method = VLMPruner(budget=case["budget"], pivots=case["pivots"], threshold=case["threshold"])
        state = state_of(arrays["hidden"], arrays["keys"], single(24, 24))
        reduction = method.reduce(state, case["budget"])
        assert reduction.kept[0].tolist() == case["kept"]
        merged = reduction.merge_weight.gather(1, reduction.kept)[0] < 1
        assert reduction.kept[0][merged].tolist() == case["aggregated"]
        out = reduction.apply(state.tokens.float())[0].double()
        torch.testing.assert_close(out.mean(1), arrays[f"{case['case']}_mean"], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(out[:, :3], arrays[f"{case['case']}_first"], atol=1e-4, rtol=1e-4)


def test_vlmpruner_keeps_planted_tokens_that_are_unlike_the_others():
    """Plant three directions of their own among tokens of one direction, with the largest keys elsewhere."""
    hidden, keys = torch.zeros(36, 8), torch.ones(2, 36, 4)
    hidden[:, 0], hidden[:, 4:] = 1, 0.05 * torch.randn(36, 4)
    planted = [3, 17, 30]
    for number, token in enumerate(planted, 1):
        hidden[token, :4] = 0
        hidden[token, number] = 1
    keys[:, 8] = 5
    kept = VLMPruner(budget=4, pivots=1).reduce(state_of(hidden, keys, single(6, 6)), 4).kept[0].tolist()
    assert kept == sorted([*planted, 8])


def by_the_words(cosine, position, pivots, count, threshold) -> list[int]:
    """All likenesses anew for each group, in plain loops."""
    chosen = list(pivots)

    def likeness(token: int) -> float:
        gap = min(math.dist(position[token], position[one]) for one in chosen)
        return max(cosine[token][one] for one in chosen) * (1 + 0.5 * gap)

    while len(chosen) < count:
        waiting = sorted(set(range(len(cosine))) - set(chosen), key=lambda token: (likeness(token), token))
        for start in range(0, len(waiting), vlmpruner.GROUP):
            if len(chosen) < count:
                alike = {token: likeness(token) for token in waiting[start : start + vlmpruner.GROUP]}
                found = [token for token in alike if alike[token] < threshold]
                if len(found) > count - len(chosen):
                    found = sorted(alike, key=alike.get)[: count - len(chosen)]
                chosen += found
        threshold += 0.1
    return sorted(chosen)


@pytest.mark.parametrize("common", [0.0, 0.6, 3.0])
@pytest.mark.parametrize("group", [3, 16])
def test_the_fast_choice_is_that_of_the_words(monkeypatch, common, group):
    """Tokens with much in common: rounds stay empty, where the release gives up. Groups are skipped and cut."""
    monkeypatch.setattr(vlmpruner, "GROUP", group)
    for seed, threshold in enumerate((0.0, 0.5, 0.7, 0.8)):
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randn(90, 12, generator=generator) + common
        cosine = F.normalize(tokens, dim=-1).double()
        cosine, position = (cosine @ cosine.T).numpy(), single(9, 10).places.double().numpy()
        for count in (5, 23, 40, 89):
            found = grow(cosine, position, np.array([7, 50]), count, threshold)
            expected = by_the_words(cosine.tolist(), position.tolist(), [7, 50], count, threshold)
            assert sorted(found.tolist()) == expected


def test_cosines_that_are_no_numbers_end_too():
    """A broken tower: no comparison with NaN is true, and the rounds went on for ever."""
    found = grow(np.full((9, 9), np.nan), single(3, 3).places.numpy(), np.array([4]), 6, 0.8)
    assert len(set(found.tolist())) == 6


def test_pivots_are_far_from_each_other_and_differ_even_where_all_keys_are_equal():
    keys = torch.tensor([[[1.0, 0], [0, 9], [8, 0], [-3, -3]]])
    assert pivots_of(keys, 3).tolist() == [[1, 3, 2]]
    assert sorted(pivots_of(torch.ones(1, 5, 2), 4)[0].tolist()) == [0, 1, 2, 3]


def test_a_kept_token_counts_three_tenths_and_its_members_by_their_cosine():
    """Tokens 0 and 4 are kept. 1 and 2 are most like 0; what is most like 4 points away from it, so 4 stays alone."""
    cosine = torch.eye(5)[None]
    for token, (to_0, to_4) in enumerate(((0.9, 0.1), (0.3, 0.2), (-0.9, -0.5)), 1):
        cosine[0, token, 0], cosine[0, token, 4] = to_0, to_4
    reduction = absorb(cosine, torch.tensor([[0, 4]]))
    assert reduction.assignment.tolist() == [[0, 0, 0, -1, 1]]
    torch.testing.assert_close(reduction.merge_weight, torch.tensor([[0.3, 0.7 * 0.75, 0.7 * 0.25, 0, 1]]))


def test_tokens_are_compared_on_the_channels_of_most_variance(monkeypatch):
    """Two of three: a channel that is large, but the same everywhere, says nothing."""
    monkeypatch.setattr(vlmpruner, "CHANNELS", 2)
    hidden = torch.tensor([[90.0, 1, 0], [91, 0, 1], [90, -1, 0], [91, 0, -1], [90, 1, 0.1]])
    state = state_of(hidden, torch.ones(1, 5, 1), single(1, 5))
    assert VLMPruner(budget=4, pivots=1).reduce(state, 4).kept.tolist() == [[0, 1, 2, 3]]


def test_tokens_left_by_an_earlier_method_keep_their_places(monkeypatch):
    """Behind divprune, token 2 of three may be token 15 of 16."""
    seen = []
    monkeypatch.setattr(vlmpruner, "grow", lambda cosine, position, *_: seen.append(position) or np.array([0]))
    layout = single(4, 4)
    state = state_of(torch.randn(3, 4), torch.ones(1, 3, 1), layout, members=lambda: torch.tensor([[1, 7, 15]]))
    VLMPruner(budget=1).reduce(state, 1)
    assert (seen[0] == layout.places[[1, 7, 15]].numpy()).all()


def test_as_many_tokens_as_asked_are_kept_after_the_layer():
    spec = ModelSpec(576, 32, PatchGrid(24, 24), 24)
    kept, mean = (VLMPruner(budget=64, schedule=schedule).tokens_per_layer(spec) for schedule in ("kept", "mean"))
    assert kept == (576,) * 2 + (64,) * 30 and mean_visual_tokens(mean) == pytest.approx(64, abs=0.5)


def test_fewer_tokens_than_pivots_are_pivots():
    keys = torch.tensor([[[1.0, 0], [0, 9], [8, 0], [-3, -3]]])
    assert VLMPruner(budget=2).reduce(state_of(torch.randn(4, 3), keys, single(2, 2)), 2).kept.tolist() == [[1, 3]]


# Places of tokens


def test_the_unit_of_places_is_the_diagonal():
    """24 x 24 patches: one row down is 1 / (24 sqrt 2); a frame of 2 x 4 patches has a diagonal of sqrt 20."""
    grid = single(24, 24).places
    assert grid[24, 0] - grid[0, 0] == pytest.approx(1 / (24 * 2**0.5)) and grid[24, 1] == grid[0, 1]
    film = frames(2, 2, 4).places
    assert torch.equal(film[:8], film[8:])
    torch.testing.assert_close(film[7] * 20**0.5, torch.tensor([1.5, 3.5]))


def test_stitched_tiles_are_one_image_and_the_base_image_shows_it_too():
    """Two tiles of 2 x 2 without the last column: 2 x 3 patches and newlines; class tokens in the middle."""
    layout = stitched((1, 2), (2, 2), (0, 2, 0, 3))
    cells = layout.places * 13**0.5
    torch.testing.assert_close(cells[:4], torch.tensor([[0.5, 0.75], [0.5, 2.25], [1.5, 0.75], [1.5, 2.25]]))
    row = torch.tensor([[0.5, 0.5], [0.5, 1.5], [0.5, 2.5], [0.5, 3.0]])
    torch.testing.assert_close(cells[4:], torch.cat([row, row + torch.tensor([1.0, 0])]))
    classes = layout.with_cls
    torch.testing.assert_close(
        classes.places[[crop.cls for crop in classes.crops]] * 13**0.5, torch.tensor([[1, 1.5]] * 3)
    )
