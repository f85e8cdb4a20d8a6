"""Fused norms and attention: as few kernels as stated, the numbers of transformers' modules, nobody else's model."""

import copy
import inspect

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from eval.efficiency.counts import Call, OperationCounter
from eval.efficiency.shapes import random_llava
from llava.errors import UserError
from llava.model.builder import load
from llava.model.fused import ATTENTIONS, GIVEN, NORMS, attend, fuse
from llava.pipeline.decoder import PreallocatedLayer, rotary_angles
from llava.transformers_names import CACHE
from tests import stock_inputs

CUDA = torch.device("cuda")  # says what to replace; nothing is moved
PREFILL, DECODING = 20, 22  # kernels of one layer


def layers_on(llm, *lengths: int, dtype=torch.float32, padded: bool = False) -> tuple[torch.Tensor, list[list[Call]]]:
    """Run all layers and the norm on prompts of noise, one part of a prompt after the other; the last part's output,
    and the operations of layer 0 for each part."""
    cache, done, noise, calls = DynamicCache(), 0, torch.Generator().manual_seed(3), []
    cache.layer_class_to_replicate = PreallocatedLayer
    hidden = torch.empty(0)
    device = llm.norm.weight.device
    for length in lengths:
        hidden = torch.randn(2, length, llm.config.hidden_size, generator=noise).to(device, dtype)
        position = torch.arange(done, done + length, device=device).expand(2, -1)
        axes = "mrope_section" in (llm.config.rope_parameters or {})
        rotary = rotary_angles(llm, hidden, position[..., None].expand(-1, -1, 3) if axes else position)
        done += length
        mask = None
        if padded:
            mask = torch.ones(2, 1, length, done, dtype=torch.bool).tril(done - length)
            mask[1, :, 1:, 0] = False
        for layer in llm.layers:
            counter = OperationCounter()
            with counter:
                hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, **{CACHE: cache})
            counter.mark("layer")
            if layer is llm.layers[0]:
                calls.append([call for call in counter.calls if call.name != "detach_"])  # of transformers' masks
    return llm.norm(hidden), calls


@pytest.mark.parametrize("shape", ["llava-1.5-7b", "llava-next-mistral-7b", "qwen2.5-vl-7b"])
@torch.inference_mode()
def test_a_layer_launches_few_kernels(shape):
    """transformers' own: 34 and 36, and four casts more in half precision."""
    llm = random_llava(shape, 1, "bfloat16", layers=1, device=torch.device("meta"), text_tower=None).llm
    weights = llm.layers[0].mlp.up_proj.weight.dtype
    stock = layers_on(llm, 64, 1, 1, dtype=weights)[1]
    assert [sum(call.kernel for call in stock[part]) for part in (0, 2)] == [34, 36], "transformers' layer has changed"
    fuse(llm, weights, CUDA)
    calls = layers_on(llm, 64, 1, 1, dtype=weights)[1]
    for part, limit in ((0, PREFILL), (2, DECODING)):  # the first step makes space in the cache
        kernels = [call.name for call in calls[part] if call.kernel]
        assert len(kernels) <= limit, kernels
        assert len(calls[part]) <= len(stock[part]) - 15, "views in place of kernels"


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", stock_inputs.FAMILIES)
@torch.inference_mode()
def test_fused_layers_compute_what_transformers_layers_do(family, padded):
    llm = copy.deepcopy(stock_inputs.shared(family).model.model.language_model)
    expected = layers_on(llm, 9, 1, 1, padded=padded)[0]
    fuse(llm, torch.float32, torch.device("cpu"))
    assert torch.equal(layers_on(llm, 9, 1, 1, padded=padded)[0], expected), "a CPU's bits are those of the chain"
    assert not any("forward" in vars(part) for part in llm.modules())
    fuse(llm, torch.float32, CUDA)
    shared = copy.deepcopy(llm)  # its methods are its own
    assert all(layer.self_attn.forward.__self__ is layer.self_attn for layer in shared.layers)
    for one in (llm, shared):
        found = layers_on(one, 9, 1, 1, padded=padded)[0]
        assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


@torch.inference_mode()
def test_the_fused_attention_uses_or_refuses_what_a_layer_gives_to_it():
    """transformers 5.24 renamed the cache's argument: it was ignored, and a decoded token attended to itself alone."""
    llm = copy.deepcopy(stock_inputs.shared("llava").model.model.language_model)
    fuse(llm, torch.float32, CUDA)
    layer, hidden = llm.layers[0], torch.ones(1, 3, llm.config.hidden_size)
    own = inspect.signature(type(layer.self_attn).forward).parameters
    assert CACHE in own and {*own} <= {*inspect.signature(attend).parameters, *GIVEN, "kwargs"}
    cache, rotary = DynamicCache(), rotary_angles(llm, hidden, torch.arange(3)[None])
    layer(hidden, position_embeddings=rotary, **{CACHE: cache})
    assert cache.get_seq_length() == 3
    layer(hidden, position_embeddings=rotary, cache_of_next_year=None)
    with pytest.raises(UserError, match="cache_of_next_year"):
        layer(hidden, position_embeddings=rotary, cache_of_next_year=cache)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_half_precision_is_nearer_to_the_exact_numbers_than_the_chain(dtype):
    errors = torch.zeros(2, dtype=torch.float64)  # of the chain and of the fused layers, over several draws of weights
    for seed in range(8):
        draw = torch.Generator().manual_seed(seed)
        llm = copy.deepcopy(stock_inputs.shared("llava").model.model.language_model)
        for weight in llm.parameters():
            weight.data = (weight + 0.1 * torch.rand(weight.shape, generator=draw)).to(dtype).double()
        exact = layers_on(llm, 9, 1, dtype=torch.float64)[0]
        llm.to(dtype)
        chain = layers_on(llm, 9, 1, dtype=dtype)[0]
        fuse(llm, dtype, torch.device("cpu"))
        assert torch.equal(layers_on(llm, 9, 1, dtype=dtype)[0], chain), "a CPU keeps the chain"
        fuse(llm, dtype, CUDA)
        fused = layers_on(llm, 9, 1, dtype=dtype)[0]
        errors += torch.stack([(chain - exact).norm(), (fused - exact).norm()])
    # A single draw may go the other way: 2 of 32 did.
    assert errors[1] <= errors[0]


def test_loaded_models_are_fused_and_those_of_the_user_are_not(tiny, tiny_path):
    kinds = [type(part) for part in tiny.hf_model.modules()]
    assert kinds.count(nn.RMSNorm) == 2 * len(tiny.llm.layers) + 1
    assert not any(kind.__name__ in NORMS for kind in kinds)
    own = [type(part).__name__ for part in stock_inputs.shared("llava").model.modules()]
    assert NORMS & set(own) and ATTENTIONS & set(own) and "RMSNorm" not in own
    assert nn.RMSNorm not in map(type, load(tiny_path, dtype="bfloat16", device="cpu").hf_model.modules())
