"""EVS against its definition, and what becomes of budgets below one frame."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as nn

from llava.model.builder import load
from llava.pipeline.generate import prefill
from llava.processing.prompt import Sample
from llava.processing.video import Video
from llava.reduction import PatchGrid, even_grid, registry
from llava.reduction.token_layout import ModelSpec
from tests.conftest import drawn_image
from tests.test_vidcom2 import state_of
from tests.tiny_checkpoints_families import make_tiny_video, save_video_original

F, N, D = 4, 6, 8


def kept(tokens: torch.Tensor, frames: int, budget: int, **options) -> list[list[int]]:
    state = state_of(tokens, frames)
    state.layout = PatchGrid(2, tokens.shape[1] // frames // 2, crops=frames)
    return registry.build("evs", budget, options).prompt(state).kept.tolist()


def test_planted_changes_are_kept():
    """A still video in which planted tokens turn: the frame where one turns, and the next one if it turns back."""
    tokens = torch.ones(1, F, N, D)
    turned = torch.tensor([1.0, -1.0] * (D // 2))
    tokens[0, 1, 4] = turned  # and back in frame 2
    tokens[0, 2:, 1] = turned  # for good
    tokens[0, 3, 5] = turned
    expected = [*range(N), N + 4, 2 * N + 1, 2 * N + 4, 3 * N + 5]
    assert kept(tokens.flatten(1, 2), F, N + 4) == [expected]


@pytest.mark.parametrize("budget", [6, 7, 11, 23])
def test_the_definition(budget):
    """Token by token: 1 minus the cosine with the same place one frame before; on a tie the lower number."""
    tokens = torch.randn(2, F * N, D, generator=torch.Generator().manual_seed(budget))
    tokens[:, N : 2 * N] = tokens[:, :N]  # a still second frame, all of whose tokens tie
    expected = []
    for video in tokens:
        change = [255.0] * N + [0.0] * N
        change += [1 - float(nn.cosine_similarity(video[i], video[i - N], dim=0)) for i in range(2 * N, F * N)]
        expected.append(sorted(sorted(range(F * N), key=lambda i: (-round(change[i], 5), i))[:budget]))
    assert kept(tokens, F, budget) == kept(tokens, F, budget, official=True) == expected


@pytest.mark.parametrize("budget", [1, 3, 5])
def test_a_budget_below_one_frame(budget):
    """By default it is met, with an even part of the first frame; as released the first frame stays alone and whole."""
    tokens = torch.randn(1, F * N, D, generator=torch.Generator().manual_seed(0))
    (chosen,) = kept(tokens, F, budget)
    first = even_grid(PatchGrid(2, 3), -(-budget // F)).tolist()
    change = 1 - nn.cosine_similarity(tokens[0, N:], tokens[0, :-N], dim=1)
    rest = (change.argsort(descending=True)[: budget - len(first)] + N).tolist()
    assert chosen == first + sorted(rest) and len(chosen) == budget
    assert kept(tokens, F, budget, official=True) == [[*range(N)]]
    still = torch.ones(1, F * N, D)
    assert kept(still, F, budget) == [[*first, *range(N, N + budget - len(first))]]


def test_what_is_planned():
    """As released at least a frame; of an image, all of it."""
    video, image = (
        ModelSpec(F * N, 2, PatchGrid(2, 3, crops=F), 4, crops=(PatchGrid(2, 3),) * F, frames=F),
        ModelSpec(N, 2, PatchGrid(2, 3), 4),
    )
    for budget, plain, official in ((4, 4, N), (9, 9, 9)):
        assert registry.build("evs", budget).tokens_per_layer(video) == (plain,) * 2
        assert registry.build("evs", budget, {"official": "true"}).tokens_per_layer(video) == (official,) * 2
    assert registry.build("evs", 4, {"official": "true"}).tokens_per_layer(image) == (N,) * 2


def test_an_image_keeps_an_even_grid():
    """It is a first frame, of which a budget keeps a part; so are the tiles of an image together."""
    tokens = torch.randn(1, F * N, D, generator=torch.Generator().manual_seed(0))
    assert kept(tokens[:, :N], 1, 4) == [even_grid(PatchGrid(2, 3), 4).tolist()]
    state = state_of(tokens, F)
    state.spec = replace(state.spec, frames=1)
    chosen = registry.build("evs", N + 2).prompt(state).kept[0]
    assert torch.equal(chosen, even_grid(PatchGrid(1, F * N), N + 2))


def test_frames_of_video_llava(tmp_path):
    """The first frame is whole, the rest of the budget lies in the others; as released, a small budget is a frame."""
    save_video_original(tmp_path, make_tiny_video())
    model = load(tmp_path, device="cpu")
    video = Video(tuple(drawn_image(frame, (70, 50)) for frame in range(8)))
    place, size = model.views(video)[1].origins(), model.layout.tokens
    for budget, options, total in ((size + 5, {}, size + 5), (3, {"official": "true"}, size), (3, {}, 3)):
        reducer = registry.build("evs", budget, options)
        state, record = prefill(model, [Sample("q", "What happens?", image=video)], reducer)
        assert record.accounting(state)[0].tokens_per_layer == (total,) * len(model.llm.layers)
        counts = place[record.steps[0][0].reduction.kept[0], 0].bincount(minlength=8)
        assert counts[0] == (size if total >= size else 1)
