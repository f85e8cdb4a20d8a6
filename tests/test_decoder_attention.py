"""Rows of a decoder layer's attention against the maps that the stock model reports, in decoders of many kinds."""

import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from llava.errors import UserError
from llava.pipeline.sequence import PromptBatch
from llava.reduction.states import PROJECTIONS, DecoderState, heads_of

SIZES = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
AXES = {"rope_type": "default", "rope_theta": 10000.0}  # of a rotation by frame, row and column
INTERLEAVED = AXES | {"mrope_section": [4, 2, 2], "mrope_interleaved": True}
# Norms of heads, sliding windows, partial, interleaved and three-axes rotation, layers without one, capped logits.
DECODERS = {
    "llama": {},
    "qwen2": {},
    "mistral": {"sliding_window": 6},
    "qwen2_5_vl_text": {"rope_parameters": AXES | {"mrope_section": [2, 3, 3]}},
    "qwen3": {"head_dim": 24},
    "qwen3_vl_text": {"head_dim": 16, "rope_parameters": INTERLEAVED},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 6},
    "gemma3_text": {"head_dim": 96, "query_pre_attn_scalar": 16, "sliding_window": 6, "sliding_window_pattern": 2},
    "cohere2": {"sliding_window": 6, "sliding_window_pattern": 2},
    "glm4v_text": {"rope_parameters": AXES | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}},
}
WITH_AXES = ("qwen2_5_vl_text", "qwen3_vl_text", "glm4v_text")
LENGTH, VISUAL, ROWS = 20, (2, 14), (15, 20)


@pytest.fixture(params=DECODERS)
def decoder(request) -> nn.Module:
    """A decoder with random weights, sharp attention and uneven norms, by eager attention."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, **SIZES | DECODERS[request.param])
    model = AutoModel.from_config(config, attn_implementation="eager").eval()
    for name, weight in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            weight.data.mul_(15)
        if "norm" in name:
            weight.data.add_(torch.randn_like(weight) / 3)
    return model


def windowed(model: nn.Module, layer: int) -> bool:
    kinds = getattr(model.config, "layer_types", None)
    return kinds[layer] == "sliding_attention" if kinds else bool(getattr(model.config, "sliding_window", None))


@torch.inference_mode()
def test_rows_are_those_of_the_stock_layer(decoder):
    """Every layer; own algebra was wrong by 0.78 in Gemma 3, 0.2 in Qwen3 and 0.0015 in Cohere 2, and said nothing."""
    axes = 3 if decoder.config.model_type in WITH_AXES else 1
    place = torch.stack([torch.arange(LENGTH) * (3 - axis) // 3 for axis in range(axes)], -1)[None]
    given = place.permute(2, 0, 1) if axes == 3 else place[..., 0]
    embedded = torch.randn(1, LENGTH, decoder.config.hidden_size)
    asked = {"output_attentions": True, "output_hidden_states": True}
    stock = decoder(inputs_embeds=embedded, position_ids=given, use_cache=False, **asked)
    masks = {
        sliding: make(decoder.config, embedded, None, None, position_ids=torch.arange(LENGTH)[None]) == 0
        for sliding, make in ((False, create_causal_mask), (True, create_sliding_window_causal_mask))
        if not sliding or any(windowed(decoder, layer) for layer in range(3))
    }
    spans = ((VISUAL,),), (ROWS,), (ROWS,), (ROWS,)
    for layer in range(3):
        hidden = stock.hidden_states[layer]
        sequence = PromptBatch(hidden, place if axes == 3 else place[..., 0], (LENGTH,), *spans)
        state = DecoderState(
            ids=("a",),
            tokens=hidden[:, slice(*VISUAL)],
            sequence=sequence,
            llm=decoder,
            layer=layer,
            entered=sequence,
            keys=hidden,
            start=sequence,
            masks=lambda index: masks[windowed(decoder, index)],
        )
        for rows, span in (("question", ROWS), ("visual", VISUAL)):
            found, _ = state.attention(rows)
            expected = stock.attentions[layer][:, :, slice(*span), slice(*VISUAL)]
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
        if not windowed(decoder, layer):
            plain = state.__class__(**{**vars(state), "masks": None}).attention("question")[0]
            assert torch.equal(plain, state.attention("question")[0])


@torch.inference_mode()
def test_only_the_projection_that_is_asked_for_is_computed(decoder):
    """No attention, no values, no output projection; and the model is as it was before."""
    layer, ran = decoder.layers[1].self_attn, []
    before = dict(vars(layer))
    hooks = [
        getattr(layer, name).register_forward_hook(lambda *_, name=name: ran.append(name))
        for name in PROJECTIONS.values()
    ]
    for part in ("query", "key"):
        heads_of(decoder.layers[1], part, torch.randn(1, 3, 64))
    assert ran == ["q_proj", "k_proj"]
    for hook in hooks:
        hook.remove()
    assert vars(layer) == before and decoder.config._attn_implementation == "eager"


@torch.inference_mode()
def test_any_kernel_and_weights_that_are_offloaded(decoder):
    """The kernel is never called, so FlashAttention needs no GPU here; accelerate's hooks fetch what is asked for."""
    layer, normed = decoder.layers[1], torch.randn(1, 3, 64)
    expected = [heads_of(layer, part, normed) for part in ("query", "key")]
    decoder.config._attn_implementation = "flash_attention_2"
    cpu_offload(decoder, torch.device("cpu"))
    assert layer.self_attn.k_proj.weight.is_meta
    assert all(map(torch.equal, expected, [heads_of(layer, part, normed) for part in ("query", "key")]))


def test_attention_that_calls_no_kernel_is_refused(decoder):
    """A layer whose attention is written out cannot be read, and says so."""

    class Own(type(decoder.layers[0].self_attn)):
        def forward(self, hidden_states, **kwargs):
            return hidden_states, None

    decoder.layers[0].self_attn.__class__ = Own
    with pytest.raises(UserError, match="Own does not call its kernel through"):
        heads_of(decoder.layers[0], "key", torch.randn(1, 3, 64))
