"""RESTORE alone and beside other methods: recorded groups, its rule by the words, planted groups, order and ids."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from baselines import restore
from baselines.restore import Restore, distinctiveness
from eval.config import options_by_method
from eval.efficiency.oracle import oracle_of
from llava.errors import UserError
from llava.model.builder import load
from llava.pipeline.accounting import Timer
from llava.pipeline.generate import until_decoder
from llava.processing.prompt import Sample
from llava.reduction import ModelSpec, PatchGrid, keep_top, registry
from llava.reduction.budget import planned, require
from llava.reduction.token_layout import spec_of
from tests import contract
from tests.conftest import QUESTIONS, drawn_image, samples
from tests.drawn_images import state_with
from tests.tiny_checkpoints_families import make_tiny_next, save_next_transformers
from tests.vectors import vectors

LLAVA_7B = ModelSpec(576, 32, PatchGrid(24, 24), tower_blocks=24)


def groups_of(reduction, image: int = 0) -> list[list[int]]:
    """The members of each output token."""
    assert reduction.merges and not reduction.drops
    own = reduction.assignment[image]
    return [(own == slot).nonzero().flatten().tolist() for slot in range(reduction.kept.shape[1])]


def alone(tokens: torch.Tensor, budget: int, **options):
    return Restore(budget=budget, **options).prompt(state_with(tokens, tokens=tokens))


def test_anchors_and_groups_are_those_of_the_release():
    about, arrays = vectors("restore")
    for case in about["cases"]:
        tokens = arrays[case["tokens"]][None]
        count = len(case["anchors"])
        assert keep_top(distinctiveness(F.normalize(tokens, dim=-1), True), count)[0].tolist() == case["anchors"]
        reduction = alone(tokens, count, official=True)
        assert sorted(groups_of(reduction)) == sorted(case["groups"])
        assert groups_of(alone(tokens, count)) != groups_of(reduction)


def by_the_words(unit: torch.Tensor, official: bool) -> list[float]:
    cosine = (unit @ unit.T).tolist()
    central = [sum(row) for row in cosine]
    scores = []
    for i, own in enumerate(central):
        to = [cosine[i][j] for j, other in enumerate(central) if (other < own if official else other > own)]
        scores.append(own * (1 - max(to, default=0.0)))
    return scores


@pytest.mark.parametrize("official", [False, True])
def test_the_score_equals_its_definition_in_whole_and_in_blocks(official, monkeypatch):
    """Among 50 tokens in a cone, some of them twice, so that equal centralities are compared."""
    unit = F.normalize(torch.randn(3, 40, 6, dtype=torch.double) + 0.5, dim=-1)
    unit = torch.cat([unit, unit[:, :10]], 1)
    # Equal tokens must have equal sums, which rounding decides: in 32nds of small whole numbers sums are exact.
    unit = (unit * 32).round() / 32
    expected = torch.tensor([by_the_words(own, official) for own in unit], dtype=torch.double)
    torch.testing.assert_close(distinctiveness(unit, official), expected)
    monkeypatch.setattr(restore, "AT_A_TIME", 500)
    torch.testing.assert_close(distinctiveness(unit, official), expected)


def test_planted_groups_are_found_and_have_median_ids_in_the_order_of_their_first_tokens():
    """Three directions; of an average of four, the second has the id."""
    group = torch.tensor([1, 0, 0, 2, 1, 1, 0, 2, 1, 0, 0, 1])
    tokens = (10 * torch.eye(3, 8)[group] + 0.1 * torch.rand(12, 8)) * torch.arange(1, 13)[:, None]
    tokens = tokens[None].half()
    for official in (False, True):
        found = alone(tokens, 3, official=official)
        assert groups_of(found) == [[0, 4, 5, 8, 11], [1, 2, 6, 9, 10], [3, 7]]
        assert found.kept.tolist() == [[5, 6, 3]]
        torch.testing.assert_close(found.apply(tokens)[0, 2], tokens[0, [3, 7]].float().mean(0).half())
        assert alone(tokens, 3, official=official, positions="renumber").kept.tolist() == [[0, 1, 3]]
    late = tokens[:, torch.tensor([1, 0, 4, 5, 8, 11, 2, 3, 6, 7])]  # the first group begins first and has a later id
    found = alone(late, 3)
    assert groups_of(found) == [[0, 6, 8], [1, 2, 3, 4, 5], [7, 9]] and found.kept.tolist() == [[6, 3, 7]]


def test_the_paper_compares_with_more_central_tokens_and_the_release_with_less_central_ones():
    """On an arc, the paper's first anchor is the middle; the release's is the end of the arc."""
    angle = torch.tensor([-0.5, -0.1, 0.0, 0.11, 0.52])
    unit = torch.stack([angle.cos(), angle.sin()], -1)[None]
    assert [keep_top(distinctiveness(unit, official), 1).item() for official in (False, True)] == [2, 4]


@pytest.mark.parametrize(("first", "space"), [("fastervlm", "features"), ("uniform", "tokens")])
@pytest.mark.parametrize(("budget", "own"), [(1, 1), (2, 1), (5, 3), (6, 3), (9, 5)])
def test_the_first_method_keeps_half_and_the_others_are_averaged_by_the_vectors_of_its_stage(first, space, budget, own):
    reducer = registry.build(f"{first}+restore", budget)
    known = {name: torch.randn(2, 12, 7) for name in ("features", "tokens")}
    before, stage = registry.build(first, own), "encoder" if space == "features" else "prompt"
    state = state_with(
        known["features"], {score: torch.rand(2, 12) for score in before.scores()}, tokens=known["tokens"]
    )
    kept = getattr(before, stage)(state).kept
    found = getattr(reducer, stage)(state)
    for image in range(2):
        own_tokens = kept[image].tolist()
        if budget == own:
            assert found.kept[image].tolist() == own_tokens and not found.merges
            continue
        groups = groups_of(found, image)
        assert all([token] in groups for token in own_tokens) and len(groups) == budget
        assert [group[0] for group in groups] == sorted(group[0] for group in groups)
        assert found.kept[image].tolist() == [group[(len(group) - 1) // 2] for group in groups]
        others = [token for token in range(12) if token not in own_tokens]
        part = alone(known[space][image : image + 1, others], budget - own)
        averaged = [group for group in groups if group[0] not in own_tokens]
        assert averaged == [[others[i] for i in group] for group in groups_of(part)]
        expected = torch.stack([known[space][image, group].mean(0) for group in groups])
        torch.testing.assert_close(found.apply(known[space])[image], expected)


@pytest.mark.parametrize("name", ["holov+restore", "vispruner+restore"])
def test_a_planted_token_is_kept_as_it_is(name, tiny):
    """The planted signal is the first method's; what has it is averaged with nothing."""
    batch = samples(5, text_only=())
    with contract.planted_signals({sample.id: [7] for sample in batch}):
        record = contract.run(tiny, batch, registry.build(name, 6))[2]
    for (step,) in record.steps:
        assert [7] in groups_of(step.reduction) and sum(map(len, groups_of(step.reduction))) == 16


def test_at_the_ends_of_the_share_the_first_method_keeps_all_or_one(tiny):
    for name in ("holov", "vispruner"):
        every = contract.run(tiny, samples(3), registry.build(f"{name}+restore", 5, {"share": 1}))
        theirs = contract.run(tiny, samples(3), registry.build(name, 5, {"positions": "original"}))
        torch.testing.assert_close(every[0], theirs[0], atol=1e-5, rtol=0)
        one = registry.build(f"{name}+restore", 5, {"share": 0})
        assert (one.first.budget, one.completion.budget) == (1, 5)
        assert [registry.build(f"{name}+restore", 30, {"share": share}).first.budget for share in (0.1, 0.45)] == [
            3,
            14,
        ]


@pytest.mark.parametrize("positions", ["original", "renumber"])
@pytest.mark.parametrize("name", ["restore", "divprune+restore", "scope+restore"])
@torch.inference_mode()
def test_position_ids_are_medians_or_renumbered(name, positions, tiny):
    """They are not ascending then; the text after the image keeps its ids, too."""
    batch = samples(3, text_only=())
    stages = until_decoder(tiny, batch, registry.build(name, 6, {"positions": positions}), Timer(tiny.device))
    full = until_decoder(tiny, batch, registry.build("full", 16), Timer(tiny.device)).start
    found, after = stages.start, []
    for row, (span, whole, (step,)) in enumerate(zip(found.images, full.images, stages.record.steps, strict=True)):
        found_ids, ids = (one.position[row, one.hidden.shape[1] - one.lengths[row] :] for one in (found, full))
        kept = step.reduction.kept[0] if positions == "original" else torch.arange(6)
        after += (kept.diff() < 0).tolist()
        assert found_ids[span[0] : span[1]].tolist() == ids[whole[0] : whole[1]][kept].tolist()
        moved = 0 if positions == "original" else 10
        assert found_ids[span[1] :].tolist() == (ids[whole[1] :] - moved).tolist()
    assert any(after) == (positions == "original")


@pytest.mark.parametrize("name", ["vispruner+restore", "divprune+restore", "hired+restore", "globalcom2+restore"])
def test_each_tile_is_completed_on_its_own(name, tmp_path):
    """The first method's rule splits the budget; the other half of each tile's part is of that tile."""
    save_next_transformers(tmp_path, make_tiny_next("mistral"))
    model = load(tmp_path, device="cpu")
    sample = Sample("q", QUESTIONS[0], image=drawn_image(0, (112, 112)))
    layout = model.views(sample.image)[1]
    spec = spec_of(model.spec, layout)
    for options in ({}, {"tile_budget": "each", "newlines": "drop"}, {"newlines": "keep"}, {"retention_ratio": 0.3}):
        reducer = registry.build(name, None if "retention_ratio" in options else 25, options, layout.tokens)
        require(reducer, model.spec)
        _, (accounting,), record = contract.run(model, [sample], reducer)
        assert accounting.tokens_per_layer == planned(reducer, spec) == (reducer.for_image(spec).budget,) * 4
        ((step,),) = record.steps
        if reducer.newlines == "drop":
            assert (step.reduction.kept[0].diff() > 0).all()
        oracle = contract.run(model, [sample], oracle_of(reducer, model.spec))[1][0]
        assert oracle.tokens_per_layer == accounting.tokens_per_layer
        if "tile_budget" not in options:
            continue
        first = contract.run(model, [sample], registry.build(name.split("+")[0], 15, options))[2].steps[0][0]
        kept, crop = first.reduction.kept[0].tolist(), layout.origins()[:, 0]
        made = [(row > 0).nonzero().flatten() for row in step.reduction.matrix()]
        assert [len(crop[tokens].unique()) for tokens in made] == [1] * 25
        assert torch.bincount(torch.stack([crop[tokens[0]] for tokens in made])).tolist() == [5] * 5
        assert {tokens.item() for tokens in made if len(tokens) == 1} >= set(kept)
        assert sum(map(len, made)) == layout.patches


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("visionzip+restore", {}, "visionzip itself merges the tokens that it does not keep"),
        ("consensusdrop+restore", {}, "consensusdrop itself merges"),
        ("restore+restore", {}, "restore itself merges"),
        ("fastv+restore", {}, "first one .* fastv acts before decoder layer 2"),
        ("visiondrop+restore", {}, "first one .* visiondrop acts"),
        ("full+restore", {}, "full reduces nothing"),
        ("trim+restore", {}, "trim itself merges"),
        ("hired+restore", {"hired.official": "true"}, "hired.restore has no plan: .* depends on the image"),
        ("attnmix+restore", {"attnmix.official": "true"}, "distinct tokens: .* attnmix may keep one twice"),
        ("holov+restore", {"holov.chunks": "7"}, "holov.chunks must divide"),
        ("holov+restore", {"holov.positions": "original"}, "'holov.positions'"),
        ("holov+restore", {"restore.newlines": "keep"}, "'restore.newlines'"),
        ("holov+restore", {"share": "1.5"}, "share must be"),
        ("holov+restore", {"restore.positions": "renumber", "positions": "original"}, "is given twice"),
        ("cdpruner+restore", {}, "text tower"),
        ("holov+restore", {"budget": 577}, "budget must be 1 to 576"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_in_one_sentence(name, options, sentence):
    with pytest.raises(UserError, match=sentence):
        require(registry.build(name, options.pop("budget", 64), options), LLAVA_7B)


def test_options_and_sources_know_both_parts():
    given = ["holov.chunks=8", "holov+restore.restore.positions=renumber", "holov+restore.share=0.25"]
    read = options_by_method(["holov+restore"], given)["holov+restore"]
    reducer = registry.build("holov+restore", 64, read)
    assert (reducer.first.chunks, reducer.first.budget, reducer.positions, reducer.completion.positions) == (
        8, 16, "renumber", "renumber",
    )  # fmt: skip
    assert registry.build("holov+restore", 64).positions == "original"  # the paper's
    (row,) = registry.describe("vispruner+restore")
    assert "RESTORE" in row["paper"] and row["reads"] == "cls_attention -2, features, order"
    assert "METHOD+restore" in registry.describe("restore")[0]["summary"]
    after = registry.build("restore+fastv", 64)  # alone, it can also be the first of two
    assert planned(after, LLAVA_7B) == registry.build("divprune+fastv", 64).tokens_per_layer(LLAVA_7B)
    assert dataclasses.replace(reducer, budget=32).first.budget == 8
