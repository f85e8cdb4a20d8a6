"""`--compile` gives the logits and the kept tokens of the plain way, up to rounding, and the same answers."""

import pytest
import torch

from eval.config import ROOT
from llava.errors import UserError
from llava.model.builder import load
from llava.pipeline import decoder
from llava.pipeline.compile import Part, compile_model
from llava.pipeline.generate import generate
from llava.pipeline.prefill import prefill
from llava.reduction import registry
from tests.conftest import samples

METHODS = ("consensusdrop", "visiondrop")  # before the decoder and between its layers
STEPS = decoder.BLOCK + 3


@pytest.fixture(autouse=True)
def fresh_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def model(tiny_path):
    return load(tiny_path, device="cpu")


def build(model, method):
    return registry.build(method, model.visual_tokens if method == "full" else 6)


def same(model, compiled, reducer, batch, length=4):
    """Hold a batch, compiled, against the plain way."""
    with torch.inference_mode():
        model.compiled = None
        plain, theirs = prefill(model, batch, reducer)
        answers = generate(model, batch, reducer, length).answers
        model.compiled = compiled
        ours_state, ours = prefill(model, batch, reducer)
        found = generate(model, batch, reducer, length).answers
        logits = model.logits(plain.hidden)
    torch.testing.assert_close(model.logits(ours_state.hidden), logits, atol=1e-4, rtol=0)
    for our_steps, their_steps in zip(ours.steps, theirs.steps, strict=True):
        for our_step, their_step in zip(our_steps, their_steps, strict=True):
            assert torch.equal(our_step.reduction.kept, their_step.reduction.kept)
    assert [(one.token_ids, one.text) for one in found] == [(one.token_ids, one.text) for one in answers]
    for layer, (our_layer, their_layer) in enumerate(zip(ours_state.cache.layers, plain.cache.layers, strict=True)):
        torch.testing.assert_close(our_layer.keys, their_layer.keys, atol=1e-4, rtol=0, msg=f"keys of layer {layer}")
        torch.testing.assert_close(our_layer.values, their_layer.values, atol=1e-4, rtol=0)
    assert ours_state.kv_bytes == plain.kv_bytes and ours_state.kv_bytes_held == plain.kv_bytes_held


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "fastv", "divprune", "tome"])
def test_traced_layers_equal_the_plain_way(model, method):
    """One question, then three of other lengths that need padding on the left; as traced, without code generation."""
    compiled = compile_model(model, "eager")
    for batch in (samples(1), samples(3)):
        same(model, compiled, build(model, method), batch)
    assert all(compiled.by_stage[stage] > 0 for stage in ("prefill", "decode"))
    assert (compiled.by_stage["vision"] > 0) == (method != "tome"), "merging inside the tower takes the plain way"


@pytest.mark.slow
@pytest.mark.parametrize(
    "folder, method",
    [*(("tinyllava", method) for method in METHODS), ("tinyllava_next", "fastervlm"), ("tinyllava_video", "fastervlm")],
)
def test_inductor_equals_the_plain_way_on_the_toy_models(folder, method):
    """Trained weights, 577 tokens of an image, a budget of 96: near ties would show.

    A video tower attends over time in its blocks, and scores are of what that makes of their inputs.
    """
    toy = load(ROOT / "assets" / folder, device="cpu")
    reducer = registry.build(method, toy.visual_tokens if method == "full" else 96)
    same(toy, compile_model(toy), reducer, samples(3 if folder == "tinyllava" else 1), 8)


def hidden_states(model, batch, reducer, step):
    """[STEPS, B, D]: another token at every step."""
    with torch.inference_mode():
        state, _ = prefill(model, batch, reducer)
        tokens = model.llm.embed_tokens(torch.arange(STEPS * len(batch)).view(STEPS, len(batch), 1) % 60)
        return torch.stack([step(model.llm, state, token)[:, 0] for token in tokens]), state


@pytest.mark.parametrize("method", ["full", "visiondrop"])
def test_the_traced_step_equals_step(tiny, method):
    """Padded prompts, another length in every layer, and columns that grow."""
    reducer = build(tiny, method)
    expected, plain = hidden_states(tiny, samples(3), reducer, decoder.step)
    found, state = hidden_states(tiny, samples(3), reducer, compile_model(tiny, "eager").step)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(state.cache.layers, plain.cache.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-5, rtol=1e-5)


def test_models_that_cannot_be_compiled_are_refused(model, monkeypatch):
    monkeypatch.setattr(model.llm, "ranks", 2, raising=False)
    with pytest.raises(UserError, match="leave --tensor-parallel and --zero out"):
        compile_model(model)
    monkeypatch.undo()
    monkeypatch.setattr(model.llm.config, "_attn_implementation", "eager")
    with pytest.raises(UserError, match="set to eager"):
        compile_model(model)


def test_a_graph_that_cannot_be_compiled_ends_in_a_sentence(model):
    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    model.compiled = compile_model(model, broken)
    with pytest.raises(UserError, match=r"could not compile the vision tower.*no compiler here"):
        generate(model, samples(1), build(model, "full"), 1)


@pytest.mark.slow
def test_seconds_of_compiling_are_kept_apart(model, clock):
    """A run's result said 20.9 s to the first token of a batch, most of it spent by the compiler."""

    def slow(graph, inputs):
        clock.wait(0.7)
        return graph.forward

    model.compiled = compile_model(model, slow)
    timing = generate(model, samples(1), build(model, "full"), 2).timing
    assert clock.now > 2 and all(spent > 0.6 for spent in model.compiled.by_stage.values())
    assert max(timing.vision, timing.prefill, timing.decode) < 1e-6
    spent = model.compiled.seconds
    generate(model, samples(1), build(model, "full"), 2)
    assert model.compiled.seconds == spent


def test_a_part_is_compiled_more_often_than_torch_does_by_default():
    """With torch 2.11 whatever came after the eighth form of the arguments ran uncompiled, in silence."""
    graphs, before = torch._dynamo.utils.counters["stats"], torch._dynamo.utils.counters["stats"]["unique_graphs"]
    part = Part("sum", lambda x: x + 1, "eager")
    for dimensions in range(1, 12):
        part(torch.ones([2] * dimensions))
    assert graphs["unique_graphs"] == before + 11
