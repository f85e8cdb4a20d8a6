"""OTPrune: choices and their order against the release's and the determinant itself, and planted tokens."""

from types import SimpleNamespace

import pytest
import torch

from baselines.otprune import OTPrune
from tests.vectors import vectors


def state_of(tokens: torch.Tensor) -> SimpleNamespace:
    return SimpleNamespace(tokens=tokens, matmul=torch.matmul)


def test_kept_tokens_are_those_of_the_release():
    """Recorded choices; fewer channels than tokens that are kept, too."""
    about, arrays = vectors("otprune")
    for case in about["cases"]:
        state = state_of(arrays[f"{case['case']}_tokens"][None])
        kept = OTPrune(budget=case["budget"]).prompt(state).kept[0].tolist()
        assert kept == case["kept"], case["case"]
        kept = OTPrune(budget=case["budget"], official=True).prompt(state).kept[0].tolist()
        assert kept == case["release_order"] and kept != sorted(kept), case["case"]


def chosen_by_the_book(tokens: torch.Tensor, gamma: float, count: int) -> list[int]:
    """The token that makes the determinant of the chosen tokens' kernel largest, over and over."""
    tokens = tokens.double()
    scaled = tokens / (tokens**2).sum(0).sqrt()
    products = scaled @ scaled.T
    kernel = torch.eye(len(tokens)).double() + gamma * products @ products
    chosen: list[int] = []
    for _ in range(count):
        left = [token for token in range(len(tokens)) if token not in chosen]
        volumes = [kernel[[*chosen, token]][:, [*chosen, token]].det() for token in left]
        chosen.append(left[int(torch.stack(volumes).argmax())])
    return sorted(chosen)


@pytest.mark.parametrize("gamma", [0.01, 10.0])
@pytest.mark.parametrize("count", [1, 7, 19])
def test_a_batch_equals_the_definition(gamma, count):
    """Also with more tokens kept than there are channels, and with a large weight."""
    tokens = torch.randn(3, 20, 6, generator=torch.Generator().manual_seed(count)).exp()
    kept = OTPrune(budget=count, gamma=gamma).prompt(state_of(tokens)).kept.tolist()
    assert kept == [chosen_by_the_book(own, gamma, count) for own in tokens]


def test_planted_tokens_that_stand_out_in_a_channel_are_kept():
    """Plant the answer: a channel counts by its shares, so that one of small numbers counts as much as the others."""
    tokens = torch.ones(1, 16, 4) * torch.tensor([1.0, 1.0, 1.0, 1e-3])
    tokens[0, 11, 3], tokens[0, 2, 0], tokens[0, 2, 3] = 0.04, -30.0, 0.0
    assert OTPrune(budget=2).prompt(state_of(tokens)).kept.tolist() == [[2, 11]]


def test_without_the_second_order_kernel_all_tokens_are_equal():
    """gamma=0 leaves the unit matrix; the lower index wins, and no token comes twice."""
    tokens = torch.randn(1, 9, 4, generator=torch.Generator().manual_seed(0))
    assert OTPrune(budget=3, gamma=0).prompt(state_of(tokens)).kept.tolist() == [[0, 1, 2]]


def test_a_channel_of_zeros_counts_nothing():
    """It has no length by which it could be divided; theirs is NaN then."""
    tokens = torch.randn(1, 9, 4, generator=torch.Generator().manual_seed(0))
    with_zeros = torch.cat([tokens, torch.zeros(1, 9, 1)], 2)
    kept = [OTPrune(budget=4).prompt(state_of(one)).kept for one in (tokens, with_zeros)]
    assert torch.equal(*kept)
