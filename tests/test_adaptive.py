"""Methods that let the image decide how many tokens are kept: their counts are said, bounded and audited."""

import pytest

from baselines.prumerge import PruMerge
from eval.config import RunConfig
from eval.efficiency.estimate import estimate
from eval.results import cost
from eval.results.report import tokens_text
from llava.pipeline.accounting import TokenAccounting
from llava.pipeline.generate import generate
from llava.places import ASSETS
from llava.reduction import registry
from llava.reduction.budget import bounds
from tests import contract
from tests.conftest import samples
from tests.eval_fakes import LAYERS


def account(kept: int, planned: float | None) -> dict:
    return cost.accounting_record(TokenAccounting((kept,) * LAYERS, 576, 0, 0, 1, planned, asked=64))


def test_a_result_says_mean_asked_fewest_and_most():
    """An adaptive method at 64 printed 121.2 tokens per layer as if it had been asked for them."""
    adaptive = cost.summarise_accounting([account(kept, None) for kept in (40, 48, 96)])
    assert tokens_text(adaptive) == "mean 61.3 of 64 asked, 40 to 96"
    assert tokens_text(cost.summarise_accounting([account(64, 64.0)] * 2)) == "64.0"


@pytest.mark.parametrize(("ends", "problem"), [((1, 16), ""), ((1, 1), "not 1 to 1"), ((15, 16), "not 15 to 16")])
def test_images_outside_the_declared_bounds_fail_the_contract(tiny, monkeypatch, ends, problem):
    reducer = registry.build("prumerge", 8, {"official": "true"})
    monkeypatch.setattr(PruMerge, "bounds", lambda self, spec: ends)
    assert bounds(reducer, tiny.spec) == ends
    if not problem:
        return contract.check(reducer, tiny, samples(4, text_only=(2,)))
    with pytest.raises(AssertionError, match=problem):
        contract.check(reducer, tiny, samples(4, text_only=(2,)))


def test_a_plan_is_both_bounds(tiny):
    assert bounds(registry.build("fastv", 12), tiny.spec) == (12.25, 12.25)


def test_a_dry_run_has_room_for_the_most_and_names_no_mean(monkeypatch):
    """Memory was estimated for the budget, which images may exceed."""
    about = {"model": str(ASSETS / "tinyllava"), "data": ASSETS / "eval", "benchmark": "gqa", "limit": 8}
    found, full = (
        estimate(RunConfig(name, budget, options=options, **about))
        for name, budget, options in (("prumerge", 64, {"official": "true"}), ("full", None, {}))
    )
    assert found.kv_bytes == full.kv_bytes and found.record()["adaptive"] and not full.record()["adaptive"]
    lines = "\n".join(found.lines())
    assert "at most 576 of 576 (the image decides: mean n/a until measured; 64 asked) visual tokens" in lines
    monkeypatch.setattr(PruMerge, "bounds", lambda self, spec: (1, 99.5))
    bounded = estimate(RunConfig("prumerge", 64, options={"official": "true"}, **about))
    assert bounded.kv_bytes < full.kv_bytes and "at most 100 of 576" in "\n".join(bounded.lines())


def test_layers_that_run_before_the_prefill_are_paid_for(tiny):
    """A probe of two layers counts as two layers with all tokens; a question without an image pays nothing."""
    probing = registry.build("consensusdrop", 8, {"probe": "contextual", "probe_layer": "2"})
    found = [one.accounting for one in generate(tiny, samples(3, text_only=(1,)), probing, 1).answers]
    ahead = 2 * tiny.visual_tokens / tiny.spec.layers
    assert [one.paid for one in found] == pytest.approx([8 + ahead, 0, 8 + ahead])
    plain = generate(tiny, samples(1), registry.build("consensusdrop", 8), 1).answers[0].accounting
    assert plain.paid == plain.mean == 8
