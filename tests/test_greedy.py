"""Greedy choices: loops in torch, forms for the CPU and for many tokens, against loops from the definition."""

import tracemalloc

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from llava.reduction import ranking as greedy
from llava.reduction.states import State
from tests.allocations import metered_peak

SHAPES = [(1, 1, 3, 1), (1, 2, 3, 1), (2, 5, 4, 3), (3, 30, 8, 12), (1, 40, 48, 40), (2, 120, 64, 60)]


def cosine_of(tokens: torch.Tensor) -> torch.Tensor:
    unit = F.normalize(tokens.float(), dim=-1)
    return unit @ unit.transpose(1, 2)


CHOICES = {
    "farthest": lambda tokens, weight, *rest: greedy.farthest_apart(tokens, *rest),
    "determinant": greedy.largest_determinant,
    "coverage": greedy.cover_greedily,
    "duplicates": lambda tokens, weight, *rest: greedy.distinct(tokens, *rest),
}


@pytest.fixture(params=["on the host", "on a device", "on the host, by rows", "on a device, by rows"])
def form(request, monkeypatch):
    """Numpy or torch; all cosines in one product, and as for images that have too many; lists of near entries."""
    if "device" in request.param:
        monkeypatch.setattr(greedy, "on_host", lambda *_: False)
    if "by rows" in request.param:
        monkeypatch.setattr(greedy, "WHOLE", 3)
    monkeypatch.setattr(greedy, "FEW", 70)
    monkeypatch.setattr(greedy, "BLOCK", 24)


def torch_on_all_cosines(name, tokens, weight, count):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(greedy, "on_host", lambda *_: False)
        patch.setattr(greedy, "WHOLE", 2**24)
        return CHOICES[name](tokens, weight, count)


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize(("batch", "total", "channels", "count"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_forms_choose_the_same_drawn_tokens(name, batch, total, channels, count, dtype, form):
    tokens, weight = torch.randn(batch, total, channels, dtype=dtype), torch.rand(batch, total) + 0.1
    expected = torch_on_all_cosines(name, tokens, weight, count)
    assert torch.equal(CHOICES[name](tokens, weight, count), expected)


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize(("batch", "total", "channels", "count"), SHAPES)
def test_all_forms_choose_the_same_where_tokens_are_equal(name, batch, total, channels, count, form):
    """Copies of a few directions, whose cosines are exactly 0 or 1, and weights that are equal: many ties."""
    directions = torch.randint(min(channels, 7), (batch, total))
    tokens, weight = torch.eye(channels)[directions], torch.full((batch, total), 0.5)
    weight[:, total // 2] = 0.25
    chosen = CHOICES[name](tokens, weight, count)
    assert torch.equal(chosen, torch_on_all_cosines(name, tokens, weight, count))
    assert all(len(set(row)) == count for row in chosen.tolist())


@pytest.mark.parametrize("name", CHOICES)
def test_equal_tokens_are_chosen_by_index(name, form):
    """Nothing tells the tokens apart. (A list loses its even entries first, so another order is right there.)"""
    chosen = CHOICES[name](torch.ones(2, 90, 4), torch.full((2, 90), 0.5), 30)
    if name == "duplicates":
        assert chosen.tolist() == [removed_by_the_book([[1.0] * 90] * 90, 30)] * 2
    else:
        assert chosen.tolist() == [list(range(30))] * 2


def removed_by_the_book(cosine: list[list[float]], count: int) -> list[int]:
    """One image, plain loops."""
    line = list(range(len(cosine)))
    while len(line) > count:
        even, odd = line[::2], line[1::2]
        even.sort(key=lambda i: -max(cosine[i][j] for j in odd))
        line = even[min(8, len(line) - count) :] + odd
    return line[:count]


def covered_by_the_book(cosine: torch.Tensor, weight: torch.Tensor, count: int) -> list[int]:
    """One image in double precision."""
    cosine, weight, chosen = cosine.double(), weight.double(), []
    covered = torch.zeros(len(cosine), dtype=torch.double)
    for _ in range(count):
        gain = [(cosine[i] - covered).clamp(min=0).sum().item() * weight[i].item() for i in range(len(cosine))]
        chosen.append(max((i for i in range(len(cosine)) if i not in chosen), key=lambda i: (gain[i], -i)))
        covered = torch.maximum(covered, cosine[chosen[-1]])
    return chosen


def farthest_by_the_book(cosine: torch.Tensor, first: int, count: int) -> list[int]:
    chosen = [first]
    while len(chosen) < count:
        left = [i for i in range(len(cosine)) if i not in chosen]
        chosen.append(max(left, key=lambda i: min(1 - cosine[i, j].item() for j in chosen)))
    return chosen


def volume_by_the_book(cosine: torch.Tensor, weight: torch.Tensor, count: int) -> list[int]:
    kernel = (weight[:, None] * cosine * weight).double()
    chosen: list[int] = []
    for _ in range(count):
        left = [i for i in range(len(kernel)) if i not in chosen]
        volume = {i: torch.linalg.det(kernel[[*chosen, i]][:, [*chosen, i]]).item() for i in left}
        chosen.append(max(left, key=lambda i: volume[i]))
    return chosen


def test_equals_the_definition(form):
    """Clustered tokens, for which bounds and lists of near entries are often wrong."""
    centres = torch.randn(2, 6, 24)
    tokens = centres[:, torch.randint(6, (110,))] + 0.3 * torch.randn(2, 110, 24)
    weight = torch.rand(2, 110) ** 4 + 0.01
    cosine = cosine_of(tokens.double()).double()
    apart = greedy.farthest_apart(tokens, 20)
    volume = greedy.largest_determinant(tokens, weight, 12)
    cover = greedy.cover_greedily(tokens, weight, 20)
    left = greedy.distinct(tokens, 20)
    for image, own in enumerate(cosine):
        nearest = own.clone().fill_diagonal_(-1).amax(1)
        assert apart[image].tolist() == farthest_by_the_book(own, int((1 - nearest).argmax()), 20)
        assert volume[image].tolist() == volume_by_the_book(own, weight[image], 12)
        assert cover[image].tolist() == covered_by_the_book(own, weight[image], 20)
        assert left[image].tolist() == removed_by_the_book(own.tolist(), 20)


@pytest.mark.parametrize(("batch", "total", "channels", "count"), SHAPES)
def test_farthest_from_a_first_token_equals_the_definition(batch, total, channels, count):
    unit = F.normalize(torch.randn(batch, total, channels), dim=-1)
    first = torch.randint(total, (batch,))
    chosen = greedy.farthest_from(unit, first, count)
    for image, row in enumerate(chosen.tolist()):
        own = unit[image].double() @ unit[image].double().T
        assert row == farthest_by_the_book(own, int(first[image]), count)


def test_a_list_of_near_entries_without_an_odd_one():
    """Clusters longer than the lists: the nearest entries of an entry stand all at even places, as it does."""
    tokens = torch.eye(12)[torch.arange(1200) % 12] + 0.01 * torch.randn(1200, 12)
    tokens[torch.arange(1200) % 2 == 0] += torch.tensor([3.0] + [0.0] * 11)
    assert greedy.FEW < 1200 and greedy.NEAREST < 600
    expected = torch_on_all_cosines("duplicates", tokens[None], None, 1100)
    assert torch.equal(greedy.distinct(tokens[None], 1100), expected)


@pytest.mark.parametrize("name", CHOICES)
def test_numbers_that_are_none_end_in_some_choice(name, form):
    """Weights of the model that are NaN are reported later; the loop must end before."""
    tokens, weight = torch.randn(1, 90, 4), torch.rand(1, 90)
    tokens[0, 3], weight[0, 5] = torch.nan, torch.nan
    chosen = CHOICES[name](tokens, weight, 30)
    assert chosen.shape == (1, 30) and chosen.min() >= 0 and chosen.max() < 90


@pytest.mark.parametrize("name", CHOICES)
def test_operations_are_counted(name, form):
    tokens, weight, state = torch.randn(2, 100, 16), torch.rand(2, 100) + 0.1, State(ids=())
    with FlopCounterMode(display=False) as counter:
        CHOICES[name](tokens, weight, 30, state.matmul)
    assert state.flops == counter.get_total_flops() > 0


@pytest.mark.parametrize("name", CHOICES)
def test_memory_is_linear_where_all_cosines_do_not_fit(name, monkeypatch):
    """At 11,520 tokens 2.3 N x N floats were alive in DivPrune, 2.4 in CDPruner, 2.1 in SCOPE, 1.3 in VisPruner."""
    monkeypatch.setattr(greedy, "WHOLE", 3)
    monkeypatch.setattr(greedy, "BLOCK", 64)
    monkeypatch.setattr(greedy, "FEW", 100)
    tokens, weight = torch.randn(1, 1024, 8), torch.rand(1, 1024) + 0.1
    tracemalloc.start()  # numpy's memory; torch's is not in it
    most = metered_peak(lambda: CHOICES[name](tokens, weight, 64))
    most += tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 1024 * 1024 * 4 / 2


@pytest.mark.parametrize("total", [50, 11520])
@pytest.mark.parametrize("name", CHOICES)
def test_the_loops_never_wait_for_the_device_nor_hold_a_table_of_many_tokens(name, total):
    """Tensors on the meta device hold no values, so whatever looks at one fails. At 11,520 tokens SCOPE and VisPruner
    held all cosines, 531 MB, off the CPU."""
    count = 20 if total == 50 or name != "duplicates" else total - 100
    tokens, weight = torch.empty(1, total, 64, device="meta"), torch.empty(1, total, device="meta")
    chosen = []
    most = metered_peak(lambda: chosen.append(CHOICES[name](tokens, weight, count)))
    assert chosen[0].shape == (1, count) and chosen[0].device.type == "meta"
    assert most < 5 * 4 * greedy.WHOLE < 11520 * 11520 * 4


def test_gains_nearer_than_rounding_are_compared_exactly(form):
    """Tokens that all gain about as much, so that a sum in another order would choose others."""
    tokens = torch.eye(40)[torch.arange(400) % 40] + 1e-4 * torch.randn(3, 400, 40)
    weight = torch.full((3, 400), 0.7)
    expected = torch_on_all_cosines("coverage", tokens, weight, 60)
    assert torch.equal(greedy.cover_greedily(tokens, weight, 60), expected)
