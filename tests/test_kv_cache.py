"""Caches written in place give, bit for bit, what concatenating caches give; logits that are not finite end a run."""

import copy
import json

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from eval import ask
from eval.config import RunConfig
from eval.run import run
from llava.errors import UserError
from llava.model.builder import load
from llava.pipeline import decoder
from llava.pipeline import generate as generation
from llava.pipeline.decoder import BLOCK, PreallocatedLayer
from llava.pipeline.generate import generate, prefill
from llava.reduction import registry
from tests import contract
from tests.conftest import samples
from tests.eval_fakes import write_gqa

STEPS = 2 * BLOCK + 5
TOKEN = 7


def decoded(model, batch, reducer, steps=STEPS):
    """Hidden states [steps, B, D] of decoding one token again and again, and the state after it."""
    with torch.inference_mode():
        state, _ = prefill(model, batch, reducer)
        token = model.llm.embed_tokens(torch.full((len(batch), 1), TOKEN))
        return torch.stack([decoder.step(model.llm, state, token)[:, 0] for _ in range(steps)]), state


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", ["full", "consensusdrop", "visiondrop"])
def test_decoding_equals_concatenated_caches(tiny, monkeypatch, method, attention):
    """Padded prompts, one without an image; visiondrop leaves another length in every layer."""
    reducer = registry.build(method, tiny.visual_tokens if method == "full" else 6)
    config = tiny.llm.config
    monkeypatch.setattr(config, "_attn_implementation", attention)
    ours, state = decoded(tiny, samples(5), reducer)
    monkeypatch.setattr(generation, "PreallocatedLayer", DynamicLayer)
    theirs, expected = decoded(tiny, samples(5), reducer)
    assert torch.equal(ours, theirs)
    for one, other in zip(state.cache.layers, expected.cache.layers, strict=True):
        assert isinstance(one, PreallocatedLayer) and not isinstance(other, PreallocatedLayer)
        assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)
    assert (state.kv_bytes, state.kv_bytes_held) == (expected.kv_bytes, expected.kv_bytes_held)


def test_the_memory_of_the_cache_is_told_with_its_room(tiny):
    """`kv_bytes` are those of the tokens; 64 tokens on the toy model hold 1.4 times as many from the first step on."""
    reducer = registry.build("consensusdrop", 6)
    _, state = decoded(tiny, samples(1), reducer, 1)
    columns = [lengths[0] + 1 + BLOCK for lengths in state.lengths]
    each = state.kv_bytes[0] // sum(lengths[0] for lengths in state.lengths)
    parts = [part for layer in state.cache.layers for part in (layer.keys, layer.values)]
    allocated = sum(part.untyped_storage().nbytes() for part in parts)
    assert allocated == each * sum(columns) > 1.4 * state.kv_bytes_held
    first, second = (generate(tiny, samples(1), reducer, max_new_tokens=tokens) for tokens in (1, 2))
    assert (first.decode_steps, second.decode_steps) == (0, 1) and first.kv_bytes == second.kv_bytes
    assert second.kv_bytes_allocated == allocated > first.kv_bytes_allocated >= first.kv_bytes


def random_rows(tokens):
    return torch.randn(2, 3, tokens, 4), torch.randn(2, 3, tokens, 5)


def both(layer, reference, tokens):
    """Append the same columns to two layers; they must show the same."""
    keys, values = random_rows(tokens)
    for found, expected in zip(layer.update(keys, values), reference.update(keys, values), strict=True):
        assert torch.equal(found, expected)


def test_a_step_writes_in_place_until_the_block_is_full():
    layer, reference = PreallocatedLayer(), DynamicCache().layer_class_to_replicate()
    both(layer, reference, 6)
    both(layer, reference, 1)
    place = layer.keys.data_ptr(), layer.values.data_ptr()
    for _ in range(BLOCK):
        both(layer, reference, 1)
        assert (layer.keys.data_ptr(), layer.values.data_ptr()) == place
    both(layer, reference, 1)
    assert layer.keys.data_ptr() != place[0] and layer.get_seq_length() == 8 + BLOCK


def test_rows_that_were_reordered_repeated_or_cropped_go_on():
    layer, reference = PreallocatedLayer(), DynamicCache().layer_class_to_replicate()
    both(layer, reference, 6)
    for change in (
        lambda one: one.reorder_cache(torch.tensor([1, 1])),
        lambda one: one.crop(-2),
        lambda one: one.batch_select_indices(torch.tensor([1, 0])),
        lambda one: one.reset(),
    ):
        change(layer)
        change(reference)
        both(layer, reference, 1)
        both(layer, reference, 1)


def test_a_copy_has_memory_of_its_own():
    """A user who keeps the cache of a prompt and continues it twice."""
    layer = PreallocatedLayer()
    layer.update(*random_rows(6))
    other = copy.deepcopy(layer)
    layer.update(*random_rows(1))
    kept = layer.keys.clone()
    other.update(*random_rows(1))
    assert torch.equal(layer.keys, kept) and not torch.equal(other.keys, kept)


def test_memory_of_inference_mode_is_left_outside_of_it():
    """torch refuses to write there; `generate` of transformers runs under no_grad."""
    layer = PreallocatedLayer()
    with torch.inference_mode():
        layer.update(*random_rows(6))
    with torch.no_grad():
        found, _ = layer.update(*random_rows(1))
        found, _ = layer.update(*random_rows(1))
    assert found.shape[2] == 8 and not found.is_inference()


# Weights with NaN or infinity end the run; they gave 0.0 % and exit code 0.


# One value in each part that an answer about an image goes through. None in a query projection: with few
# tokens, the attention kernel for the CPU turns NaN scores into finite values.
PARTS = {
    "decoder": lambda model: model.llm.layers[1].mlp.up_proj.weight,
    "tower": lambda model: model.tower.encoder.layers[0].mlp.fc1.weight,
    "projector": lambda model: next(model.projector.parameters()),
    "head": lambda model: model.head.weight,
}


@pytest.fixture
def own(tiny_path):
    """A tiny model that a test may break."""
    return load(tiny_path, device="cpu")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", PARTS)
def test_one_value_that_is_not_finite_ends_the_batch(own, part, value):
    with torch.no_grad():
        PARTS[part](own).view(-1)[0] = value
    with pytest.raises(UserError, match=r"The logits for question q\d are not finite: the weights .* of tiny-llava"):
        generate(own, samples(2, text_only=()), registry.build("full", own.visual_tokens), max_new_tokens=2)


@pytest.mark.parametrize("name", contract.METHODS)
def test_no_method_hides_a_broken_tower(own, name):
    """A method ranks NaN somehow; its own functions must not end in a traceback, nor the answer look like one."""
    with torch.no_grad():
        PARTS["tower"](own)[0] = float("nan")
    reducer = registry.build(name, own.visual_tokens if name == "full" else 8)
    # Where a method chooses a token twice because of it, that is refused first, with the same cause.
    with pytest.raises(UserError, match="are not finite"):
        generate(own, samples(2, text_only=()), reducer, max_new_tokens=2)


def test_a_run_ends_with_a_sentence_and_keeps_what_was_sound(own, tmp_path, monkeypatch):
    data = write_gqa(tmp_path / "data")
    config = RunConfig(
        "full", data=data, output=tmp_path / "o", limit=24, batch_size=4, max_new_tokens=2, wandb="disabled"
    )
    real = ask.generate

    def answer(*arguments, **named):
        batch = real(*arguments, **named)
        with torch.no_grad():
            own.head.weight[0] = float("nan")
        return batch

    monkeypatch.setattr(ask, "generate", answer)
    with pytest.raises(UserError, match="question 1004 are not finite"):
        run(config, own)
    lines = (tmp_path / "o" / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["question_id"] for line in lines] == ["1000", "1001", "1002", "1003"]
    assert not list((tmp_path / "o").rglob("result.json"))
