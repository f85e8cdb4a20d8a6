"""ToMe: matching against its definition, plans of removals, and the whole tower against a plain loop."""

import pytest
import torch

from baselines.tome import ToMe, merge_most_similar, removals, smallest_budget
from llava.errors import UserError
from llava.pipeline.accounting import Timer
from llava.pipeline.prefill import prefill
from llava.reduction.token_layout import ModelSpec, PatchGrid
from tests.conftest import samples
from tests.parity.harness import FOLDER, recording
from tests.parity.model import draw

LLAVA_15 = ModelSpec(576, 32, PatchGrid(24, 24), 24)


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
def test_matching_equals_the_definition(tokens, count):
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


def test_planted_pairs_are_merged():
    """Planted: two pairs of equal keys, all other tokens far apart; CLS has a twin too and is left alone."""
    keys = torch.eye(10)[[0, 0, 1, 2, 3, 4, 5, 6, 7, 8]]
    keys[4], keys[8] = keys[3], keys[9]
    reduction = merge_most_similar(keys[None], torch.ones(1, 10), 2)
    assert reduction.kept.tolist() == [[0, 2, 6, 1, 3, 5, 7, 9]]
    assert reduction.assignment[0, [4, 8]].tolist() == [4, 7], "into tokens 3 and 9"
    assert reduction.assignment[0, :2].tolist() == [0, 3], "CLS and its twin stay two tokens"


def test_recorded_merges_of_the_release():
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


# How many to merge where


@pytest.mark.parametrize(("budget", "expected"), [(192, {16, 17}), (128, {19, 20}), (64, {22, 23})])
def test_llava_budgets_are_spread_over_23_blocks(budget, expected):
    """384, 448 and 512 patches over 23 blocks are 16.7, 19.5 and 22.3 each: a list, not a constant."""
    plan = removals(576, budget, 23)
    assert set(plan) == expected and sum(plan) == 576 - budget and len(plan) == 23
    assert list(plan) == sorted(plan, reverse=True)


@pytest.mark.parametrize("blocks", [1, 2, 5, 23])
@pytest.mark.parametrize("patches", [16, 37, 576])
def test_every_budget_that_halving_can_reach_is_met_exactly(patches, blocks):
    for budget in range(smallest_budget(patches, blocks), patches + 1):
        left, plan = patches, removals(patches, budget, blocks)
        for block, count in enumerate(plan):
            assert count <= left // 2, "a matching merges at most half"
            assert removals(left, budget, blocks - block)[0] == count, "what is left of the plan is a plan"
            left -= count
        assert left == budget
    below = smallest_budget(patches, blocks) - 1
    assert below < 1 or sum(removals(patches, below, blocks)) < patches - below


def test_too_small_budgets_are_refused(tiny):
    """Two blocks in front of the features: 16 patches become 8, then 4."""
    with pytest.raises(UserError, match=r"tome cannot reach .* 3 .*at most half .*reaches 4 to 16"):
        ToMe(budget=3).check(tiny.spec)
    ToMe(budget=4).check(tiny.spec)
    ToMe(budget=1).check(LLAVA_15)
    assert ToMe(budget=64).tokens_per_layer(LLAVA_15) == (64,) * 32


# In the tower


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
def test_the_tower_equals_a_plain_loop(tiny, budget):
    """Also in the second block, where sizes differ: attention counts a token as often as the patches it stands for."""
    batch = samples(3)
    pictures = [sample.image for sample in batch]
    pixels = torch.stack([tiny.image_processor(picture) for picture in pictures])
    reducer = ToMe(budget=budget, order="release")
    images = tiny.encode_images(pictures, range(3), reducer, Timer(tiny.device))
    for row in range(3):
        expected, groups = tower_by_the_book(tiny.tower, pixels[row], removals(16, budget, 2))
        assert groups[0] == [0], "CLS stays alone"
        encoded = images[row].encoded
        torch.testing.assert_close(encoded.features[0], expected[1:], atol=1e-5, rtol=0)
        owner = encoded.merged.assignment[0].tolist()
        assert [[i + 1 for i, o in enumerate(owner) if o == k] for k in range(budget)] == [
            sorted(group) for group in groups[1:]
        ]


def test_raster_order_is_restored(tiny):
    """The release leaves the even half of the last matching in front of the odd one."""
    anchors = {}
    for order in ("raster", "release"):
        _, record = prefill(tiny, samples(1), ToMe(budget=9, order=order))
        place = torch.arange(16)
        for step in record.steps[0]:
            place = place[step.reduction.kept[0]]
        anchors[order] = place.tolist()
    assert anchors["raster"] == sorted(anchors["release"]) != anchors["release"]
