"""IVC-Prune against its release, plain loops, planted tokens, and the growth of its sets to a given count."""

import pytest
import torch

from baselines.ivcprune import IVCPrune
from llava.errors import UserError
from llava.pipeline.accounting import mean_visual_tokens
from llava.pipeline.sequence import PromptBatch, Rotary
from llava.reduction.states import DecoderState
from llava.reduction.token_layout import ModelSpec, PatchGrid
from tests.vectors import vectors

LLAVA_15 = ModelSpec(576, 32, PatchGrid(24, 24), 24)


def state_of(values: torch.Tensor, start: int, count: int, lengths: tuple[int, ...] | None = None, base: float = 1e4):
    """Prompts with `count` image tokens from `start` on, and values [B, H, L, d]; angles of head size 128."""
    batch, _, width, _ = values.shape
    lengths, position = lengths or (width,) * batch, torch.zeros(batch, width, dtype=torch.long)
    for sample, length in enumerate(lengths):
        position[sample, width - length :] = torch.arange(length)
    angles = position.double()[..., None] * base ** -(torch.arange(0, 128, 2).double() / 128)
    angles = torch.cat([angles, angles], -1)
    after = tuple((start + count, length) for length in lengths)
    prompts = PromptBatch(
        torch.zeros(batch, width, 1), position, lengths, (((start, start + count),),) * batch, after, after, after,
        rotary=Rotary(angles.cos(), angles.sin()),
    )  # fmt: skip
    ids = tuple(map(str, range(batch)))
    tokens = torch.zeros(batch, count, 1)
    return DecoderState(
        ids=ids, spec=LLAVA_15, tokens=tokens, sequence=prompts, llm=None, layer=16, entered=prompts, keys=None,
        start=prompts, values=lambda: values,
    )  # fmt: skip


def test_the_release_keeps_the_same_set():
    """As released, and by default at the count of its union. Its seeds and its sets by value and place are the same."""
    about, arrays = vectors("ivcprune")
    assert len(about["cases"]) == 2
    for case in about["cases"]:
        state = state_of(arrays[f"{case['case']}_values"][None].float(), about["start"], about["length"])
        (union,) = IVCPrune(budget=64, official=True).decoder(state)
        fitted = IVCPrune(budget=64).reduce(state, len(case["kept"]))
        assert union.kept[0].tolist() == fitted.kept[0].tolist() == case["kept"]
        seeds, value, cosine, sine = IVCPrune(budget=64).sets(state, 576)
        assert seeds[0].tolist() == case["seeds"] and len(case["seeds"]) == 6
        assert (value[0] < 115).nonzero().flatten().tolist() == case["value"]
        assert ((cosine[0] < 29) | (sine[0] < 29)).nonzero().flatten().tolist() == case["coordinates"]


def test_implicit_coordinates_depend_on_the_place_of_the_image_alone():
    """The release's sets for an image that begins at 5, and behind LLaVA's prompt at 35."""
    for start, sets in vectors("ivcprune")[0]["rope_sets"].items():
        _, _, *found = IVCPrune(budget=64).sets(state_of(torch.ones(1, 1, int(start) + 590, 4), int(start), 576), 576)
        for ranks, name in zip(found, ("cos", "sin"), strict=True):
            assert (ranks[0] < 29).nonzero().flatten().tolist() == sets[name]


def planted(tokens: list[int]) -> torch.Tensor:
    """Values [1, 2, 60, 4]: the text, from column 52 on, and some of 40 image tokens from column 10 on are alike."""
    values = 0.1 * torch.randn(1, 2, 60, 4)
    values[..., 0] = -2
    values[:, :, 52:, 0] = 2
    values[:, :, [10 + token for token in tokens], 0] = 2
    return values


def test_ivcprune_keeps_planted_tokens_whose_values_are_like_the_text():
    """Plant six of 40; without coordinates nothing else is kept."""
    tokens = [3, 8, 20, 21, 33, 39]
    kept = IVCPrune(budget=6, coordinates=0).reduce(state_of(planted(tokens), 10, 40), 6).kept
    assert kept.tolist() == [tokens]


def test_tokens_like_the_seeds_are_kept_although_the_text_is_not_like_them():
    """Text is like token 7 in one direction; four tokens are like token 7 in another, where it is much longer."""
    values = torch.zeros(1, 1, 60, 3)
    values[..., 2] = 1
    values[0, 0, 52:] = torch.tensor([2.0, 0, 0])
    values[0, 0, 17] = torch.tensor([4.0, 6, 0])
    values[0, 0, [20, 30, 40, 41]] = torch.tensor([0, 6.0, 0])
    method = IVCPrune(budget=5, coordinates=0)
    assert method.reduce(state_of(values, 10, 40), 5).kept.tolist() == [[7, 10, 20, 30, 31]]


def by_the_words(values, start: int, count: int, seeds: int) -> tuple[list[int], list[int]]:
    """Values [H, L, d] of one prompt: its seeds, and all image tokens by value, best first."""
    alike = torch.stack([(own @ own.T / own.shape[1] ** 0.5).softmax(-1) for own in values]).mean(0)
    text = list(range(start + count + 2, values.shape[1]))
    first = alike[text].mean(0)[start : start + count].argsort(descending=True)[:seeds].tolist()
    anchors = [start + token for token in first] + text
    return sorted(first), alike[anchors].mean(0)[start : start + count].argsort(descending=True).tolist()


def test_padded_prompts_of_different_length_are_ranked_as_alone():
    """200 tokens have two seeds. The two tokens that follow the image are no text."""
    values = torch.randn(2, 3, 240, 8)
    found = IVCPrune(budget=64).sets(state_of(values, 5, 200, (240, 226)), 200)
    for sample, length in enumerate((240, 226)):
        seeds, order = by_the_words(values[sample, :, 240 - length :].double(), 5, 200, 2)
        assert found[0][sample].tolist() == seeds and found[1][sample].argsort().tolist() == order


def test_a_text_of_two_tokens_is_text():
    """Nothing would be left to rank by."""
    values = planted([4, 11])[:, :, :54]
    values[:, :, 50:52] = values[:, :, 52:]
    kept = IVCPrune(budget=2, coordinates=0).reduce(state_of(values[:, :, :52], 10, 40), 2).kept
    assert kept.tolist() == [[4, 11]]


def test_sets_grow_together_to_the_count():
    """At any count: four tokens by value for each by cosine and by sine, as in the release; seeds are always there."""
    state = state_of(torch.randn(1, 2, 625, 8), 35, 576)
    method = IVCPrune(budget=64)
    seeds, value, cosine, sine = (part[0] for part in method.sets(state, 576))
    for keep in (10, 64, 165, 400, 575):
        kept = set(method.reduce(state, keep).kept[0].tolist())
        assert len(kept) == keep and set(seeds.tolist()) <= kept
        sizes = [number / 1000 for number in range(1, 6000)]
        unions = (
            {*(value < 115.2 * size - 0.5).nonzero().flatten().tolist(), *seeds.tolist()}
            | {*(torch.minimum(cosine, sine) < 28.8 * size - 0.5).nonzero().flatten().tolist()}
            for size in sizes
        )
        smaller = [union for union in unions if len(union) <= keep]
        assert smaller[-1] <= kept and len(smaller[-1]) >= keep - 2  # the best by cosine and by sine come together
    assert method.reduce(state, 3).kept.shape == (1, 3)


def test_all_coordinates_and_none():
    """The ends of the option: no token by its place; or five tokens by cosine and by sine for each by value."""
    state = state_of(torch.randn(1, 2, 625, 8), 35, 576)
    _, value, cosine, sine = (part[0] for part in IVCPrune(budget=64).sets(state, 576))
    none, whole = (IVCPrune(budget=64, coordinates=share).reduce(state, 100).kept[0] for share in (0, 1))
    assert (value[none] < 100).all() and (torch.minimum(cosine, sine)[whole] < 100).float().mean() > 0.8


def test_a_small_mean_needs_another_count_or_layer():
    """16 of 32 layers see all 576 tokens, which alone is a mean of 288."""
    with pytest.raises(UserError, match=r"reaches 288\.5 to 576"):
        IVCPrune(budget=64).check(LLAVA_15)
    IVCPrune(budget=64, official=True).check(LLAVA_15)
    kept = IVCPrune(budget=166, schedule="kept").tokens_per_layer(LLAVA_15)
    assert kept == (576,) * 16 + (166,) * 16 and mean_visual_tokens(kept) == 371
    assert mean_visual_tokens(IVCPrune(budget=300).tokens_per_layer(LLAVA_15)) == 300
    assert mean_visual_tokens(IVCPrune(budget=64, layer=2).tokens_per_layer(LLAVA_15)) == pytest.approx(64, abs=0.5)


def test_layer_0_is_not_cut():
    assert IVCPrune(budget=64).cut_caches(16) == range(1, 16)
