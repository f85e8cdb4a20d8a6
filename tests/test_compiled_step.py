"""Compiled decoding gives the logits of `decoder.step`, up to rounding, and the same answers."""

import pytest
import torch

from llava.errors import UserError
from llava.model.builder import load
from llava.pipeline import decoder
from llava.pipeline.faster import compiled_step
from llava.pipeline.faster.compiled_step import CompiledStep
from llava.pipeline.generate import generate
from llava.pipeline.prefill import prefill
from llava.reduction import registry
from tests.conftest import samples

STEPS = 12


@pytest.fixture(autouse=True)
def fresh_graphs(monkeypatch):
    """Small rooms, so that they grow within a few steps."""
    monkeypatch.setattr(compiled_step, "ROOM", 8)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def hidden_states(model, batch, reducer, step, steps=STEPS):
    """[steps, B, D]: another token at every step."""
    with torch.inference_mode():
        state, _ = prefill(model, batch, reducer)
        tokens = model.llm.embed_tokens(torch.arange(steps * len(batch)).view(steps, len(batch), 1) % 60)
        return torch.stack([step(model.llm, state, token)[:, 0] for token in tokens]), state


@pytest.mark.parametrize("method", ["full", "consensusdrop", "visiondrop"])
def test_the_traced_graph_equals_step(tiny, method):
    """Padded prompts, another length in every layer, and rooms that grow; as traced, without code generation."""
    reducer = registry.build(method, tiny.visual_tokens if method == "full" else 6)
    expected, plain = hidden_states(tiny, samples(3), reducer, decoder.step)
    found, state = hidden_states(tiny, samples(3), reducer, CompiledStep(tiny.llm, "eager"))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert plain.fixed is None and state.steps == 0
    assert state.fixed.lengths == [layer.get_seq_length() for layer in plain.cache.layers]


@pytest.mark.slow
def test_inductor_gives_the_same_answers(tiny_path):
    model = load(tiny_path, device="cpu")
    reducer = registry.build("visiondrop", 6)
    expected = generate(model, samples(3), reducer, max_new_tokens=6)
    model.compiled_step = CompiledStep(model.llm)
    found = generate(model, samples(3), reducer, max_new_tokens=6)
    assert [one.token_ids for one in found.answers] == [one.token_ids for one in expected.answers]
    ours, _ = hidden_states(model, samples(3), reducer, model.compiled_step, 4)
    theirs, _ = hidden_states(model, samples(3), reducer, decoder.step, 4)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_smaller_batch_and_too_many_shapes_are_not_compiled(tiny, monkeypatch):
    step, reducer = CompiledStep(tiny.llm, "eager"), registry.build("full", tiny.visual_tokens)
    monkeypatch.setattr(compiled_step, "GRAPHS", 1)
    for batch, compiled in ((samples(2), True), (samples(1), False), (samples(3), False), (samples(2), False)):
        expected, _ = hidden_states(tiny, batch, reducer, decoder.step, 2)
        found, state = hidden_states(tiny, batch, reducer, step, 2)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert (state.fixed is not None) == compiled and state.steps == (0 if compiled else 2)


def test_models_that_cannot_be_compiled_are_refused(tiny, monkeypatch):
    monkeypatch.setattr(tiny.llm, "ranks", 2, raising=False)
    with pytest.raises(UserError, match="leave --tensor-parallel and --zero out"):
        CompiledStep(tiny.llm)
    monkeypatch.undo()
    monkeypatch.setattr(tiny.llm.config, "_attn_implementation", "eager")
    with pytest.raises(UserError, match="set to eager"):
        CompiledStep(tiny.llm)
