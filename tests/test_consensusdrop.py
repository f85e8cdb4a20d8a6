"""ConsensusDrop's maths against definitions written with loops, planted answers, and every option through the model."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from consensusdrop.method import FUSIONS, ConsensusDrop, fuse, pool_attention, rank01
from llava.pipeline.generate import prefill
from llava.reduction import keep_top, registry
from llava.reduction.merging import ANCHORS, WEIGHTS, choose_anchors, merge_plan, others
from llava.reduction.reducer import PromptState
from llava.reduction.scores import TowerScore
from llava.reduction.token_layout import PatchGrid
from tests.conftest import samples
from tests.drawn_images import state_with

CHOICES = {"alpha": 0.3, "cross_top": 0}


def saliencies(seed=0, images=3, tokens=20):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.rand(images, tokens, generator=generator).pow(3)  # noqa: E731
    return draw(), draw()


def fuse_by_the_book(v: list[float], c: list[float], rule: str, keep: int) -> list[float]:
    """One image, plain loops, from the formulas in docs/consensusdrop.md."""
    n, a = len(v), CHOICES["alpha"]

    def place(score):
        order = sorted(range(n), key=lambda i: (-score[i], i))
        return [order.index(i) for i in range(n)]

    rank = lambda score: [1 - p / (n - 1) for p in place(score)]  # noqa: E731
    mean = lambda score: sum(score) / n  # noqa: E731
    if rule == "rank":
        return [a * x + (1 - a) * y for x, y in zip(rank(v), rank(c), strict=True)]
    if rule == "raw":
        return [a * x + (1 - a) * y for x, y in zip(v, c, strict=True)]
    if rule == "minmax":
        scale = lambda s: [(x - min(s)) / (max(s) - min(s)) for x in s]  # noqa: E731
        return [a * x + (1 - a) * y for x, y in zip(scale(v), scale(c), strict=True)]
    if rule == "zscore":
        deviation = lambda s: math.sqrt(sum((x - mean(s)) ** 2 for x in s) / n)  # noqa: E731
        scale = lambda s: [(x - mean(s)) / deviation(s) for x in s]  # noqa: E731
        return [a * x + (1 - a) * y for x, y in zip(scale(v), scale(c), strict=True)]
    if rule == "log":
        return [a * math.log(x / sum(v)) + (1 - a) * math.log(y / sum(c)) for x, y in zip(v, c, strict=True)]
    if rule == "rrf":
        return [a / (60 + x + 1) + (1 - a) / (60 + y + 1) for x, y in zip(place(v), place(c), strict=True)]
    if rule == "cross_first":
        head = round((1 - a) * keep)
        return [x + (2 if y < head else 0) for x, y in zip(rank(v), place(c), strict=True)]
    if rule == "gate":
        return [x * (1 + y / mean(c)) for x, y in zip(v, c, strict=True)]
    raise NotImplementedError(f"write the definition of the fusion rule {rule!r} here, with loops")


@pytest.mark.parametrize("rule", FUSIONS)
def test_fusion_equals_its_definition(rule):
    v, c = saliencies()
    actual = fuse(v, c, rule, keep=7, **CHOICES)
    if rule == "rank":  # whole numbers: times the denominators of alpha and of both ranks
        actual = (actual.double() / (10 * (v.shape[1] - 1) ** 2)).float()
    for i in range(len(v)):
        expected = torch.tensor(fuse_by_the_book(v[i].tolist(), c[i].tolist(), rule, 7))
        torch.testing.assert_close(actual[i], expected, atol=2e-5, rtol=1e-4)
        assert keep_top(actual[i : i + 1], 7).tolist() == keep_top(expected[None], 7).tolist()


@pytest.mark.parametrize("rule", sorted(set(FUSIONS) - {"gate"}))
def test_alpha_ends_are_the_single_signals(rule):
    v, c = saliencies(1)
    for alpha, signal in ((1.0, v), (0.0, c)):
        fused = fuse(v, c, rule, keep=6, **{**CHOICES, "alpha": alpha})
        assert keep_top(fused, 6).tolist() == keep_top(signal, 6).tolist()


def test_a_product_of_softmaxes_keeps_what_raw_keeps():
    """Nothing said so: a newcomer added it as a rule of its own."""
    v, c = saliencies(2)
    for alpha in (0.3, 0.5):
        product = v.softmax(1) ** alpha * c.softmax(1) ** (1 - alpha)
        raw = fuse(v, c, "raw", keep=7, **(CHOICES | {"alpha": alpha}))
        assert keep_top(product, 7).tolist() == keep_top(raw, 7).tolist()


def test_equal_sums_of_ranks_are_equal():
    """Ranks were divided in float32: equal sums came out unequal, and not the lower index was kept."""
    for tokens in (16, 24, 576):
        v = torch.arange(tokens, 0, -1).float()[None]
        for alpha in (0.5, 0.3):
            choices = CHOICES | {"alpha": alpha}
            equal = fuse(v, v.flip(1), "rank", keep=7, **(choices | {"alpha": 0.5}))
            assert equal.unique().numel() == 1
            assert keep_top(equal, 7).tolist() == [list(range(7))]
            # 7 ranks of one score weigh as much as 3 of the other at alpha 0.3.
            score = fuse(v, v, "rank", keep=7, **choices)
            assert keep_top(score, 7).tolist() == [list(range(7))] and not score.is_floating_point()


def test_rank_ties_go_to_the_lower_index_and_a_truncated_tail_counts_nothing():
    assert rank01(torch.zeros(1, 5)).tolist() == [[1.0, 0.75, 0.5, 0.25, 0.0]]
    score = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.0]])
    fused = fuse(score.flip(1), score, "rank", 2, alpha=0.0, cross_top=3)
    assert (fused / fused.max()).tolist() == [[1.0, 0.5, 0.0, 0.0, 0.0]]


def farthest_by_the_book(rest, saliency, keys, count):
    unit = {i: keys[i] / keys[i].norm() for i in rest}
    chosen = [max(rest, key=lambda i: saliency[i])]
    while len(chosen) < count:
        left = [i for i in rest if i not in chosen]
        chosen.append(max(left, key=lambda i: min(float(1 - unit[i] @ unit[j]) for j in chosen)))
    return sorted(chosen)


def test_anchor_rules_equal_their_definitions():
    generator = torch.Generator().manual_seed(3)
    saliency, keys = torch.rand(2, 20, generator=generator), torch.randn(2, 20, 6, generator=generator)
    rest, unit = others(keep_top(saliency, 6), 20), F.normalize(keys, dim=-1)
    for b, (line, value) in enumerate(zip(rest.tolist(), saliency.tolist(), strict=True)):
        for rule, expected in (
            ("saliency", sorted(sorted(line, key=lambda i: -value[i])[:4])),
            ("stride", line[:: len(line) // 4][:4]),
            ("farthest", farthest_by_the_book(line, value, keys[b], 4)),
        ):
            anchors, members = choose_anchors(rule, rest, saliency, unit, 4)
            assert anchors[b].tolist() == expected
            assert members[b].tolist() == [i for i in line if i not in expected]


def test_farthest_anchors_stay_unique_among_identical_tokens():
    saliency, keys = torch.rand(1, 12), torch.ones(1, 12, 4)
    chosen, _ = choose_anchors("farthest", torch.arange(12)[None], saliency, F.normalize(keys, dim=-1), 5)
    assert len(set(chosen[0].tolist())) == 5


def plan_by_the_book(tokens, retained, merged, saliency, keys, anchors, weights):
    """One image: the output tokens in raster order, with loops."""
    total = len(tokens)
    rest = [i for i in range(total) if i not in retained]
    if anchors == "retained":
        centres = list(retained)
    elif anchors == "saliency":
        centres = sorted(sorted(rest, key=lambda i: (-saliency[i], i))[:merged])
    elif anchors == "stride":
        centres = rest[:: max(1, len(rest) // merged)][:merged]
    else:
        centres = farthest_by_the_book(rest, saliency, keys, merged)
    out = sorted(set(retained) | set(centres))
    groups = {i: [i] for i in out}
    cosine = lambda i, j: float(torch.nn.functional.cosine_similarity(keys[i], keys[j], dim=0))  # noqa: E731
    for i in range(total):
        if i not in out and weights != "none":
            groups[max(centres, key=lambda j: cosine(i, j))].append(i)
    result = []
    for i in out:
        members = groups[i]
        if len(members) == 1:
            result.append(tokens[i])
        elif weights == "saliency":
            result.append(sum(saliency[m] * tokens[m] for m in members) / sum(saliency[m] for m in members))
        elif weights == "mean":
            result.append(sum(tokens[m] for m in members) / len(members))
        else:
            result.append(tokens[i] + sum(tokens[m] for m in members[1:]) / (len(members) - 1))
    return torch.stack(result)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("anchors", ANCHORS)
def test_merging_equals_its_definition(anchors, weights):
    generator = torch.Generator().manual_seed(4)
    tokens, keys = torch.randn(2, 24, 5, generator=generator), torch.randn(2, 24, 6, generator=generator)
    saliency = torch.rand(2, 24, generator=generator)
    retained, merged = keep_top(torch.rand(2, 24, generator=generator), 7), 0 if anchors == "retained" else 4
    actual = merge_plan(retained, others(retained, 24), merged, saliency, keys, anchors, weights, appended=False).apply(
        tokens
    )
    for b in range(2):
        expected = plan_by_the_book(
            tokens[b], retained[b].tolist(), merged, saliency[b].tolist(), keys[b], anchors, weights
        )
        torch.testing.assert_close(actual[b], expected, atol=1e-5, rtol=1e-4)


def test_appended_tokens_come_last():
    saliency, keys = torch.rand(1, 12), torch.randn(1, 12, 4)
    retained = torch.tensor([[6, 7, 8]])
    plan = merge_plan(retained, others(retained, 12), 2, saliency, keys, "saliency", "mean", appended=True)
    assert plan.kept[0, :3].tolist() == [6, 7, 8] and plan.kept.shape == (1, 5)
    torch.testing.assert_close(plan.apply(torch.ones(1, 12, 1)), torch.ones(1, 5, 1))


def test_a_group_without_any_saliency_is_still_an_average():
    """0/0 would make the merged token NaN when CLS attention underflows."""
    rest = torch.arange(1, 6)[None]
    keys = torch.randn(1, 6, 3)
    plan = merge_plan(torch.tensor([[0]]), rest, 1, torch.zeros(1, 6), keys, "saliency", "saliency", False)
    assert torch.isfinite(plan.apply(torch.ones(1, 6, 2))).all()


def test_pooling_ignores_padded_rows():
    weights, rows = torch.rand(1, 2, 3, 5), torch.tensor([[True, True, False]])
    torch.testing.assert_close(pool_attention(weights, rows, "mean", "mean")[0], weights[0, :, :2].mean((0, 1)))
    torch.testing.assert_close(pool_attention(weights, rows, "mean", "max")[0], weights[0, :, :2].amax(1).mean(0))


def test_sharp_heads_are_those_of_low_entropy():
    flat, sharp = torch.full((1, 1, 2, 4), 0.25), torch.tensor([0.97, 0.01, 0.01, 0.01]).expand(1, 1, 2, 4)
    rows = torch.ones(1, 2, dtype=torch.bool)
    torch.testing.assert_close(pool_attention(torch.cat([flat, sharp], 1), rows, "sharp", "mean")[0], sharp[0, 0, 0])


# Two images, five heads, two text rows, two visual tokens; of the first image the second row is padding.
HEADS = [
    [
        [[0.5, 0.5], [1, 0]],
        [[0.9, 0.1], [0.5, 0.5]],
        [[0.2, 0.8], [0.5, 0.5]],
        [[0.7, 0.3], [1, 0]],
        [[0.5, 0.5], [1, 0]],
    ],
    [
        [[0.5, 0.5], [0.5, 0.5]],
        [[1, 0], [0, 1]],
        [[0.9, 0.1], [0.5, 0.5]],
        [[0.8, 0.2], [0.2, 0.8]],
        [[0.5, 0.5], [0.5, 0.5]],
    ],
]


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [("mean", [[0.55, 0.45], [0.5, 0.5]]), ("max", [[0.55, 0.45], [0.9, 0.9]])],
)
def test_sharp_heads_by_hand(pooling, expected):
    """Two of five heads are taken, by the entropy of the rows that exist; all heads, or all rows, passed.

    Entropies of the first image: 0.69, 0.33, 0.50, 0.61, 0.69; the padding would put its heads 0, 3 and 4 first. Means
    over the rows of the second: 0.69, 0, 0.51, 0.50, 0.69.
    """
    rows = torch.tensor([[True, False], [True, True]])
    found = pool_attention(torch.tensor(HEADS), rows, "sharp", pooling)
    torch.testing.assert_close(found, torch.tensor(expected))


@pytest.mark.parametrize(("budget", "merged"), [(5, 2), (6, 3), (7, 4), (9, 4), (11, 6)])
def test_half_of_an_odd_budget_is_rounded_to_even(budget, merged, tiny):
    """Merged tokens take half of the budget: of 5, 7, 9 and 11 it is 2.5, 3.5, 4.5 and 5.5."""
    _, record = prefill(tiny, samples(1), ConsensusDrop(budget=budget, order="appended", alpha=1.0))
    (step,) = record.steps[0]
    assert step.reduction.kept.shape == (1, budget) and step.reduction.appended == merged


@pytest.mark.parametrize(("keep", "expected"), [(3, [0, 3, 4]), (5, [0, 1, 2, 3, 4])])
def test_cross_first_rounds_its_part_of_an_odd_number_to_even(keep, expected):
    """With alpha 0.5 the question chooses 2 of 3 tokens and 2 of 5; the encoder chooses the others."""
    v, c = torch.tensor([[6.0, 5, 4, 3, 2, 1]]), torch.tensor([[1.0, 2, 3, 5, 6, 4]])
    score = fuse(v, c, "cross_first", keep, alpha=0.5, cross_top=0)
    assert keep_top(score, keep).tolist() == [expected]


def planted_state(v, c_values):
    scores = {TowerScore("cls_attention", -2): v, TowerScore("keys", -2): torch.randn(1, 16, 4)}
    state = state_with(torch.zeros(1, 16, 4), scores, tokens=torch.randn(1, 16, 8), layout=PatchGrid(4, 4))
    state.text_attention = lambda *_: (c_values[:, None, None], torch.ones(1, 1, dtype=torch.bool))
    return state


@pytest.mark.parametrize("rule", FUSIONS)
def test_keeps_what_both_signals_point_at(rule):
    """Plant the answer: tokens 3 and 9 are salient and asked for; one signal alone likes others too."""
    v, c = torch.linspace(0.01, 0.02, 16)[None].clone(), torch.linspace(0.02, 0.01, 16)[None].clone()
    v[0, [3, 9]] = c[0, [3, 9]] = 0.9
    reducer = ConsensusDrop(budget=2, fusion=rule, merged_share=0.0)
    assert reducer.prompt(planted_state(v, c)).kept.tolist() == [[3, 9]]


def test_encoder_alone_does_not_run_the_probe(tiny, monkeypatch):
    def probe(*_):
        raise RuntimeError("probed")

    monkeypatch.setattr(PromptState, "text_attention", probe)
    prefill(tiny, samples(1), registry.build("consensusdrop", 7, {"alpha": "1"}))
    with pytest.raises(RuntimeError, match="probed"):
        prefill(tiny, samples(1), registry.build("consensusdrop", 7))


def test_the_probe_depends_on_the_question_and_the_encoder_does_not(tiny):
    one = samples(1)[0]
    other = dataclasses.replace(one, question="how many black dog are near the tree?")

    def kept(sample, alpha):
        reducer = registry.build("consensusdrop", 7, {"alpha": alpha, "merged_share": "0"})
        return prefill(tiny, [sample], reducer)[1].steps[0][0].reduction.kept.tolist()

    assert kept(one, "1") == kept(other, "1")
    assert kept(one, "0") != kept(other, "0")


def test_cls_token_is_the_first_of_the_budget(tiny):
    reducer = registry.build("consensusdrop", 7, {"cls_token": "true"})
    _, record = prefill(tiny, samples(1), reducer)
    reduction = record.steps[0][0].reduction
    assert reduction.kept[0, 0] == 0 and reduction.inputs == 17
