"""FlowCut, against recorded results of the release, its words in loops, and planted answers."""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from baselines.flowcut import FlowCut, importance, keep_first, removals
from llava.model.builder import load
from llava.model.multimodal_encoder.clip_encoder import TowerMerger
from llava.pipeline.accounting import Timer
from llava.pipeline.generate import prefill
from llava.processing.prompt import Sample
from llava.reduction.merging import Reduction
from llava.reduction.states import BlockState
from llava.reduction.token_layout import ModelSpec, PatchGrid
from tests.conftest import QUESTIONS, drawn_image
from tests.tiny_checkpoints_families import make_tiny_next, save_next_transformers
from tests.vectors import vectors

WIDTH, HEADS, BLOCKS = 16, 2, 24


def random_blocks(seed: int, count: int = BLOCKS) -> list[CLIPEncoderLayer]:
    """Blocks of a tower with random float64 weights, whose attention is far from even."""
    generator = torch.Generator().manual_seed(seed)
    config = CLIPVisionConfig(hidden_size=WIDTH, intermediate_size=WIDTH, num_attention_heads=HEADS)
    config._attn_implementation = "eager"
    blocks = [CLIPEncoderLayer(config).double().eval() for _ in range(count)]
    with torch.no_grad():
        for name, weight in ((name, one) for block in blocks for name, one in sorted(block.named_parameters())):
            drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            size = 0.7 if name.endswith(("q_proj.weight", "k_proj.weight")) else 0.2
            weight.copy_(1 + 0.1 * drawn if "norm" in name and "weight" in name else size * drawn)
    return blocks


def random_tokens(seed: int, images: int, patches: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.randn(images, 1 + patches, WIDTH, generator=generator, dtype=torch.float64)


class Watch(FlowCut):
    def tower(self, state):
        found = super().tower(state)
        self.seen.append((state.block, state.tokens.shape[1] - 1, found))
        return found


def run_tower(blocks, tokens, budget: int, selected: int = 23):
    """Features, kept patches after each block, and the patches that enter each block."""
    reducer = type("Watching", (Watch,), {"seen": []})(budget=budget)
    tower = SimpleNamespace(encoder=SimpleNamespace(layers=blocks))
    spec = ModelSpec(tokens.shape[1] - 1, 4, PatchGrid(1, tokens.shape[1] - 1), len(blocks))
    merger = TowerMerger(reducer, spec, tower, reducer.merging_blocks(selected), [len(tokens)])
    with torch.inference_mode():
        features, merged, _ = merger.run(tokens, selected)
    left, after = torch.arange(tokens.shape[1] - 1).repeat(len(tokens), 1), {}
    for block, _, found in reducer.seen:
        left = left if found is None else left.gather(1, found.kept[:, 1:] - 1)
        after[block] = left.tolist()
    assert torch.equal(merged.kept, left)
    return features, after, [count for _, count, _ in reducer.seen]


@pytest.mark.parametrize("number", range(3))
def test_a_tower_keeps_what_the_release_kept(number):
    """24 random blocks; the last case has three views, and as many patches leave all of them."""
    case = vectors("flowcut")[0]["cases"][number]
    blocks, tokens = random_blocks(case["seed"]), random_tokens(case["seed"], case["images"], case["patches"])
    features, after, counts = run_tower(blocks, tokens, case["budget"])
    assert counts == case["counts"][:22] and after[21] == case["kept"]
    assert {block: after[int(block)] for block in case["kept_after"]} == case["kept_after"]
    # transformers' softmax is in float32
    torch.testing.assert_close(features[0, 1], torch.tensor(case["first_feature"]).double(), atol=1e-4, rtol=0)


def test_the_release_counts_and_scores_alike():
    about, arrays = vectors("flowcut")
    for case in about["ratio"]:
        attention = torch.stack([arrays[name].flatten() for name in case.get("arrays", [case.get("array")])])
        left = [attention.shape[1]] * len(attention)
        assert max(removals(attention, left, case["budget"], case["later"])) == case["value"]
    # The products with the value of CLS are such that their softmax is the recorded similarity.
    attention, alike, value = arrays["score_cls"], arrays["score_sem"], arrays["score_value"]
    wanted = (alike / alike.sum()).log()[:, None, None]

    def products(first, second):
        assert first.shape[2] == 1 and second.shape[-1] == 51
        return torch.cat([torch.zeros(1, 1, 1, 1).double(), wanted], -1)

    values = torch.cat([torch.ones(1, 1, 8).double(), value], 1)[:, None]
    torch.testing.assert_close(importance(attention, values, products), arrays["score_out"])


def by_the_book(attention, values) -> list[float]:
    """Importance of one image in plain loops: attention [N], values [H][1 + N][d]."""
    heads, count = len(values), len(attention)
    alike = [0.0] * (count + 1)
    for head in values:
        shares = torch.tensor([float(head[0] @ other) for other in head]).double().softmax(-1)
        alike = [known + share.item() / heads for known, share in zip(alike, shares, strict=True)]
    alike = [one / sum(alike[1:]) for one in alike[1:]]
    lengths = [sum(abs(sum(head[i + 1][c].item() for head in values) / heads) for c in range(len(values[0][0])))
               for i in range(count)]  # fmt: skip
    total = sum(attention)
    return [(float(a / total) + b) * length for a, b, length in zip(attention, alike, lengths, strict=True)]


def test_importance_is_that_of_the_words():
    attention, values = torch.rand(2, 9).double(), torch.randn(2, 3, 10, 4).double()
    found = importance(attention, values)
    for row in range(2):
        torch.testing.assert_close(found[row], torch.tensor(by_the_book(attention[row], values[row])).double())


def state(attention, values, memory, block=1, last=21) -> BlockState:
    """A block of one image whose CLS attention and values are given."""
    tokens = torch.zeros(1, attention.shape[1] + 1, 4)
    made = BlockState(ids=("a",), tokens=tokens, keys=tokens, sizes=tokens[..., 0], block=block, last=last)
    made.tiles, made.left, made.attended = (1,), (tokens.shape[1],), SimpleNamespace(filling=None)
    made.cls_attention, made.values, made.memory = lambda: attention, lambda: values, memory
    return made


def test_planted_patches_are_kept():
    """CLS looks at patches 2 and 9; of the others, 5 has a long value, and 7 one that is like the value of CLS."""
    attention = torch.full((1, 12), 0.01)
    attention[0, [2, 9]] = 0.3
    values = torch.full((1, 2, 13, 4), 0.1)
    values[..., 6, :] *= torch.tensor([-20.0, 20, -20, 20])
    values[..., 0, 0] = 3
    values[..., 8, 0] = 2
    last = FlowCut(budget=4).tower(state(attention, values, {}, block=21))
    assert last.kept.tolist() == [[0, 3, 6, 8, 10]]


def test_the_newest_block_is_half_of_the_importance():
    """Blocks in between drop nothing, and what is added up follows the patches that are left."""
    even, values = torch.full((1, 6), 0.1), torch.ones(1, 1, 7, 2)
    peaked = torch.tensor([[0.1, 0.1, 0.9, 0.1, 0.1, 0.5]])
    memory: dict[str, torch.Tensor] = {}
    method = FlowCut(budget=2)
    assert method.tower(state(peaked, values, memory, block=0)) is None
    first = memory["score"]
    assert method.tower(state(even, values, memory, block=2)) is None
    torch.testing.assert_close(memory["score"], first / 2 + importance(even, values) / 2)
    assert method.tower(state(even, values, memory, block=21)).kept.tolist() == [[0, 3, 6]]
    torch.testing.assert_close(memory["score"], (first / 4 + importance(even, values) * 3 / 4)[:, [2, 5]])
    assert method.tower(state(even[:, :2], values[:, :, :3], memory)) is None, "the budget is reached"


def test_few_patches_leave_where_attention_is_even_and_many_where_it_is_not():
    even, one = torch.full((1, 100), 0.01), torch.zeros(1, 100)
    one[0, 7] = 0.5
    assert removals(even, [100], 20, 4) == [0]
    assert removals(one, [100], 20, 4) == [40] and removals(one, [100], 20, 16) == [20], "by the root of later blocks"
    half = torch.tensor([[1.0] * 10 + [0.0] * 90])
    assert removals(torch.cat([even, half]), [100, 90], 20, 1) == [
        0,
        round(70 * (1 - (math.log(10) / math.log(90)) ** 2)),
    ]
    assert removals(torch.full((1, 9), math.nan), [9], 2, 1) == [0], "a broken tower is reported later"


def test_what_fills_up_a_row_follows_what_is_left():
    score = torch.tensor([[0.1, 0.9, 0.3, 0.7, 0.5], [0.5, 0.5, 0.5, 0.5, 0.9]])
    assert keep_first(score, [2, 4]).tolist() == [[1, 3, 2, 4], [0, 1, 2, 4]]


@pytest.mark.parametrize(("depth", "selected", "pruned"), [(24, 23, [*range(1, 22, 2)]), (12, 11, [1, 3, 5, 7, 9]),
                                                         (6, 6, [0, 2, 4]), (3, 2, [0]), (2, 1, [0])])  # fmt: skip
def test_the_budget_is_reached_in_the_last_block_but_one(depth, selected, pruned):
    """In towers of any depth and of any selected layer, by the distance to that block."""
    blocks, tokens = random_blocks(5, depth), random_tokens(5, 1, 30)
    features, after, _ = run_tower(blocks, tokens, 6, selected)
    assert features.shape[1] == 7
    counts = [30, *(len(after[block][0]) for block in sorted(after))]
    assert [block for block in after if counts[block + 1] < counts[block]] == pruned


def test_an_image_does_not_depend_on_its_batch():
    """The release lets the image of a batch with most removals decide. The tower has six blocks."""
    model, method = load(device="cpu"), FlowCut(budget=50)
    asked = [Sample(str(number), QUESTIONS[0], image=drawn_image(number, (30, 30 * number))) for number in (1, 9, 4)]

    def encoded(samples):
        images = [sample.image for sample in samples]
        return [one.encoded for one in model.encode_images(images, range(len(images)), method, Timer(model.device))]

    together, alone = encoded(asked), [own for sample in asked for own in encoded([sample])]
    assert len({one.tokens for one in together}) == 3, "other numbers leave the blocks"
    for ours, own in zip(together, alone, strict=True):
        assert ours.tokens == own.tokens and abs(ours.spent - own.spent) < 1e-3 * own.spent
        assert ours.merged.kept.tolist() == own.merged.kept.tolist()
        torch.testing.assert_close(ours.features, own.features, atol=1e-4, rtol=1e-4)


def test_tiles_keep_equal_parts_of_the_budget(tmp_path):
    save_next_transformers(tmp_path, make_tiny_next())
    tiled = load(tmp_path, device="cpu", merge="spatial", force=(112, 112))
    state, record = prefill(tiled, [Sample("a", QUESTIONS[0], image=drawn_image(1, (112, 112)))], FlowCut(budget=25))
    (account,) = record.accounting(state)
    assert set(account.tokens_per_layer) == {25}
    assert record.steps[0][0].place == "tower" and isinstance(record.steps[0][0].reduction, Reduction)
