"""VisionDrop's scores inside the decoder against loops, against the model's own attention, and planted answers."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import visiondrop.method
from llava.pipeline.prefill import prefill
from llava.reduction import Angles
from tests.conftest import samples
from visiondrop.method import (
    AttentionInputs,
    VisionDrop,
    attention_inputs,
    merge_metric,
    received_attention,
    stages_of,
    viewers,
    visual_scores,
)


def decoder_states(tiny, layer=2, batch=None) -> list:
    """States in front of a layer, nothing reduced yet, of a padded batch."""
    states = []

    class Probe(VisionDrop):
        def decoder_layers(self, layers):
            return (layer,)

        def decoder(self, state):
            states.append(state)

    with torch.inference_mode():
        prefill(tiny, batch or samples(3), Probe(budget=16))
    return states


def received_by_the_book(layer, hidden, position, frequency, span, attention, diagonal) -> tuple[list, list]:
    """(attention received, viewers) of each visual token of one prompt, heads and rows one by one."""
    part, half = layer.self_attn, layer.self_attn.head_dim // 2
    angles = [[float(p) * f for f in frequency] for p in position]

    def heads(projection):
        raw = projection(layer.input_layernorm(hidden)).unflatten(-1, (-1, 2 * half)).tolist()
        return [
            [
                [
                    v[i % half] * math.cos(a[i % half]) - v[i % half + half] * math.sin(a[i % half])
                    if i < half
                    else v[i] * math.cos(a[i % half]) + v[i - half] * math.sin(a[i % half])
                    for i in range(2 * half)
                ]
                for v in token
            ]
            for token, a in zip(raw, angles, strict=True)
        ]

    query, key = heads(part.q_proj), heads(part.k_proj)
    count, groups = len(query[0]), len(query[0]) // len(key[0])
    visual = range(*span)
    received, seen_by = [0.0] * len(visual), [0] * len(visual)
    for i in visual:
        keys = {"causal": range(i + 1), "visual": range(span[0], i + 1), "bidirectional": visual}[attention]
        for head in range(count):
            logit = {j: sum(a * b for a, b in zip(query[i][head], key[j][head // groups], strict=True)) for j in keys}
            weight = {j: math.exp(value * part.scaling) for j, value in logit.items()}
            for j in visual:
                if j in weight and (diagonal or i != j):
                    received[j - span[0]] += weight[j] / sum(weight.values()) / count
                    seen_by[j - span[0]] += head == 0
    return received, seen_by


@pytest.mark.parametrize("attention", ["causal", "visual", "bidirectional"])
@pytest.mark.parametrize("diagonal", [True, False])
def test_scores_equal_their_definition(tiny, attention, diagonal):
    """Padded batch, grouped-query heads: the release crashes on both."""
    (state,) = decoder_states(tiny)
    assert state.sequence.padded and tiny.llm.layers[2].self_attn.num_key_value_groups == 2
    frequency = tiny.llm.rotary_emb.inv_freq.tolist()
    with torch.inference_mode():
        seen = attention_inputs(state, attention)
        scores = {a: visual_scores(state, seen, attention, a, diagonal) for a in ("all", "viewers")}
        for b, span in enumerate(state.sequence.images):
            pad = state.sequence.padding(b)
            hidden, position = state.sequence.hidden[b, pad:], state.sequence.position[b, pad:].tolist()
            received, count = received_by_the_book(
                tiny.llm.layers[2], hidden, position, frequency, span, attention, diagonal
            )
            expected = torch.tensor(received)
            torch.testing.assert_close(scores["all"][b], expected / 16, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(
                scores["viewers"][b], expected / torch.tensor(count).clamp(min=1), atol=1e-5, rtol=1e-4
            )


def test_causal_scores_are_column_means_of_the_models_own_map(tiny):
    """Against the map that transformers reports: text in front takes its share, the upper triangle counts as zeros."""
    (state,) = decoder_states(tiny, batch=samples(1))
    (start, stop) = state.sequence.images[0]
    configs = (tiny.llm.config, tiny.hf_model.config)
    for config in configs:
        config._attn_implementation = "eager"
    try:
        with torch.inference_mode():
            reported = tiny.llm(
                inputs_embeds=state.start.hidden, position_ids=state.start.position, output_attentions=True
            )
            score = visual_scores(state, attention_inputs(state, "causal"), "causal", "all", True)
    finally:
        for config in configs:
            config._attn_implementation = "sdpa"
    expected = reported.attentions[2][0].mean(0)[start:stop, start:stop].mean(0)
    torch.testing.assert_close(score[0], expected, atol=1e-5, rtol=1e-4)


def test_the_decoder_stage_keeps_the_best_and_merges_by_keys(tiny):
    """Dominant tokens in raster order, then the targets at their stride; every other joins the most similar one."""
    (state,) = decoder_states(tiny)
    reducer = VisionDrop(budget=8, ratio=2)
    dominant, contextual = stages_of(reducer, tiny.spec)[2]
    with torch.inference_mode():
        found = reducer.decoder(state)
        seen = attention_inputs(state, "causal")
        best = visual_scores(state, seen, "causal", "all", True).topk(dominant).indices.sort().values.tolist()
        key = torch.nn.functional.normalize(merge_metric(state, seen, "rotated"), dim=-1)
    assert contextual == 2
    for b, kept in enumerate(best):
        rest = [i for i in range(16) if i not in kept]
        targets = [rest[0], rest[len(rest) // 2]]
        assert found.kept[b].tolist() == kept + targets
        for i in set(rest) - set(targets):
            nearest = int((key[b, targets] @ key[b, i]).argmax())
            assert found.assignment[b, i] == dominant + nearest


@pytest.mark.parametrize("limit", [1, 300, 2000])
def test_slices_make_no_difference(tiny, monkeypatch, limit):
    (state,) = decoder_states(tiny)
    with torch.inference_mode():
        seen = attention_inputs(state, "causal")
        whole = visual_scores(state, seen, "causal", "all", False)
        monkeypatch.setattr(visiondrop.method, "SLICE", limit)
        torch.testing.assert_close(visual_scores(state, seen, "causal", "all", False), whole)


def toy_layer(width=4) -> nn.Module:
    """One head without norm: queries are channel 0, keys are channel 1."""
    query, key = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
    with torch.no_grad():
        for linear, channel in ((query, 0), (key, 1)):
            linear.weight.zero_()
            linear.weight[0, channel] = 1
    part = SimpleNamespace(q_proj=query, k_proj=key, head_dim=width, scaling=1.0)
    return SimpleNamespace(self_attn=part, input_layernorm=nn.Identity())


@torch.no_grad()
def toy_look(count: int, prefix: int, attention: str, strong=()) -> AttentionInputs:
    """`count` visual tokens behind `prefix` others; all ask alike, and the keys of `strong` ones answer."""
    hidden = torch.zeros(1, prefix + count, 4)
    hidden[..., 0] = 1
    hidden[0, [prefix + i for i in strong], 1] = 6
    hidden = hidden if attention == "causal" else hidden[:, prefix:]
    ahead = hidden.shape[1] - count
    columns = torch.arange(ahead, ahead + count)[None]
    later = None if attention == "bidirectional" else (torch.arange(hidden.shape[1]) > columns[..., None])[:, None]
    rotary = Angles(torch.ones(1, 1, count, 4), torch.zeros(1, 1, count, 4))
    keys = toy_layer().self_attn.k_proj(hidden)[:, None]
    return AttentionInputs(hidden[:, ahead:], rotary, keys, later, ((ahead, ahead + count),))


@pytest.mark.parametrize("attention", ["causal", "visual", "bidirectional"])
def test_planted_tokens_receive_the_most(attention):
    """Plant the answer: every token asks for what tokens 3 and 9 hold."""
    received = received_attention(toy_layer(), toy_look(16, 5, attention, (3, 9)), False)
    received = received / viewers(16, attention, False, received.device)
    assert sorted(received[0].topk(2).indices.tolist()) == [3, 9]


def test_causal_column_means_prefer_early_tokens():
    """Under uniform attention the released score is 71 times as high for the first of 48 tokens as for the last.

    Keeping 30 then keeps the first 30, whatever the picture shows. Only bidirectional attention has no such preference.
    """
    ratio = {}
    for attention in ("causal", "visual", "bidirectional"):
        received = received_attention(toy_layer(), toy_look(48, 35, attention), True).detach()
        for average in ("all", "viewers"):
            score = received if average == "all" else received / viewers(48, attention, True, received.device)
            ratio[attention, average] = float(score[0, 0] / score[0, -1])
            if (attention, average) == ("causal", "all"):
                assert score[0].topk(30).indices.sort().values.tolist() == list(range(30))
    assert ratio["causal", "all"] == pytest.approx(71, abs=0.5)
    assert ratio["causal", "viewers"] == pytest.approx(1.48, abs=0.01)
    assert ratio["visual", "all"] == pytest.approx(214, abs=0.5)
    assert ratio["visual", "viewers"] == pytest.approx(4.46, abs=0.01)
    assert ratio["bidirectional", "all"] == pytest.approx(1) and ratio["bidirectional", "viewers"] == pytest.approx(1)


def test_the_merge_metric_is_what_it_says(tiny):
    """Rotated keys are those of the layer's cache; unrotated ones and hidden states do not change with position ids."""
    (state,) = decoder_states(tiny)
    apart = dataclasses.replace(state.sequence, position=3 * state.sequence.position, rotary=None)
    moved = dataclasses.replace(state, sequence=apart)
    key = tiny.llm.layers[2].self_attn.k_proj
    with torch.inference_mode():
        metric = {
            m: merge_metric(state, attention_inputs(state, "causal"), m) for m in ("rotated", "unrotated", "hidden")
        }
        other = {m: merge_metric(moved, attention_inputs(moved, "causal"), m) for m in metric}
        plain = key(tiny.llm.layers[2].input_layernorm(state.tokens)).unflatten(-1, (2, -1)).mean(2)
        same = merge_metric(state, attention_inputs(state, "bidirectional"), "rotated")
    torch.testing.assert_close(metric["unrotated"], plain)
    torch.testing.assert_close(metric["rotated"], same)
    (later,) = decoder_states(tiny, layer=3)
    cached = later.sequence.take(later.keys.transpose(1, 2), later.sequence.images).mean(2)
    torch.testing.assert_close(metric["rotated"], cached, atol=1e-5, rtol=1e-4)
    assert torch.equal(metric["hidden"], state.tokens) and torch.equal(other["hidden"], state.tokens)
    assert torch.equal(metric["unrotated"], other["unrotated"])
    assert not torch.allclose(metric["rotated"], other["rotated"], atol=1e-2)
