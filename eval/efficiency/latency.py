"""The efficiency protocol: time, memory and operations of methods beside `full` and their oracles, in one process.

    python -m eval.efficiency.latency --method consensusdrop --budget 64
    python -m eval.efficiency.latency --method all --budget 64 --shape llava-1.5-7b --dtype bfloat16
    python -m eval.efficiency.latency --method consensusdrop --budget 64 --scenario offline

With `--shape` the model has random weights: the tower has its full depth, the decoder all of its layers or `--layers`,
of which `--distinct` have weights of their own, which the others share. With `--measurements FILE` every measurement is
written at once, and an interrupted run continues from the file. docs/efficiency.md defines every column.

Methods and oracles are made in `oracle.py`, asked about the noise of `shapes.py`, timed in `measure.py`, counted once
in `counts.py`, and presented by `latency_table.py`.
"""

import argparse
import copy
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from eval.command import exit_on_user_error, make_parser, open_dataset, value
from eval.config import DEFAULT_DATA, DEFAULT_MODEL, FULL, count, pairs
from eval.efficiency import memory
from eval.efficiency.counts import Counts, count_prefill
from eval.efficiency.latency_table import page, plot, sentence, write
from eval.efficiency.measure import CLOCKS, SCENARIOS, Measured, Measurements, Scenario, measure, over_rounds, ratios
from eval.efficiency.memory import size_text
from eval.efficiency.oracle import chosen_options, oracles, reducers_of
from eval.efficiency.shapes import SHAPES, noise_batches, random_llava, reading_of
from eval.results.report import commit, hardware
from llava.budget import count_or_ratio, tokens_of
from llava.errors import UserError, unknown
from llava.model.builder import DTYPES, device_of, load, parse
from llava.model.checkpoint.load import free_memory
from llava.model.llava_arch import Llava
from llava.pipeline.compile import compile_model
from llava.pipeline.generate import generate
from llava.processing.prompt import Sample
from llava.reduction.reducer import Reducer

TTFT = "vision, selection, merging and prefill of the batch, without preprocessing"
COMPILED = ", compiled"  # behind the name of a row that runs with `--compile`
GATE_BATCH = 16  # questions
MEMORY_SHARE = 0.9  # of the free memory of a CPU may be used


# One run


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, count and hold the gate; returns what is printed and written."""
    if args.threads:
        torch.set_num_threads(args.threads)
    scenario = SCENARIOS[args.scenario]
    lengths = args.lengths if args.lengths is not None else scenario.lengths
    repeats = args.repeats or scenario.repeats
    sizes = args.batch_size or tuple(1 << power for power in range((scenario.largest or 1).bit_length()))
    model, shapes = models(args)
    refuse(args, scenario, model)
    if isinstance(args.budget, float):
        args.budget = tokens_of(args.budget, model.visual_tokens)
    names = args.method.split(",")
    options = chosen_options(args.set, names)
    reducers = reducers_of([FULL], args.budget, options, model) | reducers_of(names, args.budget, options, model)
    theirs, oracle_names = oracles(reducers, model.spec) if args.oracle else ({}, {})
    settings = {
        "scenario": args.scenario,
        "budget": args.budget,
        "model": args.shape or model.name,
        "distinct_layers": min(args.distinct, model.spec.layers) if args.shape else None,
        "layers": model.spec.layers,
        "picture": model.conventions,
        "dtype": args.dtype,
        "lengths": list(lengths),
        "options": options,
        "threads": torch.get_num_threads(),
        "device": str(model.device),
        "hardware": hardware(str(model.device)),
        "clock": args.clock,
        "ttft": TTFT,
        **({"compile": True} if args.compile else {}),
    }
    rows = reducers | theirs
    held = gate(model, reducers, args.gate_benchmark, args.data, args.gate, args.gate_share) if args.gate else None
    kept = Measurements(args.measurements, settings)
    small = noise_batches(model, 1, False)(0)
    counts = {name: count_prefill(model, one, small, shapes) for name, one in rows.items()} if args.counts else {}
    if args.compile:  # every row twice, one beside the other
        rows = {name + tail: reducer for name, reducer in rows.items() for tail in ("", COMPILED)}
        oracle_names |= {name + COMPILED: oracle + COMPILED for name, oracle in oracle_names.items()}
    batches = []
    for size in sizes:
        graphs = compiled_copy(model) if args.compile else model
        compiled = {name: graphs for name in rows if name.endswith(COMPILED)}
        ask, free, needs = noise_batches(model, size, scenario.differ), usable_memory(model), {}
        if free is not None:
            needs = {name: needed(model, one, ask(0), max(lengths, default=1)) for name, one in rows.items()}
        fitting = {name: one for name, one in rows.items() if free is None or needs[name] < free}
        times = measure(model, fitting, ask, repeats, kept, lengths, size, args.clock, compiled)
        batches.append(batch_result(size, {name: times.get(name) for name in rows}, counts, oracle_names, held))
        batches[-1] |= {"free_bytes": free, "needed_bytes": {n: need for n, need in needs.items() if n not in fitting}}
        if not any(times.values()):
            break
    return {
        **settings,
        "commit": commit(),
        "repeats": repeats,
        "gate": held,
        "batches": batches,
    }


def models(args: argparse.Namespace) -> tuple[Llava, Llava | None]:
    """The model, and for random weights the same on the meta device, where counting takes seconds."""
    if not args.shape:
        picture = {key: parse(key, text) for key, text in pairs("--picture", args.picture).items()}
        return load(args.model, args.dtype, args.device, **picture), None
    if args.shape not in SHAPES:
        raise unknown("shape", args.shape, SHAPES)
    picture = reading_of(args.shape, pairs("--picture", args.picture))
    placed, meta = device_of(args.device), torch.device("meta")
    outline = random_llava(args.shape, args.distinct, args.dtype, args.layers, device=meta, **picture)
    refuse_large_weights(outline, DTYPES[args.dtype].itemsize, placed)
    model = random_llava(args.shape, args.distinct, args.dtype, args.layers, device=placed, **picture)
    return model, outline if args.counts else None


def refuse(args: argparse.Namespace, scenario: Scenario, model: Llava) -> None:
    """Raise UserError for flags that make no sense together or on this model."""
    if scenario.video and not model.takes_videos:
        raise UserError(
            f"The scenario video needs a model that takes videos, {model.name} takes images; use --shape "
            "video-llava-7b or --model assets/tinyllava_video."
        )
    if args.gate and args.shape:
        raise UserError("Random weights have no accuracy: leave --gate out, or measure a checkpoint with --model.")
    if args.clock == "cpu" and model.device.type != "cpu":
        raise UserError(f"--clock cpu leaves out the GPU's time, and the model is on {model.device}; use --clock wall.")


def compiled_copy(model: Llava) -> Llava:
    """The same weights, run as graphs; each size of batches gets its own, so that all of them are compiled."""
    other = copy.copy(model)
    other.compiled = compile_model(other)
    return other


def batch_result(
    size: int,
    rows: dict[str, Measured | None],
    counts: dict[str, Counts],
    oracle_names: dict[str, str],
    held: dict[str, Any] | None,
) -> dict[str, Any]:
    """Measurements, counts and ratios of every method and oracle at one batch size.

    Compiled rows stand beside `full` and oracles that are compiled too.
    """
    entries = {}
    for name, ours in rows.items():
        plain = name.removesuffix(COMPILED)
        entry: dict[str, Any] = {"fits": ours is not None, "oracle": oracle_names.get(name)}
        if name in counts:
            entry["counts"] = dataclasses.asdict(counts[name])
        if held is not None and plain in held["accuracy"]:
            entry |= {"accuracy": held["accuracy"][plain], "passes_gate": held["passes"][plain]}
        entries[name] = entry
        if ours is None:
            continue
        entry |= dataclasses.asdict(ours) | {"ttft": ours.ttft}
        entry["throughput"] = {str(length): size / median(times) for length, times in ours.end_to_end.items()}
        full, oracle = rows.get(FULL + name.removeprefix(plain)), rows.get(oracle_names.get(name, ""))
        if full is not None:
            pair = (counts[FULL], counts[plain]) if plain in counts else None
            entry["ratios"] = ratios(full, ours, pair, oracle)
        beside_plain = rows.get(plain) if name != plain else None
        if beside_plain is not None:
            decode = beside_plain.decode / ours.decode if beside_plain.decode and ours.decode else None
            entry["plain_over_compiled"] = {
                "ttft": over_rounds(beside_plain.ttfts, ours.ttfts).median,
                "decode": decode,
            }
    return {"batch_size": size, "methods": entries}


# The accuracy gate: the speed of a method that answers badly is marked.


def gate(
    model: Llava, reducers: dict[str, Reducer], benchmark: str, data: Path, questions: int, share: float
) -> dict[str, Any]:
    """Ask every method the first questions of a benchmark.

    Args:
        share: of the accuracy of `full` that a method must reach for its speed to count.

    Returns:
        title: of the questions, "GQA testdev".
        questions: how many were asked.
        share: as given.
        accuracy: method -> share of right answers.
        passes: method -> whether it has at least `share` of the accuracy of `full`.

    Raises:
        UserError: answers of this benchmark have no score of their own.
    """
    dataset = open_dataset(benchmark, str(data), None, None, "auto")
    if dataset.sample_score is None:
        raise UserError(f"Answers of {dataset.title} have no score of their own; choose another --gate-benchmark.")
    asked = dataset.questions[:questions]
    accuracy: dict[str, float] = {}
    for name, reducer in reducers.items():
        points = 0.0
        for start in range(0, len(asked), GATE_BATCH):
            part = asked[start : start + GATE_BATCH]
            answers = generate(model, [dataset.sample(one) for one in part], reducer, dataset.max_new_tokens).answers
            points += sum(dataset.sample_score(one, answer.text) for one, answer in zip(part, answers, strict=True))
        accuracy[name] = points / len(asked)
    passes = {name: reached >= share * accuracy[FULL] for name, reached in accuracy.items()}
    found = {"title": dataset.title, "questions": len(asked), "share": share}
    return found | {"accuracy": accuracy, "passes": passes}


# Whether a batch fits into the memory that is free, before it is tried


def usable_memory(model: Llava) -> float | None:
    """Bytes that a batch may take; None on a GPU, where it is tried.

    A CPU has no error for memory that is used up: the machine ends the process.
    """
    return MEMORY_SHARE * free_memory(model.device) if model.device.type == "cpu" else None


def needed(model: Llava, reducer: Reducer, samples: list[Sample], length: int) -> int:
    """Expected bytes of activations and cache of a batch with answers of `length` tokens."""
    itemsize = next(model.llm.parameters()).element_size()
    shapes = tuple(memory.shape_of(model, sample) for sample in samples)
    prompts = [memory.lengths(model, reducer, shape) for shape in shapes]
    cache = memory.kv_bytes(model, prompts, itemsize, length)
    return memory.activations(model, reducer, shapes, itemsize).peak(cache)


def refuse_large_weights(model: Llava, itemsize: int, device: torch.device) -> None:
    """Raise UserError where random weights would not fit into the free memory of a CPU.

    Args:
        model: on the meta device, with the layers that will have weights of their own.
        itemsize: bytes of a weight.
    """
    if device.type != "cpu":
        return
    # Layers that share weights are one parameter.
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


def lengths_of(text: str) -> tuple[int, ...]:
    """ "1,16" as numbers; "0" for none."""
    return () if text == "0" else whole_numbers(text)


def share(text: str) -> float:
    """A share between 0 and 1."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise ValueError(f"should be a share from 0 to 1, got {text!r}")
    return number


def parser() -> argparse.ArgumentParser:
    """All flags."""
    flags = make_parser("eval.efficiency.latency", __doc__)
    add = flags.add_argument
    add("--method", required=True, help="a name, several separated by commas, or all")
    budget = "visual tokens to keep per image, or their ratio (1/9)"
    add("--budget", type=value(count_or_ratio), required=True, help=budget)
    option = "option of one method, or without METHOD of each that is named"
    add("--set", action="append", default=[], metavar="[METHOD.]KEY=VALUE", help=option)
    summaries = "; ".join(f"{name}: {one.summary}" for name, one in SCENARIOS.items())
    add("--scenario", default="latency", choices=tuple(SCENARIOS), help=summaries)
    add("--model", default=DEFAULT_MODEL, help="folder or hub name of a checkpoint")
    add("--shape", help=f"random weights in the shape of: {', '.join(SHAPES)}")
    add("--distinct", type=value(count), default=4, help="with --shape: layers with their own weights")
    add("--layers", type=value(count), help="with --shape: so many decoder layers instead of all")
    add("--picture", action="append", default=[], metavar="KEY=VALUE", help="how images are read")
    sizes = "questions in a batch, each about its own image: 1, or 1,8,32"
    add("--batch-size", type=value(whole_numbers), help=sizes)
    add("--lengths", type=value(lengths_of), help="tokens of the answers: 1,16; 0 for the prefill alone")
    add("--repeats", type=value(count), help="turns of each method after one warm-up")
    add_machine_flags(flags)
    on_off = argparse.BooleanOptionalAction
    add("--oracle", action=on_off, default=True, help="measure as many tokens chosen for free")
    add("--counts", action=on_off, default=True, help="count operations, waits and bytes")
    add("--compile", action="store_true", help="measure every row a second time, with compiled graphs")
    add("--gate", type=value(count), metavar="N", help="accuracy gate: ask N questions first")
    add("--gate-share", type=value(share), default=0.9, help="of the accuracy of full that counts")
    add("--gate-benchmark", default="gqa", help="where the gate's questions come from")
    add("--data", type=Path, default=DEFAULT_DATA, help="folder that holds the benchmark of the gate")
    kept = "write every measurement to this file and continue from what is there"
    add("--measurements", type=Path, metavar="FILE", help=kept)
    return flags


def add_machine_flags(flags: argparse.ArgumentParser) -> None:
    """The flags of every measurement: where it runs, and where its result goes."""
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
    result = run(args)
    text = page(result)
    print(text)
    methods = result["batches"][0]["methods"]
    measured = [name for name in methods if not name.endswith(COMPILED) and not name.startswith("oracle of")]
    measured = [name for name in measured if name != FULL]
    if len(measured) == 1 and methods[measured[0]].get("ratios"):
        print(f"\n{sentence(measured[0], args.budget, methods[measured[0]]['ratios'])}")
    write(args, result, text)
    if args.plot:
        plot(args.plot, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
