"""AttnMix: the mixture and the release against plain loops, planted answers, and a test per fault of the release.

That batches of any prompts are as good as single ones, B6, is asked of every method by tests/test_every_method.py.
"""

import dataclasses
import math

import pytest
import torch

from attnmix import method
from attnmix.method import (
    AttnMix,
    adaptive_count,
    best_split,
    forced_count,
    mix,
    ordered,
    released_count,
    released_tokens,
    text_scores,
)
from llava.errors import UserError
from llava.pipeline.positions import Piece
from llava.pipeline.sequence import assemble
from llava.reduction import registry
from llava.reduction.reducer import PromptState
from llava.reduction.scores import TowerScore
from llava.reduction.token_layout import ModelSpec, PatchGrid
from tests.parity.harness import FOLDER, parity_model, recording, run_case

LLAVA = ModelSpec(576, 32, PatchGrid(24, 24), 24)
CLS = TowerScore("cls_attention")


def row(values: list[float]) -> torch.Tensor:
    return torch.tensor([values])


def scores(seed: int, images: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A peaked and a flatter score."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda power: torch.rand(images, tokens, generator=generator).pow(power)  # noqa: E731
    return draw(6), draw(2)


def best(values: list[float]) -> list[int]:
    """All positions, best first, ties to the lower one."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


def split_by_the_book(first: list[float], second: list[float], total: int) -> int:
    """The number for `first` with the largest geometric mean of both masses, the smallest such number."""
    mean = [math.sqrt(sum(first[:k]) * sum(second[: total - k])) for k in range(total + 1)]
    return mean.index(max(mean))


def default_by_the_book(text: list[float], saliency: list[float], budget: int, floor: float = 0.25) -> list[int]:
    forced = int(budget * floor)
    rest = budget - 2 * forced
    a, c = (sorted(values, reverse=True)[forced:] for values in (text, saliency))
    chosen = best(text)[: forced + split_by_the_book(a, c, rest)]
    for token in best(saliency):
        if len(chosen) < budget and token not in chosen:
            chosen.append(token)
    return sorted(chosen)


# -- the scores by text -----------------------------------------------------------------------------------------------


def test_text_scores_equal_their_definition():
    text, visual = torch.randn(2, 4, 6), torch.randn(2, 9, 6)
    exists = torch.tensor([[True] * 4, [True, True, False, False]])
    actual = text_scores(text, exists, visual, temperature=0.1)
    for b in range(2):
        expected = [0.0] * 9
        for t in range(4):
            if not exists[b, t]:
                continue
            cosine = [float(torch.nn.functional.cosine_similarity(text[b, t], visual[b, i], dim=0)) for i in range(9)]
            weight = [math.exp(value / 0.1) for value in cosine]
            expected = [max(old, new / sum(weight)) for old, new in zip(expected, weight, strict=True)]
        torch.testing.assert_close(actual[b], torch.tensor(expected), atol=1e-5, rtol=1e-4)


# -- the split --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "count", "product"),
    [
        ([0.4, 0.3, 0.2, 0.1], [0.25] * 4, 2, 0.35),
        ([0.9, 0.05, 0.03, 0.02], [0.25] * 4, 1, 0.675),
        ([0.30, 0.20, 0.15, 0.10, 0.08, 0.07], [0.50, 0.10, 0.10, 0.08, 0.07, 0.06], 3, 0.455),
    ],
)
def test_worked_splits(first, second, count, product):
    assert best_split(row(first), row(second)).tolist() == [count]
    assert math.isclose(sum(first[:count]) * sum(second[: len(first) - count]), product)


@pytest.mark.parametrize("total", [1, 2, 7, 30])
def test_split_equals_its_definition(total):
    first, second = (ordered(score)[0] for score in scores(total, 20, total))
    expected = [
        split_by_the_book(a, c, total) for a, c in zip(first.double().tolist(), second.double().tolist(), strict=True)
    ]
    assert best_split(first, second).tolist() == expected


def test_ties_of_the_split_go_to_fewer_text_tokens():
    """Two flat rankings and an odd number to hand out: 1 + 2 and 2 + 1 are equally good."""
    assert best_split(torch.full((1, 3), 0.5), torch.full((1, 3), 0.5)).tolist() == [1]
    assert best_split(torch.zeros(1, 3), torch.ones(1, 3)).tolist() == [0]


def test_scale_of_a_ranking_makes_no_difference():
    """CLS attention sums to less than 1 and is used as it is."""
    first, second = (ordered(score)[0] for score in scores(3, 10, 20))
    assert best_split(first, second).tolist() == best_split(first, second / 1024).tolist()


def test_each_ranking_gets_a_quarter_to_three_quarters():
    """A peaked ranking needs few tokens to keep its mass, so the flat one gets many."""
    flat, peaked = torch.full((1, 40), 0.01), torch.tensor([0.5] * 10 + [0.4] + [1e-9] * 29)[None]
    assert adaptive_count(flat, peaked, 40, 0.25).tolist() == [29]  # one adaptive token for the peak
    assert adaptive_count(peaked, flat, 40, 0.25).tolist() == [11]
    for seed in range(5):
        count = adaptive_count(*(ordered(score)[0] for score in scores(seed, 10, 40)), 40, 0.25)
        assert (count >= 10).all() and (count <= 30).all()


def test_a_share_that_is_a_whole_number_is_not_rounded_down():
    assert forced_count(100, 0.29) == 29 and forced_count(29, 0.25) == 7


# -- the default ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "budget"), [(16, 8), (16, 7), (16, 1), (50, 29), (576, 144), (576, 58), (576, 29)])
def test_default_equals_its_definition(tokens, budget):
    text, saliency = scores(budget, 4, tokens)
    count = adaptive_count(ordered(text)[0], ordered(saliency)[0], budget, 0.25)
    kept = mix(text, saliency, count, budget)
    for b in range(4):
        expected = default_by_the_book(text[b].double().tolist(), saliency[b].double().tolist(), budget)
        assert kept[b].tolist() == expected


def test_equal_scores_go_to_the_lower_index():
    flat = torch.ones(1, 12)
    assert mix(flat, flat, torch.tensor([2]), 5).tolist() == [[0, 1, 2, 3, 4]]


def words(*places: int) -> torch.Tensor:
    return torch.eye(8)[list(places)]


def state(visual, saliency, crops=1, before=(4,), question=(0,), behind=(2, 3)) -> PromptState:
    """One prompt per image: words in front of it, the question, words behind; a word is a unit vector of 8."""
    count, first = len(visual), len(before) + 1
    span = (first, first + len(question))
    sequence = assemble(
        [
            [
                Piece(words(*before), len(before)),
                Piece(tokens, len(tokens), image=True),
                Piece(words(*question, *behind), len(question) + len(behind)),
            ]
            for tokens in visual
        ],
        [span] * count,
        [(first, span[1] + 1)] * count,
    )
    return PromptState(
        ids=tuple(f"s{i}" for i in range(count)),
        features=visual,
        scores={CLS: saliency},
        layout=PatchGrid(4, visual.shape[1] // 4 // crops, crops=crops),
        tokens=visual,
        sequence=sequence,
    )


def planted() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens 3 and 9 resemble the question, 6 the instruction, 5 a word in front of the image; CLS looks at 0, 12."""
    visual = 0.01 * torch.randn(1, 16, 8) + torch.eye(8)[7]
    for token, word, strength in ((3, 0, 2.0), (9, 0, 2.0), (6, 2, 9.0), (5, 4, 9.0)):
        visual[0, token] += strength * torch.eye(8)[word]
    saliency = torch.full((1, 16), 0.01)
    saliency[0, [0, 12]] = 0.3
    return visual, saliency


def test_keeps_planted_tokens_of_both_kinds():
    """Text behind the image counts as far as the option says, text in front of it never."""
    visual, saliency = planted()
    kept = lambda **options: AttnMix(budget=4, **options).prompt(state(visual, saliency)).kept[0].tolist()  # noqa: E731
    assert kept() == [0, 3, 9, 12]
    assert kept(mix="half") == [0, 3, 9, 12]
    assert 6 in kept(text="instruction") and 6 in kept(text="after")
    assert set(kept(mix="t2i")) > {3, 9} and set(kept(mix="cls")) > {0, 12}
    assert 5 not in kept(text="after")


def test_single_rankings_are_what_they_say():
    """The mixture's ends: only text, only saliency, and which inputs each needs at all."""
    visual, saliency = torch.randn(3, 16, 8), torch.rand(3, 16)
    given = state(visual, saliency)
    text = text_scores(*given.text("question"), visual, 0.01)
    by_text = AttnMix(budget=5, mix="t2i").prompt(dataclasses.replace(given, scores={}))
    by_cls = AttnMix(budget=5, mix="cls").prompt(dataclasses.replace(given, sequence=None))
    for b in range(3):
        assert by_text.kept[b].tolist() == sorted(best(text[b].tolist())[:5])
        assert by_cls.kept[b].tolist() == sorted(best(saliency[b].tolist())[:5])


@pytest.mark.parametrize("budget", [8, 9])
def test_half_is_half(budget):
    """Without overlap, half by text (rounded down) and the rest by saliency."""
    visual = torch.stack([*[torch.eye(8)[0]] * 8, *[torch.eye(8)[7]] * 24])[None]  # the question is the first word
    given = state(visual, row([0.0] * 16 + [1.0] * 16))
    kept = AttnMix(budget=budget, mix="half").prompt(given).kept
    assert (kept < 8).sum() == budget // 2 and (kept >= 16).sum() == budget - budget // 2


# -- crops, options, errors -------------------------------------------------------------------------------------------


def test_a_question_without_words_is_refused():
    visual, saliency = planted()
    with pytest.raises(UserError, match="'s0'"):
        AttnMix(budget=4).prompt(state(visual, saliency, question=()))
    assert AttnMix(budget=4, text="after").prompt(state(visual, saliency, question=())).kept.shape == (1, 4)


# -- the release ----------------------------------------------------------------------------------------------------

# The worked example of docs/attnmix.md: 16 tokens of one crop, and the same text scores over two crops of 8.
TEXT = [0.02, 0.20, 0.01, 0.05, 0.15, 0.03, 0.10, 0.04, 0.08, 0.01, 0.06, 0.02, 0.09, 0.05, 0.05, 0.04]
SALIENCY = [0.12, 0.18, 0.02, 0.02, 0.03, 0.20, 0.04, 0.01, 0.09, 0.05, 0.02, 0.07, 0.03, 0.02, 0.06, 0.04]
TWO_CROPS = [0.30, 0.05, 0.10, 0.15, 0.05, 0.20, 0.10, 0.05, 0.02, 0.40, 0.03, 0.05, 0.10, 0.25, 0.05, 0.10]


def release_by_the_book(text, saliency, crops: int, budget: int, stride: int = 1) -> list[int]:
    size = len(saliency) // crops
    each = 2 * (budget // 2 // crops)
    total = each * crops
    forced = int(total * 0.25)
    by_text = best(text)[:total]
    by_cls = []
    for crop in range(crops):
        own = saliency[crop * size : (crop + 1) * size]
        by_cls += [(own[i], i + crop * stride) for i in best(own)[:each]]
    rest = sorted(by_cls[forced:], key=lambda pair: -pair[0])
    more = split_by_the_book([text[i] for i in by_text[forced:]], [value for value, _ in rest], total - 2 * forced)
    kept = by_text[: forced + more] + [place for _, place in by_cls[:forced] + rest[: total - 2 * forced - more]]
    return sorted(kept)


@pytest.mark.parametrize(
    ("saliency", "crops", "budget", "stride", "kept"),
    [
        (SALIENCY, 1, 8, 1, [0, 1, 1, 4, 5, 6, 8, 12]),
        (SALIENCY, 1, 6, 1, [0, 1, 1, 4, 5, 6]),
        (TWO_CROPS, 2, 8, 1, [0, 1, 2, 4, 5, 6, 6, 12]),
        (TWO_CROPS, 2, 8, 8, [0, 1, 4, 5, 6, 9, 12, 13]),
    ],
)
def test_worked_examples_of_the_release(saliency, crops, budget, stride, kept):
    actual = released_tokens(row(TEXT), row(saliency), crops, budget, 0.25, stride=stride)
    assert actual.tolist() == [kept] == [release_by_the_book(TEXT, saliency, crops, budget, stride)]


@pytest.mark.parametrize(
    ("saliency", "budget", "kept"),
    [
        (SALIENCY, 8, [0, 1, 4, 5, 6, 8, 11, 12]),
        (SALIENCY, 6, [0, 1, 4, 5, 6, 8]),
        (TWO_CROPS, 8, [0, 1, 4, 5, 6, 9, 12, 13]),
    ],
)
def test_the_default_in_the_same_examples(saliency, budget, kept):
    count = adaptive_count(ordered(row(TEXT))[0], ordered(row(saliency))[0], budget, 0.25)
    assert mix(row(TEXT), row(saliency), count, budget).tolist() == [kept]


@pytest.mark.parametrize(("tokens", "crops", "budget"), [(16, 1, 8), (96, 3, 40), (120, 5, 57), (576, 1, 58)])
def test_release_equals_its_definition(tokens, crops, budget):
    text, saliency = scores(tokens, 4, tokens)
    actual = released_tokens(text, saliency, crops, budget, 0.25)
    for b in range(4):
        expected = release_by_the_book(text[b].double().tolist(), saliency[b].double().tolist(), crops, budget)
        assert actual[b].tolist() == expected


def test_all_text_behind_the_planted_image_is_read():
    """The release compares the image with the suffix and the template too: token 6 resembles a word of them."""
    visual, saliency = planted()
    assert 6 not in AttnMix(budget=4).prompt(state(visual, saliency)).kept[0].tolist()
    kept = AttnMix(budget=4, official=True).prompt(state(visual, saliency)).kept[0].tolist()
    assert 6 in kept and 5 not in kept


def test_b1_salient_tokens_are_looked_up_in_their_own_crop():
    """The release adds c, not c times the crop's tokens: what is salient in crop 2 is looked up in the thumbnail."""
    text, saliency = torch.full((1, 24), 0.01), torch.full((1, 24), 0.01)
    saliency[0, [16 + 3, 16 + 6]] = 0.5  # third crop of 8
    visual = torch.ones(1, 24, 8)
    ours = AttnMix(budget=6, mix="cls").prompt(state(visual, saliency, crops=3)).kept
    theirs = AttnMix(budget=6, mix="cls", official=True).prompt(state(visual, saliency, crops=3)).kept
    assert {19, 22} <= set(ours[0].tolist())
    assert {3 + 2, 6 + 2} <= set(theirs[0].tolist()) and theirs.max() < 8 + 2
    assert released_tokens(text, saliency, 3, 6, 0.25, "cls", stride=8)[0].tolist() == [0, 1, 8, 9, 19, 22]


def stitched(grid: tuple[int, int], side: int) -> list[int]:
    """Where the release's sequence takes its tokens from: thumbnail, then the rows of the whole grid of tiles."""
    tiles = range(side * side, (1 + grid[0] * grid[1]) * side * side)
    number = torch.tensor(list(tiles)).view(*grid, side, side).permute(0, 2, 1, 3).flatten()
    return [*range(side * side), *number.tolist()]


def test_b2_saliency_comes_in_the_order_of_the_tokens():
    """Tiles enter the release's sequence row by row of the whole image, its saliency comes crop by crop.

    So even with the right distance between crops it would keep other patches. Here both come crop by crop. With the
    wrong distance (B1) the two orders name the same patches, which is why `official` needs no order of its own.
    """
    order = stitched((2, 2), 4)
    saliency = torch.full((1, 80), 0.001)
    saliency[0, 16 + 7] = saliency[0, 32 + 10] = 0.4  # a patch of the first and of the second tile
    right = released_tokens(saliency, saliency, 5, 20, 0.25, "cls", stride=16)[0].tolist()
    assert {23, 42} <= set(right) and not {23, 42} <= {order[place] for place in right}
    wrong = released_tokens(saliency, saliency, 5, 20, 0.25, "cls")[0].tolist()
    assert wrong == sorted(order[place] for place in wrong)
    ours = AttnMix(budget=20, mix="cls").prompt(state(torch.ones(1, 80, 8), saliency, crops=5)).kept
    assert {23, 42} <= set(ours[0].tolist())


def test_b3_the_forced_quarter_is_the_best_of_all_crops():
    """The release forces the first crop's tokens, however dull: here crop 1 has all the saliency."""
    text, saliency = torch.full((1, 32), 1.0), torch.full((1, 32), 0.001)
    text[0, :16] = 2.0
    saliency[0, 16:] = torch.linspace(0.5, 0.4, 16)
    theirs = released_tokens(text, saliency, 2, 16, 0.25, stride=16)[0]
    count = adaptive_count(ordered(text)[0], ordered(saliency)[0], 16, 0.25)
    ours = mix(text, saliency, count, 16)[0]
    twice = theirs[1:][theirs.diff() == 0]
    assert twice.tolist() == [0, 1, 2, 3]  # four dull tokens of crop 0 beside the text's own
    assert (ours >= 16).sum() == 16 - int(count) and (ours[ours >= 16] == torch.arange(16, 32 - int(count))).all()


def test_b4_a_token_chosen_twice_counts_once():
    """The release feeds it to the decoder twice, and so has fewer different tokens than it reports."""
    theirs = released_tokens(row(TEXT), row(SALIENCY), 1, 8, 0.25)[0].tolist()
    count = adaptive_count(ordered(row(TEXT))[0], ordered(row(SALIENCY))[0], 8, 0.25)
    ours = mix(row(TEXT), row(SALIENCY), count, 8)[0].tolist()
    assert len(theirs) == 8 and len(set(theirs)) == 7
    assert len(set(ours)) == 8 and set(theirs) < set(ours)  # what the duplicate cost is the next salient token


@pytest.mark.parametrize(
    ("budget", "crops", "count"),
    [
        *[(144, 1, 144), (58, 1, 58), (29, 1, 28)],
        *[(144, 5, 140), (144, 3, 144), (144, 4, 144)],
        *[(288, 5, 280), (288, 3, 288), (290, 5, 290), (720, 3, 720), (720, 4, 720), (720, 5, 720)],
    ],
)
def test_b5_only_the_release_rounds_the_budget(budget, crops, count):
    assert released_count(budget, crops, "adaptive") == count
    spec = dataclasses.replace(LLAVA, visual_tokens=576 * crops, layout=PatchGrid(24, 24, crops))
    assert AttnMix(budget=budget, official=True).tokens_per_layer(spec) == (count,) * 32
    assert AttnMix(budget=budget).tokens_per_layer(spec) == (budget,) * 32
    assert {144: 36, 58: 14, 28: 7}.get(count, count // 4) == forced_count(count, 0.25)


def test_split_is_that_of_the_release(monkeypatch):
    """How many of the adaptive tokens each ranking got, recorded beside the kept tokens."""
    meta, arrays = recording(FOLDER / "attnmix-64.npz")
    reducer = registry.build("attnmix", meta["budget"], meta["options"])
    seen = []

    def spy(first, second):
        seen.append([int(best_split(first, second)), first.shape[1]])
        return best_split(first, second)

    monkeypatch.setattr(method, "best_split", spy)
    for case in arrays["cases"][:3]:
        run_case(parity_model(), reducer, int(case))
    assert [[count, total - count] for count, total in seen] == arrays["splits"][:3].tolist()


@pytest.mark.parametrize(("crops", "mix_name", "least"), [(1, "adaptive", 2), (3, "cls", 6), (5, "t2i", 5)])
def test_budgets_that_the_release_rounds_to_nothing_are_refused(crops, mix_name, least):
    spec = dataclasses.replace(LLAVA, visual_tokens=576 * crops, layout=PatchGrid(24, 24, crops))
    with pytest.raises(UserError, match=f"at least {least}"):
        AttnMix(budget=least - 1, mix=mix_name, official=True).check(spec)
    AttnMix(budget=least, mix=mix_name, official=True).check(spec)
    AttnMix(budget=1, mix=mix_name).check(spec)
