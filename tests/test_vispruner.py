"""VisPruner: the rounds against a version with plain loops, planted duplicates, odd counts, and recorded selections."""

import numpy as np
import pytest
import torch

from baselines.vispruner import VisPruner
from llava.errors import UserError
from llava.model.multimodal_encoder.clip_encoder import encode
from llava.reduction.ranking import distinct
from llava.reduction.reducer import EncoderState
from llava.reduction.scores import TowerScore
from llava.reduction.token_layout import ModelSpec, PatchGrid
from tests.parity import model as recipe
from tests.parity.harness import FOLDER, parity_model, recording

LLAVA = ModelSpec(576, 32, PatchGrid(24, 24), 24)
CLS = TowerScore("cls_attention")


def state(features: torch.Tensor, attention: torch.Tensor) -> EncoderState:
    images, tokens = attention.shape
    return EncoderState(
        ids=tuple(map(str, range(images))), features=features, scores={CLS: attention}, layout=PatchGrid(1, tokens)
    )


def drawn(seed: int, images: int, tokens: int, channels: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, tokens, channels, generator=generator), torch.rand(images, tokens, generator=generator)


def by_the_book(features: torch.Tensor, attention: torch.Tensor, budget: int, important: float) -> list[int]:
    """One image, plain loops."""
    scores = attention.tolist()
    unit = (features.double() / features.double().norm(dim=-1, keepdim=True)).tolist()
    cosine = lambda i, j: sum(a * b for a, b in zip(unit[i], unit[j], strict=True))  # noqa: E731
    line = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    first = int(budget * important)
    kept, line = line[:first], line[first:]
    if first == budget:
        return sorted(kept)
    while len(line) > budget - first:
        even, odd = line[::2], line[1::2]
        even.sort(key=lambda i: -max(cosine(i, j) for j in odd))
        del even[: min(8, len(line) - (budget - first))]
        line = even + odd
    return sorted(kept + line)


@pytest.mark.parametrize(
    ("tokens", "budget", "important"),
    [(60, 20, 0.5), (60, 21, 0.5), (60, 22, 0.5), (61, 20, 0.75), (47, 9, 0.0), (40, 12, 0.9), (40, 12, 1.0)],
)
def test_equals_its_definition(tokens, budget, important):
    features, attention = drawn(tokens + budget, 3, tokens)
    plan = VisPruner(budget=budget, important=important).encoder(state(features, attention))
    assert plan.kept.tolist() == [by_the_book(features[b], attention[b], budget, important) for b in range(3)]


@pytest.mark.parametrize("budget", [58, 30, 14])
def test_an_odd_number_of_important_tokens(budget):
    """The release ends in an IndexError when int(budget * ratio) is odd: even and odd places then differ in number."""
    assert int(budget * 0.5) % 2
    features, attention = drawn(budget, 2, 576)
    plan = VisPruner(budget=budget).encoder(state(features, attention))
    assert plan.kept.shape == (2, budget) and (plan.kept.diff() > 0).all()
    assert plan.kept[0].tolist() == by_the_book(features[0], attention[0], budget, 0.5)


@pytest.mark.parametrize("budget", range(1, 17))
def test_a_list_shorter_than_a_round(budget):
    """Below 16 entries fewer than eight stand at even places; the release asks for a list of negative length."""
    features, attention = drawn(budget, 2, 17)
    plan = VisPruner(budget=budget).encoder(state(features, attention))
    assert plan.kept.shape == (2, budget) and (plan.kept.diff() > 0).all()


def test_planted_duplicates_go_and_planted_singles_stay():
    """Tokens 0 and 1 have all the attention. Of the other 40, 36 are nearly one and 4 stand alone; 24 are left."""
    features = torch.zeros(1, 42, 6)
    features[0, :, 0], features[0, :, 1] = 1, torch.linspace(0, 1e-2, 42)
    alone = [7, 12, 25, 40]
    features[0, alone] = torch.eye(6)[2:]
    attention = torch.linspace(0.01, 0.005, 42)[None].clone()
    attention[0, :2] = 0.4
    kept = VisPruner(budget=26, important=2 / 26).encoder(state(features, attention)).kept[0].tolist()
    assert kept[:2] == [0, 1] and set(alone) <= set(kept)


def test_never_waits_for_the_device():
    """Tensors on the meta device hold no values, so whatever looks at one fails."""
    places = distinct(torch.empty(2, 100, 6, device="meta"), 30)
    assert places.shape == (2, 30) and places.device.type == "meta"


def test_the_order_of_the_list_decides_who_is_compared():
    """Entries at even places never meet each other: duplicates survive there, and one goes when it stands elsewhere."""
    a, b, c = torch.eye(3)
    apart = torch.stack([a, b, a, c])[None]  # both copies at even places
    together = torch.stack([a, a, b, c])[None]
    assert distinct(apart, 3).tolist() == [[2, 1, 3]]  # nobody has a match: the front goes
    assert distinct(together, 3).tolist() == [[2, 1, 3]]  # the copy at place 0 goes
    later = torch.stack([b, c, a, a])[None]
    assert distinct(later, 3).tolist() == [[0, 1, 3]]


@pytest.mark.parametrize("variant", ["64-drawn", "192-drawn"])
def test_selects_what_the_release_selects_of_drawn_numbers(variant):
    """The official loop itself on drawn features and attention; see the notes in the recording."""
    meta, arrays = recording(FOLDER / f"vispruner-{variant}.npz")
    cases = [int(case) for case in arrays["cases"]]
    features = torch.stack([recipe.draw(f"vispruner-features-{i}", (576, 64)) for i in cases])
    attention = torch.stack([recipe.draw(f"vispruner-attention-{i}", (4, 576)).abs().mean(0) for i in cases])
    plan = VisPruner(budget=meta["budget"]).encoder(state(features, attention))
    np.testing.assert_array_equal(plan.kept.numpy(), arrays["kept"])


def test_important_tokens_are_those_of_the_release():
    """In whole runs the last bits of the tower decide the diverse half; the important half must be the same."""
    _, arrays = recording(FOLDER / "vispruner-64.npz")
    model = parity_model()
    for row in range(5):
        with torch.inference_mode():
            encoded = encode(model.tower, recipe.case(int(arrays["cases"][row])).pixels[None], -2, [CLS])
        # A budget of only important tokens is the important half of twice the budget.
        kept = VisPruner(budget=32, important=1.0).encoder(state(encoded.features, encoded.scores[CLS]))
        assert kept.kept[0].tolist() == sorted(arrays["important"][row].tolist())
        assert set(arrays["important"][row]) <= set(arrays["kept"][row])


def test_budget_holds_in_every_layer():
    assert all(VisPruner(budget=budget).tokens_per_layer(LLAVA) == (budget,) * 32 for budget in (192, 128, 64, 58))


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_impossible_shares_are_refused(share):
    with pytest.raises(UserError, match="between 0 and 1"):
        VisPruner(budget=8, important=share)
