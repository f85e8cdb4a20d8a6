"""The contract: every registered method passes this suite by being registered."""

import dataclasses
import random
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from llava.errors import UserError
from llava.model.builder import load
from llava.model.llava_arch import Llava
from llava.pipeline.generate import generate
from llava.processing.prompt import Sample
from llava.reduction import registry
from tests import contract
from tests.conftest import QUESTIONS, picture, samples
from tests.contract import run
from tests.tiny_checkpoints import make_tiny_llava, save_text_tower, save_transformers_layout
from tests.tiny_checkpoints_families import make_tiny_next, save_next_transformers

KINDS = {"appended", "scale", "duplicates", "unsorted", "uncounted"}  # of what known_deviations may excuse
BUDGETS = (1, 4, 7, 8, 12, 16)
ALL = 16  # visual tokens of the tiny model


@pytest.fixture(params=registry.names())
def name(request) -> str:
    return request.param


def possible(name: str, tiny: Llava, budgets=BUDGETS):
    """The method at every budget it accepts."""
    for budget in budgets:
        reducer = registry.build(name, budget)
        try:
            reducer.check(tiny.spec)
        except UserError:
            continue
        yield reducer


def reducing(name: str, tiny: Llava):
    """The method at a budget below the full one; `full` is its own."""
    return next(iter(possible(name, tiny, (8, 12, 4, ALL))))


def same_steps(first, second) -> bool:
    return len(first) == len(second) and all(
        a.place == b.place and torch.equal(a.reduction.kept, b.reduction.kept)
        for a, b in zip(first, second, strict=True)
    )


def test_accepts_some_budget_below_full(name, tiny):
    found = [reducer.budget for reducer in possible(name, tiny)]
    assert found and (name == "full" or min(found) < ALL)


def test_audited_tokens_are_the_planned_ones_and_their_mean_is_the_budget(name, tiny):
    for reducer in possible(name, tiny):
        planned = reducer.tokens_per_layer(tiny.spec)
        assert planned is not None, "by default a method keeps a budget"
        assert abs(sum(planned) / len(planned) - reducer.budget) <= reducer.rounding, (reducer, planned)
        _, audits, _ = run(tiny, samples(), reducer)
        for i, audit in enumerate(audits):
            assert audit.tokens_per_layer == ((0,) * len(planned) if i == 3 else planned), (reducer, audit)


def test_every_choice_of_every_option_keeps_the_contract(name, tiny):
    """Only defaults were tested: unsorted indices passed in a branch that defaults do not reach."""
    batch = samples(4, text_only=(2,))
    for options in contract.configurations(registry.method(name)):
        reducers = contract.accepted(registry.method(name), options, tiny, 1 if options else 2)
        assert reducers or options or name == "full", "no budget below all tokens was accepted"
        for reducer in reducers:
            contract.check(reducer, tiny, batch)


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> dict[str, tuple[Llava, list[Sample]]]:
    """A deeper model with more tokens, and images in tiles; one question is longer than CLIP's text tower takes."""
    path = tmp_path_factory.mktemp("others")
    save_transformers_layout(path / "wide", make_tiny_llava(num_hidden_layers=8, image=112), text_tower=True)
    save_text_tower(path / "tiled" / "text_tower", save_next_transformers(path / "tiled", make_tiny_next("mistral")))
    long = Sample("long", " ".join(QUESTIONS * 3), image=picture(9))
    crops = [Sample(f"q{i}", QUESTIONS[i], image=picture(i, size)) for i, size in enumerate(((112, 112), (70, 112)))]
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


def test_quirks_are_told(name):
    """Whatever is excused above is said in words, and only known excuses exist."""
    method = registry.method(name)
    for key, reason in method.known_deviations.items():
        kind, _, condition = key.partition(" with ")
        assert reason and (kind in KINDS or kind.removeprefix("unused ") in registry.options_of(method)), key
        assert not condition or condition.partition("=")[0] in registry.options_of(method), key


def test_card_is_filled_in(name):
    card = registry.method(name).metadata
    assert card.acts and (card.score or name in ("full", "random", "uniform", "downsample"))
    assert bool(card.paper) == bool(card.url)


def test_full_budget_changes_nothing(name, tiny):
    batch = samples()
    expected, _, _ = run(tiny, batch, registry.build("full", ALL))
    actual, _, _ = run(tiny, batch, registry.build(name, ALL))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def test_a_second_image_is_reduced_on_its_own(name, tiny):
    """Two images in one prompt: each meets the budget, and the first one's features do not depend on the second."""
    reducer = reducing(name, tiny)
    planned = reducer.tokens_per_layer(tiny.spec)
    both = dataclasses.replace(samples(1)[0], image=(picture(0), picture(5)))
    _, audits, record = run(tiny, [both, *samples(2)], reducer)
    assert audits[0].images == 2 and audits[0].tokens_per_layer == tuple(2 * count for count in planned)
    for number in ("", " #2"):
        steps = [s for s in record.steps[0] if s.place.endswith("#2") == bool(number)]
        assert len(steps) == len(record.steps[1])
    _, _, again = run(tiny, [both], reducer)
    assert all(same_steps([a], [b]) for a, b in zip(record.steps[0], again.steps[0], strict=True))


def test_batch_equals_single_and_padding_is_invisible(name, tiny):
    batch, reducer = samples(), reducing(name, tiny)
    logits, audits, record = run(tiny, batch, reducer)
    for i, sample in enumerate(batch):
        alone, alone_audits, alone_record = run(tiny, [sample], reducer)
        torch.testing.assert_close(logits[i], alone[0], atol=1e-4, rtol=0)
        assert same_steps(record.steps[i], alone_record.steps[0])
        assert audits[i] == alone_audits[0]


def test_other_pictures_of_the_batch_have_no_influence(name, tiny):
    reducer, batch = reducing(name, tiny), samples(2)
    before, _, record = run(tiny, batch, reducer)
    changed = [batch[0], dataclasses.replace(batch[1], image=picture(77, (33, 80)))]
    after, _, again = run(tiny, changed, reducer)
    torch.testing.assert_close(before[0], after[0], atol=1e-4, rtol=0)
    assert same_steps(record.steps[0], again.steps[0])
    assert not torch.allclose(before[1], after[1], atol=1e-3)


def test_order_of_the_batch_makes_no_difference(name, tiny):
    reducer, batch = reducing(name, tiny), samples()
    _, _, record = run(tiny, batch, reducer)
    _, _, turned = run(tiny, batch[::-1], reducer)
    assert all(same_steps(a, b) for a, b in zip(record.steps, turned.steps[::-1], strict=True))


def test_runs_are_deterministic(name, tiny):
    reducer = reducing(name, tiny)
    first, second = (generate(tiny, samples(), reducer, max_new_tokens=4) for _ in range(2))
    assert [a.token_ids for a in first.answers] == [a.token_ids for a in second.answers]


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
    parts = (tiny.llm.config, tiny.tower.config)
    for config in parts:
        config._attn_implementation = "eager"
    try:
        _, _, eager = run(tiny, samples(), reducer)
    finally:
        for config in parts:
            config._attn_implementation = "sdpa"
    assert all(same_steps(a, b) for a, b in zip(fused.steps, eager.steps, strict=True))


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
    assert len(calls) == blocks + text + len(tiny.llm.layers)


def test_is_refused_exactly_where_a_need_is_not_met(name, tiny):
    """What the card says a method needs is what it refuses to run without, with the reason."""
    reducer, needs = reducing(name, tiny), registry.method(name).metadata.needs
    spec = dataclasses.replace(tiny.spec, has_text_tower=True)
    without = {
        "CLS": (dataclasses.replace(spec, has_cls=False), "CLS"),
        "text tower": (dataclasses.replace(spec, has_text_tower=False), "text tower"),
    }
    for need, (poorer, reason) in without.items():
        if need in needs:
            with pytest.raises(UserError, match=reason):
                reducer.check(poorer)
        else:
            reducer.check(poorer)
    shallow = dataclasses.replace(spec, layers=1)
    if "decoder" in reducer.acts_in:
        with pytest.raises(UserError, match="layer"):
            reducer.check(shallow)
    else:
        reducer.check(shallow)


def test_a_planted_answer_is_looked_for(name):
    """Shape tests pass with the order of a ranking turned round; each method needs one that does not."""
    if name in ("full", "random", "uniform", "downsample"):
        return
    tests = {path: path.read_text() for path in Path(__file__).parent.glob("test_*.py")}
    marks = (f'"{name}"', registry.method(name).__name__)
    used = [t for path, t in tests.items() if path.stem == f"test_{name}" or any(mark in t for mark in marks)]
    # In the name of a test or in the first line of its docstring.
    planted = re.compile(r'def test\w*plant|def test\w*\([^)]*\)[^:]*:\n\s+"""[^\n]*plant', re.IGNORECASE)
    assert any(planted.search(source) for source in used), f"no test of {name} plants an answer and looks for it"


@pytest.mark.parametrize("budget", [0, -1, ALL + 1])
def test_impossible_budgets_are_refused(name, tiny, budget):
    with pytest.raises(UserError, match="budget"):
        registry.build(name, budget).check(tiny.spec)


def test_unknown_option_is_refused_with_a_suggestion(name):
    with pytest.raises(UserError, match="Did you mean 'positions'"):
        registry.build(name, 8, {"position": "original"})


def test_configuration_is_frozen_and_described(name):
    reducer = registry.build(name, 8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        reducer.budget = 4
    row = next(row for row in registry.describe() if row["name"] == name)
    assert row["summary"] and all(option["doc"] for option in row["options"])


def test_every_method_can_be_imported():
    assert not registry.BROKEN


def test_unknown_method_is_refused_with_a_suggestion():
    with pytest.raises(UserError, match="Did you mean 'consensusdrop'"):
        registry.build("consensusdorp", 8)
