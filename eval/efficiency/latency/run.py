"""One run of the protocol: measure, count, hold the gate, and put everything into one result."""

import argparse
import dataclasses
from statistics import median
from typing import Any

import torch

from eval.config import FULL, pairs
from eval.efficiency.latency.accuracy import Gate, gate
from eval.efficiency.latency.counts import Counts, count
from eval.efficiency.latency.fitting import needed, refuse_large_weights, room
from eval.efficiency.latency.measure import Measured, measure
from eval.efficiency.latency.measurements import Measurements
from eval.efficiency.latency.methods import (
    COMPILED,
    chosen_options,
    compiled_copy,
    oracles,
    plain_name,
    reducers_of,
    with_compiled,
)
from eval.efficiency.latency.questions import noise_batches
from eval.efficiency.latency.ratios import ratios, turn_by_turn
from eval.efficiency.latency.scenarios import SCENARIOS, doubled
from eval.efficiency.shapes import SHAPES, random_llava
from eval.results.provenance import commit, hardware
from llava.budget import tokens_of
from llava.errors import UserError, unknown
from llava.model.builder import DTYPES, device_of, load, parse
from llava.model.llava_arch import Llava

NEXT_READING = {"merge": "spatial", "force": "672x672"}
TTFT = "vision, selection, merging and prefill of the batch, without preprocessing"


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, and return what is printed and written."""
    if args.threads:
        torch.set_num_threads(args.threads)
    scenario = SCENARIOS[args.scenario]
    lengths = args.lengths if args.lengths is not None else scenario.lengths
    repeats = args.repeats or scenario.repeats
    sizes = args.batch_size or (doubled(scenario.largest) if scenario.largest else (1,))
    model, shapes = models(args)
    if isinstance(args.budget, float):
        args.budget = tokens_of(args.budget, model.visual_tokens)
    if scenario.video and not model.takes_videos:
        raise UserError(
            f"The scenario video needs a model that takes videos, {model.name} takes images; use --shape "
            "video-llava-7b or --model assets/tinyllava_video."
        )
    if args.gate and args.shape:
        raise UserError("Random weights have no accuracy: leave --gate out, or measure a checkpoint with --model.")
    if args.clock == "cpu" and model.device.type != "cpu":
        raise UserError(f"--clock cpu leaves out the GPU's time, and the model is on {model.device}; use --clock wall.")
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
    everything = reducers | theirs
    held = gate(model, reducers, args.gate_benchmark, args.data, args.gate, args.gate_share) if args.gate else None
    kept = Measurements(args.measurements, settings)
    small = noise_batches(model, 1, False)(0)
    counts = {name: count(model, one, small, shapes) for name, one in everything.items()} if args.counts else {}
    if args.compile:
        everything = with_compiled(everything)
        oracle_names |= {name + COMPILED: oracle + COMPILED for name, oracle in oracle_names.items()}
    batches = []
    for size in sizes:
        graphs = compiled_copy(model) if args.compile else model
        compiled = {name: graphs for name in everything if name.endswith(COMPILED)}
        ask = noise_batches(model, size, scenario.differ)
        free = room(model)
        longest = max(lengths, default=1)
        needs = {name: needed(model, one, ask(0), longest) for name, one in everything.items() if free is not None}
        there = {name: one for name, one in everything.items() if free is None or needs[name] < free}
        found = measure(model, there, ask, repeats, kept, lengths, size, args.clock, compiled)
        rows = {name: found.get(name) for name in everything}
        batches.append(batch_result(size, rows, counts, oracle_names, held))
        batches[-1] |= {"free_bytes": free, "needed_bytes": {n: need for n, need in needs.items() if n not in there}}
        if not any(rows.values()):
            break
    return {
        **settings,
        "commit": commit(),
        "repeats": repeats,
        "gate": None if held is None else dataclasses.asdict(held),
        "batches": batches,
    }


def models(args: argparse.Namespace) -> tuple[Llava, Llava | None]:
    """The model, and for random weights the same on the meta device, where counting takes seconds."""
    if not args.shape:
        picture = {key: parse(key, value) for key, value in pairs("--picture", args.picture).items()}
        return load(args.model, args.dtype, args.device, **picture), None
    if args.shape not in SHAPES:
        raise unknown("shape", args.shape, SHAPES)
    picture = reading_of(args.shape, pairs("--picture", args.picture))
    placed, meta = device_of(args.device), torch.device("meta")
    outline = random_llava(args.shape, args.distinct, args.dtype, args.layers, device=meta, **picture)
    refuse_large_weights(outline, DTYPES[args.dtype].itemsize, placed)
    model = random_llava(args.shape, args.distinct, args.dtype, args.layers, device=placed, **picture)
    return model, outline if args.counts else None


def reading_of(shape: str, texts: dict[str, str]) -> dict[str, Any]:
    """How a shape reads images: LLaVA-NeXT as the tables of papers do, 2,880 tokens each, unless `texts` say else."""
    of_next = SHAPES[shape]["family"] == "llava_next"
    return {key: parse(key, text) for key, text in (NEXT_READING if of_next and not texts else texts).items()}


def batch_result(
    size: int,
    rows: dict[str, Measured | None],
    counts: dict[str, Counts],
    oracle_names: dict[str, str],
    held: Gate | None,
) -> dict[str, Any]:
    """Measurements, counts and ratios of every method and oracle at one batch size.

    Compiled rows stand beside `full` and oracles that are compiled too.
    """
    found = {}
    for name, ours in rows.items():
        plain = plain_name(name)
        full = rows.get(FULL + name.removeprefix(plain))
        entry: dict[str, Any] = {"fits": ours is not None, "oracle": oracle_names.get(name)}
        if name in counts:
            entry["counts"] = dataclasses.asdict(counts[name])
        if held is not None and plain in held.accuracy:
            entry["accuracy"], entry["passes_gate"] = held.accuracy[plain], held.passes(plain)
        if ours is not None:
            entry |= dataclasses.asdict(ours) | {"ttft": ours.ttft}
            entry["throughput"] = {str(length): size / median(times) for length, times in ours.end_to_end.items()}
        if ours is not None and full is not None:
            pair = (counts[FULL], counts[plain]) if plain in counts else None
            beside = rows.get(oracle_names.get(name, ""))
            entry["ratios"] = dataclasses.asdict(ratios(full, ours, pair, beside))
        beside_plain = rows.get(plain) if name != plain else None
        if ours is not None and beside_plain is not None:
            decode = beside_plain.decode / ours.decode if beside_plain.decode and ours.decode else None
            entry["plain_over_compiled"] = {"ttft": turn_by_turn(beside_plain, ours).median, "decode": decode}
        found[name] = entry
    return {"batch_size": size, "methods": found}
