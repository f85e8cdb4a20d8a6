"""VisionDrop's schedules and merging against definitions written with loops, planted answers, old bugs, options."""

import dataclasses
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llava.errors import UserError
from llava.pipeline import decoder
from llava.pipeline.prefill import prefill
from llava.reduction import registry
from llava.reduction.scores import TowerScore
from llava.reduction.states import EncoderState
from llava.reduction.token_layout import ModelSpec, PatchGrid
from tests.conftest import picture, samples
from visiondrop.method import VisionDrop, dominant_and_contextual, geometric, geometric_means, plan, stages_of

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
    assert plan(384, QUARTERS, 576, "published", 1.5, 7)[0] == (504, 72)
    assert plan(416, QUARTERS, 576, "published", 1.5, 7) == plan(416, QUARTERS, 576, "geometric", 1.5, 7)


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


def encoder_state(images=3, spec=TINY, seed=0, kind="cls_attention", cls=True) -> EncoderState:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    count = spec.visual_tokens
    signals = {TowerScore(kind): draw(images, count).exp(), TowerScore("keys"): draw(images, count, 5)}
    features, ids = draw(images, count + cls, 6), tuple(map(str, range(images)))
    return EncoderState(ids=ids, spec=spec, features=features, scores=signals, layout=spec.layout)


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


def test_raster_order_is_that_of_the_targets():
    state = encoder_state()
    raster = VisionDrop(budget=6, order="raster").encoder(state)
    behind = VisionDrop(budget=6).encoder(state)
    assert raster.kept.tolist() == behind.kept.sort(1).values.tolist()
    place = behind.kept.argsort(1)[..., None].expand(-1, -1, 6)
    torch.testing.assert_close(raster.apply(state.features), behind.apply(state.features).gather(1, place))


def test_official_merging_sums_two_tokens():
    """The release adds the mean of the members to the whole target: merged tokens are twice as large, stage on stage.

    The paper speaks of an average, and that is the default here.
    """
    ones = torch.ones(3, 17, 2)
    for official, size in ((True, 2.0), (False, 1.0)):
        reducer = VisionDrop(budget=6, official=official)
        dominant, contextual = stages_of(reducer, TINY)[0]
        merged = reducer.encoder(encoder_state()).apply(ones)
        assert contextual == 2
        expected = torch.tensor([1.0] * dominant + [size] * contextual)[None, :, None].expand_as(merged)
        torch.testing.assert_close(merged, expected)


# -- through the model ------------------------------------------------------------------------------------------------

OPTIONS = [
    {"official": "true"},
    {"layers": "1,3"},
    {"schedule": "geometric"},
    {"start": "3"},
    {"start": "1"},
    {"ratio": "0"},
    {"ratio": "1"},
    {"keep_cls": "false"},
    {"encoder_score": "received"},
    {"attention": "visual", "average": "viewers"},
    {"attention": "bidirectional", "diagonal": "false"},
    {"metric": "unrotated"},
    {"metric": "hidden", "attention": "visual"},
    {"merge": "target_plus_mean"},
    {"merge": "none"},
    {"order": "raster"},
    {"positions": "original"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()))
def test_every_option_keeps_its_budget_alone_and_in_batches(tiny, options):
    batch, reducer = samples(), registry.build("visiondrop", 6, options)
    reducer.check(tiny.spec)
    state, record = prefill(tiny, batch, reducer)
    assert [audit.mean for audit in record.accounting(state)] == [6, 6, 6, 0, 6]
    for i, sample in enumerate(batch):
        single, alone = prefill(tiny, [sample], reducer)
        torch.testing.assert_close(tiny.logits(state.hidden)[i], tiny.logits(single.hidden)[0], atol=1e-4, rtol=0)
        for a, b in zip(record.steps[i], alone.steps[0], strict=True):
            assert a.reduction.kept.tolist() == b.reduction.kept.tolist()


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()))
def test_every_option_books_its_operations(tiny, options):
    configs = (tiny.hf_model.config, tiny.llm.config, tiny.tower.config)
    for config in configs:
        config._attn_implementation = "eager"
    try:
        with FlopCounterMode(display=False) as counter:
            state, record = prefill(tiny, samples(1), registry.build("visiondrop", 6, options))
            tiny.logits(state.hidden).argmax(-1)
    finally:
        for config in configs:
            config._attn_implementation = "sdpa"
    assert counter.get_total_flops() == record.operations.total


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


def test_every_image_of_a_prompt_is_reduced(tiny):
    """The release reduces the first image alone and leaves the second at what the encoder stage gave."""
    both = dataclasses.replace(samples(1)[0], image=(picture(0), picture(5)))
    reducer = VisionDrop(budget=6, official=True)
    state, record = prefill(tiny, [both], reducer)
    assert record.accounting(state)[0].tokens_per_layer == (18, 14, 10, 6)
    places = [step.place for step in record.steps[0]]
    assert places.count("layer 3") == places.count("layer 3 #2") == 1


def test_caches_keep_what_entered_each_layer(tiny):
    """Nothing is evicted later, and a generated token follows the prompt as each layer knows it."""
    state, _ = prefill(tiny, samples(1), VisionDrop(budget=6))
    text = state.lengths[0][0] - 9
    assert [layer.keys.shape[-2] for layer in state.cache.layers] == [text + k for k in (9, 7, 5, 3)]
    assert [int(part.next_position) for part in state.segments for _ in part.layers] == [text + k for k in (9, 7, 5, 3)]
    kept, _ = prefill(tiny, samples(1), VisionDrop(budget=6, positions="original"))
    assert {int(part.next_position) for part in kept.segments} == {text + 17}  # CLS is one of the 17


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"official": True, "order": "raster", "keep_cls": False}, "leave out keep_cls, order"),
        ({"official": True, "merge": "none"}, "leave out merge"),
        ({"start": 0.5}, "start must be at least 1"),
        ({"ratio": -1}, "ratio must be at least 0"),
        ({"layers": (8, 8)}, "layers must ascend from 1, got 8, 8"),
        ({"layers": (0, 8)}, "layers must ascend"),
        ({"attention": "both"}, "visiondrop.attention must be one of causal, visual, bidirectional"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        VisionDrop(budget=64, **options)


def test_what_a_model_cannot_do_is_refused():
    with pytest.raises(UserError, match="layers must be below 32"):
        VisionDrop(budget=64, layers=(8, 32)).check(LLAVA)
    with pytest.raises(UserError, match="start=4 spends the whole budget on the first 8 of 32 layers"):
        VisionDrop(budget=64, start=4.0).check(LLAVA)
    with pytest.raises(UserError, match="do not fit into 3 decoder layers"):
        VisionDrop(budget=64).check(dataclasses.replace(LLAVA, layers=3))


def test_a_tower_without_cls_needs_received_attention():
    """The paper ranks by attention from all patches where there is no CLS, as in SigLIP; the release cannot."""
    spec = dataclasses.replace(TINY, has_cls=False)
    for wrong in ({}, {"encoder_score": "received"}, {"keep_cls": False}):
        with pytest.raises(UserError, match="encoder_score=received"):
            VisionDrop(budget=6, **wrong).check(spec)
    reducer = VisionDrop(budget=6, encoder_score="received", keep_cls=False)
    reducer.check(spec)
    state = encoder_state(kind="received_attention", cls=False)
    dominant, _ = stages_of(reducer, spec)[0]
    best = state.scores[TowerScore("received_attention")].topk(dominant).indices.sort().values
    assert reducer.encoder(state).kept[:, :dominant].tolist() == best.tolist()
