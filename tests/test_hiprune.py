"""HiPrune: official selections, a definition in plain words, planted anchors, and what tiny budgets and grids do."""

from types import SimpleNamespace

import pytest
import torch

from baselines.hiprune import DEEP, HiPrune
from llava.model.multimodal_encoder.stock_tower import StockTower
from llava.reduction.token_layout import PatchGrid
from tests.drawn_images import state_with
from tests.vectors import vectors


def kept_of(middle: torch.Tensor, deep: torch.Tensor, budget: int, columns: int, **options) -> list[list[int]]:
    method = HiPrune(budget=budget, **options)
    scores = {method.scores()[0]: middle, DEEP: deep}
    layout = PatchGrid(middle.shape[1] // columns, columns)
    return method.encoder(state_with(middle[..., None], scores, layout=layout)).kept.tolist()


ABOUT, ARRAYS = vectors("hiprune")


@pytest.mark.parametrize("case", ABOUT["cases"], ids=lambda case: case["case"])
def test_keeps_what_the_release_keeps_of_drawn_scores(case):
    """Anchors in the first and last row, and in the first and last column, are among them."""
    middle, deep = (ARRAYS[f"{case['case']}_{name}"] for name in ("object", "deep"))
    assert kept_of(middle, deep, case["per_view"], 24) == case["kept"]


def by_the_book(middle: list[float], deep: list[float], budget: int, columns: int, alpha: float) -> list[int]:
    """One view, one token after another."""
    total, count = len(deep), min(round(budget * alpha / 5), budget // 5)
    chosen = set()
    for anchor in sorted(range(total), key=lambda i: (-middle[i], i))[:count]:
        chosen |= {min(max(anchor + step, 0), total - 1) for step in (0, -1, 1, -columns, columns)}
    rest = sorted(set(range(total)) - chosen, key=lambda i: (-deep[i], i))
    return sorted(chosen | set(rest[: budget - len(chosen)]))


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("budget", [1, 3, 8, 24, 25, 26, 40])
@pytest.mark.parametrize("columns", [7, 12])
def test_equals_its_definition_on_other_grids_and_with_ties(columns, budget, alpha):
    middle, deep = (torch.randint(0, 9, (3, 84)) / 100 for _ in range(2))
    expected = [by_the_book(*pair, budget, columns, alpha) for pair in zip(middle.tolist(), deep.tolist(), strict=True)]
    assert kept_of(middle, deep, budget, columns, alpha=alpha) == expected


def test_planted_anchor_comes_with_its_neighbours_and_the_rest_by_deep_attention():
    """One anchor of 50 tokens: five tokens that deep attention would drop; an anchor in column 0 looks to the row
    above, as in the release."""
    middle, deep = torch.zeros(2, 100), torch.zeros(2, 100)
    middle[0, 44] = middle[1, 30] = 0.5
    deep[:, 50:] = 0.01
    first, second = kept_of(middle, deep, 50, columns=10)
    assert first[:5] == [34, 43, 44, 45, 50] and first[5:] == list(range(51, 96))
    assert second[:5] == [20, 29, 30, 31, 40]


@pytest.mark.parametrize(("alpha", "anchors"), [(0.0, 0), (0.1, 1), (1.0, 12)])
def test_alpha_is_the_share_of_anchors_and_their_neighbours(alpha, anchors):
    """64 tokens: 1.28 and 12.8 anchors; the last is rounded to 13, whose neighbours would not fit."""
    middle, deep = torch.zeros(1, 900), torch.zeros(1, 900)
    places = [31 + 90 * (i // 5) + 5 * (i % 5) for i in range(15)]  # apart from each other, best first
    middle[0, places] = torch.linspace(0.9, 0.5, 15)
    deep[0, -100:] = 0.1
    kept = kept_of(middle, deep, 64, columns=30, alpha=alpha)[0]
    assert [place in kept for place in places] == [True] * anchors + [False] * (15 - anchors)
    assert len(kept) == 64 and sum(place < 800 for place in kept) == 5 * anchors


def test_the_option_names_the_block_of_the_anchors_and_scales_it():
    scores = [HiPrune(budget=64, object_block=block).scores() for block in (0, 8, 23)]
    assert [[score.index(24) % 24 for score in pair] for pair in scores] == [[0, 22], [8, 22], [23, 22]]
    assert HiPrune(budget=64).scores()[0].index(12) == 4


def test_qwen_reads_the_blocks_that_the_release_names():
    """Layers 16 and 32 of Qwen2.5-VL's 32, counted from 1: the next blocks that attend within whole images."""
    vision = SimpleNamespace(
        fullatt_block_indexes=[7, 15, 23, 31], window_size=112, spatial_merge_size=2, patch_size=14
    )
    tower = StockTower(range(32), vision, cls=None, runs=True, last=-2)
    assert [tower.block_of(score) for score in HiPrune(budget=64).scores()] == [15, 31]
