"""Greedy choices: the form for the CPU against the reference in torch and against loops from the definition."""

import tracemalloc
from contextlib import nullcontext
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from eval.efficiency.meter import peak_bytes
from llava.reduction.greedy import cosines, coverage, determinant, duplicates, farthest
from llava.reduction.states import State

SHAPES = [(1, 1, 3, 1), (1, 2, 3, 1), (2, 5, 4, 3), (3, 30, 8, 12), (1, 40, 48, 40), (2, 300, 160, 150)]


def cosine_of(tokens: torch.Tensor) -> torch.Tensor:
    unit = F.normalize(tokens.float(), dim=-1)
    return unit @ unit.transpose(1, 2)


# name -> (the choice of tokens by weight, its reference in torch on all cosines)
CHOICES = {
    "farthest": (
        lambda tokens, weight, count, state: farthest.farthest_apart(tokens, count, state),
        lambda cosine, weight, count: farthest.reference(cosine, count),
    ),
    "determinant": (determinant.largest_determinant, determinant.reference),
    "coverage": (coverage.cover_greedily, coverage.reference),
    "duplicates": (
        lambda tokens, weight, count, state: duplicates.distinct(tokens, count, state),
        lambda cosine, weight, count: duplicates.reference(cosine, count),
    ),
}


@pytest.fixture(params=["whole", "each pair once", "by rows", "by rows, on a device"])
def memory(request, monkeypatch):
    """All cosines in one product, in halves, and as for images that have too many; lists of near entries in all."""
    if request.param == "by rows, on a device":
        for module in (coverage, determinant, duplicates, farthest):
            monkeypatch.setattr(module, "on_host", lambda *_: False)
    monkeypatch.setattr(duplicates, "FEW", 70)
    monkeypatch.setattr(cosines, "BLOCK", 24)
    monkeypatch.setattr(coverage, "BLOCK", 48)
    if request.param == "each pair once":
        monkeypatch.setattr(cosines, "ONCE", 0)
    if request.param.startswith("by rows"):
        monkeypatch.setattr(cosines, "WHOLE", 3)
        monkeypatch.setattr(cosines, "KEPT", 40)  # rows are forgotten and made again
    return request.param


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize(("batch", "total", "channels", "count"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_reference_on_drawn_tokens(name, batch, total, channels, count, dtype, memory):
    choice, reference = CHOICES[name]
    tokens, weight = torch.randn(batch, total, channels, dtype=dtype), torch.rand(batch, total) + 0.1
    expected = reference(cosine_of(tokens), weight, count)
    assert torch.equal(choice(tokens, weight, count, State(ids=())), expected)


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize(("batch", "total", "channels", "count"), SHAPES)
def test_equals_the_reference_where_tokens_are_equal(name, batch, total, channels, count, memory):
    """Copies of a few directions, whose cosines are exactly 0 or 1, and weights that are equal: many ties."""
    choice, reference = CHOICES[name]
    directions = torch.randint(min(channels, 7), (batch, total))
    tokens, weight = torch.eye(channels)[directions], torch.full((batch, total), 0.5)
    weight[:, total // 2] = 0.25
    expected = reference(cosine_of(tokens), weight, count)
    chosen = choice(tokens, weight, count, State(ids=()))
    assert torch.equal(chosen, expected)
    assert all(len(set(row)) == count for row in chosen.tolist())


@pytest.mark.parametrize("name", CHOICES)
def test_equal_tokens_are_chosen_by_index(name, memory):
    """Nothing tells the tokens apart. (A list loses its even entries first, so another order is right there.)"""
    choice, _ = CHOICES[name]
    chosen = choice(torch.ones(2, 90, 4), torch.full((2, 90), 0.5), 30, State(ids=()))
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


def test_equals_the_definition(memory):
    """Clustered tokens, for which bounds, rows made ahead and lists of near entries are often wrong."""
    centres = torch.randn(2, 6, 24)
    tokens = centres[:, torch.randint(6, (110,))] + 0.3 * torch.randn(2, 110, 24)
    weight = torch.rand(2, 110) ** 4 + 0.01
    cosine = cosine_of(tokens.double()).double()
    state = State(ids=())
    apart = farthest.farthest_apart(tokens, 20, state)
    volume = determinant.largest_determinant(tokens, weight, 12, state)
    cover = coverage.cover_greedily(tokens, weight, 20, state)
    left = duplicates.distinct(tokens, 20, state)
    for image, own in enumerate(cosine):
        nearest = own.clone().fill_diagonal_(-1).amax(1)
        assert apart[image].tolist() == farthest_by_the_book(own, int((1 - nearest).argmax()), 20)
        assert volume[image].tolist() == volume_by_the_book(own, weight[image], 12)
        assert cover[image].tolist() == covered_by_the_book(own, weight[image], 20)
        assert left[image].tolist() == removed_by_the_book(own.tolist(), 20)


@pytest.mark.parametrize(("batch", "total", "channels", "count"), SHAPES)
def test_farthest_from_a_first_token_equals_its_reference(batch, total, channels, count):
    unit = F.normalize(torch.randn(batch, total, channels), dim=-1)
    first = torch.randint(total, (batch,))
    chosen = farthest.farthest_from(unit, first, count)
    assert torch.equal(chosen, farthest.from_tokens(unit, first, count))
    own = unit[0].double() @ unit[0].double().T
    assert chosen[0].tolist() == farthest_by_the_book(own, int(first[0]), count)


def test_a_list_of_near_entries_without_an_odd_one():
    """Clusters longer than the lists: the nearest entries of an entry stand all at even places, as it does."""
    tokens = torch.eye(12)[torch.arange(1200) % 12] + 0.01 * torch.randn(1200, 12)
    tokens[torch.arange(1200) % 2 == 0] += torch.tensor([3.0] + [0.0] * 11)
    assert duplicates.FEW < 1200 and duplicates.NEAREST < 600
    expected = duplicates.reference(cosine_of(tokens[None]), 1100)
    assert torch.equal(duplicates.distinct(tokens[None], 1100), expected)


@pytest.mark.parametrize("name", CHOICES)
def test_numbers_that_are_none_end_in_some_choice(name, memory):
    """Weights of the model that are NaN are reported later; the loop must end before."""
    choice, _ = CHOICES[name]
    tokens, weight = torch.randn(1, 90, 4), torch.rand(1, 90)
    tokens[0, 3], weight[0, 5] = torch.nan, torch.nan
    chosen = choice(tokens, weight, 30, State(ids=()))
    assert chosen.shape == (1, 30) and chosen.min() >= 0 and chosen.max() < 90


@pytest.mark.parametrize("name", CHOICES)
def test_operations_are_counted(name, memory):
    choice, _ = CHOICES[name]
    tokens, weight, state = torch.randn(2, 100, 16), torch.rand(2, 100) + 0.1, State(ids=())
    with FlopCounterMode(display=False) as counter:
        choice(tokens, weight, 30, state)
    assert state.flops == counter.get_total_flops() > 0


@pytest.mark.parametrize("name", CHOICES)
def test_memory_is_linear_where_all_cosines_do_not_fit(name, monkeypatch):
    """At 11,520 tokens 2.3 N x N floats were alive in DivPrune, 2.4 in CDPruner, 2.1 in SCOPE, 1.3 in VisPruner."""
    choice, _ = CHOICES[name]
    monkeypatch.setattr(cosines, "WHOLE", 3)
    monkeypatch.setattr(cosines, "KEPT", 64)
    for module in (cosines, coverage, duplicates):
        monkeypatch.setattr(module, "BLOCK", 64)
    monkeypatch.setattr(duplicates, "FEW", 100)
    tokens, weight = torch.randn(1, 1024, 8), torch.rand(1, 1024) + 0.1
    tracemalloc.start()  # numpy's memory; torch's is not in it
    most = peak_bytes(lambda: choice(tokens, weight, 64, State(ids=())))
    most += tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 1024 * 1024 * 4 / 2


@pytest.mark.parametrize("total", [50, 11520])
@pytest.mark.parametrize("name", CHOICES)
def test_the_reference_never_waits_for_the_device_nor_holds_a_table_of_many_tokens(name, total):
    """Tensors on the meta device hold no values, so whatever looks at one fails. At 11,520 tokens SCOPE and VisPruner
    held all cosines, 531 MB, off the CPU."""
    choice, _ = CHOICES[name]
    count = 20 if total == 50 or name != "duplicates" else total - 100
    tokens, weight = torch.empty(1, total, 64, device="meta"), torch.empty(1, total, device="meta")
    chosen = []
    most = peak_bytes(lambda: chosen.append(choice(tokens, weight, count, State(ids=()))))
    assert chosen[0].shape == (1, count) and chosen[0].device.type == "meta"
    assert most < 5 * 4 * cosines.WHOLE < 11520 * 11520 * 4


class SecondGpu(TorchFunctionMode):
    """Tensors of the CPU say that they are on the second GPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function == torch.Tensor.device.__get__:
            return torch.device("cuda", 1)
        return function(*args, **(kwargs or {}) | ({"device": "cpu"} if "device" in (kwargs or {}) else {}))


@pytest.mark.parametrize("name", [*CHOICES, "farthest from"])
def test_another_gpu_than_the_current_one_chooses_for_the_image_of_this_call(name, monkeypatch):
    """On cuda:1 with current device 0 a CUDA graph captured nothing: from the third call on all loops returned the
    tokens of an earlier image."""
    choice = lambda tokens, weight, state: farthest.farthest_from(tokens, torch.zeros(1, dtype=torch.long), 9)  # noqa: E731
    if name in CHOICES:
        choice = lambda tokens, weight, state: CHOICES[name][0](tokens, weight, 9, state)  # noqa: E731
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Mock)  # its replay does nothing
    monkeypatch.setattr(torch.cuda, "graph", nullcontext)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Mock(cuda_stream=0))
    for _ in range(4):
        tokens, weight = F.normalize(torch.randn(1, 36, 8), dim=-1), torch.rand(1, 36) + 0.1
        expected = choice(tokens, weight, State(ids=()))
        with SecondGpu():
            assert torch.equal(choice(tokens, weight, State(ids=())), expected)


@pytest.mark.parametrize("total", [1, 30, 39, 40, 41, 100])
def test_pairs_made_once_are_those_of_the_product(total, monkeypatch):
    """Whole blocks, and a last one that is as long as it must be to have the same last bits."""
    monkeypatch.setattr(cosines, "ONCE", 0)
    monkeypatch.setattr(cosines, "BLOCK", 24)
    unit = F.normalize(torch.randn(2, total, 160), dim=-1)
    assert np.array_equal(cosines.whole(unit, State(ids=())), (unit @ unit.transpose(1, 2)).numpy())


def test_gains_nearer_than_rounding_are_compared_exactly(memory):
    """Tokens that all gain about as much, so that a sum in another order would choose others."""
    tokens = torch.eye(40)[torch.arange(400) % 40] + 1e-4 * torch.randn(3, 400, 40)
    weight = torch.full((3, 400), 0.7)
    expected = coverage.reference(cosine_of(tokens), weight, 60)
    assert torch.equal(coverage.cover_greedily(tokens, weight, 60), expected)


def test_rows_made_ahead_are_those_of_the_product():
    unit = F.normalize(torch.randn(60, 8), dim=-1)
    rows = cosines.Rows(unit, State(ids=()))
    promise = np.zeros(60, np.float32)
    for token in (3, 59, 3, 17):
        assert np.array_equal(rows.next(token, promise), (unit @ unit.T)[token].numpy())
        promise[token] = -np.inf


def test_rows_made_ahead_are_made_once_and_few_are_kept(monkeypatch):
    """Tokens are asked for in the worst order: of the rows that were made ahead none is wanted yet."""
    monkeypatch.setattr(cosines, "KEPT", 40)
    state, promise = State(ids=()), np.arange(200, dtype=np.float32)
    rows = cosines.Rows(F.normalize(torch.randn(200, 8), dim=-1), state)
    for token in (0, 1):
        rows.next(token, promise)
    spent = state.flops
    for token in range(199, 199 - 30, -1):  # the two products had 15 others each
        rows.next(token, promise)
    assert state.flops == spent
    for token in range(2, 12):
        rows.next(token, promise)
        assert len(rows._made) <= 40
