"""Compare this repository with what a user would run instead: two worker processes take turns on one machine.

    python -m lab.bench.peers measure --name visiondrop --json results/bench/peers/visiondrop.json \
        --worker "python -m lab.bench.peers ours --method visiondrop --budget 64" \
        --worker "/envs/visiondrop/bin/python worker.py"
    python -m lab.bench.peers table results/bench/peers/*.json

A worker is a process that builds its model once and then measures on request. A worker that runs a paper's official
code lies outside this repository and has an environment of its own. These lines go over its standard input and output:

    worker -> parent    {"ready": "what it runs", ...}              once, with whatever the result should record
    parent -> worker    measure
    worker -> parent    {"seconds": {"name": 1.23, ...}}            one measurement of each thing that it runs

Lines of a worker that do not begin with "{" are skipped, because libraries print. A worker measures nothing between two
requests, so at most one worker is busy. What slows the machine in a round slows both workers, so ratios are taken per
round. At the end each worker is killed.

This module has two workers, on random weights in the shape of a real model. Every measurement asks about another image.

    python -m lab.bench.peers ours --method visiondrop --budget 64 --set official=true
    python -m lab.bench.peers ours --method full,consensusdrop,visiondrop --budget 64
    python -m lab.bench.peers stock                       # dense: `generate` for one token, SDPA
    python -m lab.bench.peers stock --attentions          # and also with output_attentions=True

`ours` runs methods of this repository, and with `--oracle` their oracles. It measures the seconds to the first token
(vision, selection and prefill) from prepared pixels and token ids.

`stock` runs transformers. With `--attentions` a second measurement asks `generate` for the attention maps from which a
user would score tokens by the text. All modules then use the eager kernel, as after
`from_pretrained(attn_implementation="eager")`.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from eval.command import exit_on_user_error, make_parser, value
from eval.config import count
from eval.efficiency.counts import first_token
from eval.efficiency.measure import over_rounds
from eval.efficiency.oracle import chosen_options, oracles, reducers_of
from eval.efficiency.shapes import SHAPES, noise_batches, random_llava
from eval.results.report import hardware
from eval.tables import left_aligned, markdown
from eval.versions import commit, versions
from llava.constants import IMAGE_TOKEN_INDEX
from llava.errors import UserError
from llava.model.builder import DTYPES
from llava.model.llava_arch import Llava
from llava.pipeline.accounting import Timer
from llava.processing.prompt import Sample
from llava.reduction.budget import planned
from llava.reduction.reducer import Reducer
from llava.transformers_names import KERNEL

EQUAL = ("layers", "distinct_layers", "dtype", "threads")  # must agree between all workers that report them
Calls = Callable[[int], dict[str, Callable[[], float]]]  # number of a measurement -> name -> timed call

# Workers and their turns


class Worker:
    """A worker process, as its parent sees it.

    Args:
        command: the worker's command line.
        threads: threads of its CPU operations (OMP_NUM_THREADS).
        stack: kills the worker when it is closed.

    Raises:
        UserError: the command cannot be started, the worker ended early, or it wrote a line that breaks the protocol.
    """

    def __init__(self, command: str, threads: int, stack: ExitStack):
        self.command = command
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        pipe = subprocess.PIPE
        try:
            process = subprocess.Popen(shlex.split(command), stdin=pipe, stdout=pipe, text=True, env=environment)
        except (OSError, ValueError) as error:
            raise UserError(f"The worker {command!r} cannot be started: {error}.") from error
        self.process = stack.enter_context(process)
        stack.callback(process.kill)

    def read(self, key: str) -> dict[str, Any]:
        """Read the worker's next line of the protocol, which must have `key`."""
        assert self.process.stdout
        for line in self.process.stdout:
            if not line.startswith("{"):
                continue
            try:
                said: dict[str, Any] = json.loads(line)
            except ValueError:
                said = {}
            if key not in said:
                raise UserError(f"The worker {self.command!r} wrote {line.strip()[:200]!r}, not JSON with {key!r}.")
            return said
        code = self.process.wait()
        raise UserError(f"The worker {self.command!r} ended with exit code {code}; its own words are above.")

    def measure(self) -> dict[str, float]:
        """Ask the worker for one measurement: seconds by name.

        Raises:
            UserError: also if the worker gives no number, or one that is not a positive time.
        """
        assert self.process.stdin
        with suppress(BrokenPipeError):  # the worker has ended, which `read` reports
            os.write(self.process.stdin.fileno(), b"measure\n")
        seconds = self.read("seconds")["seconds"]
        times = list(seconds.values()) if isinstance(seconds, dict) else []
        if not times or not all(isinstance(one, int | float) and 0 < one < float("inf") for one in times):
            raise UserError(f"The worker {self.command!r} answered {seconds!r}, not seconds above 0 by name.")
        return {name: float(one) for name, one in seconds.items()}


def compare(name: str, commands: Sequence[str], rounds: int, threads: int) -> dict[str, Any]:
    """Measure the workers in turns, in reverse order in every second round.

    A drift of the machine within rounds cancels over two rounds. A first measurement of each worker is thrown away.

    Args:
        name: of the comparison.
        commands: command lines of the workers. The first name that the first worker measures is the reference.
        rounds: number of rounds after the warm-up.
        threads: CPU threads of each worker.

    Returns:
        What a result file holds: name, settings, what the workers report of themselves, and seconds by name per round.

    Raises:
        UserError: a worker fails, workers report models of different size, or two measure something under the same
            name.
    """
    with ExitStack() as stack:
        workers = [Worker(command, threads, stack) for command in commands]
        ready = [worker.read("ready") for worker in workers]
        for key in EQUAL:
            said = [worker[key] for worker in ready if key in worker]
            if any(one != said[0] for one in said):
                raise UserError(f"The workers say {key} {', '.join(map(str, said))}; give all of them the same model.")
        names = [name for worker in workers for name in worker.measure()]
        if len(set(names)) != len(names):
            raise UserError(f"The workers measure {', '.join(names)}; a name may occur once.")
        rows = []
        for number in tqdm(range(rounds), desc=name, unit="round", disable=None):
            row: dict[str, float] = {}
            for worker in workers if number % 2 == 0 else reversed(workers):
                row |= worker.measure()
            rows.append({name: row[name] for name in names})
    return {
        "name": name,
        "commands": list(commands),
        "threads": threads,
        "hardware": hardware("cpu"),
        "commit": commit(),
        "workers": ready,
        "rounds": rows,
    }


def table(results: Sequence[dict[str, Any]], beside: str | None = None) -> str:
    """Results of several comparisons as a Markdown table, with a row for everything except each reference.

    Args:
        results: what `compare` returned. The first name of a comparison's rounds is its reference.
        beside: use this name as the reference instead.

    Raises:
        UserError: a comparison did not measure `beside`.
    """
    lines = []
    for result in results:
        rounds = result["rounds"]
        names = list(rounds[0])
        if beside is not None and beside not in names:
            raise UserError(f"{result['name']} measured {', '.join(names)}, not {beside!r}; choose one of these.")
        reference = beside or names[0]
        title = result["name"] if beside is None else f"{result['name']}: {beside}"
        times = {name: [row[name] for row in rounds] for name in names}
        for name in names:
            if name != reference:
                ratio = str(over_rounds(times[name], times[reference]))
                seconds = [f"{median(times[one]):.2f}" for one in (reference, name)]
                lines.append([title, seconds[0], name, seconds[1], ratio, str(len(rounds))])
    return left_aligned(markdown(["comparison", "seconds", "beside it", "seconds", "ratio", "rounds"], lines))


def read(path: Path) -> dict[str, Any]:
    """Read a result file.

    Raises:
        UserError: there is no such file, or it is not a result of `measure`.
    """
    try:
        result: dict[str, Any] = json.loads(path.read_text())
        result["name"], result["rounds"][0]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} is no result of `measure`: {error!r}.") from error
    return result


# This repository


def ours(args: argparse.Namespace) -> None:
    """Serve measurements of methods, and of their oracles if asked."""
    names, model = args.method.split(","), build(args)
    methods = reducers_of(names, args.budget, chosen_options(args.set, names), model)
    runs = methods | (oracles(methods, model.spec)[0] if args.oracle else {})
    ask = noise_batches(model, 1, differ=True)

    def calls(number: int) -> dict[str, Callable[[], float]]:
        return {name: partial(ttft, model, reducer, ask(number)) for name, reducer in runs.items()}

    plans = {name: planned(one.for_image(model.spec), model.spec) for name, one in methods.items()}
    serve(described(model, f"{args.method} {args.set}", args) | {"visual tokens per layer": plans}, calls)


@torch.inference_mode()
def ttft(model: Llava, reducer: Reducer, samples: list[Sample]) -> float:
    """Seconds from prepared pixels and token ids to the first token."""
    timer = Timer(model.device)
    first_token(model, reducer, samples, timer)
    spent = timer.seconds
    return sum(spent.values()) - spent.get("preprocess", 0.0)


# Stock transformers


def stock(args: argparse.Namespace) -> None:
    """Serve measurements of transformers on the same weights."""
    model = build(args)
    runs: dict[str, Callable[..., object]] = {"transformers": dense}
    if args.attentions:
        runs["transformers, output_attentions"] = attentive

    def calls(number: int) -> dict[str, Callable[[], float]]:
        asked = inputs(model, number)
        return {name: partial(seconds, run, model.hf_model, *asked) for name, run in runs.items()}

    serve(described(model, ", then ".join(runs), args), calls)


def inputs(model: Llava, number: int) -> tuple[Tensor, Tensor]:
    """Token ids [1, L] with a placeholder for each visual token, and pixels [1, 3, S, S], of one question."""
    sample = noise_batches(model, 1, differ=True)(number)[0]
    place = model.hf_model.config.image_token_id
    ids: list[int] = []
    for token in model.prompt(sample).ids:
        ids += [place] * model.visual_tokens if token == IMAGE_TOKEN_INDEX else [token]
    pixels, _ = model.views(sample.image)
    return torch.tensor([ids], device=model.device), pixels.to(model.device, model.hf_model.dtype)


def seconds(run: Callable[..., object], *arguments: object) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - began


@torch.inference_mode()
def dense(hf: Any, ids: Tensor, pixels: Tensor, **options: Any) -> Any:
    """[1]: the first token of `generate`, or what it returns with further options."""
    mask = torch.ones_like(ids)
    output = hf.generate(
        input_ids=ids, attention_mask=mask, pixel_values=pixels, max_new_tokens=1, do_sample=False, **options
    )
    return output if options else output[:, -1]


def attentive(hf: Any, ids: Tensor, pixels: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """[1]: the first token of `generate`, and the attention maps of all decoder layers, [1, H, L, L] each."""
    before = getattr(hf.config, KERNEL)
    hf.set_attn_implementation("eager")
    try:
        output = dense(hf, ids, pixels, output_attentions=True, return_dict_in_generate=True)
    finally:
        hf.set_attn_implementation(before)
    return output.sequences[:, -1], output.attentions[0]


# Both workers


def build(args: argparse.Namespace) -> Llava:
    """The model that a worker's flags describe. Its parent sets the number of CPU threads by OMP_NUM_THREADS."""
    return random_llava(args.shape, args.distinct, args.dtype, args.layers)


def described(model: Llava, runs: str, args: argparse.Namespace) -> dict[str, Any]:
    """What a worker reports of itself."""
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


def serve(ready: dict[str, Any], calls: Calls) -> None:
    """Be a worker that makes its calls in order, and in reverse order in every second measurement.

    Args:
        ready: goes into the result; has the key "ready".
        calls: number of the measurement -> name -> a call that returns its seconds.
    """
    print(json.dumps(ready), flush=True)
    requests = (line for line in sys.stdin if line.strip() == "measure")
    for number, _ in enumerate(requests):
        asked = calls(number)
        spent = {name: asked[name]() for name in list(asked)[:: 1 if number % 2 == 0 else -1]}
        print(json.dumps({"seconds": {name: spent[name] for name in asked}}), flush=True)


# The commands


def measure(args: argparse.Namespace) -> None:
    """Let the workers take turns, and print and write the result."""
    result = compare(args.name, args.worker, args.rounds, args.threads)
    print(table([result]))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def parser() -> argparse.ArgumentParser:
    """All commands and flags."""
    flags = make_parser("lab.bench.peers", __doc__)
    commands = flags.add_subparsers(required=True, metavar="measure|table|ours|stock")

    def command(name: str, run: Callable[[argparse.Namespace], None], help: str) -> Callable[..., argparse.Action]:
        added = commands.add_parser(name, help=help, allow_abbrev=False)
        added.set_defaults(run=run)
        return added.add_argument

    add = command("measure", measure, "let workers take turns")
    add("--name", required=True, help="of the comparison, a row's first cell")
    worker = "a worker's command line; the first is ours"
    add("--worker", action="append", required=True, metavar="COMMAND", help=worker)
    add("--rounds", type=value(count), default=7, help="measurements of each worker after one warm-up")
    add("--threads", type=value(count), default=2, help="of the CPU, for each worker")
    add("--json", type=Path, help="also write the result here")
    add = command(
        "table", lambda args: print(table([*map(read, args.results)], args.beside)), "print ratios as Markdown"
    )
    add("results", nargs="+", type=Path, help="files that measure wrote")
    add("--beside", metavar="NAME", help="divide by the times of this name, not of the first")
    own = command("ours", ours, "be a worker: methods of this repository")
    own("--method", required=True, help="a name of `vtr show methods`, or several separated by commas")
    own("--budget", type=value(count), required=True, help="visual tokens to keep; full keeps all")
    option = "an option of the method or of one of them"
    own("--set", action="append", default=[], metavar="[METHOD.]KEY=VALUE", help=option)
    own("--oracle", action="store_true", help="measure the methods' oracles, too")
    theirs = command("stock", stock, "be a worker: transformers on the same weights")
    theirs("--attentions", action="store_true", help="measure output_attentions=True beside the dense model")
    for add in (own, theirs):
        add("--shape", default="llava-1.5-7b", choices=tuple(SHAPES), help="of an official model")
        add("--layers", type=value(count), help="decoder layers; all of the real model if left out")
        add("--distinct", type=value(count), default=4, help="decoder layers with their own weights")
        add("--dtype", default="bfloat16", choices=tuple(DTYPES), help="of the weights")
    return flags


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, for a worker when the input ends."""
    args = parser().parse_args(arguments)
    args.run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
