"""The efficiency protocol: time, memory and operations of methods, compared with `full` and their oracles.

    python -m eval.efficiency.latency --method consensusdrop --budget 64
    python -m eval.efficiency.latency --method all --budget 64 --shape llava-1.5-7b --dtype bfloat16
    python -m eval.efficiency.latency --method consensusdrop --budget 64 --scenario offline
    python -m eval.efficiency.latency --method all --budget 192,128,64 --measurements kept.jsonl --deadline 300

Everything is measured in one process, all budgets in the same rounds together with one `full`. With `--shape` the model
has random weights: a tower of full depth, and a decoder with all of its layers or `--layers`, of which `--distinct`
have their own weights and the others reuse them. With `--measurements FILE` every measurement is written at once, and
an interrupted run continues from the file. `--deadline` ends a run early and prints a table of what it has measured;
`--pages` makes the table again on any machine. docs/efficiency.md defines every column.

`oracle.py` makes the methods and their oracles, `shapes.py` the noise images that they are asked about, `measure.py`
takes the times, `counts.py` counts, and `latency_table.py` presents the result.
"""

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from tqdm import tqdm

from eval.command import exit_on_user_error, make_parser, open_dataset, value
from eval.config import DEFAULT_DATA, DEFAULT_MODEL, FULL, count, pairs
from eval.efficiency.counts import Counts, count_prefill
from eval.efficiency.latency_table import page, plot, write
from eval.efficiency.measure import CLOCKS, SCENARIOS, Measured, Measurements, measure, ratios
from eval.efficiency.memory import size_text
from eval.efficiency.oracle import chosen_options, oracles, reducers_of
from eval.efficiency.shapes import SHAPES, noise_batches, random_llava, reading_of
from eval.results.report import hardware
from eval.versions import versions
from llava.budget import count_or_ratio, tokens_of
from llava.errors import UserError
from llava.model.builder import DTYPES, device_of, load, parse
from llava.model.checkpoint.load import free_memory
from llava.model.llava_arch import Llava
from llava.pipeline.generate import generate
from llava.reduction.reducer import Reducer

GATE_BATCH = 16  # questions in a batch of the accuracy gate
GATE_SHARE = 0.9  # share of the accuracy of full that a method must reach
MEMORY_SHARE = 0.9  # share of the free memory of a CPU that weights may use


# One run


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure, count and run the accuracy gate; returns what is printed and written, one entry for each budget."""
    last = time.monotonic() + (math.inf if args.deadline is None else args.deadline)
    if args.threads:
        torch.set_num_threads(args.threads)
    scenario = SCENARIOS[args.scenario]
    lengths = args.lengths if args.lengths is not None else scenario.lengths
    repeats = args.repeats or scenario.repeats
    sizes = args.batch_size or tuple(1 << power for power in range((scenario.largest or 1).bit_length()))
    model, shapes = models(args)
    if args.gate and args.shape:
        raise UserError("Random weights have no accuracy: leave --gate out, or measure a checkpoint with --model.")
    if args.clock == "cpu" and model.device.type != "cpu":
        raise UserError(f"--clock cpu leaves out the GPU's time, and the model is on {model.device}; use --clock wall.")
    budgets = [tokens_of(one, model.visual_tokens) if isinstance(one, float) else one for one in args.budget]
    names = args.method.split(",")
    options = chosen_options(args.set, names)
    reducers = reducers_of([FULL], budgets[0], options, model)
    rows, oracle_names = dict(reducers), dict[str, str]()
    for budget in budgets:
        chosen = reducers_of(names, budget, options, model)
        theirs, named = oracles(chosen, model.spec) if args.oracle else ({}, {})
        reducers |= {row_name(name, budget): one for name, one in chosen.items()}
        rows |= {row_name(name, budget): one for name, one in (chosen | theirs).items()}
        oracle_names |= {row_name(name, budget): row_name(oracle, budget) for name, oracle in named.items()}
    settings = {
        "scenario": args.scenario,
        "model": args.shape or model.name,
        "distinct_layers": min(args.distinct, model.spec.layers) if args.shape else None,
        "layers": model.spec.layers,
        "image_options": model.conventions,
        "dtype": args.dtype,
        "lengths": list(lengths),
        "options": options,
        "threads": torch.get_num_threads(),
        "device": str(model.device),
        "hardware": hardware(str(model.device)),
        "versions": {name: number for name, number in versions().items() if name in ("torch", "transformers")},
        "clock": args.clock,
    }
    if args.pages:  # the page names the machine that measured, not this one
        there = Measurements(args.measurements).settings
        settings |= {key: there.get(key) for key in ("threads", "device", "hardware", "versions", "clock")}
    kept = Measurements(args.measurements, settings)
    held = gate(model, reducers, args.data, args.gate) if args.gate else None
    counts = counts_of(model, rows, shapes) if args.counts else {}
    # Times of the prefill alone do not include preparing images, so preparing each once is enough.
    views = model.views if lengths else remembered(model.views)
    batches: list[list[dict[str, Any]]] = []
    for place, size in enumerate(sizes):
        now = time.monotonic()
        deadline = -math.inf if args.pages else now + (last - now) / (len(sizes) - place)
        ask = noise_batches(model, size, scenario.differ)
        with patch.object(model, "views", views):
            times = measure(model, rows, ask, repeats, kept, lengths, size, args.clock, deadline)
        if times:
            parts = {one: [row for row in rows if row == FULL or row.endswith(row_name("", one))] for one in budgets}
            batches.append([batch_result(size, parts[one], times, counts, oracle_names, held) for one in budgets])
        if times and not any(times.values()):
            break
    if not batches:
        raise UserError("Nothing was measured twice, after a warm-up, in time; give more seconds with --deadline.")
    return [
        {
            **kept.settings,
            "budget": budget,
            "commit": ", ".join(sorted(kept.commits)),
            "repeats": repeats,
            "gate": held,
            "batches": list(of_budget),
        }
        for budget, of_budget in zip(budgets, zip(*batches, strict=True), strict=True)
    ]


def row_name(name: str, budget: int) -> str:
    """The name of a method or oracle among the rows of all budgets, which share `full`."""
    return name if name == FULL else f"{name} at {budget}"


def short_name(row: str) -> str:
    """The method or the oracle, without its budget."""
    return row.rpartition(" at ")[0] or row


def counts_of(model: Llava, rows: dict[str, Reducer], shapes: Llava | None) -> dict[str, Counts]:
    """The counts of every row for one question. On the meta device, methods that read values have none."""
    small, counts = noise_batches(model, 1, False)(0), {}
    for name, reducer in tqdm(rows.items(), desc="counts", unit="row", disable=None):
        try:
            counts[name] = count_prefill(model, reducer, small, shapes)
        except (NotImplementedError, RuntimeError, TypeError) as error:
            if model.device.type != "meta" or "meta" not in str(error):
                raise  # not an attempt to read a value that the meta device does not have
    return counts


def remembered(views: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The same function, but it prepares each image only once."""
    known: dict[int, tuple[Any, Any]] = {}  # id of an image -> the image, held so that no other one gets its id

    def prepared(image: Any) -> Any:
        if id(image) not in known:
            known[id(image)] = image, views(image)
        return known[id(image)][1]

    return prepared


def models(args: argparse.Namespace) -> tuple[Llava, Llava | None]:
    """The model, and for random weights also its copy on the meta device, where counting takes seconds.

    With `--pages` the model itself is on the meta device.
    """
    if args.pages and not (args.shape and args.measurements):
        raise UserError("--pages makes the tables of a --shape again from the file --measurements; give both.")
    if not args.shape:
        options = {key: parse(key, text) for key, text in pairs("--image-option", args.image_option).items()}
        return load(args.model, args.dtype, args.device, **options), None
    options = reading_of(args.shape, pairs("--image-option", args.image_option))
    meta = torch.device("meta")
    placed = meta if args.pages else device_of(args.device)
    outline = random_llava(args.shape, args.distinct, args.dtype, args.layers, device=meta, **options)
    if args.pages:
        return outline, None
    refuse_large_weights(outline, DTYPES[args.dtype].itemsize, placed)
    model = random_llava(args.shape, args.distinct, args.dtype, args.layers, device=placed, **options)
    return model, outline if args.counts else None


def batch_result(
    size: int,
    names: Sequence[str],
    rows: dict[str, Measured | None],
    counts: dict[str, Counts],
    oracle_names: dict[str, str],
    held: dict[str, Any] | None,
) -> dict[str, Any]:
    """Measurements, counts and ratios of the named rows of one budget at one batch size.

    Rows without a completed turn after the warm-up are named under `left_out`.
    """
    entries = {}
    for name in names:
        if name not in rows:
            continue
        ours, oracle_name = rows[name], oracle_names.get(name)
        entry: dict[str, Any] = {"fits": ours is not None, "oracle": oracle_name and short_name(oracle_name)}
        if name in counts:
            entry["counts"] = dataclasses.asdict(counts[name])
        if held is not None and name in held["accuracy"]:
            entry |= {"accuracy": held["accuracy"][name], "passes_gate": held["passes"][name]}
        entries[short_name(name)] = entry
        if ours is None:
            continue
        entry |= dataclasses.asdict(ours) | {"ttft": ours.ttft}
        entry["throughput"] = {str(length): size / median(times) for length, times in ours.end_to_end.items()}
        full, oracle = rows.get(FULL), rows.get(oracle_name or "")
        if full is not None:
            pair = (counts[FULL], counts[name]) if name in counts else None
            entry["ratios"] = ratios(full, ours, pair, oracle)
    return {
        "batch_size": size,
        "methods": entries,
        "left_out": [short_name(name) for name in names if name not in rows],
    }


# The accuracy gate: it marks methods that answer badly, whose speed does not count.


def gate(model: Llava, reducers: dict[str, Reducer], data: Path, questions: int) -> dict[str, Any]:
    """Ask every method the first questions of GQA.

    Returns:
        title: name of the questions, "GQA testdev".
        questions: how many were asked.
        accuracy: method -> share of right answers.
        passes: method -> whether it reaches GATE_SHARE of the accuracy of `full`, so that its speed counts.
    """
    dataset = open_dataset("gqa", str(data), None, None, "auto")
    assert dataset.sample_score is not None  # GQA's answers have one
    asked = dataset.questions[:questions]
    accuracy: dict[str, float] = {}
    for name, reducer in reducers.items():
        points = 0.0
        for start in range(0, len(asked), GATE_BATCH):
            part = asked[start : start + GATE_BATCH]
            answers = generate(model, [dataset.sample(one) for one in part], reducer, dataset.max_new_tokens).answers
            points += sum(dataset.sample_score(one, answer.text) for one, answer in zip(part, answers, strict=True))
        accuracy[name] = points / len(asked)
    passes = {name: reached >= GATE_SHARE * accuracy[FULL] for name, reached in accuracy.items()}
    return {"title": dataset.title, "questions": len(asked), "accuracy": accuracy, "passes": passes}


def refuse_large_weights(model: Llava, itemsize: int, device: torch.device) -> None:
    """Raise UserError if random weights would not fit into the free memory of a CPU.

    Args:
        model: on the meta device, with as many distinct layers as the model to make.
        itemsize: bytes of a weight.
    """
    if device.type != "cpu":
        return
    # `parameters` lists weights that layers share only once.
    need, free = sum(weight.numel() for weight in model.hf_model.parameters()) * itemsize, free_memory(device)
    if need >= MEMORY_SHARE * free:
        raise UserError(
            f"The weights of {model.name} need {size_text(need)}, and {size_text(free)} are free; give fewer layers "
            "their own weights with --distinct 1, or take --dtype bfloat16."
        )


# The command


def whole_numbers(text: str) -> tuple[int, ...]:
    """ "1,8,32" as numbers."""
    return tuple(count(part) for part in text.split(","))


def budgets_of(text: str) -> tuple[int | float, ...]:
    """ "192,128,1/9" as numbers and ratios."""
    return tuple(count_or_ratio(part) for part in text.split(","))


def lengths_of(text: str) -> tuple[int, ...]:
    """ "1,16" as numbers; "0" for none."""
    return () if text == "0" else whole_numbers(text)


def parser() -> argparse.ArgumentParser:
    """All flags."""
    flags = make_parser("eval.efficiency.latency", __doc__)
    add = flags.add_argument
    add("--method", required=True, help="a name, several separated by commas, or all")
    budget = "visual tokens to keep per image, or their ratio (1/9); several in the same rounds: 192,128,64"
    add("--budget", type=value(budgets_of), required=True, help=budget)
    option = "option of one method, or without METHOD of each that is named"
    add("--set", action="append", default=[], metavar="[METHOD.]KEY=VALUE", help=option)
    summaries = "; ".join(f"{name}: {one.summary}" for name, one in SCENARIOS.items())
    add("--scenario", default="latency", choices=tuple(SCENARIOS), help=summaries)
    add("--model", default=DEFAULT_MODEL, help="folder or hub name of a checkpoint")
    add("--shape", choices=tuple(SHAPES), help="random weights in the shape of an official model")
    add("--distinct", type=value(count), default=4, help="with --shape: layers with their own weights")
    add("--layers", type=value(count), help="with --shape: so many decoder layers instead of all")
    add("--image-option", action="append", default=[], metavar="KEY=VALUE", help="how images are read")
    sizes = "questions in a batch, each about its own image: 1, or 1,8,32"
    add("--batch-size", type=value(whole_numbers), help=sizes)
    add("--lengths", type=value(lengths_of), help="tokens of the answers: 1,16; 0 for the prefill alone")
    add("--repeats", type=value(count), help="turns of each method after one warm-up")
    add_machine_flags(flags)
    on_off = argparse.BooleanOptionalAction
    add("--oracle", action=on_off, default=True, help="measure as many tokens chosen for free")
    add("--counts", action=on_off, default=True, help="count operations, synchronisations and bytes")
    add("--gate", type=value(count), metavar="N", help="accuracy gate: ask N questions of GQA first")
    add("--data", type=Path, default=DEFAULT_DATA, help="folder that holds the questions of the gate")
    kept = "write every measurement to this file and continue from what is there"
    add("--measurements", type=Path, metavar="FILE", help=kept)
    add("--deadline", type=float, metavar="SECONDS", help="begin no turn later; batch sizes share the time")
    pages = "measure nothing: the tables of --measurements, with counts made on the meta device"
    add("--pages", action="store_true", help=pages)
    return flags


def add_machine_flags(flags: argparse.ArgumentParser) -> None:
    """The flags that all measuring commands have: where they run, and where their result goes."""
    add = flags.add_argument
    add("--dtype", default="float32", choices=tuple(DTYPES), help="of the weights")
    add("--device", default="auto", help="torch device")
    add("--threads", type=int, default=0, help="of the CPU; 0 leaves torch's choice")
    add("--clock", default="wall", choices=tuple(CLOCKS), help="cpu: time that this process computes")
    add("--json", type=Path, help="also write the numbers here")
    add("--markdown", type=Path, help="also write the tables here")
    add("--plot", type=Path, help="also draw the plot here")


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = parser().parse_args(arguments)
    results = run(args)
    text = page(results)
    print(text)
    write(args, results, text)
    if args.plot:
        plot(args.plot, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
