"""Random weights in the shapes of the official models."""

import pytest
import torch

from eval.efficiency.shapes import SHAPES, narrow, noise_batches, random_llava
from llava.pipeline.generate import generate
from llava.pipeline.prefill import prefill
from llava.reduction import registry
from tests.conftest import samples


def test_random_model_has_the_real_shape():
    """Built here at a fraction of the size; the numbers in SHAPES are the official configuration's."""
    assert SHAPES["llava-1.5-7b"]["text"]["intermediate_size"] == 11008
    model = random_llava(narrow("llava-1.5-7b", 64, 32, 24), 3, "float32")
    layers = model.llm.layers
    assert model.visual_tokens == 576 and len(layers) == 32
    # Full depth, three layers' weights: the others share them and keep their own place in the cache.
    assert [layer.self_attn.layer_idx for layer in layers] == list(range(32))
    assert len({layer.mlp.up_proj.weight.data_ptr() for layer in layers}) == 3
    # Shared layers had copies of the configuration and stayed on SDPA where the model was set to eager attention.
    assert all(layer.self_attn.config is model.llm.config for layer in layers)
    for method in ("full", "trim"):
        reducer = registry.build(method, 576 if method == "full" else 64)
        answers = generate(model, samples(1), reducer, max_new_tokens=2).answers
        assert answers[0].accounting.mean == reducer.budget


def test_random_next_has_tiles_and_as_many_layers_as_asked():
    """The shape of the speed benchmark at a fraction of the size: 2,880 tokens in the papers' convention."""
    small = narrow("llava-next-mistral-7b", 64, 32, 2)
    model = random_llava(small, None, "float32", 2, merge="spatial", force=(672, 672))
    assert len(model.llm.layers) == 2 and model.visual_tokens == 2880
    (answer,) = generate(model, samples(1), registry.build("fastervlm", 320), max_new_tokens=1).answers
    assert answer.accounting.mean == 320 and answer.accounting.visual_tokens == 2880


def test_random_weights_are_on_their_device():
    """Shared decoder layers stay shared after the model has moved; "meta" stands for another device here."""
    model = random_llava(narrow("llava-1.5-7b", 64, 32, 24), 2, "float32", 5, device=torch.device("meta"))
    assert {weight.device.type for weight in model.hf_model.parameters()} == {"meta"} == {model.device.type}
    assert len({id(layer.mlp.up_proj.weight) for layer in model.llm.layers}) == 2


@pytest.mark.parametrize(
    ("shape", "tokens", "layers"),
    [
        ("llava-1.5-13b", 576, 40),
        ("llava-next-34b", 2880, 60),
        ("video-llava-7b", 2056, 32),
        ("qwen2.5-vl-7b", 1280, 28),
    ],
)
def test_every_family_runs_at_full_depth_without_memory(shape, tokens, layers):
    """On the meta device, which computes shapes alone; the tokens are those that the papers count (frames with CLS)."""
    reading = {"merge": "spatial", "force": (672, 672)} if "next" in shape else {}
    model = random_llava(shape, 1, device=torch.device("meta"), **reading)
    state, record = prefill(model, noise_batches(model, 1, False)(0), registry.build("full", model.visual_tokens))
    assert [image.inputs for image in record.images[0]] == [tokens] == [model.visual_tokens]
    assert state.visual == [(tokens,)] * layers
