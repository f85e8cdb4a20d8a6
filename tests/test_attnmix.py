"""AttnMix: the mixture against versions with plain loops, planted answers, every option through the model."""

import dataclasses
import math

import pytest
import torch

from attnmix.method import (
    AttnMix,
    adaptive_count,
    best_split,
    crop_pool,
    forced_count,
    mix,
    ordered,
    released_tokens,
    text_scores,
)
from llava.errors import UserError
from llava.pipeline.positions import Piece
from llava.pipeline.prefill import prefill
from llava.pipeline.sequence import assemble
from llava.reduction import registry
from llava.reduction.reducer import PromptState
from llava.reduction.scores import TowerScore
from llava.reduction.token_layout import ModelSpec, PatchGrid
from tests.conftest import samples

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


def test_a_text_score_is_high_where_a_planted_token_resembles_a_word():
    visual = 0.1 * torch.randn(1, 20, 8)
    visual[0, 13] += 5 * torch.eye(8)[2]
    score = text_scores(torch.eye(8)[None, 2:4], torch.ones(1, 2, dtype=torch.bool), visual, 0.01)
    assert score.argmax() == 13


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
    text, saliency = row([1.0] * 8 + [0.0] * 24), row([0.0] * 16 + [1.0] * 16)
    count = AttnMix(budget=budget, mix="half")._text_count(text, saliency)
    kept = mix(text, saliency, count, budget)
    assert (kept < 8).sum() == budget // 2 and (kept >= 16).sum() == budget - budget // 2


def test_temperature_sharpens_the_text():
    """A sharp text score needs few tokens, a flat one many: the split follows the temperature."""
    given = state(torch.randn(2, 400, 8), torch.rand(2, 400))
    shares = []
    for temperature in (0.02, 1.0):
        text = text_scores(*given.text("question"), given.tokens, temperature)
        shares.append(adaptive_count(ordered(text)[0], ordered(given.scores[CLS])[0], 40, 0.25))
    assert (shares[0] < shares[1]).all()


# -- crops, options, errors -------------------------------------------------------------------------------------------


def test_a_pool_per_crop_lets_no_crop_take_all():
    """Saliency is in crop 0 alone: over all crops it takes everything, with a pool of each crop it cannot."""
    saliency = torch.cat([torch.linspace(1.0, 0.9, 16), torch.full((32,), 0.001)])[None]
    given = state(torch.ones(1, 48, 8), saliency, crops=3)
    kept = {p: AttnMix(budget=12, mix="cls", pool=p).prompt(given).kept[0] // 16 for p in ("global", "crop")}
    assert torch.bincount(kept["global"], minlength=3).tolist() == [12, 0, 0]
    assert torch.bincount(kept["crop"], minlength=3).tolist() == [4, 4, 4]
    assert crop_pool(saliency, 3, 2).nonzero()[:, 1].tolist() == [0, 1, 16, 17, 32, 33]


def test_a_pool_is_large_enough_for_budgets_that_do_not_divide():
    text, saliency = scores(8, 2, 48)
    saliency = saliency.masked_fill(~crop_pool(saliency, 3, -(-14 // 3)), -torch.inf)
    kept = mix(text, saliency, adaptive_count(ordered(text)[0], ordered(saliency)[0], 14, 0.25), 14)
    assert kept.shape == (2, 14) and (kept.diff() > 0).all()
    by_text = torch.isinf(saliency.gather(1, kept)).sum(1)  # outside the pool only the text chooses
    assert (by_text <= adaptive_count(ordered(text)[0], ordered(saliency)[0], 14, 0.25)).all()


OPTIONS = [
    {"mix": "t2i"},
    {"mix": "cls"},
    {"mix": "half"},
    {"floor": "0"},
    {"floor": "0.5"},
    {"temperature": "1"},
    {"text": "instruction"},
    {"text": "after"},
    {"pool": "crop"},
    {"block": "-1"},
    {"positions": "original"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()))
def test_every_option_runs_at_its_budget_and_in_batches(tiny, options):
    batch, reducer = samples(), registry.build("attnmix", 7, options)
    start, record = prefill(tiny, batch, reducer)
    assert [audit.mean for audit in record.accounting(start)] == [7, 7, 7, 0, 7]
    for i, sample in enumerate(batch):
        single, alone = prefill(tiny, [sample], reducer)
        torch.testing.assert_close(tiny.logits(start.hidden)[i], tiny.logits(single.hidden)[0], atol=1e-4, rtol=0)
        for a, b in zip(record.steps[i], alone.steps[0], strict=True):
            assert a.reduction.kept.tolist() == b.reduction.kept.tolist()


def test_the_question_decides_and_saliency_alone_does_not_ask(tiny):
    one = samples(1)[0]
    other = dataclasses.replace(one, question="how many black dog are near the tree?")

    def kept(sample, name):
        reducer = registry.build("attnmix", 7, {"mix": name})
        return prefill(tiny, [sample], reducer)[1].steps[0][0].reduction.kept.tolist()

    assert kept(one, "cls") == kept(other, "cls")
    assert kept(one, "t2i") != kept(other, "t2i")


def test_never_waits_for_the_device():
    """Tensors on the meta device hold no values, so whatever looks at one fails."""
    text, saliency = (torch.empty(2, 96, device="meta") for _ in range(2))
    count = adaptive_count(ordered(text)[0], ordered(saliency)[0], 30, 0.25)
    assert mix(text, saliency.masked_fill(~crop_pool(saliency, 3, 10), -torch.inf), count, 30).shape == (2, 30)
    assert released_tokens(text, saliency, 3, 30, 0.25).shape == (2, 30)


def test_a_question_without_words_is_refused():
    visual, saliency = planted()
    with pytest.raises(UserError, match="'s0', which is empty"):
        AttnMix(budget=4).prompt(state(visual, saliency, question=()))
    assert AttnMix(budget=4, text="after").prompt(state(visual, saliency, question=())).kept.shape == (1, 4)


def test_text_alone_needs_no_cls_token():
    spec = dataclasses.replace(LLAVA, has_cls=False)
    AttnMix(budget=8, mix="t2i").check(spec)
    with pytest.raises(UserError, match="CLS"):
        AttnMix(budget=8).check(spec)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"floor": "0.6"}, "between 0 and 0.5"),
        ({"temperature": "0"}, "above 0"),
        ({"mix": "both"}, "must be one of"),
        ({"text": "last"}, "must be one of"),
        ({"official": "true", "text": "instruction"}, "takes text=after"),
        ({"official": "true", "mix": "half"}, "in no release"),
    ],
)
def test_wrong_options_are_explained(options, said):
    with pytest.raises(UserError, match=said):
        registry.build("attnmix", 8, options)
