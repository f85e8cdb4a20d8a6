"""The worker of this repository: a method beside its oracle, on random weights in the shape of a real model.

    python -m eval.efficiency.peers.ours --method visiondrop --budget 64 --set official=true
    python -m eval.efficiency.peers.ours --method full,consensusdrop,visiondrop --budget 64

One method is measured as "ours", several under their names. Seconds are those to the first token (vision, selection
and prefill) from prepared pixels and token ids, as everywhere. Every measurement asks about another image.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from eval.command import exit_on_user_error, make_parser
from eval.config import FULL
from eval.efficiency.latency.methods import chosen_options, oracles, reducers_of
from eval.efficiency.latency.questions import noise_batches
from eval.efficiency.oracle import oracle_of
from eval.efficiency.peers.protocol import serve
from eval.efficiency.shapes import SHAPES, random_llava
from eval.results.provenance import versions
from llava.errors import UserError, unknown
from llava.model.builder import DTYPES
from llava.model.llava_arch import Llava
from llava.pipeline.accounting import Timer
from llava.pipeline.prefill import prefill
from llava.processing.sample import Sample
from llava.reduction.crop_budget import planned
from llava.reduction.reducer import Reducer


@torch.inference_mode()
def first_token(model: Llava, reducer: Reducer, samples: list[Sample]) -> float:
    """Seconds from prepared pixels and token ids to the first token."""
    timer = Timer(model.device)
    state, _ = prefill(model, samples, reducer, timer)
    model.logits(state.hidden).argmax(-1)
    timer.mark("prefill")
    spent = timer.seconds
    return sum(spent.values()) - spent.get("preprocess", 0.0)


def build(args: argparse.Namespace) -> Llava:
    """The model of a worker's flags. Its CPU threads are those of OMP_NUM_THREADS, which the parent sets."""
    if args.shape not in SHAPES:
        raise unknown("shape", args.shape, SHAPES)
    return random_llava(args.shape, args.distinct, args.dtype, args.layers)


def described(model: Llava, runs: str, args: argparse.Namespace) -> dict[str, Any]:
    """What a worker says of itself."""
    return {
        "ready": runs,
        **versions(),
        "model": model.name,
        "layers": model.spec.layers,
        "distinct_layers": args.distinct,
        "dtype": args.dtype,
        "threads": torch.get_num_threads(),
        "text tokens": len(model.prompt(noise_batches(model, 1, differ=False)(0)[0]).ids) - 1,
    }


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """--shape, --layers, --distinct and --dtype, as `build` reads them."""
    parser.add_argument("--shape", default="llava-1.5-7b", help=f"one of {', '.join(SHAPES)}")
    parser.add_argument("--layers", type=int, help="decoder layers; all of the real model if left out")
    parser.add_argument("--distinct", type=int, default=4, help="decoder layers with their own weights")
    parser.add_argument("--dtype", default="bfloat16", choices=tuple(DTYPES), help="of the weights")


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code when the input ends."""
    parser = make_parser("eval.efficiency.peers.ours", __doc__)
    parser.add_argument("--method", required=True, help="a name of `vtr show methods`, or several separated by commas")
    parser.add_argument("--budget", type=int, help="visual tokens to keep; needless with --method full")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="[METHOD.]KEY=VALUE",
        help="an option of the method or of one of them",
    )
    parser.add_argument("--oracle", action="store_true", help="measure the methods' oracles, too")
    add_model_flags(parser)
    args = parser.parse_args(arguments)
    names = args.method.split(",")
    if args.budget is None and names != [FULL]:
        raise UserError(f"--method {args.method} needs a --budget: the visual tokens to keep.")
    model = build(args)
    methods = reducers_of(names, args.budget or model.visual_tokens, chosen_options(args.set, names), model)
    theirs: dict[str, Reducer] = {}
    if args.oracle:
        for one in methods.values():
            oracle_of(one, model.spec)  # an error where there is none
        theirs, _ = oracles(methods, model.spec)
    runs = methods | theirs
    if len(methods) == 1:
        runs = dict(zip(("ours", "oracle") if theirs else ("ours",), runs.values(), strict=True))
    ask, turns = noise_batches(model, 1, differ=True), itertools.count()

    def measure() -> dict[str, float]:
        turn = next(turns)
        return alternately(turn, {name: partial(first_token, model, run, ask(turn)) for name, run in runs.items()})

    plans = {name: planned(one.for_picture(model.spec), model.spec) for name, one in methods.items()}
    plan = plans if len(plans) > 1 else plans[names[0]]
    serve(described(model, f"{args.method} {args.set}", args) | {"visual tokens per layer": plan}, measure)
    return 0


def alternately(turn: int, runs: Mapping[str, Callable[[], float]]) -> dict[str, float]:
    """Seconds of each, measured forwards in even turns and backwards in odd ones."""
    order = list(runs)[:: 1 if turn % 2 == 0 else -1]
    found = {name: runs[name]() for name in order}
    return {name: found[name] for name in runs}


if __name__ == "__main__":
    sys.exit(main())
