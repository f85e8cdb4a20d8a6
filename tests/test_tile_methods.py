"""HiRED and GlobalCom², which split a budget over tiles: loops, planted answers and the releases themselves."""

import math

import pytest
import torch

from baselines.globalcom2 import SCORE, GlobalCom2, adjustment, equal_parts
from baselines.hired import EARLY, LATE, HiRED, crop_budgets, crop_budgets_as_released, salient_patches
from llava.model.builder import load
from llava.model.multimodal_encoder.clip_encoder import encode
from llava.pipeline.generate import prefill
from llava.pipeline.views import overview
from llava.processing.prompt import Sample
from llava.reduction import registry
from llava.reduction.budget import planned
from llava.reduction.scores import TowerScore
from llava.reduction.token_layout import ModelSpec, PatchGrid, frames, single, spec_of, stitched
from tests.conftest import QUESTIONS, drawn_image
from tests.drawn_images import arranged, counts_of, image_with, kept_of, parts_with, state_of
from tests.parity import model as recipe
from tests.parity.harness import FOLDER, parity_model, recording
from tests.tiny_checkpoints_families import make_tiny_next, save_next_transformers

LLAVA = ModelSpec(576, 32, PatchGrid(24, 24), 24)


def test_hired_and_globalcom2_through_the_model(tmp_path):
    """The releases' counts depend on the image, so they have no plan; tests/test_next.py has that of the default."""
    save_next_transformers(tmp_path / "tiny", make_tiny_next())
    model = load(tmp_path / "tiny", device="cpu")
    sample = Sample("a", QUESTIONS[0], image=drawn_image(3, (60, 100)))
    spec = spec_of(model.spec, model.views(sample.image)[1])
    for name in ("hired", "globalcom2"):
        reducer = registry.build(name, 30, {"official": "true"})
        state, record = prefill(model, [sample], reducer)
        (account,) = record.accounting(state)
        assert planned(reducer, spec) is None and account.mean != 30


def test_hired_and_globalcom2_rates_of_the_releases():
    """HiRED's is one of whole crops, GlobalCom²'s one of patches; newline tokens are tokens in ours."""
    spec = spec_of(LLAVA, arranged((640, 480)))
    assert HiRED(budget=1, retention_ratio=0.2, official=True).for_image(spec).budget == 576
    assert HiRED(budget=1, retention_ratio=0.2).for_image(spec).budget == round(0.2 * spec.visual_tokens)
    spec = spec_of(LLAVA, arranged((672, 672)))
    assert GlobalCom2(budget=1, retention_ratio=0.25, official=True).for_image(spec).budget == 720
    assert GlobalCom2(budget=1, retention_ratio=0.25).for_image(spec).budget == 732


# HiRED


def shown_by(sizes, index, length):
    """The numbers below `length` that the index-th of neighbours of these sizes stands for."""
    edges = [sum(sizes[:end]) / sum(sizes) * length for end in (index, index + 1)]
    return [i for i in range(length) if int(edges[0] + 1e-9) <= i < int(edges[1] + 1e-9)]


def budgets_by_the_book(early, count, run, budget):
    """Loops over patches and tiles; a tile shows the share of the image that its rows and columns are."""
    rows, columns = run.grid
    best = sorted(range(rows * columns), key=lambda i: (-early[i].item(), i))[:count]
    tiles, (down, across) = run.crops[1:], run.tiles
    found = []
    for row in range(down):
        for column in range(across):
            high = shown_by([tile.rows for tile in tiles[::across]], row, rows)
            wide = shown_by([tile.columns for tile in tiles[:across]], column, columns)
            found.append(sum(i // columns in high and i % columns in wide for i in best))
    given = [budget * value // count for value in found]
    fraction = [budget * value % count for value in found]
    for tile in sorted(range(len(tiles)), key=lambda c: (-fraction[c], c))[: budget - sum(given)]:
        given[tile] += 1
    return given


@pytest.mark.parametrize("size", [(672, 672), (640, 400), (300, 1000), (1000, 310), (700, 690)])
def test_hired_split_equals_its_definition(size):
    """Also where unpadding leaves tiles of different shapes; no tile is full."""
    torch.manual_seed(0)
    run = arranged(size)
    for _ in range(3):
        early = torch.rand(576)
        found = crop_budgets(salient_patches(early, 200), run, 137)
        assert found == budgets_by_the_book(early, 200, run, 137) and sum(found) == 137


def strange() -> torch.Tensor:
    """[576] early attention, all of it in the right half of the upper twelve rows."""
    early = torch.zeros(24, 24)
    early[:12, 12:] = 1.0
    return early.flatten()


def test_hired_planted_tile_gets_the_budget_and_not_a_strip_of_the_image():
    """HiRED@502d6dd cuts the flat 24 x 24 map into four runs of six rows: what it takes for the upper right tile is a
    strip over the whole width, and half of the budget goes to the upper left tile, where nothing is."""
    salient = salient_patches(strange(), 144)
    assert crop_budgets(salient, arranged((672, 672)), 100) == [0, 100, 0, 0]
    assert crop_budgets_as_released(salient, 4, 100) == [50, 50, 0, 0]


def test_hired_planted_tile_of_an_image_whose_padding_was_cut_off():
    """Half as wide as high: each tile shows twelve columns, and still half of the base image's width."""
    narrow = stitched((2, 2), (24, 24), (0, 48, 12, 36))
    assert [crop.columns for crop in narrow.crops[1:]] == [12] * 4
    assert crop_budgets(salient_patches(strange(), 144), narrow, 100) == [0, 100, 0, 0]


def test_hired_what_a_full_tile_cannot_take_goes_to_the_others():
    early = strange()
    early[-1] = 0.5
    assert crop_budgets(salient_patches(early, 145), arranged((672, 672)), 700) == [0, 576, 0, 124]
    assert crop_budgets_as_released(salient_patches(strange(), 144), 4, 1500) == [576, 576, 0, 0]


def test_hired_nothing_is_lost_by_rounding():
    """The release rounds every tile's share down: three equal tiles of a budget of 8 keep 6."""
    salient, run = torch.ones(36), stitched((3, 1), (6, 6), newline=False)
    assert crop_budgets(salient, run, 8) == [3, 3, 2]
    assert crop_budgets_as_released(salient, 3, 8) == [2, 2, 2]


def drawn(row: int, arrays) -> dict[TowerScore, torch.Tensor]:
    case, count = int(arrays["cases"][row]), len(arranged(tuple(arrays["sizes"][row])).crops)
    early = recipe.draw(f"hired-early-{case}", (count, 4, 576)).abs()
    early[0, :, :200] *= 1 + case % 3 / 4
    return {EARLY: early.mean(1), LATE: recipe.draw(f"hired-late-{case}", (count, 4, 576)).abs().mean(1)}


@pytest.mark.parametrize("merge", ["spatial", "spatial_unpad"])
def test_hired_official_selects_what_the_release_selects(merge):
    """The official functions on drawn attention: before unpadding for all images, and what is left behind it where
    the release stitches tiles as LLaVA does."""
    _, arrays = recording(FOLDER / "hired-next-drawn.npz")
    compared = 0
    for row, (rate, alpha) in enumerate(zip(arrays["rates"], arrays["alphas"], strict=True)):
        theirs = arrays["chosen" if merge == "spatial" else "kept"][row]
        theirs = theirs[theirs >= 0].tolist()
        if not theirs:
            continue
        run = arranged(tuple(arrays["sizes"][row]), merge)
        budget = int(len(run.crops) * 576 * rate)
        reducer = HiRED(budget=budget, alpha=float(alpha), official=True)
        ours = kept_of(reducer, run, drawn(row, arrays))
        assert ours == theirs if merge == "spatial_unpad" else sorted(ours) == theirs, row
        compared += 1
    assert compared == (60 if merge == "spatial" else 24)


def test_hired_the_default_keeps_the_whole_budget_where_the_release_does_not():
    """Of 640 x 480 pixels the release chooses 576 tokens and cuts 69 of them off with the padding."""
    _, arrays = recording(FOLDER / "hired-next-drawn.npz")
    row = next(i for i, size in enumerate(arrays["sizes"]) if tuple(size) == (640, 480) and arrays["rates"][i] == 0.2)
    run, signals = arranged((640, 480)), drawn(row, arrays)
    assert len(kept_of(HiRED(budget=576), run, signals)) == 576
    assert len(kept_of(HiRED(budget=576, official=True), run, signals)) == 507
    assert counts_of(kept_of(HiRED(budget=576, alpha=0.25), run, signals), run)[0] == 144
    # The base image has no more than it has; the rest of its half is for the tiles.
    counts = counts_of(kept_of(HiRED(budget=1500), run, signals), run)
    assert counts[0] == 576 and sum(counts) == 1500


@pytest.mark.parametrize(("size", "counts"), [((300, 150), [352, 144, 144]), ((200, 65), [448, 96, 96])])
def test_hired_what_unpadded_tiles_cannot_take_goes_to_the_base_image(size, counts):
    """It was dropped: 300 x 150 pixels kept 608 of 640 and 200 x 65 kept 512, and the plan said 640."""
    run = arranged(size)
    signals = {EARLY: torch.rand(3, 576), LATE: torch.rand(3, 576)}
    assert counts_of(kept_of(HiRED(budget=640), run, signals), run) == counts
    assert planned(HiRED(budget=640), spec_of(LLAVA, run)) == (640,) * 32
    released = HiRED(budget=640, official=True)
    assert len(kept_of(released, run, signals)) < 640 and planned(released, spec_of(LLAVA, run)) is None


@pytest.mark.parametrize(("tile_budget", "first"), [("content", 40), ("each", 16), ("thumbnail", 16), ("global", 75)])
def test_hired_other_splits_stay_possible(tile_budget, first):
    late = torch.linspace(1, 2, 576).repeat(5, 1)
    late[0, :75], late[0, 75:] = 3.0, 0.0
    run, reducer = arranged((672, 672), "spatial"), HiRED(budget=80, tile_budget=tile_budget)
    assert (EARLY in reducer.tower_scores(tiled=True)) == (tile_budget == "content")
    counts = counts_of(kept_of(reducer, run, {LATE: late, EARLY: late}), run)
    assert counts[0] == first and sum(counts) == 80


# GlobalCom²


def scores(run, seed=0) -> torch.Tensor:
    return torch.randn(len(run.crops), 576, generator=torch.Generator().manual_seed(seed))


def split(score, run, temperature, budget, official=False) -> list[int]:
    """Tokens of each tile, by the base image's scores [P]."""
    reducer = GlobalCom2(budget=budget, temperature=temperature, official=official)
    return reducer.crop_shares(run, {SCORE: score[None]}, budget)


def test_globalcom2_adjustment_equals_its_formula():
    richness = [3.0, -8.0, 20.0, 0.5]
    powers = [math.exp(value / 10) for value in richness]
    expected = [1 + power / sum(powers) - 0.25 for power in powers]
    assert adjustment(richness, 10.0) == pytest.approx(expected, abs=1e-7)
    assert sum(adjustment([1e4, -1e4], 10.0)) == pytest.approx(2)
    assert adjustment([5.0], 10.0) == pytest.approx([1.0])


def test_globalcom2_a_planted_rich_tile_keeps_more():
    """All that CLS looks at is in the lower right quarter: softmax 1 there, so 1.75 against 0.75 of the ratio."""
    run, score = stitched((2, 2), (24, 24), newline=False), torch.zeros(24, 24)
    score[12:, 12:] = 10.0
    assert split(score.flatten(), run, 10.0, 1000) == [200, 150, 150, 150, 350]
    assert split(score.flatten(), run, 1e9, 1000) == [200] * 5


def split_by_the_book(score, run, budget):
    """Loops over the base image's patches; exact fractions, no tile full."""
    (rows, columns), across, tiles = run.grid, run.tiles[1], run.crops[1:]
    heights, widths = [tile.rows for tile in tiles[::across]], [tile.columns for tile in tiles[:across]]
    richness = []
    for number in range(len(tiles)):
        row, column = divmod(number, across)
        total = 0.0
        for i in range(rows * columns):
            down_in = sum(heights[:row]) * rows // sum(heights) <= i // columns
            down_in &= i // columns < sum(heights[: row + 1]) * rows // sum(heights)
            across_in = sum(widths[:column]) * columns // sum(widths) <= i % columns
            across_in &= i % columns < sum(widths[: column + 1]) * columns // sum(widths)
            total += score[i].item() if down_in and across_in else 0.0
        richness.append(total)
    powers = [math.exp((value - max(richness)) / 10) for value in richness]
    weights = [len(t.patches) * (1 + p / sum(powers) - 1 / len(tiles)) for t, p in zip(tiles, powers, strict=True)]
    first = math.floor(budget * 576 / run.patches + 0.5)
    quota = [(budget - first) * weight / sum(weights) for weight in weights]
    given = [math.floor(value) for value in quota]
    for tile in sorted(range(len(tiles)), key=lambda t: given[t] - quota[t])[: budget - first - sum(given)]:
        given[tile] += 1
    return [first, *given]


@pytest.mark.parametrize("size", [(672, 672), (640, 480), (300, 1000), (1000, 310), (333, 777)])
def test_globalcom2_split_equals_its_definition_and_loses_nothing(size):
    run = arranged(size)
    for seed, budget in enumerate((160, 321, 640)):
        score = scores(run, seed)[0]
        found = split(score, run, 10.0, budget)
        assert found == split_by_the_book(score, run, budget) and sum(found) == budget


def test_globalcom2_the_release_loses_fractions_and_full_tiles():
    """At a ratio of 0.9 a rich tile would need 1.57 times its patches: the release stops at all and keeps 2,523 of
    2,592; ours gives the rest to the other tiles."""
    run, score = stitched((2, 2), (24, 24), newline=False), torch.zeros(24, 24)
    score[12:, 12:] = 10.0
    assert split(score.flatten(), run, 10.0, 2592, official=True) == [518, 388, 388, 388, 576]
    assert split(score.flatten(), run, 10.0, 2592) == [518, 500, 499, 499, 576]
    assert split(torch.zeros(576), run, 10.0, 720, official=True) == [144] * 5
    assert sum(split(torch.zeros(576), run, 10.0, 640, official=True)) == 640
    assert sum(split(torch.zeros(576), run, 10.0, 642, official=True)) == 640  # five times 128.4


def test_globalcom2_a_tile_answers_for_what_it_shows():
    """Three tiles above each other; padding leaves 8, 24 and 8 rows. Scores at the image's upper third belong to the
    middle tile, which shows three fifths of it; the release's equal thirds put them on the first."""
    run, score = stitched((3, 1), (24, 24), (16, 56, 0, 24)), torch.zeros(24, 24)
    score[5:8] = 10.0
    assert [len(tile.patches) for tile in run.crops[1:]] == [192, 576, 192]
    assert split(score.flatten(), run, 10.0, 400) == [150, 26, 198, 26]
    found = split(score.flatten(), run, 10.0, 400, official=True)
    assert found[1] > 2 * found[3] and found[2] == int(576 * (400 / 1536) * (2 / 3))


def test_globalcom2_equal_parts_equal_loops():
    score = torch.rand(7 * 9)
    for tiles in ((2, 2), (1, 3), (3, 1), (2, 4), (9, 1)):
        expected = [0.0] * (tiles[0] * tiles[1])
        high, wide = max(7 // tiles[0], 1), max(9 // tiles[1], 1)
        for i, value in enumerate(score.tolist()):
            row, column = min(i // 9 // high, tiles[0] - 1), min(i % 9 // wide, tiles[1] - 1)
            expected[row * tiles[1] + column] += value
        assert equal_parts(score, (7, 9), tiles) == pytest.approx(expected)


def between(table, row, column, size):
    """The value of a table at (row, column) of the same table resized to `size`: four neighbours, edges repeated."""
    value, where = 0.0, []
    for place, length, wanted in ((row, len(table), size[0]), (column, len(table[0]), size[1])):
        at = max((place + 0.5) * length / wanted - 0.5, 0.0)
        low = min(int(at), length - 1)
        where.append([(low, 1 - (at - int(at))), (min(low + 1, length - 1), at - int(at))])
    for i, share in where[0]:
        for j, other in where[1]:
            value += share * other * table[i][j].item()
    return value


@pytest.mark.parametrize(
    "run", [stitched((2, 2), (4, 4)), stitched((2, 2), (4, 4), (1, 7, 0, 8)), stitched((1, 3), (4, 4), (0, 4, 3, 9))]
)
def test_globalcom2_overview_is_the_small_copy_laid_over_the_tiles(run):
    values = torch.randn(len(run.crops), 16)
    seen = image_with(run, {SCORE: values})
    rows, columns = run.grid[0] * run.tiles[0], run.grid[1] * run.tiles[1]
    shown = [(n, c // 4, c % 4) for n, crop in enumerate(run.crops) for c in crop.patches.tolist() if n]
    places = [((n - 1) // run.tiles[1] * 4 + r, (n - 1) % run.tiles[1] * 4 + c) for n, r, c in shown]
    top, left = min(r for r, _ in places), min(c for _, c in places)
    size = (max(r for r, _ in places) - top + 1, max(c for _, c in places) - left + 1)
    assert size[0] <= rows and size[1] <= columns
    found = torch.cat([overview(seen, number, SCORE) for number in range(1, len(run.crops))])
    expected = [between(values[0].view(4, 4), r - top, c - left, size) for r, c in places]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=0)
    assert torch.equal(overview(seen, 0, SCORE), values[0])


def test_globalcom2_ranking_equals_its_definition():
    run = arranged((640, 480))
    values = scores(run)
    for part in parts_with(GlobalCom2(budget=300), run, {SCORE: values}):
        number, crop = part.numbers[0], run.crops[part.numbers[0]]
        own = values[number][crop.patches].double()
        copy = overview(part.image, number, SCORE).double()
        total = own / own.square().sum().sqrt() + copy / copy.square().sum().sqrt()
        order = sorted(range(len(own)), key=lambda i: -total[i].item())[: part.reducer.budget]
        assert part.reducer.encoder(state_of(part)).kept[0].tolist() == sorted(order)


def test_globalcom2_the_small_copy_has_a_planted_say_in_every_tile():
    """Tiles without an opinion of their own keep what the base image looks at: the centre of the image."""
    run, values = stitched((2, 2), (24, 24), newline=False), torch.full((5, 576), 1.0)
    values[0].view(24, 24)[9:15, 9:15] = 9.0
    kept = [code for code in kept_of(GlobalCom2(budget=180), run, {SCORE: values}) if code >= 576]
    corners = {1: (23, 23), 2: (23, 0), 3: (0, 23), 4: (0, 0)}  # the corner of each tile that is nearest to the centre
    for code in kept:
        tile, row, column = code // 576, code % 576 // 24, code % 24
        assert abs(row - corners[tile][0]) < 7 and abs(column - corners[tile][1]) < 7
    assert len(kept) == 144
    # And a tile with a strong opinion keeps that too.
    values[4, :10] = 50.0
    kept = kept_of(GlobalCom2(budget=180), run, {SCORE: values})
    assert set(range(4 * 576, 4 * 576 + 10)) <= set(kept)


def test_globalcom2_newlines_are_in_the_budget_and_the_release_adds_them():
    run = arranged((672, 672))
    signals = {SCORE: scores(run)}
    ours, dropped, theirs = (
        kept_of(GlobalCom2(budget=320, **options), run, signals)
        for options in ({}, {"newlines": "drop"}, {"official": True})
    )
    assert len(ours) == 320 and ours.count(-1) == 48
    assert len(dropped) == 320 and dropped.count(-1) == 0
    assert theirs.count(-1) == 48 and 316 <= len(theirs) - 48 <= 320


def test_globalcom2_official_selects_what_the_release_selects():
    """The official functions on drawn scores: the very same tokens. Also in the same order, but for the base image's,
    which the release has best first, and where unpadding cuts columns: there the release takes the number of a patch
    among those that are left for its place in the whole tile. Rows that were cut off have a newline token there."""
    meta, arrays = recording(FOLDER / "globalcom2-drawn.npz")
    assert len(arrays["cases"]) == 40
    for row, case in enumerate(arrays["cases"].tolist()):
        run = arranged(tuple(arrays["sizes"][row]))
        values = 0.5 * recipe.draw(f"globalcom2-scores-{case}", (len(run.crops), 576))
        values[0, :200] += case % 3 * 0.1
        reducer = GlobalCom2(budget=int(arrays["budgets"][row]), official=True)
        ours = kept_of(reducer, run, {SCORE: values})
        theirs = arrays["kept"][row]
        theirs = theirs[theirs >= -1].tolist()
        copy = sum(0 <= code < 576 for code in theirs)
        assert theirs[:copy] != sorted(theirs[:copy]), "the release: best first"
        assert sorted(code for code in ours if code >= 0) == sorted(code for code in theirs if code >= 0), row
        if all(crop.columns == 24 for crop in run.crops):
            assert [code for code in ours[copy:] if code >= 0] == [code for code in theirs[copy:] if code >= 0], row
        assert ours.count(-1) == len(run.newlines) and theirs.count(-1) == 24 * run.tiles[0], row
        if all(len(crop.patches) == 576 for crop in run.crops):
            assert ours[copy:] == theirs[copy:], row
    assert meta["options"] == {"official": "true"}


def test_globalcom2_logits_are_those_of_the_release():
    _, arrays = recording(FOLDER / "globalcom2-drawn.npz")
    pixels = torch.stack([recipe.case(number).pixels for number in (0, 1)])
    with torch.inference_mode():
        encoded = encode(parity_model().tower, pixels, -2, [SCORE])
    torch.testing.assert_close(encoded.scores[SCORE], torch.from_numpy(arrays["logits"]), atol=2e-4, rtol=0)


def test_globalcom2_an_image_in_one_crop_is_its_own_small_copy():
    values = torch.zeros(1, 16)
    values[0, [2, 7, 11]] = torch.tensor([3.0, 1.0, 2.0])
    assert kept_of(GlobalCom2(budget=3), single(4, 4), {SCORE: values}) == [2, 7, 11]
    run = frames(2, 4, 4)
    assert counts_of(kept_of(GlobalCom2(budget=5), run, {SCORE: torch.rand(2, 16)}), run) == [3, 2]
