"""Caches written in place give, bit for bit, what concatenating caches give."""

import copy

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from llava.pipeline import decoder
from llava.pipeline.decoder import BLOCK, PreallocatedLayer
from llava.pipeline.generate import generate
from llava.pipeline.prefill import prefill
from llava.reduction import registry
from tests.conftest import samples

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
    monkeypatch.setattr(decoder, "PreallocatedLayer", DynamicLayer)
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
    assert state.kv_bytes_allocated == each * sum(columns) > 1.4 * state.kv_bytes_held
    first, second = (generate(tiny, samples(1), reducer, max_new_tokens=tokens) for tokens in (1, 2))
    assert (first.decode_steps, second.decode_steps) == (0, 1) and first.kv_bytes == second.kv_bytes
    assert second.kv_bytes_with_room == state.kv_bytes_allocated > first.kv_bytes_with_room >= first.kv_bytes


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


def test_room_is_one_block_at_most():
    """Room for 1,024 tokens is not taken before there are so many."""
    layer = PreallocatedLayer()
    for tokens in (6, *[1] * 100):
        layer.update(*random_rows(tokens))
        length = layer.get_seq_length()
        columns = layer.keys.untyped_storage().nbytes() // layer.keys[:, :, :1].nbytes
        assert length <= columns <= length + BLOCK


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
