"""DivPrune: the greedy choice against a version with plain loops, a planted answer, duplicates, recorded order."""

import pytest
import torch

from baselines.divprune import DivPrune
from llava.reduction.ranking import farthest_apart
from llava.reduction.reducer import PromptState
from llava.reduction.token_layout import ModelSpec, PatchGrid
from tests.parity import model as recipe
from tests.parity.harness import FOLDER, parity_model, recording

LLAVA = ModelSpec(576, 32, PatchGrid(24, 24), 24)


def state(tokens: torch.Tensor) -> PromptState:
    images, count = tokens.shape[:2]
    return PromptState(
        ids=tuple(map(str, range(images))), features=tokens, scores={}, layout=PatchGrid(1, count), tokens=tokens
    )


def by_the_book(tokens: torch.Tensor, budget: int) -> list[int]:
    """One image, plain loops: the order of choice."""
    unit = torch.nn.functional.normalize(tokens.double(), dim=-1)
    distance = (1 - unit @ unit.T).tolist()
    every = range(len(tokens))
    chosen = [max(every, key=lambda i: min(distance[i][j] for j in every if j != i))]
    while len(chosen) < budget:
        left = [i for i in every if i not in chosen]
        chosen.append(max(left, key=lambda i: min(distance[i][j] for j in chosen)))
    return chosen


@pytest.mark.parametrize(("tokens", "budget"), [(12, 1), (12, 2), (30, 11), (31, 30)])
def test_equals_its_definition(tokens, budget):
    features = torch.randn(3, tokens, 5)
    expected = [by_the_book(features[b], budget) for b in range(3)]
    assert farthest_apart(features, budget).tolist() == expected
    assert DivPrune(budget=budget).prompt(state(features)).kept.tolist() == [sorted(order) for order in expected]


def test_finds_the_planted_loners():
    """Plant the answer: 20 tokens around one direction, and 3 that point elsewhere, however long they are."""
    tokens = torch.tensor([1.0, 0, 0, 0]) + 0.01 * torch.randn(2, 20, 4)
    tokens[0, 3], tokens[0, 11], tokens[0, 17] = torch.eye(4)[1], 100 * torch.eye(4)[2], 0.01 * torch.eye(4)[3]
    tokens[1, 0], tokens[1, 1], tokens[1, 19] = torch.eye(4)[1], -torch.eye(4)[0], torch.eye(4)[3]
    kept = DivPrune(budget=4).prompt(state(tokens)).kept.tolist()
    assert {3, 11, 17} < set(kept[0]) and {0, 1, 19} < set(kept[1])


def test_no_token_is_chosen_twice_among_duplicates():
    """All distances are zero once every direction is taken, and the release can then choose a token again."""
    tokens = torch.eye(3).repeat(4, 1)[None]
    order = farthest_apart(tokens, 9)[0].tolist()
    assert len(set(order)) == 9 and {i % 3 for i in order[:3]} == {0, 1, 2}


def test_distances_are_not_rounded_to_half_precision():
    """In float16, as in the release, the two candidates tie."""
    angle = torch.tensor([0.0, 0.02, 0.0201])
    tokens = torch.stack([angle.cos(), angle.sin()], 1)
    half = 1 - (tokens.half() @ tokens.half().T)
    assert half[0, 1] == half[0, 2]
    far = torch.cat([tokens, torch.tensor([[0.0, -1.0]])])[None]
    order = farthest_apart(far, 3)[0].tolist()
    assert order[0] == 3 and order[1] == 2  # the farthest from the loner, by a hundred-thousandth


def test_never_waits_for_the_device():
    """Tensors on the meta device hold no values, so whatever looks at one fails."""
    order = farthest_apart(torch.empty(2, 50, 8, device="meta"), 20)
    assert order.shape == (2, 20) and order.device.type == "meta"


def test_order_of_choice_is_that_of_the_release():
    _, arrays = recording(FOLDER / "divprune-64.npz")
    model = parity_model()
    for row in range(3):
        pixels = recipe.case(int(arrays["cases"][row])).pixels[None]
        with torch.inference_mode():
            features = model.tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
            order = farthest_apart(model.projector(features), 64)
        assert order[0].tolist() == arrays["order"][row].tolist()


def test_budget_holds_in_every_layer():
    """The paper's own ratio of 0.098 is 56 tokens."""
    assert all(DivPrune(budget=budget).tokens_per_layer(LLAVA) == (budget,) * 32 for budget in (192, 128, 64, 56))
    assert DivPrune(budget=9).keeps_all(9) and not DivPrune(budget=8).keeps_all(9)
