"""`reduce` on models as transformers loads them: on several devices, offloaded, with FlashAttention, quantised.

Devices are pretended (tests/pretended.py). FlashAttention is transformers' own way to the kernel, with a plain one at
its end: only a GPU shows what the real kernel does, which takes half precision alone.
"""

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
import transformers.modeling_flash_attention_utils as flash
from accelerate import cpu_offload, dispatch_model
from torch import nn

from llava import reduce
from llava.errors import UserError
from llava.hf.families import FAMILIES
from llava.hf.models import device_hooks
from llava.model.multimodal_encoder.stock_tower import Call, views_of
from llava.reduction.modules import layer_flops
from llava.reduction.scores import TOWER_SCORES
from tests import stock_families
from tests.pretended import pretended
from tests.stock_inputs import shared

STEPS = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
LOGITS = {"return_dict_in_generate": True, "output_logits": True}
# Before the projector, before the decoder, between its layers, and at two of these.
METHODS = ("fastervlm", "consensusdrop", "fastv", "visiondrop")
NAMES = ("llava", "internvl3", "qwen3_vl", *(("qwen2.5",) if "Qwen2_5_VLForConditionalGeneration" in FAMILIES else ()))


def stock(name):
    """A model, which nobody may change, and prompts of unequal lengths."""
    if name in stock_families.NAMES:
        return stock_families.tiny(name), stock_families.call(name, (1, 2))
    case = shared(name)
    return case.model, case.batch()


def answer(model, inputs, method):
    """The logits of each step, and the tokens that are left."""
    with torch.no_grad(), reduce(model, method, None if method == "full" else "1/2") as reduced:
        out = model.generate(**inputs, **STEPS, **LOGITS)
    return [logits.cpu() for logits in out.logits], reduced.accounting


def same(found, expected):
    """Weights that are read from a file or as whole numbers may lie otherwise in memory: the last bits may differ."""
    assert found[1] == expected[1]
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=0)


def places(module, there, prefix=""):
    """A device map: the two halves of every list of layers lie on two devices, and the tower begins on the second."""
    for name, part in module.named_children():
        if isinstance(part, nn.ModuleList):
            half = "01" if "language" in prefix else "10"
            yield from ((f"{prefix}{name}.{i}", there[int(half[2 * i // len(part)])]) for i in range(len(part)))
        elif any(isinstance(inside, nn.ModuleList) for inside in part.modules()):
            yield from places(part, there, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", there[name not in ("embed_tokens", "lm_head")]
    yield from ((f"{prefix}{name}", there[1]) for name, _ in module.named_parameters(recurse=False))


@pytest.mark.parametrize("name", [name for name in (*NAMES, "next") if name != "internvl3"])  # its tied weights
def test_layers_on_two_devices(name):
    """As on one device. Nothing of the model is different afterwards."""
    plain, inputs = stock(name)
    with pretended():
        there = {key: value.to("cuda:0") for key, value in inputs.items()}
        one = copy.deepcopy(plain).to("cuda:0")
        model = dispatch_model(copy.deepcopy(plain), dict(places(plain, ("cuda:0", "cuda:1"))), main_device="cuda:0")
        assert {"cuda:0", "cuda:1"} <= {str(weight.device) for weight in model.parameters()}
        before = [hook.io_same_device for part in model.modules() for hook in device_hooks(part)]
        for method in ("full", *METHODS, "sparsevlm", *(("tome", "downsample") if name == "llava" else ())):
            same(answer(model, there, method), answer(one, there, method))
        assert before == [hook.io_same_device for part in model.modules() for hook in device_hooks(part)]


@pytest.mark.parametrize("name", [*NAMES, "next", "next_video"])
@pytest.mark.parametrize("to", ["cpu", "disk"])
def test_offloaded_weights(name, to, tmp_path):
    """Each is there only while its module runs."""
    plain, inputs = stock(name)
    model = copy.deepcopy(plain)
    if to == "cpu":
        cpu_offload(model, "cpu")
    else:
        dispatch_model(model, dict(places(plain, ("cpu", "disk"))), offload_dir=tmp_path)
    meta = [weight.is_meta for weight in model.parameters()]
    assert any(meta) and all(meta) == (to == "cpu")
    for method in ("full", *METHODS, *(("tome", "downsample") if name == "llava" else ())):
        same(answer(model, inputs, method), answer(plain, inputs, method))
    assert meta == [weight.is_meta for weight in model.parameters()]


def kernel(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0):
    """[B, L, H, d] -> [B, L, H, d], by the definition."""
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (k, v))
    ahead = torch.arange(k.shape[2]) - torch.arange(q.shape[2])[:, None] - (k.shape[2] - q.shape[2])
    scores = (q @ k.mT * (softmax_scale or q.shape[-1] ** -0.5)).masked_fill(causal & (ahead > 0), -1e30)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def ragged_kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=None, max_seqlen_k=None, **options):
    """The same for sequences written one after another, [n, H, d]."""
    runs = zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True)
    return torch.cat([kernel(q[None, a:b], k[None, c:d], v[None, c:d], **options)[0] for (a, b), (c, d) in runs])


@pytest.fixture
def flashed(monkeypatch):
    """A copy of a model that asks for FlashAttention in all its parts."""
    parts = kernel, ragged_kernel, None, flash._pad_input, flash._unpad_input
    monkeypatch.setattr(flash, "_lazy_imports", lambda *_, **__: parts)
    monkeypatch.setattr(flash, "_loaded_implementation", None)

    def copied(model):
        model = copy.deepcopy(model)
        for config in {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}.values():
            config._attn_implementation = "flash_attention_2"
        return model

    return copied


@pytest.mark.parametrize("name", [*NAMES, "next", "video", "mistral3"])
def test_flash_attention(name, flashed):
    """It takes no mask but that of the padding; Mistral3's tower takes none for images side by side, either."""
    plain, inputs = stock(name)
    model = flashed(plain)
    for method in ("full", *METHODS):
        same(answer(model, inputs, method), answer(plain, inputs, method))


def test_what_flash_attention_has_no_mask_for(flashed):
    model = flashed(shared("llava").model)
    with pytest.raises(UserError, match=r"tome .* FlashAttention"):
        reduce(model, "tome", 8)
    for name in ("llava", "internvl3"):
        model = copy.deepcopy(stock(name)[0])
        model.config.get_text_config()._attn_implementation = "flex_attention"
        with pytest.raises(UserError, match=r"attn_implementation='sdpa'.*'flex_attention'"):
            reduce(model, "fastv", 8)


def test_padding_of_a_tower_that_runs_flash_attention():
    query, key = torch.randn(2, 2, 4, 6, 8)
    real = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    whole, padding = real[:, None, None].expand(-1, 1, 6, -1), real.int()
    for kind in ("received_attention", "keys"):
        views = [views_of([Call(query, key, key, mask, 0.3)], [6, 4], None) for mask in (whole, padding)]
        compute = TOWER_SCORES[kind].compute
        assert [len(own) for own in views] == [2, 2]
        assert all(torch.equal(compute(one), compute(other)) for one, other in zip(*views, strict=True))


class Int8(nn.Module):
    """A linear layer with whole numbers and one scale per row; as in torch's own, `weight` is a method."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.packed = (linear.weight.detach() / self.scale).round().to(torch.int8)

    def weight(self):
        return self.packed * self.scale

    def forward(self, rows):
        return F.linear(rows, self.weight(), self.bias)


@pytest.mark.parametrize("name", NAMES)
def test_int8_weights(name):
    """With all tokens kept, the quantised model's own logits; and the operations of the other."""
    plain, inputs = stock(name)
    model = copy.deepcopy(plain)
    for parent in list(model.modules()):
        for part, linear in parent.named_children():
            if type(linear) is nn.Linear:
                setattr(parent, part, Int8(linear).eval())
    own = model.generate(**inputs, **STEPS, **LOGITS)
    torch.testing.assert_close(answer(model, inputs, "full")[0], list(own.logits), atol=1e-5, rtol=0)
    for method in METHODS:
        (logits, found), (_, expected) = answer(model, inputs, method), answer(plain, inputs, method)
        assert logits[-1].isfinite().all() and [one.mean for one in found] == [one.mean for one in expected]
    layers = [one.model.language_model.layers[0] for one in (model, plain)]
    assert layer_flops(layers[0], 3, 5) == layer_flops(layers[1], 3, 5)
