"""The oracle of a method keeps as many tokens as the method, but chooses them for free.

No method can be faster than its oracle at the same tokens per layer, so the time that it takes beyond its oracle is the
price of choosing tokens. The oracle drops tokens at the stages of the method and keeps evenly spaced ones, whose places
are computed once. It reads no score, merges nothing and computes nothing per question. It is not in the registry of
methods.

    oracle_of(reducer, spec)    keeps as many tokens as a method in every decoder layer
    flat_oracle(budget)         keeps `budget` tokens in every layer, dropped after the tower: the limit of a budget

`reducers_of` and `oracles` make the rows of a comparison: the methods that were asked for, and the oracle of each.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from eval.config import FULL, options_by_method
from llava.budget import BLIND
from llava.errors import UserError
from llava.model.llava_arch import Llava
from llava.reduction import registry
from llava.reduction.budget import planned, require
from llava.reduction.merging import Reduction
from llava.reduction.ranking import cached_by_sizes
from llava.reduction.reducer import Reducer
from llava.reduction.states import DecoderState, EncoderState, PromptState
from llava.reduction.token_layout import ModelSpec, PatchGrid


class AfterTower(Reducer):
    """A schedule without a choice of tokens: the budget in every layer, from the tower on."""

    def encoder(self, state: EncoderState) -> None:
        return None


@dataclass(frozen=True, kw_only=True)
class Oracle(Reducer):
    """Keeps evenly spaced tokens, as many as `method` plans to have in each decoder layer.

    For a method that merges inside the tower, the oracle drops tokens after the tower, which runs on all patches. For a
    method that takes a smaller image (`input_grid`), the oracle takes the same smaller image.

    Attributes:
        method: the method whose stages and tokens per layer the oracle takes over.
        counted: tokens in each layer that a method without a plan had of one image, which alone is asked about.
    """

    name: ClassVar[str] = "oracle"

    method: Reducer
    counted: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "acts_in", stages_of(self.method))
        object.__setattr__(self, "second", self.method.second)

    def tokens_per_layer(self, spec: ModelSpec) -> tuple[int, ...] | None:
        return self.counted or self.method.tokens_per_layer(spec)

    def with_budget(self, budget: int) -> Self:
        method = self.method.with_budget(budget)
        return replace(self, budget=budget, retention_ratio=method.retention_ratio, method=method)

    def for_image(self, spec: ModelSpec) -> Self:
        method = self.method.for_image(spec)
        return replace(self, budget=method.budget, retention_ratio=method.retention_ratio, method=method)

    def before_decoder(self, spec: ModelSpec) -> Self:
        method = self.method.before_decoder(spec)
        return replace(self, budget=method.budget, method=method)

    def keeps_all(self, tokens: int) -> bool:
        return self.method.keeps_all(tokens)

    def input_grid(self, layout: PatchGrid) -> tuple[int, int] | None:
        return self.method.input_grid(layout)

    def encoder(self, state: EncoderState) -> Reduction | None:
        return self._before_decoder(state, state.features)

    def prompt(self, state: PromptState) -> Reduction | None:
        return self._before_decoder(state, state.tokens)

    def decoder_layers(self, layers: int) -> tuple[int, ...]:
        return self.method.decoder_layers(layers)

    def decoder(self, state: DecoderState) -> Reduction | None:
        assert state.spec is not None  # the pipeline sets it
        plan = planned(self, state.spec)
        assert plan is not None  # oracle_of refuses a method without a plan
        return evenly(state.tokens, plan[state.layer])

    def _before_decoder(self, state: EncoderState, tokens: Tensor) -> Reduction | None:
        assert state.spec is not None  # the pipeline sets it
        plan = self.tokens_per_layer(state.spec)
        assert plan is not None  # oracle_of refuses a method without a plan
        return evenly(tokens, plan[0])


def oracle_of(reducer: Reducer, spec: ModelSpec, counted: tuple[int, ...] = ()) -> Oracle:
    """The oracle with the stages and the tokens per layer of a configured method.

    Args:
        spec: sizes of the model.
        counted: tokens in each layer of the one image that will be asked about, for a method without a plan.

    Raises:
        UserError: the number of tokens depends on the content of the image, so there is no schedule to follow.
    """
    plan = planned(reducer.for_image(spec), spec)
    if plan is None and not counted:
        raise UserError(
            f"{reducer.name} keeps a number of tokens that depends on the image, so it has no oracle; "
            "set its options so that it keeps a budget."
        )
    return Oracle(
        budget=reducer.budget,
        positions=reducer.positions,
        # Shares by content would have to be computed, so every tile gets the same.
        tile_budget="global" if reducer.tile_budget == "global" else "each",
        retention_ratio=reducer.retention_ratio,
        newlines=reducer.newlines,
        method=reducer,
        counted=() if plan else counted,
    )


def flat_oracle(budget: int) -> Oracle:
    """The oracle with `budget` tokens in every decoder layer, chosen after the tower."""
    return Oracle(budget=budget, method=AfterTower(budget=budget))


def stages_of(method: Reducer) -> frozenset[str]:
    """Stages in which the oracle of a method acts: those of the method, but "encoder" in place of "tower"."""
    return frozenset("encoder" if stage == "tower" else stage for stage in method.acts_in)


def evenly(tokens: Tensor, keep: int) -> Reduction | None:
    """The reduction of [B, N, D] tokens to `keep` evenly spaced ones; None if there are no more than that."""
    batch, total = tokens.shape[:2]
    return None if keep >= total else Reduction(even_places(batch, total, keep, tokens.device), total)


@cached_by_sizes
def even_places(batch: int, total: int, keep: int, device: torch.device) -> Tensor:
    """[batch, keep] ascending indices below `total`. They are kept, so that later prefills find them on the device."""
    return (torch.arange(keep, device=device) * total // keep).repeat(batch, 1)


# Rows of a comparison


def chosen_options(settings: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Options of --set by method: METHOD.KEY=VALUE for one method, KEY=VALUE for each named method.

    Args:
        settings: the values of --set.
        names: the measured methods, or "all".

    Raises:
        UserError: with all methods, an option names none of them.
    """
    everything = list(names) == ["all"]
    for setting in settings:
        if everything and "." not in setting.partition("=")[0]:
            raise UserError(f"--set {setting} names no method; with all methods write METHOD.{setting}.")
    by_method = options_by_method(registry.names() if everything else names, settings)
    return {method: options for method, options in by_method.items() if options}


def reducers_of(
    names: Sequence[str], budget: int, options: dict[str, dict[str, str]], model: Llava
) -> dict[str, Reducer]:
    """The methods that can run at this budget. With "all", methods that cannot are left out and named on stderr.

    Args:
        names: methods, or "all". `full` keeps every token at any budget.
        options: options by method.

    Raises:
        UserError: a method that was named cannot run at this budget.
    """
    rows = {}
    everything = list(names) == ["all"]
    for name in [one for one in registry.names() if one != BLIND] if everything else names:
        reducer = registry.build(name, model.visual_tokens if name == FULL else budget, options.get(name, {}))
        try:
            require(reducer, model.spec)
        except UserError as error:
            if not everything:
                raise
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        rows[name] = reducer
    return rows


def oracles(reducers: dict[str, Reducer], spec: ModelSpec) -> tuple[dict[str, Reducer], dict[str, str]]:
    """The oracles of the methods, each once. Methods with the same tokens at the same stages share an oracle.

    Returns:
        Name -> oracle, and method -> name of its oracle. A method whose number of tokens depends on the content of the
        image has none.
    """
    rows: dict[str, Reducer] = {}
    name_of: dict[str, str] = {}
    known: dict[tuple[object, ...], str] = {}
    for name, reducer in reducers.items():
        if name == FULL:
            continue
        try:
            oracle = oracle_of(reducer, spec)
        except UserError:
            continue
        plan, layers = planned(reducer.for_image(spec), spec), reducer.decoder_layers(spec.layers)
        grid = reducer.input_grid(spec.layout)
        key = (stages_of(reducer), plan, layers, grid, oracle.tile_budget, oracle.newlines, oracle.positions)
        name_of[name] = known.setdefault(key, f"oracle of {name}")
        rows.setdefault(name_of[name], oracle)
    return rows, name_of
