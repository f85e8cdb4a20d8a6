"""Signals against the attention that transformers itself reports in eager mode, and the account of operations."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llava.errors import UserError
from llava.model.multimodal_encoder.clip_encoder import encode
from llava.pipeline.prefill import prefill
from llava.reduction import registry
from llava.reduction.scores import TowerScore
from llava.reduction.states import attention_rows, projected_heads
from tests.conftest import samples


@pytest.fixture
def eager(tiny):
    """The tiny model with eager attention everywhere, so that transformers returns its attention maps."""
    configs = (tiny.hf_model.config, tiny.llm.config, tiny.tower.config)
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = "eager"
    yield tiny
    for config, value in zip(configs, before, strict=True):
        config._attn_implementation = value


def pixels(tiny, count=3):
    return torch.stack([tiny.image_processor(sample.image) for sample in samples(count)])


@pytest.mark.parametrize("block", [-3, -2, -1, 0])
def test_tower_signals_equal_eager_attention(eager, block):
    images = pixels(eager)
    wanted = [TowerScore(kind, block) for kind in ("cls_attention", "received_attention", "keys")]
    with torch.inference_mode():
        encoded = encode(eager.tower, images, -2, wanted)
        reported = eager.tower(images, output_attentions=True, output_hidden_states=True)
        attention = reported.attentions[block]
        torch.testing.assert_close(encoded.scores[wanted[0]], attention[:, :, 0, 1:].mean(1), atol=1e-6, rtol=0)
        received = attention[:, :, 1:, 1:].mean((1, 2))
        torch.testing.assert_close(encoded.scores[wanted[1]], received, atol=1e-6, rtol=0)
        layer = eager.tower.encoder.layers[block]
        hidden = reported.hidden_states[:-1][block]
        keys = layer.self_attn.k_proj(layer.layer_norm1(hidden))[:, 1:]
        heads = layer.self_attn.num_heads
        torch.testing.assert_close(encoded.scores[wanted[2]], keys.unflatten(-1, (heads, -1)).mean(2))
        torch.testing.assert_close(encoded.features, reported.hidden_states[-2][:, 1:])


@pytest.mark.parametrize("block", [-2, -1])
def test_cls_logits_are_eager_attention_before_its_softmax(eager, block):
    """Up to a constant per head the logarithm of a row of attention; and the definition, head by head."""
    images, wanted = pixels(eager), TowerScore("cls_logits", block)
    with torch.inference_mode():
        found = encode(eager.tower, images, -2, [wanted]).scores[wanted]
        reported = eager.tower(images, output_attentions=True, output_hidden_states=True)
        log = reported.attentions[block][:, :, 0, 1:].log().mean(1)
        centred = [rows - rows.mean(1, keepdim=True) for rows in (found, log)]
        torch.testing.assert_close(*centred, atol=1e-5, rtol=0)
        layer = eager.tower.encoder.layers[block]
        normed = layer.layer_norm1(reported.hidden_states[:-1][block])
        heads = layer.self_attn.num_heads
        query = layer.self_attn.q_proj(normed[:, 0]).unflatten(-1, (heads, -1))
        key = layer.self_attn.k_proj(normed[:, 1:]).unflatten(-1, (heads, -1))
        products = [(query[:, None, h] * key[:, :, h]).sum(-1) * query.shape[-1] ** -0.5 for h in range(heads)]
        torch.testing.assert_close(found, sum(products) / heads, atol=1e-6, rtol=1e-5)
        assert (found < 0).any() and (found > 0).any()


def test_blocks_behind_the_features_run_only_for_a_signal(tiny, monkeypatch):
    ran = []
    for index, block in enumerate(tiny.tower.encoder.layers):
        original = block.forward
        monkeypatch.setattr(block, "forward", lambda *a, i=index, f=original: ran.append(i) or f(*a))
    with torch.inference_mode():
        encode(tiny.tower, pixels(tiny), -2)
    assert ran == [0, 1]


def test_a_block_the_tower_lacks_is_refused(tiny):
    with pytest.raises(UserError, match="has 3 blocks"):
        encode(tiny.tower, pixels(tiny), -2, [TowerScore("keys", -4)])


def test_smaller_grid_equals_a_smaller_tower(tiny):
    """At the tower's own grid nothing is resized; at 2 x 2 four patches come out."""
    with torch.inference_mode():
        images = pixels(tiny)
        torch.testing.assert_close(
            encode(tiny.tower, images, -2, grid=(4, 4)).features, encode(tiny.tower, images, -2).features
        )
        assert encode(tiny.tower, images, -2, grid=(2, 2)).features.shape[1] == 4


@pytest.mark.parametrize("layer", [0, 2])
def test_contextual_rows_equal_the_models_own_attention(eager, layer):
    """With rotation and real inputs, a row is the eager map's row, renormalised over the visual keys."""
    batch = samples(3)
    seen = {}

    class Probe(registry.method("consensusdrop")):
        def prompt(self, state):
            for rows in ("question", "last"):
                seen[rows] = state.text_attention(layer, rows, rotary=True, contextual=True)

    prefill(eager, batch, Probe(budget=7))
    for i, sample in enumerate(batch):
        prompt = eager.prompt(sample)
        slot = prompt.ids.index(-200)
        ids = [*prompt.ids[:slot], *[eager.hf_model.config.image_token_index] * 16, *prompt.ids[slot + 1 :]]
        with torch.inference_mode():
            maps = eager.hf_model(
                input_ids=torch.tensor([ids]),
                pixel_values=eager.image_processor(sample.image)[None],
                output_attentions=True,
            ).attentions[layer]
        visual = maps[0, :, :, slot : slot + 16]
        visual = visual / visual.sum(-1, keepdim=True)
        start, stop = (place + 15 for place in prompt.question)
        for rows, expected in (("question", visual[:, start:stop]), ("last", visual[:, -1:])):
            weights, mask = seen[rows]
            assert expected.shape[1] == (weights.shape[2] if mask is None else int(mask[i].sum()))
            torch.testing.assert_close(weights[i, :, : expected.shape[1]], expected, atol=1e-5, rtol=1e-4)


def test_static_rows_without_rotation_ignore_positions(tiny):
    """The same visual tokens in another order get the same scores in that order: no preference for late tokens."""
    text, visual = torch.randn(1, 3, 64), torch.randn(1, 16, 64)
    turn = torch.randperm(16)
    layer = tiny.llm.layers[0]
    with torch.inference_mode():
        keys = [projected_heads(layer, layer.self_attn.k_proj, v) for v in (visual, visual[:, turn])]
        straight, turned = (attention_rows(layer, text, key) for key in keys)
    torch.testing.assert_close(straight[..., turn], turned)


@pytest.mark.parametrize("budget", [4, 9, 16])
@pytest.mark.parametrize("method", registry.names())
def test_flops_equal_what_torch_counts(eager, method, budget):
    """One sample, so that every product is a matmul that torch's counter sees.

    For it attention is eager, and CLIP's text tower runs the plain kernel.
    """
    reducer = registry.build(method, budget)
    try:
        reducer.check(eager.spec)
    except UserError:
        return  # a budget that this method's structure cannot meet on so small a model
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        state, record = prefill(eager, samples(1), reducer)
        eager.logits(state.hidden).argmax(-1)
    assert counter.get_total_flops() == record.operations.total
