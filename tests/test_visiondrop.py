"""VisionDrop's schedules, merging and scores against loops and the model's own attention, planted answers, old bugs."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention

import visiondrop.method
from llava.pipeline import decoder
from llava.pipeline.generate import prefill
from llava.reduction import registry
from llava.reduction.scores import TowerScore
from llava.reduction.states import EncoderState
from llava.reduction.token_layout import ModelSpec, PatchGrid
from tests.attention_maps import eager_attention
from tests.conftest import samples
from tests.drawn_images import state_with
from visiondrop.method import (
    AttentionInputs,
    VisionDrop,
    attention_inputs,
    dominant_and_contextual,
    geometric,
    geometric_means,
    merge_metric,
    plan,
    stages_of,
    visual_scores,
)

LLAVA = ModelSpec(576, 32, PatchGrid(24, 24), 24)
TINY = ModelSpec(16, 4, PatchGrid(4, 4), 3)
QUARTERS = (8, 8, 8, 8)


# -- schedules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times, budget", [(1, 32), (2, 64), (4, 128), (6, 192)])
def test_default_schedule_is_a_multiple_of_the_published_one(times, budget):
    reducer = registry.build("visiondrop", budget)
    reducer.check(LLAVA)
    pairs = {0: (42, 6), 8: (30, 5), 16: (22, 4), 24: (16, 3)}
    assert stages_of(reducer, LLAVA) == {layer: (times * d, times * c) for layer, (d, c) in pairs.items()}
    expected = [times * total for total in (48, 35, 26, 19) for _ in range(8)]
    assert list(reducer.tokens_per_layer(LLAVA)) == expected and sum(expected) == 32 * budget


@pytest.mark.parametrize(
    "budget, counts",
    [(32, (48, 35, 26, 19)), (64, (96, 70, 52, 38)), (128, (192, 141, 103, 76)), (192, (288, 211, 155, 114))],
)
def test_the_geometric_rule_gives_the_published_counts(budget, counts):
    assert geometric(budget, QUARTERS, 576, 1.5) == counts
    first, *rest = geometric_means(budget, QUARTERS, 576, 1.5)
    factor = rest[0] / first
    assert first == 1.5 * budget and factor == pytest.approx(0.73362, abs=1e-5)
    assert rest == pytest.approx([first * factor**k for k in (1, 2, 3)])


def test_the_split_rule_gives_the_published_pairs():
    """A contextual token for every begun group of eight: the pairs of the release, which no fixed share gives."""
    assert [dominant_and_contextual(total, 7) for total in (48, 35, 26, 19)] == [(42, 6), (30, 5), (22, 4), (16, 3)]
    assert (
        dominant_and_contextual(19, 0) == (19, 0)
        and dominant_and_contextual(1, 7) == (1, 0)
        and dominant_and_contextual(2, 1) == (1, 1)
        and dominant_and_contextual(16, 1) == (8, 8)
    )


def test_video_starts_at_three_times_the_budget():
    assert geometric_means(256, QUARTERS, 2048, 3.0) == pytest.approx((768, 194.36, 49.19, 12.45), abs=0.01)
    assert geometric(256, QUARTERS, 2048, 3.0) == (768, 194, 49, 13)


@pytest.mark.parametrize("widths", [QUARTERS, (10,) * 4, (6, 5, 6, 5), (2, 8, 10, 12), (1,) * 4, (3, 2, 2), (4,) * 8])
@pytest.mark.parametrize("start", [1.0, 1.5, 3.0])
def test_any_budget_is_met_on_any_segments(widths, start):
    """Never growing, at least 1, at most the whole image, and the mean over layers is the budget exactly."""
    for budget in (1, 2, *range(4, 20), 33, 50, 63, 64, 100, 191, 300, 420, 575):
        counts = geometric(budget, widths, 576, start)
        assert all(a >= b >= 1 for a, b in zip((576, *counts), counts, strict=False))
        assert sum(c * w for c, w in zip(counts, widths, strict=True)) == budget * sum(widths), (budget, counts)
        exact = sum(m * w for m, w in zip(geometric_means(budget, widths, 576, start), widths, strict=True))
        assert exact == pytest.approx(budget * sum(widths))


def test_rounding_stays_beside_the_geometric_values():
    for budget in range(10, 384):
        ideal = geometric_means(budget, QUARTERS, 576, 1.5)
        assert max(abs(a - b) for a, b in zip(geometric(budget, QUARTERS, 576, 1.5), ideal, strict=True)) <= 1.0


def test_the_first_segment_never_exceeds_the_image():
    assert geometric(500, QUARTERS, 576, 1.5) == (576, 522, 473, 429)
    assert plan(384, QUARTERS, 576, 1.5, 7)[0] == (504, 72)


def test_stages_move_with_the_depth():
    deep = dataclasses.replace(LLAVA, layers=40)
    reducer = registry.build("visiondrop", 64)
    assert reducer.decoder_layers(40) == (10, 20, 30) and reducer.decoder_layers(8) == (2, 4, 6)
    assert reducer.tokens_per_layer(deep) == tuple(total for total in (96, 70, 52, 38) for _ in range(10))
    odd = dataclasses.replace(LLAVA, layers=22)
    assert reducer.decoder_layers(22) == (6, 11, 17)
    assert sum(reducer.tokens_per_layer(odd)) == 64 * 22
    early = registry.build("visiondrop", 64, {"layers": "2,16"})
    assert early.decoder_layers(32) == (2, 16) and sum(early.tokens_per_layer(LLAVA)) == 64 * 32
    once = registry.build("visiondrop", 64, {"start": "1"})
    assert once.tokens_per_layer(LLAVA) == (64,) * 32


# -- the encoder stage ------------------------------------------------------------------------------------------------


def encoder_state(images=3, spec=TINY, seed=0, cls=True) -> EncoderState:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    count = spec.visual_tokens
    signals = {TowerScore("cls_attention"): draw(images, count).exp(), TowerScore("keys"): draw(images, count, 5)}
    return state_with(draw(images, count + cls, 6), signals, spec=spec, layout=spec.layout)


def reduce_by_the_book(tokens, score, metric, dominant, contextual, merge, fixed=()) -> tuple[list[int], list]:
    """(positions, values) of one image, plain loops. Positions in `fixed` are dominant whatever their score."""
    count = len(tokens)
    order = [*fixed, *sorted((i for i in range(count) if i not in fixed), key=lambda i: (-score[i], i))]
    kept = sorted(order[:dominant])
    rest = [i for i in range(count) if i not in kept]
    step = max(1, len(rest) // contextual)
    targets = [rest[k * step] for k in range(contextual)]
    members = {target: [] for target in targets}
    for i in rest:
        if i not in targets:
            dot = [sum(a * b for a, b in zip(metric[i], metric[t], strict=True)) for t in targets]
            cosine = [value / math.hypot(*metric[t]) for value, t in zip(dot, targets, strict=True)]
            members[targets[cosine.index(max(cosine))]].append(i)
    values = [tokens[i] for i in kept]
    for target in targets:
        others = [tokens[i] for i in members[target]]
        mean = [sum(column) / len(others) for column in zip(*others, strict=True)] if others else [0.0] * len(tokens[0])
        if merge == "target_plus_mean":
            values.append([a + b for a, b in zip(tokens[target], mean, strict=True)])
        elif merge == "mean":
            group = [tokens[target], *others]
            values.append([sum(column) / len(group) for column in zip(*group, strict=True)])
        else:
            values.append(tokens[target])
    return kept + targets, values


@pytest.mark.parametrize("merge", ["mean", "target_plus_mean", "none"])
@pytest.mark.parametrize("budget", [2, 5, 9, 10])
@pytest.mark.parametrize("keep_cls", [True, False])
def test_encoder_stage_equals_its_definition(merge, budget, keep_cls):
    state = encoder_state(seed=budget, cls=keep_cls)
    reducer = VisionDrop(budget=budget, merge=merge, keep_cls=keep_cls, ratio=3)
    found = reducer.encoder(state)
    values = found.apply(state.features)
    score, keys = (state.scores[signal].tolist() for signal in reducer.scores())
    for b in range(3):
        scores, metric = ([0.0, *score[b]], [[1.0] * 5, *keys[b]]) if keep_cls else (score[b], keys[b])
        pair, fixed = stages_of(reducer, TINY)[0], (0,) if keep_cls else ()
        position, expected = reduce_by_the_book(state.features[b].tolist(), scores, metric, *pair, merge, fixed)
        assert found.kept[b].tolist() == position
        torch.testing.assert_close(values[b], torch.tensor(expected), atol=1e-5, rtol=1e-4)


def test_planted_patches_are_dominant_and_cls_comes_first():
    """Plant the answer: CLS looks at patches 3 and 9, everything else is merged."""
    state = encoder_state(images=1)
    state.scores[TowerScore("cls_attention")] = torch.full((1, 16), 0.01)
    state.scores[TowerScore("cls_attention")][0, [3, 9]] = 0.4
    reducer = VisionDrop(budget=3, ratio=3)  # the first segment gets 5 tokens: 3 dominant, 2 contextual
    assert stages_of(reducer, TINY)[0] == (3, 2)
    assert reducer.encoder(state).kept[0, :3].tolist() == [0, 4, 10]
    without = VisionDrop(budget=3, ratio=3, keep_cls=False).encoder(encoder_state(images=1, cls=False))
    assert without.inputs == 16


def test_a_first_segment_as_long_as_the_image_keeps_every_patch_and_no_cls():
    assert VisionDrop(budget=13).encoder(encoder_state()).kept.tolist() == [list(range(1, 17))] * 3
    assert VisionDrop(budget=13, keep_cls=False).encoder(encoder_state(cls=False)) is None


def test_the_encoder_stage_alone_is_the_first_stage_with_the_whole_budget():
    state, whole = encoder_state(), VisionDrop(budget=3, ratio=3)  # 5 tokens after the first stage
    alone = VisionDrop(budget=5, ratio=3, encoder_only=True)
    first, found = whole.encoder(state), alone.encoder(state)
    assert torch.equal(found.kept, first.kept) and torch.equal(found.apply(state.features), first.apply(state.features))
    assert alone.acts_in == alone.with_budget(8).acts_in == {"encoder"} and whole.acts_in == {"encoder", "decoder"}
    assert set(alone.tokens_per_layer(TINY)) == {5}
    alone.check(TINY)


def test_raster_order_is_that_of_the_targets():
    state = encoder_state()
    raster = VisionDrop(budget=6, order="raster").encoder(state)
    behind = VisionDrop(budget=6).encoder(state)
    assert raster.kept.tolist() == behind.kept.sort(1).values.tolist()
    place = behind.kept.argsort(1)[..., None].expand(-1, -1, 6)
    torch.testing.assert_close(raster.apply(state.features), behind.apply(state.features).gather(1, place))


# -- through the model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["renumber", "original"])
def test_decoding_in_a_batch_equals_decoding_alone(tiny, positions):
    """In the release a batch of two gives wrong logits, in silence, from the first decode step; three crash."""
    reducer = VisionDrop(budget=6, positions=positions, official=positions == "renumber")

    def decode(batch):
        with torch.inference_mode():
            state, _ = prefill(tiny, batch, reducer)
            token = tiny.llm.embed_tokens(torch.full((len(batch), 1), 7))
            hidden = [decoder.step(tiny.llm, state, token) for _ in range(3)][-1]
        return tiny.logits(hidden)

    batch = samples(3)
    together = decode(batch)
    for i, sample in enumerate(batch):
        torch.testing.assert_close(together[i], decode([sample])[0], atol=1e-4, rtol=0)


def test_caches_keep_what_entered_each_layer(tiny):
    """Nothing is evicted later, and a generated token follows the prompt as each layer knows it."""
    state, _ = prefill(tiny, samples(1), VisionDrop(budget=6))
    text = state.lengths[0][0] - 9
    assert [layer.keys.shape[-2] for layer in state.cache.layers] == [text + k for k in (9, 7, 5, 3)]
    assert [int(part.next_position) for part in state.segments for _ in part.layers] == [text + k for k in (9, 7, 5, 3)]
    kept, _ = prefill(tiny, samples(1), VisionDrop(budget=6, positions="original"))
    assert {int(part.next_position) for part in kept.segments} == {text + 17}  # CLS is one of the 17


# -- errors -----------------------------------------------------------------------------------------------------------


def test_a_tower_without_cls_keeps_patches_alone():
    """The paper ranks by attention from all patches where there is no CLS, as in SigLIP; the release cannot."""
    reducer, state = VisionDrop(budget=6), encoder_state(cls=False)
    dominant, _ = stages_of(reducer, TINY)[0]
    best = state.scores[TowerScore("cls_attention")].topk(dominant).indices.sort().values
    assert reducer.encoder(state).kept[:, :dominant].tolist() == best.tolist()


# -- scores in the decoder --------------------------------------------------------------------------------------------


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
    with torch.inference_mode():
        with eager_attention(tiny):
            reported = tiny.llm(
                inputs_embeds=state.start.hidden, position_ids=state.start.position, output_attentions=True
            )
        score = visual_scores(state, attention_inputs(state, "causal"), "causal", "all", True)
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
    part = LlamaAttention(LlamaConfig(hidden_size=width, num_attention_heads=1), 0)
    part.scaling = 1.0
    with torch.no_grad():
        for linear, channel in ((part.q_proj, 0), (part.k_proj, 1)):
            linear.weight.zero_()
            linear.weight[0, channel] = 1
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
    keys = toy_layer().self_attn.k_proj(hidden)[:, None]
    return AttentionInputs(hidden[:, ahead:], None, keys, later, ((ahead, ahead + count),))


def toy_scores(look: AttentionInputs, *choices) -> torch.Tensor:
    return visual_scores(SimpleNamespace(llm=SimpleNamespace(layers=[toy_layer()]), layer=0), look, *choices)


@pytest.mark.parametrize("attention", ["causal", "visual", "bidirectional"])
def test_planted_tokens_receive_the_most(attention):
    """Plant the answer: every token asks for what tokens 3 and 9 hold."""
    score = toy_scores(toy_look(16, 5, attention, (3, 9)), attention, "viewers", False)
    assert sorted(score[0].topk(2).indices.tolist()) == [3, 9]


def test_causal_column_means_prefer_early_tokens():
    """Under uniform attention the released score is 71 times as high for the first of 48 tokens as for the last.

    Keeping 30 then keeps the first 30, whatever the image shows. Only bidirectional attention has no such preference.
    """
    ratio = {}
    for attention in ("causal", "visual", "bidirectional"):
        for average in ("all", "viewers"):
            score = toy_scores(toy_look(48, 35, attention), attention, average, True).detach()
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
