"""FEATHER, against recorded selections of the release, attention maps without rotation, and planted answers."""

from types import SimpleNamespace

import pytest
import torch

from baselines.feather import Feather, on_grid
from llava.errors import UserError
from llava.pipeline.generate import prefill
from llava.reduction.states import heads_of
from llava.reduction.token_layout import ModelSpec, PatchGrid, TokenLayout, single, stitched
from tests.conftest import samples
from tests.vectors import vectors

SPEC = ModelSpec(576, 32, PatchGrid(24, 24), 24)


def state_of(weights: torch.Tensor, layout: TokenLayout, layer: int, members: torch.Tensor | None = None):
    """What a stage reads, with the last row's attention [B, H, 1, N] to images of one layout."""
    images, count = weights.shape[0], weights.shape[3]
    every = torch.arange(count).expand(images, -1)
    return SimpleNamespace(
        tokens=torch.zeros(images, count, 2),
        spec=ModelSpec(layout.tokens, 32, PatchGrid(1, layout.tokens), 24),
        layer=layer,
        layouts=(layout,) * images,
        members=lambda: every if members is None else members,
        attention=lambda rows, at, rotary: weights,
    )


def asked(state, expected=("last", "previous", False)):
    """The state, whose attention is returned only for these arguments."""
    weights = state.attention(*expected)
    state.attention = lambda rows, at, rotary: {expected: (weights, None)}[rows, at, rotary]
    return state


@pytest.mark.parametrize("number", range(4))
def test_stages_keep_what_the_release_kept(number):
    """Both stages of schedule=release, in float64; with as many tokens, the default's first stage keeps the same."""
    about, arrays = vectors("feather")
    case, start = about["cases"][number], about["cases"][number]["before"]
    layout, left = single(case["side"], case["side"]), None
    for stage, layer in (("a", 8), ("b", 16)):
        logits = arrays[f"{case['case']}{stage}_logits"]  # of the last row and all keys
        visual = slice(start, logits.shape[1] - case["after"])
        state = asked(state_of(logits.softmax(-1)[None, :, None, visual], layout, layer, left))
        found = Feather(budget=20, schedule="release").decoder(state)
        kept = (found[0] if stage == "a" else found).kept
        if stage == "a":
            assert Feather(budget=20).reduce(state, kept.shape[1]).kept.tolist() == kept.tolist()
        left = kept if left is None else left.gather(1, kept)
        assert left[0].tolist() == case["first" if stage == "a" else "second"]


def test_planted_tokens_and_the_grid_are_kept_then_planted_tokens_alone():
    """Two images look at two tokens each; the first stage keeps the grid of 4 x 4 patches, too, the second does not."""
    weights = torch.full((2, 3, 1, 16), 0.01)
    weights[0, :, 0, [5, 6]] = weights[1, :, 0, [1, 14]] = 0.2
    grid, layout = [0, 3, 12, 15], single(4, 4)
    assert Feather(budget=6).reduce(asked(state_of(weights, layout, 8)), 6).kept.tolist() == [
        sorted([*grid, 5, 6]),
        sorted([*grid, 1, 14]),
    ]
    assert Feather(budget=6).reduce(asked(state_of(weights, layout, 16)), 2).kept.tolist() == [[5, 6], [1, 14]]
    # Fewer tokens than the grid has: those of the grid that are looked at.
    weights[:, :, 0, [3, 12]] = 0.05
    assert Feather(budget=6).reduce(asked(state_of(weights, layout, 8)), 2).kept.tolist() == [[3, 12]] * 2


def test_every_head_counts_alike_however_little_it_looks_at_the_image():
    """The release's softmax runs over the image alone: a head that looks at the text has as much to say."""
    weights = torch.tensor([[0.1, 0.5, 0.1, 0.1], [0.001, 0.001, 0.009, 0.001]])[None, :, None]
    assert Feather(budget=2).reduce(asked(state_of(weights, single(2, 2), 16)), 1).kept.tolist() == [[2]]


@pytest.mark.parametrize(("stride", "first"), [(1, [0, 1, 2]), (2, [0, 2, 6, 8]), (3, [0])])
def test_every_tile_has_a_grid_of_its_own(stride, first):
    """On 3 x 3 patches of a base image and two tiles; newline and class tokens are on no grid, whatever its stride."""
    layout = stitched((1, 2), (3, 3)).with_cls
    found = on_grid(layout, stride, torch.device("cpu"))
    chosen = set(found.nonzero().flatten().tolist())
    for tile in layout.crops:
        assert set(tile.indices[first].tolist()) <= chosen
    assert len(chosen) == 3 * (9 if stride == 1 else len(first))
    assert not chosen & {*layout.newlines.tolist(), *(tile.cls for tile in layout.crops)}


def test_tokens_that_an_earlier_method_dropped_are_not_on_the_grid():
    members = torch.tensor([[1, 3, 5, 6, 12, 14]])
    state = asked(state_of(torch.full((1, 1, 1, 6), 0.1), single(4, 4), 8, members))
    assert Feather(budget=2).reduce(state, 2).kept.tolist() == [[1, 4]]


class Watch(Feather):
    def score(self, state):
        score = super().score(state)
        self.seen.append((state, score))
        return score


def test_scores_are_those_of_keys_and_queries_without_rotation(tiny):
    """In a padded batch, from the layer's own projections, for each image alone."""
    method = type("Watching", (Watch,), {"seen": []})(budget=7)
    with torch.inference_mode():
        prefill(tiny, samples(), method)
        assert len(method.seen) == 2
        for state, score in method.seen:
            layer, entered = tiny.llm.layers[state.layer - 1], state.entered
            for row in range(len(state.ids)):
                own = entered.hidden[row, entered.padding(row) :][: entered.lengths[row]]
                normed = layer.input_layernorm(own)[None]
                query, key = heads_of(layer, "query", normed)[0, :, -1], heads_of(layer, "key", normed)[0]
                start, stop = entered.images[row]
                key = key[:, start:stop].repeat_interleave(len(query) // len(key), 0)
                expected = (key @ query[..., None] * layer.self_attn.scaling)[..., 0].softmax(-1).mean(0)
                torch.testing.assert_close(score[row], expected)


def test_the_second_stage_keeps_nine_hundredths_of_the_first():
    assert Feather(budget=192).tokens_per_layer(SPEC) == (576,) * 8 + (164,) * 8 + (14,) * 16
    assert Feather(budget=64, schedule="kept").tokens_per_layer(SPEC) == (576,) * 8 + (164,) * 8 + (14,) * 16
    assert Feather(budget=64, layers=(2, 4)).tokens_per_layer(SPEC)[:5] == (576, 576, 200, 200, 18)


def test_the_mean_of_the_release_depends_on_the_image_and_is_asked_for(tiny):
    method = Feather(budget=200, schedule="release")
    method.check(SPEC)
    assert method.tokens_per_layer(SPEC) is None
    for budget in (150, 260):
        with pytest.raises(UserError, match=r"mean of 194\.5 to 213\.5 visual tokens"):
            Feather(budget=budget, schedule="release").check(SPEC)
    _, record = prefill(tiny, samples(4, text_only=()), Feather(budget=6, schedule="release"))
    counts = [[step.reduction.kept.shape[1] for step in steps] for steps in record.steps]
    # 4 of 16 by attention and 4 on the grid, less those that are both; then 9 %, and at least one.
    assert all(4 <= first <= 8 and second == 1 for first, second in counts) and len({first for first, _ in counts}) > 1


@pytest.mark.parametrize(
    ("layers", "said"), [((8,), "must be two"), ((8, 8), "ascend"), ((0, 8), "ascend from 1"), ((8, 32), "below 32")]
)
def test_layers_are_two_that_ascend(layers, said):
    with pytest.raises(UserError, match=said):
        Feather(budget=192, layers=layers).check(SPEC)
