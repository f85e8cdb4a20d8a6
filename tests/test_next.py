"""LLaVA-NeXT at run time: the official merge of crops, and every method on images in several crops."""

import dataclasses

import pytest
import torch

from llava.errors import UserError
from llava.model.builder import load
from llava.pipeline.generate import prefill
from llava.processing.prompt import Sample
from llava.reduction import PatchGrid, registry
from llava.reduction.budget import bounds, planned, require
from llava.reduction.reducer import options_of
from llava.reduction.token_layout import spec_of
from tests import contract
from tests.conftest import QUESTIONS, drawn_image
from tests.contract import COMPOSED, accepted, run
from tests.tiny_checkpoints import save_text_tower
from tests.tiny_checkpoints_families import make_tiny_next, save_next_transformers
from tests.watch import watched

# Tiles of 56 pixels: one above the other, side by side, two by two; with and without padding.
SIZES = ((60, 110), (120, 50), (112, 112), (70, 112))
BUDGETS = (30, 20, 64)  # the last for a method that acts in the middle of the decoder
INSIDE = {"input_grid", "tower"}
WHOLE_TILES = {name for name in contract.METHODS if registry.method(name).acts_in & INSIDE}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("next") / "tiny-next"
    model = save_next_transformers(folder, make_tiny_next("mistral"))
    save_text_tower(folder / "text_tower", model)
    return folder


@pytest.fixture(scope="module", params=["spatial_unpad", "spatial"])
def model(request, path):
    """Grouped-query heads, 16 patches per crop."""
    return load(path, device="cpu", merge=request.param, force=(112, 112) if request.param == "spatial" else None)


def batch(sizes=SIZES) -> list[Sample]:
    rows = [Sample(f"q{i}", QUESTIONS[i], image=drawn_image(i, size)) for i, size in enumerate(sizes)]
    return [*rows, Sample("text", QUESTIONS[3])]


@pytest.fixture(params=[*(name for name in contract.METHODS if name != "full"), *COMPOSED])
def name(request) -> str:
    return request.param


def test_every_method_meets_its_budget_over_crops(name, model):
    """Unpadded crops of any shape, budgets that crops do not divide, images with fewer tokens than the budget."""
    if name in WHOLE_TILES and model.anyres.merge != "spatial":
        with pytest.raises(UserError, match="merge=spatial"):
            run(model, batch(), registry.build(name, 20))
        return
    reducers = accepted(registry.method(name), {}, model, 2, BUDGETS)
    assert reducers
    for reducer in reducers:
        _, accounts, _ = run(model, batch(), reducer)
        for sample, accounting in zip(batch(), accounts, strict=True):
            if sample.image is None:
                assert accounting.tokens_per_layer == (0,) * 4
                continue
            full = model.views(sample.image)[1]
            plan, (least, most) = (of(reducer, spec_of(model.spec, full)) for of in (planned, bounds))
            assert least <= accounting.mean <= most, (reducer, full.tokens)
            if plan is None:
                continue
            assert accounting.tokens_per_layer == plan, (reducer, full.tokens)
            # PyramidDrop's stages keep fixed shares, so it cannot keep nearly all of a small image.
            if reducer.budget < full.patches * (0.5 if "pyramiddrop" in name else 1):
                assert abs(accounting.mean - reducer.budget) <= reducer.rounding
            assert accounting.planned == accounting.mean


def test_every_method_takes_batches_as_single_images(name, model):
    reducers = accepted(registry.method(name), {}, model, 1, BUDGETS)
    if not reducers or (name in WHOLE_TILES and model.anyres.merge != "spatial"):
        return
    samples, (reducer,) = batch(), reducers
    logits, accounts, record = run(model, samples, reducer)
    for i, sample in enumerate(samples):
        alone, (accounting,), single = run(model, [sample], reducer)
        torch.testing.assert_close(logits[i], alone[0], atol=2e-4, rtol=0)
        assert accounting == accounts[i]
        for ours, theirs in zip(record.steps[i], single.steps[0], strict=True):
            assert torch.equal(ours.reduction.kept, theirs.reduction.kept)


def test_a_budget_of_all_tokens_changes_nothing(name, model):
    total = model.visual_tokens
    if name in WHOLE_TILES and (model.anyres.merge != "spatial" or total % 5):
        return
    expected, _, _ = run(model, batch(), registry.build("full", total))
    actual, _, _ = run(model, batch(), registry.build(name, total))
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=0)


def test_every_other_split_meets_the_budget_too(name, model):
    choices = options_of(registry.method(name))["tile_budget"].metadata["choices"]
    for tile_budget in choices[1:] if name not in ("hired", "globalcom2") else choices:
        reducer = registry.build(name, 24, {"tile_budget": tile_budget})
        require(reducer, model.spec)
        _, accounts, record = run(model, batch()[1:3], reducer)
        room = reducer.rounding if reducer.parts else 0
        ends = bounds(reducer, model.spec) if reducer.image_decides else (24 - room, 24 + room)
        assert all(ends[0] <= accounting.mean <= ends[1] for accounting in accounts)
        for steps in record.steps:
            anchors = steps[0].reduction.kept[0]
            assert len(anchors.unique()) == len(anchors)


def test_newline_tokens_are_counted_once(path):
    """3 x 250 pixels are a base image of 16 patches and 12 newline tokens. The 12 were taken off twice, in plan and
    run alike: a budget of 14 kept 4 tokens, one of 20 with newlines=keep kept 16."""
    model, sample = load(path, device="cpu"), Sample("thin", QUESTIONS[0], image=drawn_image(0, (3, 250)))
    layout = model.views(sample.image)[1]
    assert (layout.tokens, layout.patches, len(layout.crops)) == (28, 16, 1)
    for name in ("fastervlm", "consensusdrop", "globalcom2", "vscan", "visiondrop"):
        for budget, newlines, expected in ((14, "drop", 14), (20, "drop", 16), (20, "keep", 20)):
            reducer = registry.build(name, budget, {"newlines": newlines})
            _, (accounting,), record = run(model, [sample], reducer)
            if name == "fastervlm":
                there = torch.isin(layout.newlines, record.steps[0][0].reduction.kept[0])
                assert there.all() == there.any() == (newlines == "keep")
            assert abs(accounting.mean - expected) <= reducer.rounding and accounting.planned == accounting.mean, (
                name,
                budget,
            )
    # VisionDrop's decoder stages kept as many tokens less as there are newline tokens, and no run met its plan.
    _, accounts, _ = run(model, batch(), registry.build("visiondrop", 30, {"newlines": "keep"}))
    assert [(accounting.mean, accounting.planned) for accounting in accounts[:-1]] == [(30, 30)] * 4


def test_kept_tokens_are_the_full_run_at_these_places(path):
    """What reaches the decoder is a selection of the unreduced run: tiles, newlines and projection in place."""
    model, seen = load(path, device="cpu"), {}

    for reducer in (registry.build("full", model.visual_tokens), registry.build("fastervlm", 30, {"newlines": "keep"})):
        with watched() as found:
            _, record = prefill(model, batch(), reducer)
        seen[reducer.name] = {row: image.tokens for row, image in found.images.items()}
    for image, tokens in seen["fastervlm"].items():
        whole = seen["full"][image]
        anchors = record.steps[image[0]][0].reduction.kept[0] if record.steps[image[0]] else torch.arange(len(whole))
        torch.testing.assert_close(tokens, whole[anchors])


@pytest.mark.parametrize("tile_budget", ["thumbnail", "global"])
def test_other_splits_follow_saliency(path, tile_budget):
    """A planted tile: CLS attention lies in the last tile, and in the quarter of the base image that it shows."""
    model = load(path, device="cpu", merge="spatial", force=(112, 112))
    real = model.encode_images

    def planted(*arguments):
        found = real(*arguments)
        for one in found:
            for values in one.encoded.scores.values():
                values[:] = 1e-6
                values[4] = torch.linspace(1, 2, 16)
                values[0].view(4, 4)[2:, 2:] = 1.0
        return found

    model.encode_images = planted
    _, _, record = run(model, batch()[:1], registry.build("fastervlm", 20, {"tile_budget": tile_budget}))
    crop = model.views(drawn_image(0))[1].origins()[:, 0]
    assert torch.bincount(crop[record.steps[0][0].reduction.kept[0]], minlength=5).tolist() == [4, 0, 0, 0, 16]


def test_merged_tokens_stay_inside_their_crop(path):
    model = load(path, device="cpu", merge="spatial", force=(112, 112))
    crop = model.views(drawn_image(0))[1].origins()[:, 0]
    for name in ("consensusdrop", "visionzip"):
        _, _, record = run(model, batch()[:1], registry.build(name, 40))
        reduction = record.steps[0][0].reduction
        used = reduction.assignment[0] >= 0
        origins = crop if reduction.inputs == 80 else model.views(drawn_image(0))[1].with_cls.origins()[:, 0]
        assert torch.equal(origins[reduction.kept[0]][reduction.assignment[0][used]], origins[used])
        assert torch.allclose(reduction.apply(torch.ones(1, reduction.inputs, 1)), torch.ones(1, 40, 1))


def test_original_positions_are_places_in_the_whole_run(path):
    model = load(path, device="cpu")

    sample = batch()[2]
    reducer = registry.build("fastervlm", 30, {"positions": "original"})
    with watched() as found:
        _, record = prefill(model, [sample], reducer)
    sequence = found.sequences["embedded"]
    ((start, stop),) = sequence.visual[0]
    anchors = record.steps[0][0].reduction.kept[0]
    assert torch.equal(sequence.position[0, start:stop], anchors + start)
    assert int(sequence.position[0, stop]) == start + model.views(sample.image)[1].tokens


def test_wrong_choices_are_refused(path, tiny_path):
    with pytest.raises(UserError, match="spatial_unpad"):
        load(path, device="cpu", merge="spatial_unpadded")
    with pytest.raises(UserError, match="no choice of merge"):
        load(tiny_path, device="cpu", merge="spatial")
    with pytest.raises(UserError, match="fastervlm needs a budget of at least 5 here, got 3"):
        require(registry.build("fastervlm", 3), load(path, device="cpu").spec)


def test_a_budget_below_the_newline_tokens_of_some_image_is_refused(path):
    """A tall image has more newline tokens than the largest one; keeping them all must fit into the budget."""
    model = load(path, device="cpu")
    most = max(len(model.anyres.arrange(size).newlines) for size in model.anyres.pinpoints)
    assert most > len(model.largest.newlines)
    with pytest.raises(UserError, match="newlines=drop"):
        require(registry.build("fastervlm", most, {"newlines": "keep"}), model.spec)
    reducer = registry.build("fastervlm", most + 5, {"newlines": "keep"})
    require(reducer, model.spec)
    _, (accounting,), _ = run(model, [Sample("tall", "where is it", image=drawn_image(0, (56, 168)))], reducer)
    assert accounting.mean == min(most + 5, accounting.visual_tokens)


def test_coordinates_are_those_of_each_tile_also_when_tiles_are_ranked_together(path):
    """Tiles of different shapes are one long row to a method; their tokens still know where they are in their tile."""
    model, found = load(path, device="cpu"), []

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Look(registry.method("uniform")):
        tile_budget: str = "global"

        def prompt(self, state):
            found.append((state.coordinates(), state.tokens.shape[1]))
            return None

    _, record = prefill(model, batch()[1:2], Look(budget=20, tile_budget="global"))
    (layout,) = (image.layout for image in record.images[0])
    ((place, tokens),) = found
    grids = [(tile.rows, tile.columns) for tile in layout.crops if len(tile.patches)]
    assert len(set(grids)) > 1 and place.shape == (tokens, 2)
    expected = torch.cat([PatchGrid(*grid).coordinates() for grid in grids])
    assert torch.equal(place, expected)
