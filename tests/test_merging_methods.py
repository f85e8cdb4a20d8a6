"""Methods that merge, in the tower or behind it, against definitions in loops, planted answers and the releases."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from baselines.prumerge import (
    PruMerge,
    PruMergePlus,
    fixed_grid,
    outliers,
    shares,
)
from baselines.tome import ToMe, merge_most_similar, removals
from baselines.visionzip import VisionZip
from llava.errors import UserError
from llava.pipeline.accounting import Timer
from llava.pipeline.generate import prefill
from llava.reduction.scores import TowerScore
from llava.reduction.token_layout import ModelSpec, PatchGrid
from tests.conftest import samples
from tests.drawn_images import state_with
from tests.parity.harness import FOLDER, recording
from tests.parity.model import draw

LLAVA = ModelSpec(576, 32, PatchGrid(24, 24), 24)


# VisionZip


def zip_by_the_book(features, saliency, keys, dominant, contextual, added):
    """One image, plain loops: output tokens and the input positions they stand at; features has CLS in front."""
    patches = range(len(saliency))
    best = sorted(patches, key=lambda i: (-saliency[i].item(), i))[: dominant - 1]
    rest = [i for i in patches if i not in best]
    targets = rest[:: max(1, len(rest) // contextual)][:contextual]
    members = {target: [] for target in targets}
    for i in rest:
        if i not in targets:
            members[max(targets, key=lambda t: F.cosine_similarity(keys[i], keys[t], dim=0).item())].append(i)
    tokens = [features[0], *(features[i + 1] for i in sorted(best))]
    for target in targets:
        group = [features[i + 1] for i in members[target]]
        if added:
            tokens.append(features[target + 1] + (sum(group) / len(group) if group else 0))
        else:
            tokens.append(sum(group, features[target + 1]) / (len(group) + 1))
    return torch.stack(tokens), [0, *(i + 1 for i in sorted(best)), *(i + 1 for i in targets)]


def zip_state(saliency, keys, features):
    signals = {TowerScore("cls_attention"): saliency, TowerScore("keys"): keys}
    return state_with(features, signals, layout=PatchGrid(4, 4, has_cls=True))


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize(("tokens", "dominant", "contextual"), [(20, 5, 3), (36, 9, 7), (36, 1, 4), (12, 6, 1)])
def test_visionzip_equals_its_definition(tokens, dominant, contextual, official):
    features, saliency, keys = torch.randn(3, tokens + 1, 8), torch.rand(3, tokens), torch.randn(3, tokens, 6)
    budget = dominant + contextual
    reducer = VisionZip(budget=budget, contextual=contextual / budget, official=official)
    plan = reducer.encoder(zip_state(saliency, keys, features))
    for i, merged in enumerate(plan.apply(features)):
        expected, places = zip_by_the_book(features[i], saliency[i], keys[i], dominant, contextual, official)
        assert plan.kept[i].tolist() == places
        torch.testing.assert_close(merged, expected)


def test_visionzip_planted_tokens_are_kept_and_planted_twins_are_merged():
    """CLS looks at two patches; all others have one of two keys, and so two contextual tokens become of them."""
    saliency = torch.full((1, 16), 0.01)
    saliency[0, [3, 12]] = torch.tensor([0.3, 0.4])
    kind = torch.tensor([i >= 8 for i in range(16)])
    keys = torch.where(kind[:, None], torch.tensor([0.0, 2.0]), torch.tensor([1.0, 0.0]))[None]
    features = torch.arange(17.0).reshape(1, 17, 1)
    reducer = VisionZip(budget=5, contextual=0.4)
    plan = reducer.encoder(zip_state(saliency, keys, features))
    # The rest is 0 1 2 4 .. 11 13 14 15; every seventh of it is a target: 0 and 8.
    assert plan.kept.tolist() == [[0, 4, 13, 1, 9]]
    first, second = [0, 1, 2, 4, 5, 6, 7], [8, 9, 10, 11, 13, 14, 15]
    expected = [0, 4, 13, *(sum(i + 1 for i in group) / 7 for group in (first, second))]
    torch.testing.assert_close(plan.apply(features).flatten(), torch.tensor(expected))


def test_visionzip_budgets_are_split_as_in_the_release():
    """54 + 10, 108 + 20, 162 + 30, and 27 + 5 for a crop of LLaVA-NeXT; CLS is one of the first number."""
    state = zip_state(torch.rand(1, 576), torch.rand(1, 576, 2), torch.zeros(1, 577, 1))

    def split(budget: int, **options) -> tuple[int, int]:
        plan = VisionZip(budget=budget, **options).encoder(state)
        assert plan.kept[0, 0] == 0 and plan.kept.shape[1] == budget
        return budget - plan.appended, plan.appended

    splits = {192: (162, 30), 128: (108, 20), 64: (54, 10), 32: (27, 5)}
    assert {budget: split(budget) for budget in splits} == splits
    assert all(split(budget, contextual=0.99)[0] >= 1 for budget in range(1, 576))


# PruMerge and PruMerge+


def merge_by_the_book(features, kept, attention, keys, neighbours):
    """One image, plain loops: x + sum a_j x_j over the nearest of each kept token, then sum a_j x_j of all others."""
    everyone, out = range(len(features)), []
    for i in kept:
        cosine = {j: F.cosine_similarity(keys[i], keys[j], dim=0).item() for j in everyone if j != i}
        nearest = sorted(cosine, key=lambda j: -cosine[j])[:neighbours]
        out.append(features[i] + sum((attention[j] * features[j] for j in nearest), torch.zeros(features.shape[1])))
    rest = (attention[j] * features[j] for j in everyone if j not in kept)
    return torch.stack([*out, sum(rest, torch.zeros(features.shape[1]))])


@pytest.mark.parametrize(("tokens", "count", "neighbours"), [(40, 6, 5), (40, 11, 32), (12, 4, 32), (12, 0, 3)])
def test_prumerge_merging_equals_its_definition(tokens, count, neighbours):
    features, attention, keys = torch.randn(3, tokens, 4), torch.rand(3, tokens), torch.randn(3, tokens, 6)
    kept = torch.stack([torch.randperm(tokens)[:count] for _ in range(3)])
    merged = shares(kept, attention, keys, neighbours) @ features
    for i in range(3):
        expected = merge_by_the_book(features[i], kept[i].tolist(), attention[i], keys[i], neighbours)
        torch.testing.assert_close(merged[i], expected, atol=1e-5, rtol=1e-5)


def encode(reducer, attention, keys=None, features=None):
    batch, tokens = attention.shape
    first, second = reducer.scores()
    signals = {first: attention, second: torch.randn(batch, tokens, 6) if keys is None else keys}
    return reducer.encoder(state_with(torch.zeros(batch, tokens, 2) if features is None else features, signals))


@pytest.mark.parametrize("cls", [PruMerge, PruMergePlus])
def test_prumerge_default_is_the_releases_sum_divided_by_its_weights_in_raster_order(cls):
    attention, keys, features = torch.rand(2, 40) / 40, torch.randn(2, 40, 6), torch.randn(2, 40, 4)
    plan = encode(cls(budget=11), attention, keys, features)
    merged, ones = plan.apply(features), plan.apply(torch.ones(2, 40, 1))
    torch.testing.assert_close(ones, torch.ones(2, 11, 1))
    for i in range(2):
        kept = plan.kept[i, :-1].tolist()
        assert kept == sorted(set(kept)) and plan.kept[i, -1].item() not in kept
        book = lambda x, i=i, kept=kept: merge_by_the_book(x, kept, attention[i], keys[i], 32)  # noqa: E731
        torch.testing.assert_close(merged[i], book(features[i]) / book(torch.ones(40, 1)), atol=1e-5, rtol=1e-5)


def test_prumerge_planted_tokens_are_kept_and_supplemented_by_their_twins():
    """CLS looks at tokens 2 and 7; 3 has the key of 2, 8 the key of 7, and all others end in the last token."""
    attention = torch.full((1, 10), 0.05)
    attention[0, [2, 7]] = 0.3
    keys = torch.eye(10)
    keys[3], keys[8] = keys[2], keys[7]
    features = torch.eye(10)[None]
    plan = encode(PruMerge(budget=3, neighbours=1), attention, keys[None], features)
    merged = plan.apply(features)[0]
    assert plan.kept[0, :2].tolist() == [2, 7]
    for row, own, twin in ((0, 2, 3), (1, 7, 8)):
        assert merged[row, own] == pytest.approx(1 / 1.05) and merged[row, twin] == pytest.approx(0.05 / 1.05)
    assert merged[2, [0, 1, 3, 4, 5, 6, 8, 9]].tolist() == pytest.approx([1 / 8] * 8) and merged[2, [2, 7]].sum() == 0


def test_prumerge_planted_attention_takes_a_quarter_of_plus_and_the_rest_is_spread():
    """Twelve kept tokens: three that CLS looks at, nine that stand as evenly as the others allow."""
    attention = torch.full((1, 30), 0.01)
    attention[0, [4, 5, 6]] = 0.2
    plan = encode(PruMergePlus(budget=13), attention)
    assert plan.kept[0, :-1].tolist() == [0, 3, 4, 5, 6, 9, 12, 15, 18, 21, 24, 27]


def test_prumerge_spread_tokens_are_every_nth_of_what_is_left():
    attention = torch.full((2, 10), 0.01)
    attention[0, [0, 2]] = attention[1, [5, 1]] = 0.3
    kept = PruMergePlus(budget=7, spatial=4 / 6).keep(attention).tolist()
    assert kept == [sorted([0, 2, *[1, 4, 6, 8]]), sorted([5, 1, *[0, 3, 6, 8]])]
    assert PruMergePlus(budget=3, spatial=0.0).keep(attention).tolist() == [[0, 2], [1, 5]]


def test_prumerge_outliers_equal_numpys_quartiles():
    attention = torch.rand(20, 576).pow(6)
    low, high = np.percentile(attention.numpy(), [25, 75], axis=1, keepdims=True)
    expected = (attention.numpy() > high + 1.5 * (high - low)).sum(1)
    assert outliers(attention).tolist() == expected.tolist() and expected.min() > 0


def peaked(count, tokens=576):
    """[1, tokens] attention with `count` outliers, the highest first."""
    attention = torch.linspace(0.001, 0.0011, tokens)[None]
    attention[0, 100 : 100 + count] = torch.linspace(0.02, 0.01, count)
    return attention


def test_prumerge_official_count_is_the_images_and_not_the_budgets():
    reducer = PruMerge(budget=64, official=True)
    attention = torch.cat([peaked(30), peaked(7)])
    first, second = encode(reducer, attention)
    assert [first.kept.shape, second.kept.shape] == [(1, 31), (1, 8)]
    assert first.kept[0, :-1].tolist() == list(range(100, 130)), "in the order of attention"
    assert reducer.tokens_per_layer(LLAVA) is None


def test_prumerge_official_weights_are_attention_as_it_is():
    """The release leaves the division out, so the scale of a token depends on how much attention is near it."""
    attention, keys, features = torch.rand(1, 40) / 40, torch.randn(1, 40, 6), torch.randn(1, 40, 4)
    plan = encode(PruMerge(budget=9, official=True, fixed=True), attention, keys, features)
    kept = sorted(range(40), key=lambda i: -attention[0, i])[:8]
    assert plan.kept[0, :-1].tolist() == kept
    expected = merge_by_the_book(features[0], kept, attention[0], keys[0], 32)
    torch.testing.assert_close(plan.apply(features)[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("share", "about"), [(0.05, 120), (0.07, 176), (0.10, 232), (0.15, 337), (0.17, 576)])
def test_prumerge_official_plus_keeps_about_four_times_the_outliers(share, about):
    """The counts that the release gives for these shares of outliers; how many of the grid are outliers varies."""
    (plan,) = encode(PruMergePlus(budget=64, official=True), peaked(int(576 * share)))
    assert abs(plan.kept.shape[1] - about) <= 6
    kept = plan.kept[0, :-1].tolist()
    assert len(set(kept)) == len(kept)


def test_prumerge_official_plus_survives_an_image_without_outliers():
    """The release divides by zero."""
    attention = torch.linspace(0.001, 0.0011, 576)[None]
    (plan,) = encode(PruMergePlus(budget=64, official=True), attention)
    assert outliers(attention).tolist() == [0] and plan.kept.tolist() == [[0, 575]]


def test_prumerge_official_plus_survives_more_than_a_third_of_outliers():
    """The release's step is a third of one over the share, rounded down: 0 above a third, and arange fails.

    No image gets there by quartiles, which leave at most a quarter above the third.
    """
    for count in (97, 192, 193, 200, 576):
        kept = PruMergePlus(budget=64, official=True).keep(torch.rand(1, 576), count)
        assert sorted(kept[0].tolist()) in (list(range(575)), list(range(576)))


def test_prumerge_official_extra_token_is_zero_when_nothing_is_left():
    attention, features = torch.rand(1, 6), torch.randn(1, 6, 4)
    mix = shares(torch.arange(6)[None], attention, torch.randn(1, 6, 3), 2)
    assert (mix[:, -1] @ features == 0).all()


def test_prumerge_fixed_branch_repeats_tokens_and_forgets_as_many():
    """The release's fixed grid is not held against the top tokens: a token can be there twice, and then the lowest
    position that was not kept is neither in the extra token nor anybody's neighbour."""
    attention = torch.full((1, 24), 0.01)
    attention[0, [4, 1, 20]] = torch.tensor([0.3, 0.2, 0.1])
    reducer = PruMergePlus(budget=7, official=True, fixed=True)
    assert reducer.keep(attention).tolist() == [[4, 1, 20, 4, 12, 20]]
    plan = encode(reducer, attention, torch.eye(24)[None])
    kept = {0, 1, 2, 4, 12, 20}  # 0 and 2 are forgotten
    assert {i for i, weight in enumerate(plan.merge_matrix[0, -1].tolist()) if weight > 0} == set(range(24)) - kept
    # The other copy is the nearest of a token that is there twice: its share is 1 + its own attention.
    assert plan.merge_matrix[0, 0, 4] == pytest.approx(1.3) and plan.merge_matrix[0, 3, 4] == pytest.approx(1.3)


def test_prumerge_fixed_branch_knows_its_budgets():
    assert list(fixed_grid(576, 32)) == list(range(9, 576, 18))
    for budget in (49, 65, 129, 193):
        PruMergePlus(budget=budget, official=True, fixed=True).check(LLAVA)
    for budget in (63, 64, 67):  # the grid of 31 tokens has 32, and the grid of 33 has 34
        with pytest.raises(UserError, match=rf"a budget of {budget} has no such grid, near it are .*61, 65"):
            PruMergePlus(budget=budget, official=True, fixed=True).check(LLAVA)


# ToMe


def matching_by_the_book(keys, groups: list[list[int]], count: int) -> list[list[int]]:
    """One image: merged groups of first tokens, in the order of the release.

    Args:
        keys: [n, d] of the tokens as they are now.
        groups: the first tokens that each of them stands for.
    """
    unit = [key / key.norm() for key in keys.double()]
    even, odd = list(range(0, len(unit), 2)), list(range(1, len(unit), 2))
    partner = {i: max(odd, key=lambda j: (unit[i] @ unit[j]).item()) for i in even}
    candidates = sorted(even[1:], key=lambda i: -(unit[i] @ unit[partner[i]]).item())
    merged = candidates[:count]
    members = {j: list(groups[j]) for j in odd}
    for i in merged:
        members[partner[i]] += groups[i]
    return [groups[i] for i in even if i not in merged] + [members[j] for j in odd]


@pytest.mark.parametrize(("tokens", "count"), [(17, 5), (16, 7), (9, 4), (33, 1)])
def test_tome_matching_equals_the_definition(tokens, count):
    keys, sizes, values = torch.randn(3, tokens, 8), torch.rand(3, tokens) + 1, torch.randn(3, tokens, 5)
    reduction = merge_most_similar(keys, sizes, count)
    outputs = reduction.apply(values)
    assert reduction.kept.shape == (3, tokens - count)
    for row in range(3):
        groups = matching_by_the_book(keys[row], [[i] for i in range(tokens)], count)
        found = [[] for _ in groups]
        for token, output in enumerate(reduction.assignment[row].tolist()):
            found[output].append(token)
        assert [sorted(group) for group in groups] == found
        for group, output in zip(groups, outputs[row], strict=True):
            share = sizes[row, group] / sizes[row, group].sum()
            torch.testing.assert_close(output, (share[:, None] * values[row, group]).sum(0))


def test_tome_planted_pairs_are_merged():
    """Planted: two pairs of equal keys, all other tokens far apart; CLS has a twin too and is left alone."""
    keys = torch.eye(10)[[0, 0, 1, 2, 3, 4, 5, 6, 7, 8]]
    keys[4], keys[8] = keys[3], keys[9]
    reduction = merge_most_similar(keys[None], torch.ones(1, 10), 2)
    assert reduction.kept.tolist() == [[0, 2, 6, 1, 3, 5, 7, 9]]
    assert reduction.assignment[0, [4, 8]].tolist() == [4, 7], "into tokens 3 and 9"
    assert reduction.assignment[0, :2].tolist() == [0, 3], "CLS and its twin stay two tokens"


def test_tome_recorded_merges_of_the_release():
    """Matching, sums and sizes, with sizes that differ from the first block on."""
    meta, arrays = recording(FOLDER / "tome-merge.npz")
    compared = 0
    for number, case in enumerate(meta["inputs"]):
        if not case["class_token"]:
            continue  # CLIP has one
        tokens = case["tokens"]
        keys = draw(case["metric"], (1, tokens, case["metric_width"]))
        values = draw(case["x"], (1, tokens, case["x_width"]))
        sizes = 1 + draw(case["size"], (1, tokens, 1)).abs()[..., 0]
        reduction = merge_most_similar(keys, sizes, case["r"])
        assert reduction.assignment[0].tolist() == arrays[f"assign_{number}"].tolist()
        expected = torch.from_numpy(arrays[f"out_{number}"])
        torch.testing.assert_close(reduction.apply(values)[0], expected, atol=2e-6, rtol=0)
        compared += 1
    assert compared == 7


@pytest.mark.parametrize(("budget", "expected"), [(192, {16, 17}), (128, {19, 20}), (64, {22, 23})])
def test_tome_llava_budgets_are_spread_over_23_blocks(budget, expected):
    """384, 448 and 512 patches over 23 blocks are 16.7, 19.5 and 22.3 each: a list, not a constant."""
    plan = removals(576, budget, 23)
    assert set(plan) == expected and sum(plan) == 576 - budget and len(plan) == 23
    assert list(plan) == sorted(plan, reverse=True)


@pytest.mark.parametrize("blocks", [1, 2, 5, 23])
@pytest.mark.parametrize("patches", [16, 37, 576])
def test_tome_every_budget_that_halving_can_reach_is_met_exactly(patches, blocks):
    least = patches
    for _ in range(blocks):
        least = math.ceil(least / 2)
    for budget in range(least, patches + 1):
        left, plan = patches, removals(patches, budget, blocks)
        for block, count in enumerate(plan):
            assert count <= left // 2, "a matching merges at most half"
            assert removals(left, budget, blocks - block)[0] == count, "what is left of the plan is a plan"
            left -= count
        assert left == budget
    below, spec = least - 1, ModelSpec(patches, 4, PatchGrid(1, patches), blocks + 1)
    assert below < 1 or sum(removals(patches, below, blocks)) < patches - below
    ToMe(budget=least).check(spec)
    if below:
        with pytest.raises(UserError, match=rf"tome .* {below} .*at most half .*reaches {least} to {patches}"):
            ToMe(budget=below).check(spec)


def tower_by_the_book(tower, pixels, plan) -> tuple[torch.Tensor, list[list[int]]]:
    """One image through eager CLIP blocks that merge: features with CLS first, and the patches each row stands for."""
    hidden = tower.pre_layrnorm(tower.embeddings(pixels[None]))[0]
    groups = [[i] for i in range(len(hidden))]
    for block, count in zip(tower.encoder.layers, plan, strict=False):
        attention, normed = block.self_attn, block.layer_norm1(hidden)
        heads = lambda t, h=attention.num_heads: t.unflatten(-1, (h, -1)).transpose(0, 1)  # noqa: E731
        query, key, value = (heads(p(normed)) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        sizes = torch.tensor([float(len(group)) for group in groups])
        weights = (query @ key.transpose(1, 2) * attention.scale + sizes.log()).softmax(-1)
        hidden = hidden + attention.out_proj((weights @ value).transpose(0, 1).flatten(1))
        merged = matching_by_the_book(key.mean(0), groups, count)
        place = {tuple(group): row for row, group in enumerate(groups)}
        rows = []
        for group in merged:
            parts = [old for old in place if set(old) <= set(group)]
            rows.append(sum(len(old) * hidden[place[old]] for old in parts) / len(group))
        groups, hidden = merged, torch.stack(rows)
        hidden = hidden + block.mlp(block.layer_norm2(hidden))
    return hidden, groups


@torch.inference_mode()
@pytest.mark.parametrize("budget", [5, 11])
def test_tome_the_tower_equals_a_plain_loop(tiny, budget):
    """Also in the second block, where sizes differ: attention counts a token as often as the patches it stands for."""
    batch = samples(3)
    images = [sample.image for sample in batch]
    pixels = torch.stack([tiny.image_processor(image) for image in images])
    reducer = ToMe(budget=budget, order="release")
    images = tiny.encode_images(images, range(3), reducer, Timer(tiny.device))
    for row in range(3):
        expected, groups = tower_by_the_book(tiny.tower, pixels[row], removals(16, budget, 2))
        assert groups[0] == [0], "CLS stays alone"
        encoded = images[row].encoded
        torch.testing.assert_close(encoded.features[0], expected[1:], atol=1e-5, rtol=0)
        owner = encoded.merged.assignment[0].tolist()
        assert [[i + 1 for i, o in enumerate(owner) if o == k] for k in range(budget)] == [
            sorted(group) for group in groups[1:]
        ]


def test_tome_raster_order_is_restored(tiny):
    """The release leaves the even half of the last matching in front of the odd one."""
    anchors = {}
    for order in ("raster", "release"):
        _, record = prefill(tiny, samples(1), ToMe(budget=9, order=order))
        place = torch.arange(16)
        for step in record.steps[0]:
            place = place[step.reduction.kept[0]]
        anchors[order] = place.tolist()
    assert anchors["raster"] == sorted(anchors["release"]) != anchors["release"]
