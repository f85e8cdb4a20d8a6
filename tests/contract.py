"""What the contract asks of a method at any options, for tests/test_every_method.py and methods planted against it.

Configurations are the defaults, every choice of every option, and the ends of every number (`option(least=, most=)`, or
values around the default). A failure says method, options, question, step and indices.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import Field, replace
from functools import cache
from typing import Any

import pytest
import torch

from eval.results import cost
from llava.budget import BLIND
from llava.errors import UserError
from llava.model.llava_arch import Llava
from llava.pipeline import stages
from llava.pipeline.generate import prefill
from llava.processing.prompt import Sample
from llava.reduction import registry
from llava.reduction.budget import require
from llava.reduction.merging import Trace
from llava.reduction.reducer import Reducer, check_reductions, options_of
from llava.reduction.states import DecoderState, EncoderState, PromptState

# The methods that have a budget, and full; tests/test_blind.py has what is said of none alone.
METHODS = tuple(name for name in registry.names() if name != BLIND)
BUDGETS = (8, 12, 7, 4, 20, 24, 32, 40)
SIZES = (2, 3, 4)  # beside every question alone
LAYERS = ((1,), (2,), (1, 2), (1, 2, 3), (2, 3, 5))  # for options that name decoder layers
# The contract holds for compositions, too.
COMPOSED = ("divprune+fastv", "fastervlm+pyramiddrop", "holov+restore", "vispruner+restore")
# What the pipeline does for every method (tests/test_next.py); those that act in the decoder alone have no use for it.
LEFT_OUT = {"retention_ratio", "newlines"}


def values_of(known: Field) -> list[Any]:
    """Other values of an option than its default: all choices, or the ends of a number."""
    default, data = known.default, known.metadata
    if isinstance(default, bool):
        return [not default]
    if data["choices"]:
        return [value for value in data["choices"] if value != default]
    if isinstance(default, tuple):
        return [value for value in LAYERS if value != default]
    least, most = data["least"], data["most"]
    if isinstance(default, int):
        near = [default - 1, default + 1, default + 2, default // 2, 2 * default]
        found = [default - 1 if least is None else least, *near, most]
    else:
        found = [default / 8 if least is None else least, 8 * default if most is None else most]
    return [value for value in dict.fromkeys(found) if value not in (None, default)]


def accepted(
    cls: type[Reducer], options: dict[str, Any], model: Llava, count: int = 1, budgets: Sequence[int] = BUDGETS
) -> list[Reducer]:
    """The method with these options at the first budgets below all tokens that it accepts; [] where it accepts none."""
    if cls.blind:
        return [cls(**options)]
    found: list[Reducer] = []
    for budget in (budget for budget in budgets if budget < model.visual_tokens):
        try:
            reducer = cls(budget=budget, **options)
            require(reducer, model.spec)
        except UserError:
            continue
        found.append(reducer)
        if len(found) == count:
            break
    return found


def configurations(cls: type[Reducer]) -> Iterator[dict[str, Any]]:
    """The defaults, and each other value of each option."""
    yield {}
    for name, known in options_of(cls).items():
        if name not in LEFT_OUT:
            yield from ({name: value} for value in values_of(known))


def label(reducer: Reducer) -> str:
    """Name, budget and options that are not the default."""
    changed = {n: getattr(reducer, n) for n, known in options_of(type(reducer)).items()}
    changed = {n: value for n, value in changed.items() if value != options_of(type(reducer))[n].default}
    return " ".join([reducer.name, str(reducer.budget), *(f"{name}={value}" for name, value in changed.items())])


def run(model: Llava, batch: list[Sample], reducer: Reducer):
    state, record = prefill(model, batch, reducer)
    return model.logits(state.hidden), record.accounting(state), record


def standing(steps: Trace) -> tuple[torch.Tensor, torch.Tensor]:
    """[K] input positions of what is left after all steps, and which of them were appended."""
    place = torch.arange(steps[0].reduction.inputs)
    appended = torch.zeros(len(place), dtype=torch.bool)
    for step in steps:
        kept = step.reduction.kept[0]
        place, appended = place[kept], appended[kept]
        appended[len(kept) - step.reduction.appended :] = True
    return place, appended


def check_order(reducer: Reducer, question: str, steps: Trace) -> None:
    """Kept tokens are ascending and unique; or, for a method that says so, merged ones stand behind them."""
    place, appended = standing(steps)
    said = f"{label(reducer)}: image of {question} after {steps[-1].place}: tokens {place.tolist()}"
    assert bool(len(place)) != reducer.blind, said
    if reducer.blind:
        return
    assert place.min() >= 0 and place.max() < steps[0].reduction.inputs, said
    assert reducer.deviates("duplicates") or len(place.unique()) == len(place), f"{said}, one of them twice"
    raster = place[~appended] if reducer.deviates("appended") else place
    assert (raster.diff() >= 0).all() or reducer.deviates("unsorted"), f"{said}, not in raster order"


def check_averages(reducer: Reducer, question: str, steps: Trace) -> None:
    """Every output token's shares add up to 1, so merging does not change the scale of features."""
    for step in steps if not reducer.deviates("scale") else ():
        if not step.reduction.merges:
            continue
        sums = step.reduction.apply(torch.ones(1, step.reduction.inputs, 1))[0, :, 0]
        wrong = ((sums - 1).abs() > 1e-4).nonzero().flatten().tolist()
        assert not wrong, (
            f"{label(reducer)}: image of {question}, {step.place}: the weights of output tokens {wrong} add up to "
            f"{[round(sums[i].item(), 4) for i in wrong]}, not to 1"
        )


def check_equal(reducer: Reducer, question: str, said: str, first: Trace, second: Trace) -> None:
    """The same reductions."""
    for a, b in zip(first, second, strict=True):
        assert a.place == b.place and torch.equal(a.reduction.kept, b.reduction.kept), (
            f"{label(reducer)}: image of {question}, {a.place}: {said} it keeps {a.reduction.kept[0].tolist()}, "
            f"alone {b.reduction.kept[0].tolist()}"
        )


def entering(tokens: int, layers: int, steps: Trace) -> tuple[int, ...]:
    """The tokens of an image that enter each layer, by the reductions alone."""
    left = [tokens] * layers
    for step in steps:
        left[step.layer :] = [step.reduction.kept.shape[1]] * (layers - step.layer)
    return tuple(left)


def check(reducer: Reducer, model: Llava, batch: list[Sample]) -> None:
    """The whole contract for one method at one budget, over batches of one question to all of them.

    A method without a plan must keep each image within its bounds, a result must say where their mean misses the budget
    and that the image decides, and the tokens of each image are counted again from its reductions.
    """
    planned, (least, most) = reducer.tokens_per_layer(model.spec), reducer.bounds(model.spec)
    if planned is not None and not reducer.deviates("uncounted"):
        mean = sum(planned) / len(planned)
        assert abs(mean - reducer.budget) <= reducer.rounding, f"{label(reducer)}: plans {planned}, a mean of {mean:g}"
    alone = [run(model, [sample], reducer) for sample in batch]
    records = [cost.accounting_record(accounting) for _, (accounting,), _ in alone]
    off = cost.off_budget(records, reducer)
    summary = cost.summarise_accounting(records)
    mean = summary["mean_tokens_per_layer"]
    missed = planned is None and abs(mean - min(reducer.budget, model.visual_tokens)) > reducer.rounding
    assert bool(off) == missed, f"{label(reducer)}: {mean:g} tokens per layer, a result says of its budget: {off}"
    assert summary["adaptive"] == (planned is None), f"{label(reducer)}: a result says {summary['adaptive']}"
    for size in SIZES:
        logits, accounts, record = run(model, batch[:size], reducer)
        for i, steps in enumerate(record.steps):
            question = batch[i].id
            if batch[i].image is not None:
                counted, said = accounts[i].tokens_per_layer, f"{label(reducer)}: {question}"
                plan = planned or entering(model.visual_tokens, len(counted), steps)
                assert counted == plan, f"{said}: {'plans' if planned else 'keeps'} {plan}, counted are {counted}"
                inside = least <= accounts[i].mean <= most
                assert inside, f"{said}: {accounts[i].mean:g} tokens per layer, not {least:g} to {most:g}"
            if steps:
                check_order(reducer, question, steps)
                check_averages(reducer, question, steps)
            check_equal(reducer, question, f"in a batch of {size}", steps, alone[i][2].steps[0])
            gap = (logits[i] - alone[i][0][0]).abs().max().item()
            assert gap < 1e-4, f"{label(reducer)}: {question}: logits in a batch of {size} differ by {gap:.2g}"


def unused(cls: type[Reducer], models: dict[str, tuple[Llava, list[Sample]]], said: set[str]) -> list[str]:
    """Options whose values change no answer of any of the models, alone or beside another value of another option.

    Args:
        said: options that the method says to be unused.
    """
    known = options_of(cls)
    own = {name: values_of(known[name]) for name in known if name not in LEFT_OUT and values_of(known[name])}
    # Choices of other options first, numbers last.
    beside = sorted(
        ({name: value} for name, values in own.items() for value in values),
        key=lambda one: not isinstance(next(iter(one.values())), bool | str),
    )
    answers = cache(lambda model, reducer: run(*models[model], reducer)[0])

    def changes(name: str) -> bool:
        tried = [(n, model, o) for n in (1, len(BUDGETS)) for model in models for o in [{}, *beside] if name not in o]
        for budgets, model, options in tried:
            for reducer in accepted(cls, options, models[model][0], budgets):
                for value in own[name]:
                    with suppress(UserError):
                        other = replace(reducer, **{name: value})
                        require(other, models[model][0].spec)
                        if not torch.equal(answers(model, reducer), answers(model, other)):
                            return True
        return False

    return [name for name in own if name not in said and not changes(name)]


@contextmanager
def planted_signals(planted: dict[str, list[int]]) -> Iterator[set[str]]:
    """Every signal that a method can rank by is highest at some tokens of each image; yields the names of those read.

    Signals are the scores of the tower, the attention of the text in the decoder, and similarity to the question in
    CLIP's space.

    Args:
        planted: question -> token numbers. Images are whole ones.
    """
    read: set[str] = set()
    places: dict[str, torch.Tensor] = {}  # question -> [N] original token of each token that is left
    tokens = {name: torch.tensor(numbers) for name, numbers in planted.items()}

    def raised(ids: tuple[str, ...], values: torch.Tensor) -> torch.Tensor:
        """[B, ..., N] with the planted tokens far above the others."""
        read.add("a signal")
        values = values.clone()
        for row, name in enumerate(ids):
            place = places.get(name, torch.arange(values.shape[-1]))
            here = torch.isin(place[-values.shape[-1] :], tokens[name])
            values[row][..., here] = values[row][..., here] + 3 * (values[row].amax() - values[row].amin())
        return values

    def tracked(method, stage, returned, ids, count):
        found = check_reductions(method, stage, returned, ids, count)
        for reduction, rows in found:
            for row, image in enumerate(rows):
                before = places.get(ids[image])
                if before is None or len(before) < count:  # class token first
                    size = count - method.keep_cls
                    before = torch.cat([torch.full((count - size,), -1), torch.arange(size)])
                places[ids[image]] = before[reduction.kept[row]]
        return found

    groups_of = stages.Stages._groups

    def scored(self):
        groups = groups_of(self)
        for group in groups:
            ids, scores = group.fields["ids"], group.fields["scores"]
            group.fields["scores"] = {s: raised(ids, v) if v.dim() == 2 else v for s, v in scores.items()}
        return groups

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "check_reductions", tracked)
        patch.setattr(stages.Stages, "_groups", scored)
        for cls, name in ((PromptState, "text_attention"), (DecoderState, "attention")):
            original = getattr(cls, name)

            def attended(state, *arguments, _original=original, **options):
                weights, mask = _original(state, *arguments, **options)
                return raised(state.ids, weights), mask

            patch.setattr(cls, name, attended)
        similarity = EncoderState.relevance
        patch.setattr(EncoderState, "relevance", lambda state, *a, **o: raised(state.ids, similarity(state, *a, **o)))
        yield read
