"""HiRED: the ranking, and the split of a budget over tiles, against loops, planted answers and the release itself."""

import pytest
import torch

from baselines.hired import EARLY, LATE, HiRED, crop_budgets, crop_budgets_as_released, salient_patches
from llava.errors import UserError
from llava.model.builder import load
from llava.pipeline.prefill import prefill
from llava.processing.prompt import Sample
from llava.reduction import registry
from llava.reduction.budget import planned
from llava.reduction.reducer import EncoderState
from llava.reduction.scores import TowerScore
from llava.reduction.token_layout import ModelSpec, PatchGrid, frames, spec_of, stitched
from tests.conftest import QUESTIONS, picture
from tests.drawn_pictures import arranged, counts_of, kept_of
from tests.parity.harness import FOLDER, recording
from tests.parity.model import draw
from tests.tiny_checkpoints_families import make_tiny_next, save_next_transformers

LLAVA = ModelSpec(576, 32, PatchGrid(24, 24), 24)


def encode(attention, budget):
    signals = {TowerScore("cls_attention"): attention}
    batch, tokens = attention.shape
    state = EncoderState(
        ids=("a",) * batch, features=torch.zeros(batch, tokens, 2), scores=signals, layout=PatchGrid(4, 4)
    )
    return HiRED(budget=budget).encoder(state)


@pytest.mark.parametrize("budget", [1, 5, 15])
def test_equals_its_definition(budget):
    attention = torch.rand(3, 16)
    expected = [sorted(sorted(range(16), key=lambda i: -row[i])[:budget]) for row in attention.tolist()]
    assert encode(attention, budget).kept.tolist() == expected


def test_planted_patches_are_kept():
    attention = torch.full((2, 16), 0.01)
    attention[0, [4, 9, 15]] = attention[1, [0, 1, 2]] = 0.2
    assert encode(attention, 3).kept.tolist() == [[4, 9, 15], [0, 1, 2]]


def test_llava_15_keeps_its_budget_in_every_layer():
    assert HiRED(budget=64).tokens_per_layer(LLAVA) == (64,) * 32
    assert HiRED(budget=16).keeps_all(16)


def shown_by(sizes, index, length):
    """The numbers below `length` that the index-th of neighbours of these sizes stands for."""
    edges = [sum(sizes[:end]) / sum(sizes) * length for end in (index, index + 1)]
    return [i for i in range(length) if int(edges[0] + 1e-9) <= i < int(edges[1] + 1e-9)]


def budgets_by_the_book(early, count, run, budget):
    """Loops over patches and tiles; a tile shows the share of the picture that its rows and columns are."""
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
def test_split_equals_its_definition(size):
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


def test_planted_tile_gets_the_budget_and_not_a_strip_of_the_picture():
    """HiRED@502d6dd cuts the flat 24 x 24 map into four runs of six rows: what it takes for the upper right tile is a
    strip over the whole width, and half of the budget goes to the upper left tile, where nothing is."""
    salient = salient_patches(strange(), 144)
    assert crop_budgets(salient, arranged((672, 672)), 100) == [0, 100, 0, 0]
    assert crop_budgets_as_released(salient, 4, 100) == [50, 50, 0, 0]


def test_planted_tile_of_a_picture_whose_padding_was_cut_off():
    """Half as wide as high: each tile shows twelve columns, and still half of the base image's width."""
    narrow = stitched((2, 2), (24, 24), (0, 48, 12, 36))
    assert [crop.columns for crop in narrow.crops[1:]] == [12] * 4
    assert crop_budgets(salient_patches(strange(), 144), narrow, 100) == [0, 100, 0, 0]


def test_what_a_full_tile_cannot_take_goes_to_the_others():
    early = strange()
    early[-1] = 0.5
    assert crop_budgets(salient_patches(early, 145), arranged((672, 672)), 700) == [0, 576, 0, 124]
    assert crop_budgets_as_released(salient_patches(strange(), 144), 4, 1500) == [576, 576, 0, 0]


def test_nothing_is_lost_by_rounding():
    """The release rounds every tile's share down: three equal tiles of a budget of 8 keep 6."""
    salient, run = torch.ones(36), stitched((3, 1), (6, 6), newline=False)
    assert crop_budgets(salient, run, 8) == [3, 3, 2]
    assert crop_budgets_as_released(salient, 3, 8) == [2, 2, 2]


def drawn(row: int, arrays) -> dict[TowerScore, torch.Tensor]:
    case, count = int(arrays["cases"][row]), len(arranged(tuple(arrays["sizes"][row])).crops)
    early = draw(f"hired-early-{case}", (count, 4, 576)).abs()
    early[0, :, :200] *= 1 + case % 3 / 4
    return {EARLY: early.mean(1), LATE: draw(f"hired-late-{case}", (count, 4, 576)).abs().mean(1)}


@pytest.mark.parametrize("merge", ["spatial", "spatial_unpad"])
def test_official_selects_what_the_release_selects(merge):
    """The official functions on drawn attention: before unpadding for all pictures, and what is left behind it where
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


def test_the_default_keeps_the_whole_budget_where_the_release_does_not():
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
def test_what_unpadded_tiles_cannot_take_goes_to_the_base_image(size, counts):
    """It was dropped: 300 x 150 pixels kept 608 of 640 and 200 x 65 kept 512, and the plan said 640."""
    run = arranged(size)
    signals = {EARLY: torch.rand(3, 576), LATE: torch.rand(3, 576)}
    assert counts_of(kept_of(HiRED(budget=640), run, signals), run) == counts
    assert planned(HiRED(budget=640), spec_of(LLAVA, run)) == (640,) * 32
    released = HiRED(budget=640, official=True)
    assert len(kept_of(released, run, signals)) < 640 and planned(released, spec_of(LLAVA, run)) is None


@pytest.mark.parametrize(("crops", "first"), [("content", 40), ("each", 16), ("thumbnail", 16), ("global", 75)])
def test_other_splits_stay_possible(crops, first):
    late = torch.linspace(1, 2, 576).repeat(5, 1)
    late[0, :75], late[0, 75:] = 3.0, 0.0
    run, reducer = arranged((672, 672), "spatial"), HiRED(budget=80, crops=crops)
    assert (EARLY in reducer.tower_scores(tiled=True)) == (crops == "content")
    counts = counts_of(kept_of(reducer, run, {LATE: late, EARLY: late}), run)
    assert counts[0] == first and sum(counts) == 80


def test_frames_of_a_video_have_even_shares():
    signals = {signal: torch.rand(4, 16) for signal in (EARLY, LATE)}
    run = frames(4, 4, 4)
    assert counts_of(kept_of(HiRED(budget=10), run, signals), run) == [3, 3, 2, 2]


def test_rate_of_the_release_is_one_of_whole_crops():
    spec = spec_of(LLAVA, arranged((640, 480)))
    assert HiRED(budget=1, retention_ratio=0.2, official=True).for_picture(spec).budget == 576
    assert HiRED(budget=1, retention_ratio=0.2).for_picture(spec).budget == round(0.2 * spec.visual_tokens)


def test_through_the_model(tmp_path):
    """The default meets its plan to the token; the release's counts depend on the picture, so it has no plan."""
    model = load(save_and_name(tmp_path), device="cpu")
    sample = Sample("a", QUESTIONS[0], image=picture(3, (60, 100)))
    full = spec_of(model.spec, model.views(sample.image)[1])
    for official in ("false", "true"):
        reducer = registry.build("hired", 30, {"official": official})
        state, record = prefill(model, [sample], reducer)
        (audit,) = record.accounting(state)
        if official == "false":
            assert audit.tokens_per_layer == planned(reducer, full) == (30,) * 4
        else:
            assert planned(reducer, full) is None and 20 < audit.mean < 30


def save_and_name(folder):
    save_next_transformers(folder / "tiny", make_tiny_next())
    return folder / "tiny"


def test_wrong_choices_are_refused():
    for alpha in (-0.1, 1.1):
        with pytest.raises(UserError, match="alpha must be between 0 and 1"):
            HiRED(budget=8, alpha=alpha)
    with pytest.raises(UserError, match="cannot do so for 5 tiles"):
        crop_budgets_as_released(torch.ones(576), 5, 10)
    assert crop_budgets_as_released(torch.zeros(576), 4, 10) == [0, 0, 0, 0]
