"""PruneSID against the release's indices, a definition in loops, and planted answers."""

import math

import pytest
import torch
import torch.nn.functional as F

from baselines.prunesid import PruneSID, choose, components, largest, shares, unlike
from llava.reduction.scores import TowerScore
from tests.drawn_images import state_with
from tests.vectors import vectors


def kept_of(patches, attention, budget, cls=True, **options):
    """Indices for each image; with `cls`, 0 is CLS."""
    features = F.pad(patches, (0, 0, int(cls), 0))
    plan = PruneSID(budget=budget, **options).encoder(state_with(features, {TowerScore("cls_attention"): attention}))
    return plan.kept.tolist()


def test_the_release_keeps_the_same_tokens_in_the_same_order():
    """Three images, all components and constants of the release with an exact decomposition."""
    about, arrays = vectors("prunesid")
    for case in about["cases"]:
        hidden, attention = (arrays[f"{case['case']}_{name}"].float() for name in ("hidden", "cls_sum"))
        assert kept_of(hidden, attention, case["budget"]) == case["kept"]


def by_the_book(patches, attention, budget, count):
    """One image, plain loops over groups and tokens, in float64; the decomposition is that of the matrix itself."""
    total, groups = len(patches), max(1, budget // 4)
    matrix = patches.double().sigmoid().T
    matrix = matrix - matrix.mean(0)
    group = torch.linalg.svd(matrix, full_matrices=False).Vh[:groups].abs().argmax(0).tolist()
    unit = F.normalize(patches.double(), dim=1)
    cosine = unit @ unit.T
    limit = budget / 32 * cosine[tuple(torch.triu_indices(total, total, 1))].mean().item()
    ranked, distinct = [], []
    for number in range(groups):
        members = sorted((i for i in range(total) if group[i] == number), key=lambda i: (-attention[i].item(), i))
        chosen = []
        for i in members:
            if all(cosine[i, j] <= limit for j in chosen):
                chosen.append(i)
        ranked.append(chosen + [i for i in members if i not in chosen])
        distinct.append(len(chosen))
    take = shares_by_the_book([len(own) for own in ranked], distinct, budget, count)
    return [i for own, n in zip(ranked, take, strict=True) for i in own[:n]][:count]


def shares_by_the_book(size, distinct, budget, count):
    """The release's loops. `round` of Python rounds halves to even, too."""
    groups = range(len(size))
    least = [min(1, own) for own in size]
    most = [min(5 * math.ceil(budget / 64), size[g], distinct[g]) for g in groups]
    while sum(most) < budget:
        most = [min(most[g] + 1, size[g]) for g in groups]
    rest = max(count - sum(least), 0)
    ends = [0, *(round(sum(distinct[: g + 1]) / sum(distinct) * rest) for g in groups)]
    take = [min(ends[g + 1] - ends[g] + least[g], most[g]) for g in groups]
    for g in sorted(groups, key=lambda g: -distinct[g]):
        take[g] += min(most[g] - take[g], rest + sum(least) - sum(take))
    return take


@pytest.mark.parametrize(("budget", "cls"), [(1, True), (2, True), (3, False), (8, True), (9, False), (21, True)])
@pytest.mark.parametrize("spread", [0.3, 2.0])
def test_equals_its_definition(budget, cls, spread):
    """Vectors pin large budgets with CLS; small ones, towers without CLS and batches are compared with loops."""
    patches = torch.randn(3, 24, 40) * spread + torch.randn(3, 1, 40)
    attention = torch.rand(3, 24)
    for own, image, score in zip(kept_of(patches, attention, budget, cls), patches, attention, strict=True):
        found = by_the_book(image, score, budget, budget - cls)
        assert own == ([0, *(i + 1 for i in found)] if cls else found)


def test_shares_equal_their_definition():
    """Limits that grow, groups without members, and the order in which full groups pass tokens on."""
    draw = torch.Generator().manual_seed(0)
    for budget, groups in ((8, 2), (40, 10), (70, 17), (64, 6), (65, 6)):
        for _ in range(30):
            home = (torch.rand(90, generator=draw) ** 3 * groups).long()
            size = home.bincount(minlength=groups)
            distinct = (size * torch.rand(groups, generator=draw)).long().clamp(min=1).minimum(size)
            expected = shares_by_the_book(size.tolist(), distinct.tolist(), budget, budget - 1)
            found = shares(size[None], distinct[None], budget, budget - 1, 90)[0]
            assert found.tolist() == expected and sum(expected) == budget - 1


def test_a_chain_of_tokens_that_are_each_like_the_next_takes_all_rounds():
    """Each token is like the one before it alone, so every second one is kept; a fixed number of rounds fails here."""
    alike = torch.ones(1, 31, 31).triu(1).tril(1)
    assert unlike(alike)[0].tolist() == [i % 2 == 0 for i in range(31)]


@pytest.mark.parametrize("kind", ["noise", "clusters", "one large mean", "nothing"])
def test_what_a_gpu_computes_is_as_exact_as_a_decomposition(kind):
    """Up to its sign. A large mean takes digits from the other eigenvectors."""
    patches = torch.randn(2, 120, 200, dtype=torch.float64)
    if kind == "clusters":
        patches = 0.3 * patches + torch.randn(2, 5, 200, dtype=torch.float64)[:, torch.arange(120) % 5]
    elif kind == "one large mean":
        patches += 3 * torch.randn(2, 1, 200, dtype=torch.float64)
    elif kind == "nothing":
        patches[0] = 0
    product = patches @ patches.mT
    found, exact = largest(product, 12), torch.linalg.eigh(product).eigenvectors[..., -12:]
    assert found.isfinite().all()
    alike = (found * exact).sum(1).abs()[int(kind == "nothing") :]
    torch.testing.assert_close(alike, torch.ones_like(alike), atol=1e-4, rtol=0)


def test_planted_tokens_are_kept_group_by_group():
    """Two kinds of patches. CLS attention orders each, but a planted opposite comes second."""
    strong = torch.tensor([4.0] * 4 + [-4.0] * 4)
    weak = torch.tensor([2.0, -2.0] * 4)
    patches = torch.stack([strong] * 8 + [weak] * 8)[None]
    patches[0, 5] = -strong  # as large in the same component, and like no other
    attention = torch.full((1, 16), 0.01)
    attention[0, [2, 6, 0, 12, 9]] = torch.tensor([0.5, 0.4, 0.3, 0.2, 0.1])
    attention[0, 5] = 0.001
    group, _ = components(patches, 2)
    assert group.tolist() == [[0] * 8 + [1] * 8]
    assert kept_of(patches, attention, 8, cls=False) == [[2, 5, 6, 0, 1, 12, 9, 8]]


def test_rank_by_size_ignores_attention():
    """rank=size orders by the entry in the component, as in the paper; rank=attention by CLS attention."""
    patches, attention = torch.randn(1, 30, 20), torch.rand(1, 30)
    group, size = components(patches, 2)
    by_size = choose(patches, size, group, 2, 8, 7)
    assert kept_of(patches, attention, 8, rank="size") == kept_of(patches, 1 - attention, 8, rank="size")
    assert kept_of(patches, attention, 8, rank="size") == [[0, *(by_size[0] + 1).tolist()]]
    assert kept_of(patches, attention, 8) != kept_of(patches, 1 - attention, 8)
    best = [max((i for i in range(30) if group[0, i] == g), key=lambda i: size[0, i].item()) for g in (0, 1)]
    assert set(best) <= set(by_size[0].tolist())
