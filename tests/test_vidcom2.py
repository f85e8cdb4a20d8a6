"""VidCom2 against the official selection, and the rule by which the total is exactly the budget."""

import pytest
import torch

from baselines.vidcom2 import likeness, released, shares, within
from llava.errors import UserError
from llava.model.builder import load
from llava.pipeline.generate import prefill
from llava.processing.prompt import Sample
from llava.processing.video import Video
from llava.reduction import PatchGrid, PromptState, ranks, registry
from llava.reduction.budget import split_evenly
from llava.reduction.token_layout import ModelSpec
from tests.conftest import drawn_image
from tests.tiny_checkpoints_families import make_tiny_video, save_video_original
from tests.vectors import vectors

F, N, D = 4, 12, 16


def state_of(tokens: torch.Tensor, frames: int) -> PromptState:
    """Of videos [B, F * n, D]."""
    batch, total = tokens.shape[:2]
    layout = PatchGrid(1, total // frames, crops=frames)
    spec = ModelSpec(total, 4, layout, 4, frames=frames)
    ids = tuple(map(str, range(batch)))
    return PromptState(ids=ids, spec=spec, features=tokens, tokens=tokens, scores={}, layout=layout)


def kept(tokens: torch.Tensor, frames: int, budget: int, **options) -> list[list[int]]:
    returned = registry.build("vidcom2", budget, options).prompt(state_of(tokens, frames))
    parts = returned if isinstance(returned, list) else [returned]
    return [row.tolist() for part in parts for row in part.kept]


@pytest.mark.parametrize("case", vectors("vidcom2")[0]["cases"], ids=lambda case: case["case"])
def test_the_official_indices(case):
    """Channels, Gaussians, softmax over frames, rounding half to even; and the same total in float32 by the method."""
    tokens = vectors("vidcom2")[1][case["case"]]
    frames, ratio = case["frames"], case["ratio"]
    video, frame = likeness(tokens.view(1, frames, case["per_frame"], -1))
    (found,) = released(ranks(-(video + frame)), shares(video, ratio))
    assert found[0].tolist() == case["kept"]
    if len(tokens) * ratio == int(len(tokens) * ratio):
        assert kept(tokens[None], frames, int(len(tokens) * ratio), official=True) == [case["kept"]]


def test_planted_frame_and_tokens_are_kept():
    """A frame unlike the others gets most tokens, and the planted odd token of every frame is kept."""
    generator = torch.Generator().manual_seed(0)
    tokens = 1 + 0.05 * torch.randn(1, F, N, D, generator=generator)
    tokens[0, 2] += torch.tensor([0.4, -0.4] * (D // 2))
    odd = [3, 7, 0, 11]
    for number, token in enumerate(odd):
        tokens[0, number, token] += torch.randn(D, generator=generator)
    ((*chosen,),) = kept(tokens.flatten(1, 2), F, 12)
    counts = torch.bincount(torch.tensor(chosen) // N, minlength=F).tolist()
    assert counts == [2, 2, 6, 2] or (counts[2] == max(counts) and sorted(counts)[-2] < counts[2])
    assert all(number * N + token in chosen for number, token in enumerate(odd))


@pytest.mark.parametrize("budget", [1, 3, 4, 5, 12, 13, 30, 40, 47])
def test_the_total_is_the_budget_by_largest_fractions(budget):
    """Against `split_evenly`, where no frame is full and each has a token; no frame is left out, no total is off."""
    generator = torch.Generator().manual_seed(budget)
    tokens = torch.randn(3, F, N, D, generator=generator)
    tokens[:, 1] *= 0.1
    video, frame = likeness(tokens)
    share = shares(video, budget / (F * N))
    order = ranks(-(video + frame))
    chosen = within(order, share, budget)
    assert chosen.tolist() == kept(tokens.flatten(1, 2), F, budget)
    for row, own in zip(chosen, share, strict=True):
        counts = torch.bincount(row // N, minlength=F)
        assert counts.sum() == budget == len(row.unique()) and (row.diff() > 0).all()
        assert budget < F or counts.min() >= 1
        if own.max() < N and own.min() >= 1:
            assert counts.tolist() == split_evenly(budget, [N] * F, own.tolist())


def test_within_a_frame_the_best_are_kept_whatever_the_share():
    """A frame keeps its first tokens by rank, also a full one, and a share above a frame goes to the others in turn."""
    order = torch.stack([torch.arange(5), torch.arange(5).flip(0), torch.tensor([1, 0, 2, 3, 4])])[None]
    share = torch.tensor([[5.0, 1.4, 1.6]], dtype=torch.float64)
    assert within(order, share, 8).tolist() == [[0, 1, 2, 3, 4, 9, 10, 11]]
    assert within(order, share, 11).tolist() == [[0, 1, 2, 3, 4, 7, 8, 9, 10, 11, 12]]
    assert within(order, share, 2).tolist() == [[0, 1]]  # fewer than frames: no frame is sure of one
    assert within(order, torch.tensor([[2.8, 0.1, 0.1]]), 3).tolist() == [[0, 9, 11]]  # as many: each has one


def test_as_released_a_frame_has_a_token_and_at_most_all():
    """A share is rounded half to even, to 1 at least; `shares` ends at a whole frame."""
    order = torch.arange(5).expand(1, 4, 5)
    (kept_,) = released(order, torch.tensor([[0.2, 1.5, 2.5, 5.0]]))
    assert (kept_[0] // 5).bincount().tolist() == [1, 2, 2, 5]
    video = torch.tensor([[[0.0] * 5, [1.0] * 5]])
    assert shares(video, 0.8).tolist() == [[5.0, 0.8 * 0.5 * 5]]


def test_an_image_is_one_frame():
    """The tokens farthest from the mean; official=true then keeps the budget."""
    tokens = torch.randn(2, N, D, generator=torch.Generator().manual_seed(0))
    video, frame = likeness(tokens[:, None])
    assert torch.equal(video, frame)
    expected = (-video[:, 0]).argsort(dim=1, descending=True, stable=True)[:, :5].sort(1).values.tolist()
    assert kept(tokens, 1, 5) == kept(tokens, 1, 5, official=True) == expected


def test_only_the_steadier_half_of_the_channels_counts():
    """Noise in the other half changes nothing."""
    generator = torch.Generator().manual_seed(0)
    tokens = 0.1 * torch.randn(1, F * N, D, generator=generator)
    loud = tokens.clone()
    tokens[..., : D // 2] += 5 * torch.randn(1, F * N, D // 2, generator=generator)
    loud[..., : D // 2] += 9 * torch.randn(1, F * N, D // 2, generator=generator)
    assert kept(tokens, F, 9) == kept(loud, F, 9)


def test_official_plans_no_total():
    """What the release keeps depends on the video."""
    spec = ModelSpec(F * N, 4, PatchGrid(1, N, crops=F), 4, frames=F)
    assert registry.build("vidcom2", 9).tokens_per_layer(spec) == (9,) * 4
    assert registry.build("vidcom2", 9, {"official": "true"}).tokens_per_layer(spec) is None
    with pytest.raises(UserError, match="one of global"):
        registry.build("vidcom2", 9, {"tile_budget": "each"})


def test_frames_of_video_llava(tmp_path):
    """The budget is that of all eight frames together, and class tokens of frames are no tokens of the method."""
    save_video_original(tmp_path, make_tiny_video())
    model = load(tmp_path, device="cpu")
    video = Video(tuple(drawn_image(frame, (70, 50)) for frame in range(8)))
    frame = model.views(video)[1].origins()[:, 0]
    state, record = prefill(model, [Sample("q", "What happens?", image=video)], registry.build("vidcom2", 19))
    assert record.accounting(state)[0].tokens_per_layer == (19,) * len(model.llm.layers)
    (step,) = record.steps[0]
    assert frame[step.reduction.kept[0]].bincount(minlength=8).min() >= 1
