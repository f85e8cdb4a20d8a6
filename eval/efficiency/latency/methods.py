"""Which methods are measured: `full`, those that were asked for, and the oracles of their token counts."""

import copy
import sys
from collections.abc import Sequence

from eval.config import FULL, options_by_method
from eval.efficiency.oracle import oracle_of, stages_of
from llava.errors import UserError
from llava.model.llava_arch import Llava
from llava.pipeline.faster.compiled_model import compile_model
from llava.reduction import registry
from llava.reduction.crop_budget import planned, require
from llava.reduction.model_spec import ModelSpec
from llava.reduction.reducer import Reducer

EVERYTHING = "all"
COMPILED = ", compiled"  # behind the name of a row that runs with `--compile`


def chosen_options(settings: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Options of --set by method: METHOD.KEY=VALUE for one method, KEY=VALUE for each that is named.

    Args:
        names: the measured methods, or "all".
    """
    everything = list(names) == [EVERYTHING]
    for setting in settings:
        if everything and "." not in setting.partition("=")[0]:
            raise UserError(f"--set {setting} names no method; with all methods write METHOD.{setting}.")
    found = options_by_method(registry.names() if everything else names, settings)
    return {method: options for method, options in found.items() if options}


def reducers_of(
    names: Sequence[str], budget: int, options: dict[str, dict[str, str]], model: Llava
) -> dict[str, Reducer]:
    """The methods that can run at this budget; of all methods, those that cannot are told on standard error.

    Args:
        names: methods, or "all". `full` keeps every token at any budget.
        options: by method.

    Raises:
        UserError: a method that was named cannot run at this budget.
    """
    found = {}
    everything = list(names) == [EVERYTHING]
    for name in registry.names() if everything else names:
        reducer = registry.build(name, model.visual_tokens if name == FULL else budget, options.get(name, {}))
        try:
            require(reducer, model.spec)
        except UserError as error:
            if not everything:
                raise
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        found[name] = reducer
    return found


def with_compiled(rows: dict[str, Reducer]) -> dict[str, Reducer]:
    """Every row twice, plain and compiled, one beside the other."""
    return {name + tail: reducer for name, reducer in rows.items() for tail in ("", COMPILED)}


def plain_name(name: str) -> str:
    """The row without graphs that a row belongs to."""
    return name.removesuffix(COMPILED)


def compiled_copy(model: Llava) -> Llava:
    """The same weights, run as graphs; each size of batches gets its own, so that all of them are compiled."""
    other = copy.copy(model)
    other.compiled = compile_model(other)
    return other


def oracles(reducers: dict[str, Reducer], spec: ModelSpec) -> tuple[dict[str, Reducer], dict[str, str]]:
    """The oracles of the methods, each once: methods with the same tokens at the same stages share one.

    Returns:
        Name -> oracle, and method -> name of its oracle. A method whose tokens depend on the image has none.
    """
    found: dict[str, Reducer] = {}
    named: dict[str, str] = {}
    known: dict[tuple[object, ...], str] = {}
    for name, reducer in reducers.items():
        if name == FULL:
            continue
        try:
            oracle = oracle_of(reducer, spec)
        except UserError:
            continue
        key = (
            stages_of(reducer),
            planned(reducer.for_picture(spec), spec),
            reducer.decoder_layers(spec.layers),
            reducer.input_grid(spec.layout),
            oracle.crops,
            oracle.newlines,
            oracle.positions,
        )
        if key not in known:
            known[key] = f"oracle of {name}"
            found[known[key]] = oracle
        named[name] = known[key]
    return found, named
