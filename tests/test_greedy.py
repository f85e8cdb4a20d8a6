"""Greedy choices, with all cosines held and with a few rows at a time, against loops from the definition."""

import pytest
import torch
import torch.nn.functional as F

from llava.reduction import ranking as greedy
from tests.allocations import metered_peak

SHAPES = [(1, 1, 3, 1), (1, 2, 3, 1), (2, 5, 4, 3), (3, 30, 8, 12), (1, 40, 48, 40), (2, 120, 64, 60)]


def cosine_of(tokens: torch.Tensor) -> torch.Tensor:
    unit = F.normalize(tokens.float(), dim=-1)
    return unit @ unit.transpose(1, 2)


def cover_of(tokens: torch.Tensor) -> list[torch.Tensor]:
    """What tokens cover: as many other things in each image, one more than in the image before."""
    tables = [own.clamp(min=0)[:, : -(-own.shape[1] // 2)] for own in cosine_of(tokens)]
    return [torch.cat([own, own[:, :1].expand(-1, number)], 1) for number, own in enumerate(tables, 1)]


def late_of(tokens: torch.Tensor) -> list[torch.Tensor | None]:
    """In every second image, two thirds of the tokens are chosen after all others."""
    batch, total = tokens.shape[:2]
    return [torch.arange(total) % 3 > 0 if number % 2 else None for number in range(batch)]


CHOICES = {
    "farthest": lambda tokens, weight, *rest: greedy.farthest_apart(tokens, *rest),
    "determinant": greedy.largest_determinant,
    "coverage": greedy.cover_greedily,
    "table": lambda tokens, weight, count: greedy.cover_most(cover_of(tokens), count, late_of(tokens)),
    "duplicates": lambda tokens, weight, *rest: greedy.distinct(tokens, *rest),
}


@pytest.fixture(params=["whole on the host", "by rows on the host", "whole on a device", "by rows on a device"])
def form(request, monkeypatch):
    """All cosines in one product, or as for images that have too many; values may be looked at, or not."""
    if "rows" in request.param:
        monkeypatch.setattr(greedy, "WHOLE", 3)
    if "device" in request.param:
        monkeypatch.setattr(greedy, "HOST", "none")


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize(("batch", "total", "channels", "count"), SHAPES)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, "equal"])
def test_all_forms_choose_the_same(name, batch, total, channels, count, kind, form):
    """Drawn tokens; and copies of a few directions, whose cosines are exactly 0 or 1, with weights that are equal."""
    if kind == "equal":
        tokens = torch.eye(channels)[torch.randint(min(channels, 7), (batch, total))]
        weight = torch.full((batch, total), 0.5)
        weight[:, total // 2] = 0.25
    else:
        tokens, weight = torch.randn(batch, total, channels, dtype=kind), torch.rand(batch, total) + 0.1
    found = CHOICES[name](tokens, weight, count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(greedy, "HOST", "none")
        patch.setattr(greedy, "WHOLE", 2**24)
        assert torch.equal(CHOICES[name](tokens, weight, count), found)
    assert all(len(set(row)) == count for row in found.tolist())


@pytest.mark.parametrize("name", CHOICES)
def test_equal_tokens_are_chosen_by_index(name, form):
    """Nothing tells the tokens apart. (A list loses its even entries first, so another order is right there.)"""
    chosen = CHOICES[name](torch.ones(2, 90, 4), torch.full((2, 90), 0.5), 30)
    if name == "duplicates":
        assert chosen.tolist() == [removed_by_the_book([[1.0] * 90] * 90, 30)] * 2
    elif name == "table":
        assert chosen.tolist() == [list(range(30)), list(range(0, 90, 3))]
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


def test_what_a_table_covers_equals_the_definition(form):
    """With tokens that come late: no more than the others, and more, so that late ones are chosen at the end."""
    tokens = torch.randn(2, 60, 5)
    tables, late = cover_of(tokens), late_of(tokens)
    for count in (12, 20, 21, 45):
        found = greedy.cover_most(tables, count, late)
        for table, own, row in zip(tables, late, found.tolist(), strict=True):
            table, chosen = table.double(), []
            best = torch.zeros(table.shape[1]).double()
            for _ in range(count):
                gains = (table - best).clamp(min=0).sum(1)
                gains[chosen] = -1
                if own is not None and len(chosen) < int((~own).sum()):
                    gains[own] = -1
                chosen.append(int(gains.argmax()))
                best = torch.maximum(best, table[chosen[-1]])
            assert row == chosen


@pytest.mark.parametrize(("batch", "total", "channels", "count"), SHAPES)
def test_farthest_from_a_first_token_equals_the_definition(batch, total, channels, count):
    unit = F.normalize(torch.randn(batch, total, channels), dim=-1)
    first = torch.randint(total, (batch,))
    chosen = greedy.farthest_from(unit, first, count)
    for image, row in enumerate(chosen.tolist()):
        own = unit[image].double() @ unit[image].double().T
        assert row == farthest_by_the_book(own, int(first[image]), count)


@pytest.mark.parametrize(
    ("name", "total"), [*((name, 50) for name in CHOICES), *((name, 11520) for name in CHOICES if name != "table")]
)
def test_the_loops_never_wait_for_the_device_nor_hold_a_table_of_many_tokens(name, total):
    """Tensors on the meta device hold no values, so whatever looks at one fails. At 11,520 tokens SCOPE and VisPruner
    held all cosines, 531 MB, off the CPU."""
    count = 20 if total == 50 or name != "duplicates" else total - 100
    tokens, weight = torch.empty(1, total, 64, device="meta"), torch.empty(1, total, device="meta")
    chosen = []
    most = metered_peak(lambda: chosen.append(CHOICES[name](tokens, weight, count)))
    assert chosen[0].shape == (1, count) and chosen[0].device.type == "meta"
    assert most < 5 * 4 * greedy.WHOLE < 11520 * 11520 * 4
