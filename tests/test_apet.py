"""ApET against the release's indices and features, a definition in loops, and planted answers."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from baselines.apet import ApET, central_distance, reconstruction_error, sample_basis, written_over
from llava.reduction import DecoderState, ModelSpec, PatchGrid
from tests.drawn_images import state_with
from tests.vectors import vectors

LLAVA = ModelSpec(576, 32, PatchGrid(24, 24), 24)
SMALL = ModelSpec(40, 32, PatchGrid(5, 8), 24)


def first_stage(features, budget, spec=SMALL, **options):
    return ApET(budget=budget, **options).encoder(state_with(features, spec=spec))


def second_stage(tokens, budget, spec=SMALL, **options):
    unread = dict.fromkeys(("sequence", "llm", "entered", "keys", "start"))
    ids = tuple(map(str, range(len(tokens))))
    return ApET(budget=budget, **options).decoder(DecoderState(ids=ids, tokens=tokens, layer=16, spec=spec, **unread))


def test_the_release_keeps_the_same_places_and_features():
    """Basis, order of errors, kept places and what stands there, from the start that the release drew."""
    about, arrays = vectors("apet")
    for case in about["cases"]:
        patches, out = (arrays[f"{case['case']}_{name}"][None] for name in ("patches", "out"))
        basis = sample_basis(patches, torch.tensor(case["basis"][:1]), 10)
        assert basis[0].tolist() == case["basis"]
        error = reconstruction_error(patches, basis)
        order = error.argsort(dim=1, descending=True, stable=True)[0, : case["tokens"]]
        assert order.tolist() == case["by_error_desc"]
        kept, matrix = written_over(patches, basis, error, case["tokens"], raster=True)
        assert kept[0].tolist() == case["kept"]
        torch.testing.assert_close(matrix.double() @ patches, out, atol=1e-5, rtol=0)


def basis_by_the_book(x, count):
    """One image in float64: sampled indices, and the error of each token by numpy's least squares (without ridge)."""
    chosen = [int(((x - x.mean(0)) ** 2).sum(1).argmax())]
    while len(chosen) < count:
        chosen.append(int(np.min([((x - x[i]) ** 2).sum(1) for i in chosen], axis=0).argmax()))
    weights = np.linalg.lstsq(x[chosen].T, x.T, rcond=None)[0]
    return chosen, np.linalg.norm(x - weights.T @ x[chosen], axis=1)


def by_the_book(x, keep, count, official, raster):
    """One image, plain loops: places, and the token at each."""
    total, (basis, error) = range(len(x)), basis_by_the_book(x, count)
    order = sorted(total, key=lambda i: -error[i])
    if official:
        top, places = order[: keep - count], order[keep - count : keep]
        rest, places = [i for i in total if i not in order[:keep]], sorted(places) if raster else places
    else:
        top, places = [i for i in order if i not in basis][: keep - count], basis
        rest = [i for i in total if i not in (*top, *basis)]
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    groups = {i: [i] for i in top}
    for i in rest:
        groups[max(top, key=lambda j: unit[i] @ unit[j])].append(i)
    out = {i: x[own].mean(0) for i, own in groups.items()} | {p: x[b] for p, b in zip(places, basis, strict=True)}
    return sorted(out), np.stack([out[i] for i in sorted(out)])


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize(
    ("stage", "budget", "keep"), [(first_stage, 12, 18), (first_stage, 4, 6), (second_stage, 24, 12)]
)
def test_equals_its_definition(stage, budget, keep, official):
    """Both stages, as described and as released; the release's second stage puts the basis at places by error."""
    tokens = torch.randn(3, 40, 30)
    plan = stage(tokens, budget, official=official)
    for kept, merged, x in zip(plan.kept, plan.apply(tokens), tokens, strict=True):
        places, expected = by_the_book(x.double().numpy(), keep, keep // 3, official, stage is first_stage)
        assert kept.tolist() == places
        np.testing.assert_allclose(merged.numpy(), expected, atol=1e-5)


def test_ridge_is_that_of_the_release():
    """The vectors do not depend on it: a token of squared length 1e-5 is reconstructed by half."""
    token = torch.tensor([[[1e-5**0.5, 0.0]]])
    torch.testing.assert_close(reconstruction_error(token, torch.tensor([[0]])), token[..., 0] / 2)


def test_planted_tokens_are_kept_and_planted_neighbours_merge():
    """All tokens are on one line, but for four planted ones; each other token leans to one of these."""
    tokens, planted = torch.zeros(1, 40, 8), [3, 11, 20, 38]
    tokens[0, :, 0] = torch.linspace(-2, 2, 40)
    tokens[0, 7, 0], tokens[0, 30, 0] = 10.0, -9.0  # the ends of the line are the basis
    group = [i % 4 for i in range(40)]
    for i in range(40):
        if i not in (7, 30):
            tokens[0, i, 1 + group[i]] = 0.2
    for number, place in enumerate(planted):
        tokens[0, place], group[place] = 0.0, number
        tokens[0, place, 1 + number] = 3.0
    plan = first_stage(tokens, 4)
    assert plan.kept[0].tolist() == sorted([7, 30, *planted])
    members = {place: [i for i in range(40) if i not in (7, 30) and group[i] == n] for n, place in enumerate(planted)}
    for place, row in zip(plan.kept[0].tolist(), plan.matrix(), strict=True):
        assert row.nonzero().flatten().tolist() == members.get(place, [place])


@pytest.mark.parametrize(
    ("budget", "counts"), [(192, (288, 96)), (128, (192, 64)), (64, (96, 32)), (1, (1, 1)), (500, (576, 424))]
)
def test_stages_keep_what_the_release_keeps(budget, counts):
    """Other budgets are met exactly, at the ends with other proportions."""
    reducer = ApET(budget=budget)
    assert reducer.counts(LLAVA) == counts and sum(reducer.tokens_per_layer(LLAVA)) == 32 * budget


def test_basis_grows_to_a_third_of_the_kept_tokens():
    """basis=1 is the token farthest from the mean alone; more than a third of the kept tokens is never sampled."""
    tokens = torch.randn(1, 40, 30)
    single = [row.nonzero().flatten().tolist() for row in first_stage(tokens, 12, basis=1).matrix()]
    start = central_distance(tokens).argmax(1)
    assert [int(start)] in single
    many, third = (first_stage(tokens, 12, basis=count) for count in (17, 6))
    assert torch.equal(many.kept, third.kept) and not torch.equal(many.kept, first_stage(tokens, 12, basis=5).kept)
    assert torch.equal(first_stage(tokens, 18).matrix(), first_stage(tokens, 18, basis=9).matrix())
    big = torch.randn(1, 576, 64)
    assert torch.equal(first_stage(big, 64, LLAVA).matrix(), first_stage(big, 64, LLAVA, basis=10).matrix())


@pytest.mark.parametrize("official", [False, True])
def test_one_token_and_equal_tokens(official):
    """With one token left there is nothing to merge into; equal tokens are sampled one after the other."""
    tokens = torch.randn(1, 40, 30)
    assert first_stage(tokens, 1, official=official).kept.shape == (1, 1)
    same = first_stage(torch.ones(2, 40, 30), 8, official=official)
    assert same.kept.shape == (2, 12) and F.mse_loss(same.apply(torch.ones(2, 40, 30)), torch.ones(2, 12, 30)) < 1e-10
    assert sample_basis(torch.ones(1, 5, 2), torch.tensor([3]), 3).tolist() == [[3, 0, 1]]
