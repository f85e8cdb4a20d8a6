"""CDPruner: greedy determinants against their definition, relevance to the question, and the release's recordings."""

import pytest
import torch
import torch.nn.functional as F

from baselines.cdpruner import CDPruner, unit_interval
from llava.errors import UserError
from llava.reduction.ranking import largest_determinant
from llava.reduction.reducer import PromptState
from llava.reduction.token_layout import ModelSpec, PatchGrid
from tests.parity.harness import FOLDER, recording
from tests.parity.model import draw

LLAVA_15 = ModelSpec(576, 32, PatchGrid(24, 24), 24, has_text_tower=True)


def greedy_by_the_book(kernel: torch.Tensor, budget: int) -> list[int]:
    """One image: add the token with the largest determinant of the chosen submatrix, in double precision."""
    chosen: list[int] = []
    for _ in range(budget):
        left = [i for i in range(len(kernel)) if i not in chosen]
        volume = {i: torch.linalg.det(kernel.double()[[*chosen, i]][:, [*chosen, i]]).item() for i in left}
        chosen.append(max(left, key=volume.get))
    return chosen


def state_of(tiny, batch: int = 2, seed: int = 0, **changes) -> PromptState:
    """Drawn features and tokens, real questions."""
    generator = torch.Generator().manual_seed(seed)
    known = {
        "ids": tuple("abcdef"[:batch]),
        "features": torch.randn(batch, 16, 32, generator=generator),
        "tokens": torch.randn(batch, 16, 64, generator=generator),
        "scores": {},
        "layout": tiny.layout,
        "questions": ("is there a star ?", "what color is the cat ?", "where is it")[:batch],
        "clip": tiny.clip,
    }
    return PromptState(**{**known, **changes})


def relevance_of(state: PromptState, row: int) -> torch.Tensor:
    """[N] cosine of every patch to the question of its image."""
    image = state.clip.image(state.features[row])[0]
    text = state.clip.text((state.questions[row],))[0][0, 0]
    return F.cosine_similarity(image, text[None], dim=-1)


@pytest.mark.parametrize(("tokens", "width", "budget"), [(12, 16, 7), (20, 24, 20), (9, 30, 1)])
def test_the_choice_equals_the_definition(tokens, width, budget):
    unit = F.normalize(torch.randn(3, tokens, width), dim=-1)
    worth = torch.rand(3, tokens) + 0.1
    kernel = worth[:, :, None] * (unit @ unit.transpose(1, 2)) * worth[:, None]
    chosen = largest_determinant(unit, worth, budget)
    expected = [greedy_by_the_book(image, budget) for image in kernel]
    if width < tokens:  # behind the rank only the set is defined
        expected = [sorted(chosen) for chosen in expected]
        assert chosen.sort(1).values.tolist() == expected
    else:
        assert chosen.tolist() == expected


@torch.inference_mode()
@pytest.mark.parametrize("sign", ["negated", "plain"])
def test_the_method_equals_the_definition(tiny, sign):
    state = state_of(tiny)
    kept = CDPruner(budget=6, relevance=sign).prompt(state).kept
    for row in range(2):
        worth = relevance_of(state, row) * (-1 if sign == "negated" else 1)
        worth = (worth - worth.min() + 1e-6) / (worth.max() - worth.min())
        tokens = F.normalize(state.tokens[row], dim=-1)
        kernel = worth[:, None] * (tokens @ tokens.T) * worth
        assert kept[row].tolist() == sorted(greedy_by_the_book(kernel, 6))


@torch.inference_mode()
def test_planted_relevant_tokens_are_kept(tiny):
    """Planted: all tokens differ from one another, four patches look unlike the question, which is what is sought.

    The sign is the release's: in CLIP's space patches of what is asked about are far from the text
    (CDPruner issue 14, TRIM issue 3).
    """
    text = tiny.clip.text(("is there a star ?",))[0][0, 0]
    toward = torch.linalg.pinv(tiny.clip.visual_projection.weight) @ text  # a feature whose projection is the text
    features = toward.expand(1, 16, -1) + 0.01 * torch.randn(1, 16, 32)
    features[0, [2, 7, 8, 13]] -= 2 * toward
    state = state_of(tiny, 1, features=features, tokens=torch.eye(16, 64)[None])
    assert CDPruner(budget=4).prompt(state).kept.tolist() == [[2, 7, 8, 13]]
    assert not {2, 7, 8, 13} & set(CDPruner(budget=4, relevance="plain").prompt(state).kept[0].tolist())


def test_planted_duplicates_are_not_kept():
    """Planted: five directions, each in several copies; the most relevant copy of each must be kept."""
    tokens = torch.eye(5, 8)[[0, 0, 0, 1, 1, 2, 3, 3, 4, 4]]
    worth = torch.tensor([0.5, 0.9, 0.7, 0.2, 0.3, 0.1, 0.8, 0.6, 0.4, 0.35])
    assert largest_determinant(tokens[None], worth[None], 5).tolist() == [[1, 6, 8, 4, 5]]


@pytest.mark.parametrize("budget", [20, 40, 64])
def test_budgets_beyond_the_rank(budget):
    """The release divides by zero when the chosen tokens span all others: NaN, and the same token again and again.

    With 64 channels it kept 72 to 77 different tokens at a budget of 192.
    """
    unit = F.normalize(torch.randn(2, 64, 12), dim=-1)
    worth = torch.rand(2, 64) + 0.1
    chosen = largest_determinant(unit, worth, budget)
    assert all(len(set(row)) == budget for row in chosen.tolist())
    for row, order in zip(worth, chosen[:, 12:], strict=True):
        assert (row[order].diff() <= 0).all(), "spanned tokens follow by relevance"
        assert set(order.tolist()) == set(order[row[order].argsort(descending=True)].tolist())


def test_tokens_worth_the_same_are_kept_by_diversity_alone():
    """No spread of relevance: the release divides zero by zero."""
    assert torch.equal(unit_interval(torch.full((2, 5), 0.3)), torch.ones(2, 5))
    chosen = largest_determinant(torch.ones(1, 6, 4), torch.ones(1, 6), 4)
    assert chosen.tolist() == [[0, 1, 2, 3]]


@torch.inference_mode()
def test_relevance_is_scaled_over_one_image(tiny):
    """The release takes minimum and maximum over its whole batch of crops, which couples them."""
    alone, batch = state_of(tiny), state_of(tiny)
    batch.features = torch.cat([batch.features[:1], 100 * batch.features[1:]])
    first, second = (CDPruner(budget=5).prompt(state).kept[0] for state in (alone, batch))
    assert torch.equal(first, second)
    values = torch.tensor([[0.0, 1.0, 2.0], [10.0, 30.0, 20.0]])
    expected = torch.tensor([[0.0, 0.5, 1.0], [0.0, 1.0, 0.5]])
    torch.testing.assert_close(unit_interval(values), expected, atol=2e-6, rtol=0)


@torch.inference_mode()
def test_the_question_decides(tiny):
    kept = [
        CDPruner(budget=5).prompt(state_of(tiny, 1, questions=(question,))).kept.tolist()
        for question in ("is there a star ?", "what color is the small cat on the left of the tree ?")
    ]
    assert kept[0] != kept[1]


@torch.inference_mode()
def test_only_texts_too_long_for_clip_differ_in_the_release(tiny):
    """Inside its chunks without an end token, the release reads off the begin token or any word."""
    short, long = ("is there a star ?",), ("is there a star near the red cat ? " * 6,)
    both = [
        [CDPruner(budget=5, official=flag).prompt(state_of(tiny, 1, questions=text)).kept for flag in (False, True)]
        for text in (short, long)
    ]
    assert torch.equal(*both[0]) and not torch.equal(*both[1])


def test_recorded_choices_of_the_release():
    """Selection alone at 192 of 576, in the order of choice."""
    _, arrays = recording(FOLDER / "cdpruner-192-drawn.npz")
    for row, case in enumerate(arrays["cases"][:5]):
        tokens = F.normalize(draw(f"cdpruner-features-{case}", (576, 256)), dim=-1)
        image = F.normalize(draw(f"cdpruner-image-{case}", (576, 64)), dim=-1)
        text = F.normalize(draw(f"cdpruner-text-{case}", (64,)), dim=-1)
        worth = unit_interval(-(image @ text)[None])
        assert largest_determinant(tokens[None], worth, 192)[0].tolist() == arrays["order"][row].tolist()


def test_budgets_and_what_is_missing(tiny):
    assert CDPruner(budget=64).tokens_per_layer(LLAVA_15) == (64,) * 32
    with pytest.raises(UserError, match=r"cdpruner .* needs the CLIP text tower"):
        CDPruner(budget=64).check(ModelSpec(576, 32, PatchGrid(24, 24), 24))
    with pytest.raises(UserError, match=r"cdpruner.relevance must be one of tower, negated, plain, got 'positive'"):
        CDPruner(budget=64, relevance="positive")
