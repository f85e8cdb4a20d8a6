"""One method on top of another, against both applied by hand; the contract suite covers compositions, too."""

import dataclasses
from pathlib import Path

import pytest
import torch

from eval.answers.source_hash import answer_sources
from eval.config import RunConfig, build_reducer, changed_options, options_by_method
from eval.efficiency.oracle import oracle_of
from llava.errors import UserError
from llava.model.builder import load
from llava.pipeline.accounting import Timer
from llava.pipeline.generate import run_decoder, until_decoder
from llava.pipeline.sequence import ImageReduction
from llava.processing.prompt import Sample
from llava.processing.video import Video
from llava.reduction import DecoderState, ModelSpec, PatchGrid, compose, registry
from llava.reduction.budget import planned, require
from llava.reduction.token_layout import spec_of
from tests import contract
from tests.conftest import QUESTIONS, drawn_image, samples
from tests.tiny_checkpoints_families import make_tiny_next, make_tiny_video, save_next_transformers

LLAVA_7B = ModelSpec(576, 32, PatchGrid(24, 24), tower_blocks=24)
# With the second method in the decoder; tests/test_restore.py is about the others.
STAGED = [name for name in contract.COMPOSED if not name.endswith("+restore")]
PAIRS = [*STAGED, "otprune+priortr", "consensusdrop+sparsevlm", "visionzip+dart", "cdpruner+fastv"]


def kept(record) -> list[list[list[int]]]:
    return [[step.reduction.kept[0].tolist() for step in steps] for steps in record.steps]


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("count", [1, 3])
@torch.inference_mode()
def test_is_the_first_method_and_then_the_second_on_what_it_left(name, count, tiny):
    """16 tokens and a budget of 4: the first method leaves 8, the second has a mean of 4 of these 8."""
    batch, (first, second) = samples(count, text_only=()), name.split("+")
    reducer = registry.build(name, 4)
    logits, accounts, record = contract.run(tiny, batch, reducer)
    before, after = registry.build(first, 8), registry.build(second, 4)
    stages = until_decoder(tiny, batch, before, Timer(tiny.device))
    sequence = stages.start
    assert [stop - start for start, stop in sequence.images] == [8] * count
    spec = dataclasses.replace(tiny.spec, visual_tokens=8, layout=PatchGrid(1, 8))
    steps = [[step.reduction.kept[0].tolist()] for (step,) in stages.record.steps]

    def between(now, layer, entered, cache, _):
        tokens = now.take(now.hidden, now.images)
        ids = tuple(sample.id for sample in batch)
        state = DecoderState(
            ids=ids, spec=spec, tokens=tokens, sequence=now, llm=tiny.llm, layer=layer, entered=entered,
            keys=cache[layer - 1].keys,
            start=sequence,
        )  # fmt: skip
        reduction = after.decoder(state)
        if reduction is None:
            return now
        for row, own in enumerate(reduction.kept.tolist()):
            steps[row].append(own)
        rows, merged = [(row, 0) for row in range(count)], reduction.apply(tokens) if reduction.merges else None
        return now.reduce([ImageReduction(rows, reduction, merged)], after.positions == "renumber")

    state = run_decoder(tiny.llm, sequence, after.decoder_layers(4), between)
    assert kept(record) == steps and all(len(own) > 1 for own in steps)
    torch.testing.assert_close(logits, tiny.logits(state.hidden), atol=1e-5, rtol=0)
    for accounting in accounts:
        assert accounting.tokens_per_layer == reducer.tokens_per_layer(tiny.spec) == after.tokens_per_layer(spec)
        assert accounting.tokens_per_layer[0] == 8 and abs(accounting.mean - 4) <= 0.5


def test_the_budget_is_shared_as_the_page_says():
    """The geometric mean of 576 and 64 is 192; FastV's stage then makes the mean over 32 layers 64."""
    both = compose("divprune", "fastv")
    assert both(budget=64).tokens_per_layer(LLAVA_7B) == (192,) * 2 + (55,) * 30
    assert both(budget=64, share=1).tokens_per_layer(LLAVA_7B) == (64,) * 32
    assert both(budget=64, share=0).tokens_per_layer(LLAVA_7B) == registry.build("fastv", 64).tokens_per_layer(LLAVA_7B)
    assert both(budget=64, fastv__schedule="kept").tokens_per_layer(LLAVA_7B) == (192,) * 2 + (64,) * 30
    ratio = registry.build("divprune+fastv", "1/9", visual_tokens=576)
    assert planned(ratio, LLAVA_7B) == (192,) * 2 + (55,) * 30
    assert planned(ratio, dataclasses.replace(LLAVA_7B, visual_tokens=144))[0] == 48


@pytest.mark.parametrize("name", PAIRS)
def test_at_the_ends_of_the_share_one_method_does_everything(name, tiny):
    for share, alone in zip((1, 0), name.split("+"), strict=True):
        results = [
            contract.run(tiny, samples(3), reducer)
            for reducer in (registry.build(name, 5, {"share": share}), registry.build(alone, 5))
        ]
        for ours, theirs in zip(*(kept(record) for _, _, record in results), strict=True):
            assert ours[-len(theirs) :] == theirs or not theirs, share  # VisionZip drops CLS where it keeps all patches
        torch.testing.assert_close(results[0][0], results[1][0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "sees"), [("divprune+fastv", 1), ("fastervlm+pyramiddrop", 0)])
def test_a_planted_token_is_kept_by_every_stage_that_ranks_by_signals(name, sees, tiny):
    """DivPrune reads no signal and may drop it; of what it leaves, FastV keeps it."""
    batch = samples(5, text_only=())
    with contract.planted_signals({sample.id: [7] for sample in batch}):
        record = contract.run(tiny, batch, registry.build(name, 6))[2]
    found = [7 in contract.standing(steps)[0] for steps in record.steps]
    assert found == [not sees or 7 in steps[0].reduction.kept for steps in record.steps] and any(found)


@pytest.fixture(scope="module")
def tiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiled")
    save_next_transformers(folder / "next", make_tiny_next("mistral"))
    save_next_transformers(folder / "video", make_tiny_video())
    return [load(folder / name, device="cpu") for name in ("next", "video")]


@pytest.mark.parametrize("name", ["fastervlm+pyramiddrop", "hired+pyramiddrop"])  # HiRED splits by scores of its own
def test_tiles_and_frames_share_what_the_first_method_leaves(name, tiled):
    """Every tile was given its part of the whole budget; the second method sees the tokens of all tiles together."""
    images = drawn_image(0, (112, 112)), Video(tuple(drawn_image(frame) for frame in range(8)))
    options = [{}, {"newlines": "keep"}, {"tile_budget": "global"}, {"retention_ratio": 0.2}]
    for model, image in zip(tiled, images, strict=True):
        sample, layout = Sample("q", QUESTIONS[0], image=image), model.views(image)[1]
        spec = spec_of(model.spec, layout)
        for one in options:
            budget = None if "retention_ratio" in one else 20
            reducer = registry.build(name, budget, one, layout.tokens)
            require(reducer, model.spec)
            found = contract.run(model, [sample], reducer)
            first = dataclasses.replace(reducer.before_decoder(spec), retention_ratio=0)
            alone = contract.run(model, [sample], first)
            assert kept(found[2])[0][0] == kept(alone[2])[0][0]
            (accounting,), (entering, *_) = found[1], alone[1][0].tokens_per_layer
            assert accounting.tokens_per_layer == planned(reducer, spec) and accounting.tokens_per_layer[0] == entering
            own = reducer.for_image(spec).budget
            assert abs(entering - (layout.tokens * own) ** 0.5) <= 1 and abs(accounting.mean - own) <= 0.5
            oracle = contract.run(model, [sample], oracle_of(reducer, model.spec))[1][0]
            assert oracle.tokens_per_layer == accounting.tokens_per_layer


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("divprune+visionzip", {}, "second one .* visionzip acts after"),
        ("visiondrop+fastv", {}, "first one .* visiondrop acts"),
        ("tome+fastv", {}, "tome acts inside the tower"),
        ("full+fastv", {}, "full reduces nothing"),
        ("divprune+fastvv", {}, "'fastvv'. Did you mean 'fastv'"),
        ("divprune+fastv+dart", {}, "names two methods, .* got 'divprune.fastv.dart'"),
        ("divprune+", {}, "two methods, .* got 'divprune.'"),
        ("divprune+fastv", {"fastv.layr": "2"}, "option of divprune.fastv 'fastv.layr'. Did you mean 'fastv.layer'"),
        ("divprune+fastv", {"fastv.newlines": "keep"}, "divprune.fastv 'fastv.newlines'"),
        ("divprune+fastv", {"divprune.retention_ratio": "0.5"}, "'divprune.retention_ratio'"),
        ("divprune+fastv", {"divprune.tile_budget": "each", "tile_budget": "global"}, "divprune.fastv is given twice"),
        ("divprune+fastv", {"fastv.layer": "-1"}, "fastv.layer must be"),
        ("divprune+fastv", {"share": "2"}, "share must be"),
        ("divprune+pyramiddrop", {"budget": 192}, "leaves 333 of 576 tokens. Of these, pyramiddrop cannot .*share may"),
        ("trim+fastv", {"trim.adaptive": "true"}, "depends on the image"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_in_one_sentence(name, options, sentence):
    spec = dataclasses.replace(LLAVA_7B, has_text_tower=True)
    with pytest.raises(UserError, match=sentence):
        require(registry.build(name, options.pop("budget", 64), options), spec)


def test_options_seeds_results_and_sources_know_both_parts():
    read = options_by_method(["fastv", "random+fastv"], ["fastv.layer=3", "random+fastv.share=0.3"])
    assert read == {"fastv": {"layer": "3"}, "random+fastv": {"fastv.layer": "3", "share": "0.3"}}
    config = RunConfig("random+fastv", 64, seed=7, options={**read["random+fastv"], "random.positions": "original"})
    reducer = build_reducer(config, 576)
    assert (reducer.first.seed, reducer.first.positions, reducer.second.layer, reducer.second.positions) == (
        7, "original", 3, "original",
    )  # fmt: skip
    changed = changed_options("random+fastv", dataclasses.asdict(reducer))
    assert changed == ["positions=original", "share=0.3", "random__seed=7", "fastv__layer=3"]
    files = {Path(name).stem for name in answer_sources(reducer)}
    assert {"controls", "fastv", "_staged", "compose"} <= files
    assert not {"random+fastv", *contract.COMPOSED} & set(registry.names())
