"""What the contract sees: methods that break it on purpose, and wrong returns refused in one sentence."""

import dataclasses
import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from eval import ask
from llava.errors import MethodError, UserError
from llava.model.builder import load
from llava.pipeline.generate import prefill
from llava.reduction import (
    EncoderState,
    MethodMetadata,
    Reducer,
    Reduction,
    Scorer,
    TowerScore,
    gather_tokens,
    keep_top,
    option,
    others,
    places,
    reducer,
    registry,
)
from llava.reduction.budget import require
from tests import contract, observed, test_every_method
from tests.conftest import samples
from tests.tiny_checkpoints import make_tiny_llava, save_transformers_layout

RECEIVED = TowerScore("received_attention")


@dataclass(frozen=True, kw_only=True)
class Planted(Reducer):
    """Keeps by received attention; each subclass does one thing wrong."""

    name: ClassVar[str] = "planted"
    metadata: ClassVar[MethodMetadata] = MethodMetadata(acts="after the tower", score="received attention")

    how: str = option("usual", "a branch", ("usual", "other"))

    def scores(self) -> tuple[TowerScore, ...]:
        return (RECEIVED,)

    def encoder(self, state: EncoderState) -> Reduction:
        score = state.scores[RECEIVED]
        return self.reduction(keep_top(score, self.budget), score)

    def reduction(self, kept: torch.Tensor, score: torch.Tensor) -> Reduction:
        return Reduction(kept, score.shape[1])


class UnsortedElsewhere(Planted):
    """In a branch that defaults do not reach."""

    def reduction(self, kept, score):
        return super().reduction(kept.flip(1) if self.how == "other" else kept, score)


class Sums(Planted):
    """A merged token is a sum: it was not divided by its members."""

    def reduction(self, kept, score):
        slots = torch.arange(kept.shape[1]).expand_as(kept)
        target = torch.zeros_like(score, dtype=torch.int64).scatter(1, kept, slots)
        own = Reduction(kept, score.shape[1], target, torch.ones_like(score), drops=False)
        return own if self.how == "other" else super().reduction(kept, score)


class LooksAtTheBatch(Planted):
    """Ranks by what the other images of the batch have, from three on."""

    def reduction(self, kept, score):
        if len(score) > 2:
            kept = keep_top(score - score.mean(0), self.budget)
        return super().reduction(kept, score)


class Plans(Planted):
    """Says another number of tokens than it keeps."""

    def tokens_per_layer(self, spec):
        return (self.budget - (self.how == "other"),) * spec.layers


FAULTS = {
    UnsortedElsewhere: r"planted.encoder: kept must ascend .* for q0",
    Sums: r"planted 8 how=other: image of q0, encoder: .* add up to \[\d+.*, not to 1",
    LooksAtTheBatch: r"planted 8: image of q\d, encoder: in a batch of 3 it keeps \[.*\], alone \[.*\]",
    Plans: r"planted 8 how=other: plans \(7, 7, 7, 7\), a mean of 7",
}


@pytest.mark.parametrize("cls", FAULTS)
def test_the_contract_sees(cls, tiny):
    """Each of these passed all contract tests; a failure only said `assert all(generator)`."""
    with pytest.raises((AssertionError, MethodError), match=FAULTS[cls]):
        for options in contract.configurations(cls):
            for reducer in contract.accepted(cls, options, tiny):
                contract.check(reducer, tiny, samples(4, text_only=()))


def test_the_contract_sees_an_ignored_option(tiny):
    assert contract.unused(Planted, {"tiny": (tiny, samples(2))}, set()) == ["tile_budget", "how"]
    assert contract.unused(Planted, {"tiny": (tiny, samples(2))}, {"how", "tile_budget"}) == []


def test_the_contract_sees_a_reversed_ranking(tiny, monkeypatch):
    class Reversed(Planted):
        def encoder(self, state):
            score = -state.scores[RECEIVED]
            return self.reduction(keep_top(score, self.budget), score)

    for cls, sees in ((Planted, False), (Reversed, True)):
        monkeypatch.setitem(registry.METHODS, "planted", cls)
        if not sees:
            test_every_method.test_what_signals_point_at_is_kept("planted", tiny)
            continue
        with pytest.raises(AssertionError, match="planted 8: 0% of the tokens"):
            test_every_method.test_what_signals_point_at_is_kept("planted", tiny)


# A new method that does what it says, and one mistake at a time in it.

CLS, KEYS = TowerScore("cls_attention"), TowerScore("keys")


@dataclass(frozen=True, kw_only=True)
class Merges(Reducer):
    """Keeps half of the budget by CLS attention, and merges the rest into the other half by keys."""

    name: ClassVar[str] = "merges"
    metadata: ClassVar[MethodMetadata] = MethodMetadata(
        acts="after the tower",
        score="CLS attention, block −2",
        rest="averaged by its attention into the target with the most similar key",
        reads=("cls_attention -2", "keys -2"),
        similarity="keys",
        weights="score",
    )

    def scores(self) -> tuple[TowerScore, ...]:
        return CLS, KEYS

    def encoder(self, state: EncoderState) -> Reduction:
        score = state.scores[self.scores()[0]]
        kept = keep_top(self.precision(score), self.budget)
        target = torch.zeros_like(score, dtype=torch.int64).scatter(1, kept, places(*kept.shape, kept.device))
        rest, vectors = others(kept, score.shape[1]), self.vectors(state)
        unit = vectors / vectors.norm(dim=-1, keepdim=True)
        home = self.home(gather_tokens(unit, rest) @ gather_tokens(unit, kept).mT)
        target = self.target(target.scatter(1, rest, home))
        share = self.share(score)
        sums = torch.zeros_like(kept, dtype=torch.float32).scatter_add(1, target, share)
        return Reduction(kept, score.shape[1], target, share / sums.gather(1, target), drops=False)

    def precision(self, score):
        return score

    def vectors(self, state):
        return state.scores[KEYS]

    def home(self, cosine):
        return cosine.argmax(-1)

    def target(self, target):
        return target

    def share(self, score):
        return score


class OtherBlock(Merges):
    def scores(self):
        return TowerScore("cls_attention", -1), KEYS


class OtherKind(Merges):
    def scores(self):
        return RECEIVED, KEYS


class LeastSimilar(Merges):
    def home(self, cosine):
        return cosine.argmin(-1)


class Half(Merges):
    def precision(self, score):
        return score.half()


class Features(Merges):
    def vectors(self, state):
        return state.features


class ShiftedWeights(Merges):
    def share(self, score):
        return score.roll(1, 1)


class ShiftedTargets(Merges):
    def target(self, target):
        return (target + 1) % self.budget


class ActsElsewhere(Merges):
    metadata = dataclasses.replace(Merges.metadata, acts="before decoder layer 0")


class SaysThatItDrops(Merges):
    metadata = dataclasses.replace(Merges.metadata, rest="dropped", score="CLS attention and keys, block −2")


class SaysThatItReadsTheQuestion(Merges):
    metadata = dataclasses.replace(Merges.metadata, reads=(*Merges.metadata.reads, "question"))


class SaysAMean(Merges):
    metadata = dataclasses.replace(Merges.metadata, weights="mean")


@dataclass(frozen=True, kw_only=True)
class Reinserts(Reducer):
    """Keeps half of the budget by CLS attention; the others are the least similar to these."""

    name: ClassVar[str] = "reinserts"
    metadata: ClassVar[MethodMetadata] = MethodMetadata(
        acts="after the tower",
        score="CLS attention, block −2, then the least similar features",
        reads=("cls_attention -2", "features"),
        similarity="features",
    )

    def scores(self) -> tuple[TowerScore, ...]:
        return (CLS,)

    def encoder(self, state: EncoderState) -> Reduction:
        kept = keep_top(state.scores[CLS], self.budget // 2)
        rest, vectors = others(kept, state.features.shape[1]), self.vectors(state)
        unit = vectors / vectors.norm(dim=-1, keepdim=True)
        alike = (gather_tokens(unit, rest) @ gather_tokens(unit, kept).mT).amax(-1)
        again = rest.gather(1, keep_top(self.different(alike), self.budget - kept.shape[1]))
        return Reduction(torch.cat([kept, again], 1).sort(1).values, state.features.shape[1])

    def vectors(self, state):
        return state.features.float()

    def different(self, alike):
        return -alike


class ReinsertsTheMostSimilar(Reinserts):
    def different(self, alike):
        return alike


class ComparesInTheModelsPrecision(Reinserts):
    def vectors(self, state):
        return state.features


@dataclass(frozen=True, kw_only=True)
class Middle(Scorer):
    """Ranks by CLS attention and nearness to the middle of the image."""

    name: ClassVar[str] = "middle"
    metadata: ClassVar[MethodMetadata] = MethodMetadata(
        acts="after the tower", score="CLS attention, block −2", reads=("cls_attention -2", "grid")
    )

    def scores(self) -> tuple[TowerScore, ...]:
        return (CLS,)

    def score(self, state):
        return state.scores[CLS] - 0.3 * self.coordinates(state).square().sum(-1)

    def coordinates(self, state):
        return state.coordinates()


class WidthOf24(Middle):
    def coordinates(self, state):
        token = torch.arange(state.layout.tokens)
        return torch.stack([token // 24, token % 24], 1) / 11.5 - 1


class WidthOf24ForColumns(Middle):
    def coordinates(self, state):
        token = torch.arange(state.layout.tokens)
        return torch.stack([token // state.layout.columns / state.layout.rows * 2, token % 24 / 11.5], 1) - 1


MISTAKES = {
    OtherBlock: r"reads states \['cls_attention -2'|asks for \['cls_attention -1'|names blocks \[22\] of 24",
    OtherKind: "scores\\(\\) asks for|names blocks",
    LeastSimilar: "merges tokens into a target that is less like them",
    Half: "computes in half precision",
    Features: "depends on features",
    ShiftedWeights: "but metadata.weights says 'score'",
    ShiftedTargets: "depends on order",
    ActsElsewhere: r"says 'before decoder layer 0', .*\['encoder'\]",
    SaysThatItDrops: "metadata.rest says 'dropped'",
    SaysThatItReadsTheQuestion: "names question, and nothing",
    SaysAMean: "but metadata.weights says 'mean'",
    ReinsertsTheMostSimilar: "tokens that encoder keeps are more alike",
    ComparesInTheModelsPrecision: "other tokens where .* float16",
    WidthOf24: "depends on order|names grid, and nothing",
    WidthOf24ForColumns: "depends on order",
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """64 visual tokens and 8 decoder layers."""
    path = tmp_path_factory.mktemp("wide")
    save_transformers_layout(path, make_tiny_llava(num_hidden_layers=8, image=112))
    return load(path, device="cpu")


@pytest.mark.parametrize("cls", [Merges, Reinserts, Middle])
def test_a_method_that_does_what_its_metadata_says_passes(cls, wide):
    observed.check(cls, wide)


@pytest.mark.parametrize("cls", MISTAKES)
def test_the_contract_sees_a_mistake_that_metadata_contradicts(cls, wide):
    """Each of these passed all tests, of a new method or of one that was there."""
    with pytest.raises(AssertionError, match=MISTAKES[cls]):
        observed.check(cls, wide)


def made(kept, **fields):
    return lambda state: Reduction(kept(len(state.features)), 16, **{n: make(state) for n, make in fields.items()})


def rows(*indices):
    return lambda images: torch.tensor([indices] * images)


WRONG = {
    "a tensor": (
        lambda state: torch.arange(8),
        "must return a Reduction, a list of them or None, got a tensor of int64",
    ),
    "a list of tensors": (lambda state: [torch.arange(8)] * len(state.features), "got a tensor of int64"),
    "too few": (lambda state: [Reduction(rows(0, 1)(1), 16)], "one reduction for each of 2 images, got 1"),
    "other tokens": (lambda state: Reduction(rows(0, 1)(2), 80), "of 80 tokens, but each image has 16"),
    "one row": (made(lambda images: torch.arange(2)), r"kept must be int64 of shape \[2, 2\] .*, got .* shape \[2\]"),
    "a mask": (made(lambda images: torch.ones(images, 16) > 0), r"got a tensor of bool and shape \[2, 16\]"),
    "beyond": (made(rows(3, 16)), r"0 to 15, got \[3, 16\] for q0"),
    "negative": (made(rows(-1, 3)), r"0 to 15, got \[-1, 3\] for q0"),
    "unsorted": (made(rows(4, 2)), r"kept must ascend .*, got \[4, 2\] for q0"),
    "twice": (made(rows(2, 2)), r"must not hold a token twice, got \[2, 2\] for q0"),
    "half a merge": (
        made(rows(0, 1), assignment=lambda state: torch.zeros(2, 16).long()),
        "assignment and merge_weight",
    ),
    "target": (
        made(rows(0, 1), assignment=lambda state: torch.full((2, 16), 2), merge_weight=lambda state: torch.ones(2, 16)),
        r"assignment must be -1 \(dropped\) to 1 \(output tokens\), got 2 to 2",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_return_is_one_sentence_that_names_the_method(wrong, tiny, monkeypatch):
    """Unsorted, repeated and foreign indices ran and printed a result; a tensor was a traceback."""
    give, sentence = WRONG[wrong]
    monkeypatch.setattr(Planted, "encoder", lambda self, state: give(state))
    with pytest.raises(MethodError, match=r"planted\.encoder: .*" + sentence):
        prefill(tiny, samples(2), Planted(budget=2))


def test_a_method_that_declares_it_may_keep_a_token_twice(tiny, monkeypatch):
    """A duplicated token (official AttnMix) is the same kept index twice."""
    monkeypatch.setattr(Planted, "encoder", lambda self, state: made(rows(2, 2))(state))
    monkeypatch.setattr(Planted, "known_deviations", {"duplicates with how=other": "why"})
    prefill(tiny, samples(2), Planted(budget=2, how="other"))
    with pytest.raises(MethodError, match="twice"):
        prefill(tiny, samples(2), Planted(budget=2))


@pytest.mark.parametrize(
    ("score", "sentence"),
    [
        (lambda sums: sums[0], r"must return a tensor of shape \[2, 16\].*got \[16\]"),
        (lambda sums: sums * 0 / 0, "must return numbers, got NaN"),
    ],
)
def test_a_wrong_score_is_one_sentence(score, sentence, tiny):
    """Of scores that are NaN, the tokens at the front were kept, and the run printed a result."""
    wrong = dataclass(frozen=True, kw_only=True)(
        type("Wrong", (Scorer,), {"name": "wrong", "score": lambda self, state: score(state.features.sum(-1))})
    )
    with pytest.raises(MethodError, match=r"wrong\.score: " + sentence):
        prefill(tiny, samples(2), wrong(budget=2))


@pytest.mark.parametrize(
    ("function", "returned", "sentence"),
    [
        ("scores", RECEIVED, "planted.scores: must return a tuple of TowerScore, got a TowerScore"),
        ("scores", ("received_attention",), "planted.scores: .*, got a tuple"),
        ("tokens_per_layer", (2,), "planted.tokens_per_layer: .* a tuple of 4 numbers, .* got 1 numbers"),
        ("tokens_per_layer", 2.0, "planted.tokens_per_layer: .* got a float"),
    ],
)
def test_wrong_scores_and_plans_are_one_sentence_before_the_run(function, returned, sentence, tiny, monkeypatch):
    """A TowerScore without its comma was a TypeError, and a plan of one number a ValueError of `zip`."""
    monkeypatch.setattr(Planted, function, lambda self, *spec: returned)
    with pytest.raises(MethodError, match=sentence):
        require(Planted(budget=2), tiny.spec)


def test_on_an_accelerator_values_are_read_once(tiny, monkeypatch):
    """The host must not wait at every stage of every batch: the first batch of a method, options and stage is read."""
    monkeypatch.setattr(reducer, "HOST", "none")
    monkeypatch.setattr(reducer, "_read", set())
    read = []
    on_host = reducer.np.from_dlpack
    monkeypatch.setattr(reducer.np, "from_dlpack", lambda tensor: read.append(tensor) or on_host(tensor))
    for _ in range(3):
        prefill(tiny, samples(2), Planted(budget=2))
    assert len(read) == 1, "once"
    prefill(tiny, samples(2), Planted(budget=2, how="other"))
    assert len(read) == 2, "another branch"


def test_a_wrong_return_ends_the_run_at_once(tiny, monkeypatch):
    """Sixteen questions were blamed first, one by one."""

    def generate(*arguments, **options):
        raise MethodError("planted.encoder: wrong.")

    monkeypatch.setattr(ask, "generate", generate)
    ready = [ask.LoadedQuestion(None, sample, "") for sample in samples(3)]
    job = type("Job", (), {"model": tiny, "reducer": None, "max_new_tokens": 4})()
    with pytest.raises(MethodError):
        list(ask.outcomes(job, ready, ask.BatchLimit()))


def test_a_method_that_is_no_frozen_dataclass_is_one_sentence():
    """A missing @dataclass was a TypeError about an unexpected argument, at the first question."""
    with pytest.raises(UserError, match="Bare must be a frozen dataclass"):
        registry.register("bare")(type("Bare", (Scorer,), {"score": lambda self, state: None}))


@pytest.mark.process
def test_a_broken_file_leaves_the_other_methods_alone(tmp_path):
    """A syntax error in one baseline broke `vtr show methods` of another."""
    program = (
        "import sys, baselines, eval.show\n"
        f"baselines.__path__.append({str(tmp_path)!r})\n"
        "sys.exit(eval.show.main(['methods', sys.argv[1]]))\n"
    )
    (tmp_path / "broken.py").write_text("def\n")
    shown = {
        name: subprocess.run([sys.executable, "-c", program, name], capture_output=True, text=True)
        for name in ("fastv", "broken")
    }
    assert shown["fastv"].returncode == 0 and shown["fastv"].stdout.startswith("fastv")
    assert "Warning: baselines.broken " in shown["fastv"].stderr
    assert shown["broken"].returncode == 2 and "Traceback" not in shown["broken"].stderr
    assert shown["broken"].stderr.splitlines()[-1].startswith("baselines.broken cannot be imported: SyntaxError")


def test_a_class_that_was_not_registered_is_one_sentence():
    """The file was there, and "Unknown method" said nothing of what it lacked."""
    with pytest.raises(UserError, match=r"baselines/_staged\.py registers no method"):
        registry.build("_staged", 8)
    with pytest.raises(UserError, match=r'write @register\("bare"\) above it'):
        registry.register(type("Bare", (Scorer,), {}))


def test_a_class_token_that_is_asked_for_and_missing_is_refused(tiny):
    spec = dataclasses.replace(tiny.spec, has_cls=False)
    with pytest.raises(UserError, match=r"cls_token .* this tower has none"):
        registry.build("consensusdrop", 8, {"cls_token": "true"}).check(spec)
