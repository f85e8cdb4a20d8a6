"""The contract: every registered method passes this suite by being registered."""

import dataclasses
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llava.errors import UserError
from llava.model.builder import load
from llava.model.llava_arch import Llava
from llava.pipeline.generate import generate
from llava.pipeline.turns import answer_turns
from llava.processing.prompt import Sample
from llava.reduction import registry
from llava.reduction.budget import require
from llava.reduction.reducer import Reducer
from llava.reduction.token_layout import ModelSpec, PatchGrid
from tests import contract, observed
from tests.attention_maps import eager_attention, noted_logits
from tests.conftest import QUESTIONS, drawn_image, samples
from tests.contract import run
from tests.tiny_checkpoints import make_tiny_llava, save_text_tower, save_transformers_layout
from tests.tiny_checkpoints_families import (
    make_tiny_next,
    make_tiny_qwen,
    save_next_transformers,
    save_qwen_transformers,
)

KINDS = {"appended", "scale", "duplicates", "unsorted", "uncounted"}  # of what known_deviations may excuse
CONTROLS = ("full", "none", "random", "uniform", "downsample")
ALL = 16  # visual tokens of the tiny model


@pytest.fixture(params=[*registry.names(), *contract.COMPOSED])
def name(request) -> str:
    return request.param


def reducing(name: str, tiny: Llava) -> Reducer:
    """The method at the first budget below the full one that it accepts; `full` is its own."""
    return (contract.accepted(registry.method(name), {}, tiny) or [registry.build(name, ALL)])[0]


def same_steps(first, second) -> bool:
    return len(first) == len(second) and all(
        a.place == b.place and torch.equal(a.reduction.kept, b.reduction.kept)
        for a, b in zip(first, second, strict=True)
    )


def test_every_choice_of_every_option_keeps_the_contract(name, tiny):
    """Only defaults were tested: unsorted indices passed in a branch that defaults do not reach."""
    batch = samples(4, text_only=(2,))
    for options in contract.configurations(registry.method(name)):
        reducers = contract.accepted(registry.method(name), options, tiny, 1 if options else 3)
        assert reducers or options or name == "full", "no budget below all tokens was accepted"
        for reducer in reducers:
            assert options or reducer.image_decides or reducer.tokens_per_layer(tiny.spec), (
                "by default a method keeps a budget; one that lets the image decide says why in `image_decides`"
            )
            contract.check(reducer, tiny, batch)


@pytest.fixture(scope="module")
def qwens(tmp_path_factory) -> list[Llava]:
    """Qwen2-VL and Qwen2.5-VL at 16 tokens for a square."""
    models = []
    for version in ("2", "2.5"):
        path = tmp_path_factory.mktemp("qwen")
        save_qwen_transformers(path, make_tiny_qwen(version))
        models.append(load(path, device="cpu", min_pixels=112**2, max_pixels=112**2))
    return models


def test_a_tower_without_a_class_token_keeps_the_contract(name, qwens):
    """13 of 25 methods refused Qwen-VL for its missing token, ConsensusDrop among them."""
    batch = [
        dataclasses.replace(one, image=one.image and drawn_image(4, (112, 112))) for one in samples(4, text_only=(2,))
    ]
    for model in qwens:
        reducers = contract.accepted(registry.method(name), {}, model)
        assert reducers or name == "full" or registry.method(name).needs_text_tower
        for reducer in reducers:
            if reducer.acts_in.isdisjoint(("tower", "input_grid")):
                contract.check(reducer, model, batch)


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> dict[str, tuple[Llava, list[Sample]]]:
    """A deeper model with more tokens, and images in tiles; one question is longer than CLIP's text tower takes."""
    path = tmp_path_factory.mktemp("others")
    save_transformers_layout(path / "wide", make_tiny_llava(num_hidden_layers=8, image=112), text_tower=True)
    save_text_tower(path / "tiled" / "text_tower", save_next_transformers(path / "tiled", make_tiny_next("mistral")))
    long = Sample("long", " ".join(QUESTIONS * 3), image=drawn_image(9))
    crops = [
        Sample(f"q{i}", QUESTIONS[i], image=drawn_image(i, size)) for i, size in enumerate(((112, 112), (70, 112)))
    ]
    return {
        "wide": (load(path / "wide", device="cpu"), [*samples(2), long]),
        "unpadded": (load(path / "tiled", device="cpu"), crops),
        "tiled": (load(path / "tiled", device="cpu", merge="spatial", force=(112, 112)), crops),
    }


def test_every_option_changes_something(name, tiny, others):
    """An option that no code read passed every test."""
    method = registry.method(name)
    said = {key.removeprefix("unused ") for key in method.known_deviations if key.startswith("unused ")}
    models = {"tiny": (tiny, samples(2)), **others}
    found = contract.unused(method, models, said) if name != "full" else []
    assert not found, (
        f"{name}: no value of {', '.join(found)} changes an answer; use the option, or say in known_deviations under "
        "'unused OPTION' why it has no effect here"
    )


@pytest.mark.parametrize("name", [name for name in contract.METHODS if name != "full"])
def test_the_metadata_says_what_the_method_does(name, others):
    """Mistakes planted in a new method passed, such as another block than stated or the least similar as a target."""
    observed.check(registry.method(name), others["wide"][0])


def test_what_signals_point_at_is_kept(name, tiny):
    """A reversed ranking passed: tokens that a method's signals point at are kept more often than the others."""
    batch, draw = samples(12, text_only=()), random.Random(0)
    planted = {sample.id: draw.sample(range(ALL), 4) for sample in batch}
    for options in contract.configurations(registry.method(name)):
        for reducer in contract.accepted(registry.method(name), options, tiny):
            with contract.planted_signals(planted) as read:
                _, _, record = run(tiny, batch, reducer)
            if not read or not all(record.steps):
                continue
            there = others_there = 0
            for sample, steps in zip(batch, record.steps, strict=True):
                place = contract.standing(steps)[0] - (steps[0].reduction.inputs - ALL)  # CLS is -1
                hits = int(torch.isin(place.unique(), torch.tensor(planted[sample.id])).sum())
                there, others_there = there + hits, others_there + int((place.unique() >= 0).sum()) - hits
            share, other = there / 4 / len(batch), others_there / (ALL - 4) / len(batch)
            # An option may choose a part of the tokens by something else, but not by the opposite.
            assert share > other * (0.75 if options else 1), (
                f"{contract.label(reducer)}: {share:.0%} of the tokens with the highest signals are kept and "
                f"{other:.0%} of the others: is the ranking the wrong way round?"
            )


def test_row_of_the_method_is_filled_in(name):
    """What the contract excuses is said in words, and only known excuses exist; every option has a sentence.

    Of code that was read, `release` says the licence, and what it leaves to chance.
    """
    method, card = registry.method(name), registry.method(name).metadata
    assert card.acts and (card.score or name in CONTROLS)
    assert bool(card.paper) == bool(card.url)
    for part in method.parts or (method,):
        about = part.metadata
        assert not about.code or (about.release and about.release.licence), "`release` gives the licence of the code"
    (row,) = registry.describe(name)
    assert row["summary"] and all(option["doc"] for option in row["options"])
    assert ("without a CLS token" in row) == ("CLS" in card.needs)
    for key, reason in method.known_deviations.items():
        kind, _, condition = key.partition(" with ")
        assert reason and (kind in KINDS or kind.removeprefix("unused ") in registry.options_of(method)), key
        assert not condition or condition.partition("=")[0] in registry.options_of(method), key


@pytest.mark.parametrize("name", [*contract.METHODS, *contract.COMPOSED])
def test_full_budget_changes_nothing(name, tiny):
    batch = samples()
    expected, _, _ = run(tiny, batch, registry.build("full", ALL))
    actual, _, _ = run(tiny, batch, registry.build(name, ALL))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def test_a_second_image_is_reduced_on_its_own(name, tiny):
    """Two images in one prompt: each meets the budget, and the first one's features do not depend on the second.

    VisionDrop's release leaves the second one at what its encoder stage gave.
    """
    reducer = reducing(name, tiny)
    both = dataclasses.replace(samples(1)[0], image=(drawn_image(0), drawn_image(5)))
    _, accounts, record = run(tiny, [both, *samples(2)], reducer)
    second = run(tiny, [dataclasses.replace(both, image=both.image[1])], reducer)[1][0]
    own = zip(accounts[1].tokens_per_layer, second.tokens_per_layer, strict=True)
    assert accounts[0].images == 2 and accounts[0].tokens_per_layer == tuple(map(sum, own))
    for number in ("", " #2"):
        steps = [s for s in record.steps[0] if s.place.endswith("#2") == bool(number)]
        assert len(steps) == len(record.steps[1])
    _, _, again = run(tiny, [both], reducer)
    assert all(same_steps([a], [b]) for a, b in zip(record.steps[0], again.steps[0], strict=True))


def test_text_only_prompts_are_untouched(name, tiny):
    text = [sample for sample in samples() if sample.image is None]
    expected, _, _ = run(tiny, text, registry.build("full", ALL))
    actual, _, record = run(tiny, text, reducing(name, tiny))
    torch.testing.assert_close(actual, expected, atol=0, rtol=0)
    assert not any(record.steps)


def test_nothing_stays_attached(name, tiny, monkeypatch):
    """Also after an error in the middle of the decoder, the model has no hook and answers as before."""
    reducer, batch = reducing(name, tiny), samples(2)
    expected, _, _ = run(tiny, batch, reducer)

    def count(module: nn.Module) -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())

    before = count(tiny.hf_model)

    def fail(*args, **kwargs):
        raise RuntimeError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(tiny.llm.layers[2], "forward", fail)
        with pytest.raises(RuntimeError, match="planted"):
            run(tiny, batch, reducer)
    assert count(tiny.hf_model) == before
    actual, _, _ = run(tiny, batch, reducer)
    torch.testing.assert_close(actual, expected, atol=0, rtol=0)


def test_fused_and_eager_main_path_select_the_same(name, tiny):
    reducer = reducing(name, tiny)
    _, _, fused = run(tiny, samples(), reducer)
    with eager_attention(tiny):
        _, _, eager = run(tiny, samples(), reducer)
    assert all(same_steps(a, b) for a, b in zip(fused.steps, eager.steps, strict=True))


def test_every_option_books_its_operations(name, tiny):
    """One sample and plain kernels, so that every product is a matmul that torch's counter sees."""
    for options in contract.configurations(registry.method(name)):
        for reducer in contract.accepted(registry.method(name), options, tiny) or [registry.build(name, ALL)]:
            with eager_attention(tiny), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                logits, _, record = run(tiny, samples(1), reducer)
                logits.argmax(-1)
            assert counter.get_total_flops() == record.operations.total, contract.label(reducer)


def test_a_question_that_is_asked_again_is_answered_alike(name, tiny):
    """With the tokens that the first question left in each layer, merged or not, a later one is what it was."""
    reducer = reducing(name, tiny)
    question = replace(samples(1)[0], id="first")
    with noted_logits(tiny) as logits:
        turns = answer_turns(tiny, [question, replace(question, id="again")], reducer, False, max_new_tokens=1)
        (first,) = generate(tiny, [question], reducer, max_new_tokens=1).answers
    assert torch.equal(logits[0], logits[2]) and turns[0].kv_bytes == first.accounting.kv_bytes
    assert turns[1].kv_bytes == turns[0].kv_bytes and turns[1].flops < turns[0].flops
    # Text before the cut saw the tokens that later text no longer sees in these layers.
    if type(reducer).cut_caches is Reducer.cut_caches:
        torch.testing.assert_close(logits[1], logits[0], atol=2e-5, rtol=0)


def test_no_method_asks_for_attention_maps(name, tiny, monkeypatch):
    """The fused kernel never returns weights; a method that needs output_attentions would fail here."""
    import transformers.integrations.sdpa_attention as sdpa

    calls = []
    original = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        sdpa.torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or original(*a, **k)
    )
    reducer = reducing(name, tiny)
    run(tiny, samples(2), reducer)
    blocks = tiny.select_layer % (len(tiny.tower.encoder.layers) + 1)
    text = len(tiny.clip.text_model.encoder.layers) if reducer.needs_text_tower else 0
    tower = 0 if reducer.blind else blocks
    assert len(calls) == tower + text + len(tiny.llm.layers)


def test_is_refused_exactly_where_a_need_is_not_met(name, tiny):
    """What the card says a method needs is what it refuses to run without, or says what stands in for it."""
    reducer, needs = reducing(name, tiny), registry.method(name).metadata.needs
    spec = dataclasses.replace(tiny.spec, has_text_tower=True)
    poorer = dataclasses.replace(spec, has_cls=False)
    reducer.check(poorer)
    assert bool(reducer.without_cls(poorer)) == ("CLS" in needs) and not reducer.without_cls(spec)
    poorer = dataclasses.replace(spec, has_text_tower=False)
    if "text tower" in needs:
        with pytest.raises(UserError, match="text tower"):
            reducer.check(poorer)
    else:
        reducer.check(poorer)
    shallow = dataclasses.replace(spec, layers=1)
    if "decoder" in reducer.acts_in:
        with pytest.raises(UserError, match="layer"):
            require(reducer, shallow)
    else:
        require(reducer, shallow)


def test_a_planted_answer_is_looked_for(name):
    """Shape tests pass with the order of a ranking turned round; each method needs one that does not."""
    if name in CONTROLS:
        return
    marks = (f'"{name}"', f"_{name}_", registry.method(name).__name__)
    # In the name of a test or in the first line of its docstring.
    planted = re.compile(r'def test\w*plant|def test\w*\([^)]*\)[^:]*:\n\s+"""[^\n]*plant', re.IGNORECASE)
    for path in Path(__file__).parent.glob("test_*.py"):
        for test in re.split(r"\n\n\n", path.read_text()):
            if planted.search(test) and (path.stem == f"test_{name}" or any(mark in test for mark in marks)):
                return
    pytest.fail(f"no test of {name} plants an answer and looks for it")


@pytest.mark.parametrize("budget", [0, -1, ALL + 1])
@pytest.mark.parametrize("name", [*contract.METHODS, *contract.COMPOSED])
def test_impossible_budgets_are_refused(name, tiny, budget):
    with pytest.raises(UserError, match="budget"):
        registry.build(name, budget).check(tiny.spec)


REFUSED = [  # method, budget and options; decoder layers of a model of 576 tokens; a part of the sentence
    ("attnmix 8 floor=0.6", 32, "floor must be between 0 and 0.5"),
    ("attnmix 8 temperature=0", 32, "temperature must be above 0"),
    ("attnmix 8 official=true text=instruction", 32, "takes text=after"),
    ("attnmix 8 official=true mix=half", 32, "in no release"),
    ("autoprune 18", 32, "all 576 enter layer 0 of 32 layers.* 18.97 to 576. Set autoprune.official=true"),
    ("autoprune 18 x0=-1", 32, "autoprune.x0 must be at least 0"),
    ("consensusdorp 8", 32, "Did you mean 'consensusdrop'"),
    ("consensusdrop 8 alpha=half", 32, "alpha must be a number"),
    ("consensusdrop 8 probe_layer=2.5", 32, "whole number"),
    ("consensusdrop 8 rope=maybe", 32, "true or false"),
    ("consensusdrop 8 fusion=borda", 32, "must be one of"),
    ("consensusdrop 8 fuson=rank", 32, "Did you mean 'fusion'"),
    ("consensusdrop 8 query=last", 32, "query=last needs consensusdrop.probe=contextual"),
    ("consensusdrop 8 block=-25", 32, "consensusdrop reads tower block -25, but the tower has 24 blocks"),
    ("consensusdrop 8 probe=contextual", 32, "needs a probe_layer of at least 1"),
    ("consensusdrop 8 probe_layer=4", 4, "probe_layer must be below 4"),
    ("consensusdrop 8 merged_share=1", 32, "merged_share must be at least 0 and below 1"),
    ("dart 36", 32, "36.94 to 576. Set dart.schedule=kept"),
    ("dart 100 layer=9", 8, "acts before layer 9"),
    ("fastv 64", 8, "mean of 64 .* reaches 72.88 to 576. Set fastv.schedule=kept"),
    ("fastv 64 layer=-1", 32, "fastv.layer must be at least 0"),
    ("fastv 64 layer=32", 32, "32 layers"),
    ("feather 128", 32, "all 576 enter the first 8 of 32 layers.* 144.8 to 313.5. Set feather.schedule=kept"),
    ("globalcom2 8 temperature=nan", 32, "globalcom2.temperature"),
    ("globalcom2 8 tile_budget=global", 32, "tile_budget must be one of adaptive, each, thumbnail"),
    ("holov 64 chunks=7", 32, "holov.chunks must divide the 576 visual tokens"),
    ("ivcprune 64", 32, "all 576 enter the first 16 of 32 layers.*ivcprune.schedule=kept"),
    ("ivcprune 64 coordinates=1.5", 32, "ivcprune.coordinates must be between 0 and 1"),
    ("clse 100 schedule=release", 32, "has the budgets 192, 128, 64, got 100"),
    ("prumerge 8 fixed=true", 32, "official=true"),
    ("prumerge_plus 64 official=true fixed=true", 32, "no such grid, near it are 55, 61, 65, 73"),
    ("prumerge_plus 8 spatial=1.5", 32, "spatial"),
    ("pyramiddrop 30", 32, "all 576 enter.* 36.94 to 324"),
    ("pyramiddrop 400", 32, "fixed shares.* 36.94 to 324"),
    ("pyramiddrop 192 schedule=paper", 32, "schedule=paper has a mean of 270 .* ask for a budget of 270"),
    ("sparsevlm 50", 32, "all 576 enter the first 3 of 32 layers.*schedule=kept"),
    ("sparsevlm 100 schedule=release", 32, "has the budgets 192, 128, 96, 64, got 100"),
    ("sparsevlm 300", 1, "do not fit into 1 decoder layers"),
    ("sparsevlm 300", 3, "3 decoder layers"),
    ("visiondrop 64 official=true order=raster keep_cls=false", 32, "leave out keep_cls, order"),
    ("visiondrop 64 official=true merge=none", 32, "leave out merge"),
    ("visiondrop 64 start=0.5", 32, "start must be at least 1"),
    ("visiondrop 64 layers=8,8", 32, "layers must ascend from 1, got 8, 8"),
    ("visiondrop 64 layers=8,32", 32, "layers must be below 32"),
    ("visiondrop 64 start=4", 32, "start=4 spends the whole budget on the first 8 of 32 layers"),
    ("visiondrop 64", 3, "3 decoder layers"),
    ("visiondrop 64 encoder_only=true start=2", 32, "encoder_only leaves no decoder stages; leave out layers"),
    ("visionzip 8 contextual=1", 32, "visionzip.contextual"),
]


@pytest.mark.parametrize(("asked", "layers", "sentence"), REFUSED, ids=[asked for asked, _, _ in REFUSED])
def test_what_a_method_cannot_do_is_refused_in_one_sentence(asked, layers, sentence):
    name, budget, *options = asked.split()
    with pytest.raises(UserError, match=sentence):
        reducer = registry.build(name, int(budget), dict(option.split("=") for option in options))
        reducer.check(ModelSpec(576, layers, PatchGrid(24, 24), 24))


def test_every_method_can_be_imported():
    assert not registry.BROKEN
