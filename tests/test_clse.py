"""CLSE against its release, a filter by the words, planted tokens, and maps of tiles and of tokens that are left."""

import math
from types import SimpleNamespace

import pytest
import torch

from baselines.clse import CLSE, detail, evolution
from llava.pipeline.accounting import mean_visual_tokens
from llava.reduction import keep_top
from llava.reduction.states import DecoderState
from llava.reduction.token_layout import ModelSpec, PatchGrid, TokenLayout, frames, single, stitched
from tests.vectors import vectors

LLAVA_15 = ModelSpec(576, 32, PatchGrid(24, 24), 24)


def state_of(before, after, attention, layouts: tuple[TokenLayout, ...], layer: int = 1, **fields) -> DecoderState:
    """Images [B, N, D] before layer 0 and now, with the attention [B, N] that each of two heads gives."""
    prompt = SimpleNamespace(
        hidden=before, images=[(0, before.shape[1])] * len(before), take=lambda whole, spans: whole
    )
    state = DecoderState(
        ids=("a",), spec=LLAVA_15, tokens=after, sequence=prompt, llm=None, layer=layer, entered=prompt, keys=None,
        start=prompt, layouts=layouts, **fields,
    )  # fmt: skip
    asked = {("last", "previous"): attention[:, None, None].expand(-1, 2, -1, -1)}
    state.attention = lambda rows, at: (asked[rows, at], None)
    return state


def test_the_release_scores_and_keeps_the_same():
    """One image of 24 x 24 patches, two frames of 12 x 24, and a grid of odd sides."""
    about, arrays = vectors("clse")
    assert len(about["cases"]) == 4
    for case in about["cases"]:
        count, rows, columns = case["grid"]
        layout = single(rows, columns) if count == 1 else frames(count, rows, columns)
        own = (arrays[f"{case['inputs']}_{part}"][None, : layout.tokens] for part in ("before", "after", "attention"))
        score = CLSE(budget=64).score(state_of(*own, (layout,)))
        torch.testing.assert_close(score[0].double(), arrays[f"{case['case']}_score"], atol=1e-6, rtol=1e-4)
        for keep, kept in case["kept"].items():
            assert keep_top(score, int(keep))[0].tolist() == kept


def test_clse_keeps_planted_tokens_whose_detail_changed():
    """Plant a change at three of 36 tokens that all have the same attention; later stages look at attention alone."""
    before, planted = torch.randn(1, 36, 8), [4, 17, 30]
    after = before.clone()
    after[0, planted] *= 5
    attention, layout = torch.ones(1, 36), single(6, 6)
    attention[0, 9] = 1.5
    kept = keep_top(CLSE(budget=64).score(state_of(before, after, attention, (layout,))), 4)[0].tolist()
    assert set(planted) <= set(kept)
    later = CLSE(budget=64).score(state_of(before, after, attention, (layout,), layer=11))
    assert torch.equal(later, attention)


def test_detail_that_grows_without_end_counts_as_much_as_detail_that_grows_threefold():
    """A change in proportion to the mean and the token's own detail counts up to 1."""
    first, second, third, fourth = evolution(torch.ones(1, 4), torch.tensor([[1.0, 2, 3, 900]]))[0].tolist()
    assert first < second < third == pytest.approx(fourth, rel=1e-4)


def test_attention_counts_in_the_first_stage_too():
    before, layout = torch.randn(1, 36, 8), single(6, 6)
    attention = torch.rand(1, 36)
    score = CLSE(budget=64).score(state_of(before, before, attention, (layout,)))
    torch.testing.assert_close(score, attention / 2)  # nothing changed, so every factor is the middle one


def by_the_words(tile: torch.Tensor) -> torch.Tensor:
    """[rows, columns, D] -> [rows * columns]: take from a map its part in each frequency, by sums over all tokens."""
    rows, columns, _ = tile.shape
    width, low = 0.1 * min(rows // 2, columns // 2), torch.zeros_like(tile, dtype=torch.complex128)
    for v in range(-(rows // 2), rows - rows // 2):
        for u in range(-(columns // 2), columns - columns // 2):
            down, across = torch.arange(rows)[:, None] * v / rows, torch.arange(columns) * u / columns
            wave = torch.exp(2j * math.pi * (down + across).double())[..., None]
            part = (tile * wave.conj()).sum((0, 1)) / (rows * columns)
            low += math.exp(-(u * u + v * v) / (2 * width**2)) * part * wave
    return (tile - low).abs().mean(-1).flatten()


def test_each_tile_is_filtered_on_its_own_grid():
    """Stitched tiles, of which unpadding left 24 x 24 and 24 x 20; newline and class tokens have no detail."""
    layout = stitched((1, 2), (24, 24), (0, 24, 0, 44))
    for own in (layout, layout.with_cls):
        tokens = torch.randn(2, own.tokens, 3).double()
        found = detail(tokens, own)
        for tile in own.crops:
            expected = by_the_words(tokens[1, tile.indices].unflatten(0, (tile.rows, tile.columns)))
            torch.testing.assert_close(found[1, tile.indices], expected, atol=1e-6, rtol=1e-5)
        patches = torch.cat([tile.indices for tile in own.crops])
        assert not found[:, sorted(set(range(own.tokens)) - set(patches.tolist()))].any()


def test_a_row_of_patches_has_detail():
    """Half its shorter side is 0: a division by zero would leave no number."""
    assert detail(torch.randn(1, 12, 2), single(1, 12)).isfinite().all()


def test_images_of_different_tiles_are_scored_as_alone():
    """In one batch; and so are images of which an earlier method left some tokens, in a map that is zero elsewhere."""
    layouts = single(4, 9), single(6, 6), single(4, 9)
    before, after, attention = torch.randn(3, 36, 5), torch.randn(3, 36, 5), torch.rand(3, 36)
    whole = CLSE(budget=64).score(state_of(before, after, attention, layouts))
    members = torch.stack([torch.randperm(36)[:20].sort().values for _ in range(3)])
    left = state_of(before[:, :20], after[:, :20], attention[:, :20], layouts, members=lambda: members)
    few = CLSE(budget=64).score(left)
    for image, layout in enumerate(layouts):
        row = slice(image, image + 1)
        maps = [detail(part[row], layout) for part in (before, after)]
        torch.testing.assert_close(whole[row], attention[row] * evolution(*maps))
        holes = [torch.zeros(1, 36, 5).index_copy(1, members[image], part[row, :20]) for part in (before, after)]
        maps = [detail(part, layout)[:, members[image]] for part in holes]
        torch.testing.assert_close(few[row], attention[row, :20] * evolution(*maps))


TABLES = [(192, (330, 210, 62), 208.1), (128, (220, 140, 41), 144.6), (64, (110, 70, 20), 81.1)]


@pytest.mark.parametrize(("budget", "counts", "mean"), TABLES)
def test_the_tables_of_the_release_do_not_have_their_budget_as_mean(budget, counts, mean):
    """They were recorded from the release's forward. The default keeps their proportions, at an honest mean."""
    planned = CLSE(budget=budget, schedule="release").tokens_per_layer(LLAVA_15)
    assert planned == (576,) + (counts[0],) * 10 + (counts[1],) * 10 + (counts[2],) * 11
    assert mean_visual_tokens(planned) == pytest.approx(mean, abs=0.05)
    assert CLSE(budget=budget).keeps(counts[0], 576) == counts
    assert mean_visual_tokens(CLSE(budget=budget).tokens_per_layer(LLAVA_15)) == pytest.approx(budget, abs=0.5)


def test_all_earlier_caches_are_cut():
    assert [CLSE(budget=64).cut_caches(layer) for layer in (1, 11)] == [range(1), range(11)]
