"""Selection in one step by CLS attention, diversity or the question: definitions, planted answers, releases."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from baselines import cdpruner
from baselines.cdpruner import CDPruner
from baselines.divprune import DivPrune
from baselines.fastervlm import FasterVLM
from baselines.scope import Scope
from baselines.trim import TRIM, keep_and_average, outliers
from baselines.vispruner import VisPruner
from llava.pipeline.generate import prefill
from llava.reduction.ranking import farthest_apart, largest_determinant
from llava.reduction.reducer import PromptState
from llava.reduction.scores import TowerScore
from tests.conftest import samples
from tests.drawn_images import state_with
from tests.parity import model as recipe
from tests.parity.harness import FOLDER, parity_model, recording
from tests.test_greedy import removed_by_the_book, volume_by_the_book

CLS = TowerScore("cls_attention")
QUESTIONS = ("is there a star ?", "what color is the cat ?", "where is it")


# CLS attention and diversity


def test_fastervlm_keeps_the_planted_patches_that_cls_looks_at():
    attention = torch.full((2, 36), 0.001)
    attention[0, [4, 20, 33]] = attention[1, [0, 1, 35]] = 0.3
    kept = FasterVLM(budget=3).encoder(state_with(attention[..., None], {CLS: attention})).kept
    assert kept.tolist() == [[4, 20, 33], [0, 1, 35]]


def test_fastervlm_attention_is_not_rounded_to_half_precision():
    """The release ranks in float16, where these two tie and the lower index would win."""
    attention = torch.full((1, 8), 1e-4)
    attention[0, 2], attention[0, 5] = 0.5, 0.5 + 1e-5
    assert attention.half()[0, 2] == attention.half()[0, 5]
    assert FasterVLM(budget=1).encoder(state_with(attention[..., None], {CLS: attention})).kept.tolist() == [[5]]


def test_divprune_finds_the_planted_loners():
    """Plant the answer: 20 tokens around one direction, and 3 that point elsewhere, however long they are."""
    tokens = torch.tensor([1.0, 0, 0, 0]) + 0.01 * torch.randn(2, 20, 4)
    tokens[0, 3], tokens[0, 11], tokens[0, 17] = torch.eye(4)[1], 100 * torch.eye(4)[2], 0.01 * torch.eye(4)[3]
    tokens[1, 0], tokens[1, 1], tokens[1, 19] = torch.eye(4)[1], -torch.eye(4)[0], torch.eye(4)[3]
    kept = DivPrune(budget=4).prompt(state_with(tokens, tokens=tokens)).kept.tolist()
    assert {3, 11, 17} < set(kept[0]) and {0, 1, 19} < set(kept[1])


def test_divprune_distances_are_not_rounded_to_half_precision():
    """In float16, as in the release, the two candidates tie."""
    angle = torch.tensor([0.0, 0.02, 0.0201])
    tokens = torch.stack([angle.cos(), angle.sin()], 1)
    half = 1 - (tokens.half() @ tokens.half().T)
    assert half[0, 1] == half[0, 2]
    far = torch.cat([tokens, torch.tensor([[0.0, -1.0]])])[None]
    order = farthest_apart(far, 3)[0].tolist()
    assert order[0] == 3 and order[1] == 2  # the farthest from the loner, by a hundred-thousandth


def test_divprune_order_of_choice_is_that_of_the_release():
    _, arrays = recording(FOLDER / "divprune-64.npz")
    model = parity_model()
    for row in range(3):
        pixels = recipe.case(int(arrays["cases"][row])).pixels[None]
        with torch.inference_mode():
            features = model.tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
            order = farthest_apart(model.projector(features), 64)
        assert order[0].tolist() == arrays["order"][row].tolist()


def test_scope_planted_groups_give_one_token_each_the_one_that_cls_looks_at():
    """Three groups of equal tokens: a second token of a group adds no coverage, however much attention it has."""
    features = torch.eye(3).repeat_interleave(4, dim=0)[None]
    attention = torch.full((1, 12), 0.01)
    attention[0, [1, 2, 7, 8]] = torch.tensor([0.3, 0.2, 0.02, 0.05])
    assert Scope(budget=3).encoder(state_with(features, {CLS: attention})).kept.tolist() == [[1, 7, 8]]


def test_scope_without_attention_coverage_decides():
    """alpha 0: the largest group first, whatever CLS looks at."""
    features = torch.eye(3)[torch.tensor([0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 0])][None]
    attention = torch.zeros(1, 12)
    attention[0, 0] = 1.0
    assert Scope(budget=2, alpha=0.0).encoder(state_with(features, {CLS: attention})).kept.tolist() == [[2, 7]]
    assert Scope(budget=1).encoder(state_with(features, {CLS: attention})).kept.tolist() == [[0]]


def drawn(seed: int, images: int, tokens: int, channels: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, tokens, channels, generator=generator), torch.rand(images, tokens, generator=generator)


def pruned_by_the_book(features: torch.Tensor, attention: torch.Tensor, budget: int, important: float) -> list[int]:
    """One image, plain loops."""
    line = sorted(range(len(attention)), key=lambda i: (-attention[i].item(), i))
    first = int(budget * important)
    unit = F.normalize(features[line[first:]].double(), dim=-1)
    left = removed_by_the_book((unit @ unit.T).tolist(), budget - first) if budget > first else []
    return sorted(line[:first] + [line[first + place] for place in left])


@pytest.mark.parametrize(
    ("tokens", "budget", "important"),
    [(60, 20, 0.5), (60, 21, 0.5), (60, 22, 0.5), (61, 20, 0.75), (47, 9, 0.0), (40, 12, 0.9), (40, 12, 1.0)],
)
def test_vispruner_equals_its_definition(tokens, budget, important):
    features, attention = drawn(tokens + budget, 3, tokens)
    plan = VisPruner(budget=budget, important=important).encoder(state_with(features, {CLS: attention}))
    assert plan.kept.tolist() == [pruned_by_the_book(features[b], attention[b], budget, important) for b in range(3)]


@pytest.mark.parametrize("budget", range(1, 17))
def test_vispruner_a_list_shorter_than_a_round(budget):
    """Below 16 entries fewer than eight stand at even places; the release asks for a list of negative length."""
    features, attention = drawn(budget, 2, 17)
    plan = VisPruner(budget=budget).encoder(state_with(features, {CLS: attention}))
    assert plan.kept.shape == (2, budget) and (plan.kept.diff() > 0).all()


def test_vispruner_planted_duplicates_go_and_planted_singles_stay():
    """Tokens 0 and 1 have all the attention. Of the other 40, 36 are nearly one and 4 stand alone; 24 are left."""
    features = torch.zeros(1, 42, 6)
    features[0, :, 0], features[0, :, 1] = 1, torch.linspace(0, 1e-2, 42)
    alone = [7, 12, 25, 40]
    features[0, alone] = torch.eye(6)[2:]
    attention = torch.linspace(0.01, 0.005, 42)[None].clone()
    attention[0, :2] = 0.4
    kept = VisPruner(budget=26, important=2 / 26).encoder(state_with(features, {CLS: attention})).kept[0].tolist()
    assert kept[:2] == [0, 1] and set(alone) <= set(kept)


@pytest.mark.parametrize("variant", ["64-drawn", "192-drawn"])
def test_vispruner_selects_what_the_release_selects_of_drawn_numbers(variant):
    """The official loop itself on drawn features and attention; see the notes in the recording."""
    meta, arrays = recording(FOLDER / f"vispruner-{variant}.npz")
    cases = [int(case) for case in arrays["cases"]]
    features = torch.stack([recipe.draw(f"vispruner-features-{i}", (576, 64)) for i in cases])
    attention = torch.stack([recipe.draw(f"vispruner-attention-{i}", (4, 576)).abs().mean(0) for i in cases])
    plan = VisPruner(budget=meta["budget"]).encoder(state_with(features, {CLS: attention}))
    np.testing.assert_array_equal(plan.kept.numpy(), arrays["kept"])


# Similarity to the question


def asking(tiny, batch: int = 2, **changes) -> PromptState:
    """Drawn features and tokens, real questions."""
    generator = torch.Generator().manual_seed(0)
    known = {
        "features": torch.randn(batch, 16, 32, generator=generator),
        "tokens": torch.randn(batch, 16, 64, generator=generator),
        "questions": QUESTIONS[:batch],
        "messages": tuple(f"{question} answer with one word" for question in QUESTIONS[:batch]),
    }
    return state_with(**{**known, **changes}, clip=tiny.clip)


def relevance_of(state: PromptState, row: int) -> torch.Tensor:
    """[N] cosine of every patch to the question of its image."""
    image = state.clip.image(state.features[row])[0]
    text = state.clip.text((state.questions[row],))[0][0, 0]
    return F.cosine_similarity(image, text[None], dim=-1)


@torch.inference_mode()
@pytest.mark.parametrize("sign", ["negated", "plain"])
def test_cdpruner_the_method_equals_the_definition(tiny, sign):
    state = asking(tiny)
    kept = CDPruner(budget=6, relevance=sign).prompt(state).kept
    for row in range(2):
        worth = relevance_of(state, row) * (-1 if sign == "negated" else 1)
        worth = (worth - worth.min() + 1e-6) / (worth.max() - worth.min())
        tokens = F.normalize(state.tokens[row], dim=-1)
        assert kept[row].tolist() == sorted(volume_by_the_book(tokens @ tokens.T, worth, 6))


@torch.inference_mode()
@pytest.mark.parametrize("method", [CDPruner, TRIM])
def test_cdpruner_and_trim_keep_planted_relevant_tokens(method, tiny):
    """Planted: all tokens differ from one another, four patches look unlike the question, which is what is sought.

    The sign is the releases': in CLIP's space patches of what is asked about are far from the text
    (CDPruner issue 14, TRIM issue 3).
    """
    text = tiny.clip.text(("is there a star ?",))[0][0, 0]
    toward = torch.linalg.pinv(tiny.clip.visual_projection.weight) @ text  # a feature whose projection is the text
    features = toward.expand(1, 16, -1) + 0.01 * torch.randn(1, 16, 32)
    features[0, [2, 7, 8, 13]] -= 2 * toward
    state = asking(tiny, 1, features=features, tokens=torch.eye(16, 64)[None])
    stage, mean = ("prompt", 0) if method is CDPruner else ("encoder", 1)  # TRIM's last token is the mean of the rest
    kept, plain = (
        getattr(method(budget=4 + mean, relevance=sign), stage)(state).kept[0, :4].tolist()
        for sign in ("negated", "plain")
    )
    assert kept == [2, 7, 8, 13] and not set(kept) & set(plain)


@pytest.mark.parametrize("budget", [20, 40, 64])
def test_cdpruner_budgets_beyond_the_rank(budget):
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


def test_cdpruner_tokens_worth_the_same_are_kept_by_diversity_alone():
    """No spread of relevance: the release divides zero by zero."""
    tokens = torch.randn(2, 9, 4)
    state = state_with(tokens, tokens=tokens)
    state.relevance = lambda *_, **__: torch.full((2, 9), 0.3)
    alone = largest_determinant(tokens, torch.ones(2, 9), 4)
    assert torch.equal(CDPruner(budget=4).prompt(state).kept, alone.sort(1).values)
    chosen = largest_determinant(torch.ones(1, 6, 4), torch.ones(1, 6), 4)
    assert chosen.tolist() == [[0, 1, 2, 3]]


@torch.inference_mode()
def test_cdpruner_only_texts_too_long_for_clip_differ_in_the_release(tiny):
    """Inside its chunks without an end token, the release reads off the begin token or any word."""
    short, long = ("is there a star ?",), ("is there a star near the red cat ? " * 6,)
    both = [
        [CDPruner(budget=5, official=flag).prompt(asking(tiny, 1, questions=text)).kept for flag in (False, True)]
        for text in (short, long)
    ]
    assert torch.equal(*both[0]) and not torch.equal(*both[1])


def test_cdpruner_recorded_choices_of_the_release(monkeypatch):
    """Selection alone at 192 of 576, in the order of choice."""
    chosen = []
    choose = lambda *given: chosen.append(largest_determinant(*given)) or chosen[-1]  # noqa: E731
    monkeypatch.setattr(cdpruner, "largest_determinant", choose)
    _, arrays = recording(FOLDER / "cdpruner-192-drawn.npz")
    for row, case in enumerate(arrays["cases"][:5]):
        tokens = F.normalize(recipe.draw(f"cdpruner-features-{case}", (576, 256)), dim=-1)
        image = F.normalize(recipe.draw(f"cdpruner-image-{case}", (576, 64)), dim=-1)
        text = F.normalize(recipe.draw(f"cdpruner-text-{case}", (64,)), dim=-1)
        state = state_with(tokens[None], tokens=tokens[None])
        state.relevance = lambda *_, worth=-(image @ text)[None], **__: worth
        CDPruner(budget=192).prompt(state)
        assert chosen[row][0].tolist() == arrays["order"][row].tolist()


def trim_by_the_book(tiny, features, text, kept: int, sign: int = -1) -> tuple[list[int], torch.Tensor]:
    """One image, plain loops: positions kept, and all output tokens."""
    projected, words = tiny.clip.image(features)[0], tiny.clip.text((text,), "truncate")[0][0, 0]
    score = [sign * sum(a * b for a, b in zip(patch, words.tolist(), strict=True)) for patch in projected.tolist()]
    best = sorted(sorted(range(len(score)), key=lambda i: -score[i])[:kept])
    rest = [features[i] for i in range(len(score)) if i not in best]
    return best, torch.stack([*(features[i] for i in best), sum(rest) / len(rest)])


@torch.inference_mode()
@pytest.mark.parametrize("budget", [1, 2, 9, 15])
@pytest.mark.parametrize("sign", ["negated", "plain"])
def test_trim_the_method_equals_the_definition(tiny, budget, sign):
    state = asking(tiny, 3)
    reduction = TRIM(budget=budget, relevance=sign).encoder(state)
    outputs = reduction.apply(state.features)
    for row, question in enumerate(state.questions):
        number = -1 if sign == "negated" else 1
        kept, expected = trim_by_the_book(tiny, state.features[row], question, budget - 1, number)
        assert reduction.kept[row, :-1].tolist() == kept
        torch.testing.assert_close(outputs[row], expected)


def test_trim_the_mean_counts(tiny):
    """The release keeps T tokens and adds one: T + 1 where other methods have T."""
    state, record = prefill(tiny, samples(3), TRIM(budget=8, official=True))
    assert {account.tokens_per_layer for account in record.accounting(state)} == {(9,) * 4}


@torch.inference_mode()
def test_trim_the_release_reads_the_whole_message_up_to_clips_length(tiny):
    """It hands over the user message with its answer format, and CLIP's tokenizer cuts it off."""
    message = "is there a star ? " * 9
    state = asking(tiny, 1, messages=(message,))
    kept, expected = trim_by_the_book(tiny, state.features[0], message, 8)
    reduction = TRIM(budget=8, official=True).encoder(state)
    assert reduction.kept[0, :-1].tolist() == kept
    torch.testing.assert_close(reduction.apply(state.features)[0], expected)
    assert TRIM(budget=9).encoder(state).kept[0, :-1].tolist() != kept, "the question alone says something else"


def test_trim_the_mean_has_equal_shares_and_stands_last():
    kept = torch.tensor([[0, 4], [1, 2]])
    reduction = keep_and_average(kept, 5)
    assert reduction.kept.tolist() == [[0, 4, 3], [1, 2, 4]]
    assert reduction.assignment.tolist() == [[0, 2, 2, 2, 1], [2, 0, 1, 2, 2]]
    torch.testing.assert_close(reduction.merge_weight[0], torch.tensor([1, 1 / 3, 1 / 3, 1 / 3, 1]))


def test_trim_the_mean_of_one_token_stands_where_that_token_stood():
    """The first token alone is left over: its place is 0."""
    found = keep_and_average(torch.tensor([[1, 2, 3], [0, 1, 2]]), 4)
    assert found.kept.tolist() == [[1, 2, 3, 0], [0, 1, 2, 3]]


@torch.inference_mode()
def test_trim_outliers_are_counted_by_the_interquartile_range(tiny):
    """The paper's own choice of how many tokens to keep; one reduction per image."""
    score = torch.rand(3, 40)
    score[0, :3], score[1, 5] = 9.0, 4.0
    expected = []
    for row in score.tolist():
        ordered = sorted(row)
        quartiles = []
        for share in (0.25, 0.75):
            place = share * (len(row) - 1)
            low = int(place)
            quartiles.append(ordered[low] + (place - low) * (ordered[low + 1] - ordered[low]))
        bound = quartiles[1] + 1.5 * (quartiles[1] - quartiles[0])
        expected.append(sum(value > bound for value in row))
    assert outliers(score).tolist() == expected == [3, 1, 0]

    reducer, state = TRIM(budget=8, adaptive=True), asking(tiny, 3)
    found = reducer.encoder(state)
    assert reducer.tokens_per_layer(tiny.spec) is None and len(found) == 3
    texts = tiny.clip.text(state.questions)[0]  # [B, 1, P]
    similarity = (tiny.clip.image(state.features)[0] @ texts.transpose(1, 2)).squeeze(2)
    counts = outliers((-similarity).softmax(-1)).tolist()
    assert [reduction.kept.shape[1] for reduction in found] == [count + 1 for count in counts]
