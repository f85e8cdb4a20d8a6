"""TRIM: ranking by CLIP similarity, the mean of the rest, and the release's one token more."""

import pytest
import torch

from baselines.trim import TRIM, keep_and_average, outliers
from llava.errors import UserError
from llava.pipeline.prefill import prefill
from llava.reduction.reducer import EncoderState
from llava.reduction.token_layout import ModelSpec, PatchGrid
from tests.conftest import samples

LLAVA_15 = ModelSpec(576, 32, PatchGrid(24, 24), 24, has_text_tower=True)


def state_of(tiny, batch: int = 2, tokens: int = 16, **changes) -> EncoderState:
    questions = ("is there a star ?", "what color is the cat ?", "where is it")[:batch]
    known = {
        "ids": tuple("abcdef"[:batch]),
        "features": torch.randn(batch, tokens, 32, generator=torch.Generator().manual_seed(tokens)),
        "scores": {},
        "layout": tiny.layout,
        "questions": questions,
        "messages": tuple(f"{question} answer with one word" for question in questions),
        "clip": tiny.clip,
    }
    return EncoderState(**{**known, **changes})


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
def test_the_method_equals_the_definition(tiny, budget, sign):
    state = state_of(tiny, 3)
    reduction = TRIM(budget=budget, relevance=sign).encoder(state)
    outputs = reduction.apply(state.features)
    for row, question in enumerate(state.questions):
        number = -1 if sign == "negated" else 1
        kept, expected = trim_by_the_book(tiny, state.features[row], question, budget - 1, number)
        assert reduction.kept[row, :-1].tolist() == kept
        torch.testing.assert_close(outputs[row], expected)


@torch.inference_mode()
def test_planted_patches_are_kept(tiny):
    """Planted: four patches point away from the question. The release negates on purpose (TRIM issue 3)."""
    text = tiny.clip.text(("is there a star ?",))[0][0, 0]
    toward = torch.linalg.pinv(tiny.clip.visual_projection.weight) @ text
    features = toward.expand(1, 16, -1) + 0.01 * torch.randn(1, 16, 32)
    features[0, [2, 7, 8, 13]] -= 2 * toward
    state = state_of(tiny, 1, features=features)
    assert TRIM(budget=5).encoder(state).kept[:, :4].tolist() == [[2, 7, 8, 13]]
    assert not {2, 7, 8, 13} & set(TRIM(budget=5, relevance="plain").encoder(state).kept[0, :4].tolist())


def test_the_mean_counts(tiny):
    """The release keeps T tokens and adds one: T + 1 where other methods have T."""
    assert TRIM(budget=64).tokens_per_layer(LLAVA_15) == (64,) * 32
    assert TRIM(budget=64, official=True).tokens_per_layer(LLAVA_15) == (65,) * 32
    for official in (False, True):
        reducer = TRIM(budget=8, official=official)
        state, record = prefill(tiny, samples(3), reducer)
        assert {a.tokens_per_layer for a in record.accounting(state)} == {reducer.tokens_per_layer(tiny.spec)}


@torch.inference_mode()
def test_the_release_reads_the_whole_message_up_to_clips_length(tiny):
    """It hands over the user message with its answer format, and CLIP's tokenizer cuts it off."""
    message = "is there a star ? " * 9
    state = state_of(tiny, 1, messages=(message,))
    kept, expected = trim_by_the_book(tiny, state.features[0], message, 8)
    reduction = TRIM(budget=8, official=True).encoder(state)
    assert reduction.kept[0, :-1].tolist() == kept
    torch.testing.assert_close(reduction.apply(state.features)[0], expected)
    assert TRIM(budget=9).encoder(state).kept[0, :-1].tolist() != kept, "the question alone says something else"


def test_the_mean_has_equal_shares_and_stands_last():
    kept = torch.tensor([[0, 4], [1, 2]])
    reduction = keep_and_average(kept, 5)
    assert reduction.kept.tolist() == [[0, 4, 3], [1, 2, 4]]
    assert reduction.assignment.tolist() == [[0, 2, 2, 2, 1], [2, 0, 1, 2, 2]]
    torch.testing.assert_close(reduction.merge_weight[0], torch.tensor([1, 1 / 3, 1 / 3, 1 / 3, 1]))


@torch.inference_mode()
def test_outliers_are_counted_by_the_interquartile_range(tiny):
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

    reducer, state = TRIM(budget=8, adaptive=True), state_of(tiny, 3)
    found = reducer.encoder(state)
    assert reducer.tokens_per_layer(LLAVA_15) is None and len(found) == 3
    texts = tiny.clip.text(state.questions)[0]  # [B, 1, P]
    similarity = (tiny.clip.image(state.features)[0] @ texts.transpose(1, 2)).squeeze(2)
    counts = outliers((-similarity).softmax(-1)).tolist()
    assert [reduction.kept.shape[1] for reduction in found] == [count + 1 for count in counts]


def test_what_is_missing():
    with pytest.raises(UserError, match=r"trim .* needs the CLIP text tower"):
        TRIM(budget=64).check(ModelSpec(576, 32, PatchGrid(24, 24), 24))
    with pytest.raises(UserError, match=r"trim.relevance must be one of tower, negated, plain"):
        TRIM(budget=64, relevance="up")
