"""Requests per second, time to first token and KV blocks of vLLM under a method, compared with `full` and our decoder.

    python -m lab.bench.serving --budget 64
    python -m lab.bench.serving --budget 64 --shape llava-1.5-7b --layers 2 --blocks 3 --dtype bfloat16

It runs in the environment of scripts/serve_setup.sh. All engines live in this process and are asked in turns, always
about new images, without prefix cache and without cache of processed images. The requests of a turn are handed over at
once; the turn is timed from opened images to the last of LENGTH tokens of every request. Every measurement can be kept
in a file, from which an interrupted benchmark continues.
"""

import argparse
import copy
import itertools
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm
from transformers import CLIPImageProcessorPil

from eval.command import exit_on_user_error, make_parser, value
from eval.config import DEFAULT_MODEL, FULL, count
from eval.efficiency.latency import whole_numbers
from eval.efficiency.latency_table import ms, table, write
from eval.efficiency.measure import Measurements, over_rounds
from eval.efficiency.shapes import QUESTION, SHAPES, SUFFIX, hf_model, noise
from eval.results.report import hardware
from eval.results.statistics import plural
from llava.errors import UserError
from llava.model.builder import DTYPES, device_of, load
from llava.model.checkpoint.config import CLIP_L_336
from llava.model.checkpoint.files import locate
from llava.model.llava_arch import Llava
from llava.pipeline.accounting import Timer
from llava.pipeline.generate import generate
from llava.processing.json_files import read_json
from llava.processing.prompt import Sample
from llava.reduction.budget import require
from llava.reduction.reducer import Reducer
from llava.reduction.registry import build
from llava.serving.client import EMBEDS, PIXELS
from llava.serving.engine_model import Engine, import_vllm

LENGTH = 16  # tokens of an answer
OWN = "own"
# Ways to answer, each with the method that is compared with `full` on it.
PAIRS = ((OWN, "divprune"), (PIXELS, "divprune"), (OWN, "consensusdrop"), (EMBEDS, "consensusdrop"))
NAMES = {OWN: "own decoder", PIXELS: "vLLM, pixels", EMBEDS: "vLLM, embeds"}
# Caches are off, so that no turn profits from the one before, and the engine records when each first token came.
ENGINE = {"enable_prefix_caching": False, "mm_processor_cache_gb": 0, "disable_log_stats": False}
Ask = Callable[[Sequence[Sample]], dict[str, Any]]

# The model


def save_random(shape: Mapping[str, Any], folder: Path, dtype: str) -> None:
    """Write a LLaVA-1.5 of random weights in transformers' layout, with the tokenizer of the toy model.

    Args:
        shape: an entry as in SHAPES.
    """
    toy = locate(DEFAULT_MODEL, "checkpoint")
    known = read_json(toy / "config.json")
    ids = {name: known["text_config"][name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    vision = shape.get("vision", CLIP_L_336)
    made = hf_model("llava", {**shape["text"], **ids}, vision, DTYPES[dtype], torch.device("cpu"))
    made.config.image_token_index = known["image_token_index"]
    made.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "generation_config.json"):
        shutil.copy(toy / name, folder)
    side = vision["image_size"]
    sizes: dict[str, Any] = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    CLIPImageProcessorPil(**sizes).save_pretrained(folder)


# What is measured


def askers(model: Llava, directory: Path, budget: int, dtype: str, largest: int) -> dict[str, Ask]:
    """ "WAY METHOD" -> a function that asks a batch and returns its seconds, time to first token and KV blocks.

    Args:
        largest: the most requests at once.

    Raises:
        UserError: a method cannot run at this budget or on this model.
    """
    found: dict[str, Ask] = {}
    for way, method in PAIRS:
        reducers = {FULL: build(FULL, model.visual_tokens), method: build(method, budget)}
        require(reducers[method], model.spec)
        if way == OWN:
            found |= {f"{way} {name}": partial(ask_own, model, one) for name, one in reducers.items()}
            continue
        engine = Engine(model, reducers[method], directory, dtype, largest)
        if engine.route != way:
            raise UserError(f"{method} goes by {engine.route} on {model.name}; give --model a LLaVA-1.5.")
        # Three engines and our model share the memory of a GPU.
        given = ENGINE if model.device.type == "cpu" else {**ENGINE, "gpu_memory_utilization": 0.2}
        engine.arguments |= given
        if way == PIXELS:
            whole = Engine(model, reducers[FULL], directory, dtype, largest)
            whole.arguments |= given
        else:  # the engine receives reduced embeddings and knows no method, so one serves both
            _ = engine.llm
            whole = copy.copy(engine)
            whole.reducer = reducers[FULL]
        found[f"{way} {FULL}"] = partial(ask_engine, whole)
        found[f"{way} {method}"] = partial(ask_engine, engine)
    return found


def ask_own(model: Llava, reducer: Reducer, samples: Sequence[Sample]) -> dict[str, Any]:
    """One turn of our own decoder, where all requests of a batch have their first token at the same time."""
    began = time.monotonic()
    batch = generate(model, samples, reducer, LENGTH, ignore_eos=True)
    return {"seconds": time.monotonic() - began, "ttft": batch.timing.preprocess + batch.timing.ttft}


@torch.inference_mode()
def ask_engine(engine: Engine, samples: Sequence[Sample]) -> dict[str, Any]:
    """One turn of an engine. The time to first token is the median over requests, from the start of the turn."""
    with blocks_in_use(engine.llm) as used:
        began = time.monotonic()
        engine.answers(samples, engine.reducer, LENGTH, True, Timer(engine.model.device))
        seconds = time.monotonic() - began
    first = [output.metrics.first_token_ts - began for output in engine.outputs]
    cache = engine.llm.llm_engine.vllm_config.cache_config
    held = {"blocks": max(used) / len(samples), "block": cache.block_size, "cache": cache.num_gpu_blocks}
    return {"seconds": seconds, "ttft": median(first), **held}


@contextmanager
def blocks_in_use(llm: Any) -> Iterator[list[int]]:
    """While active, collects after every step how many KV blocks the engine's scheduler has in use."""
    engine, step = llm.llm_engine, llm.llm_engine.step
    pool = engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    free, used = pool.get_num_free_blocks(), [0]

    def counted() -> Any:
        outputs = step()
        used.append(free - pool.get_num_free_blocks())
        return outputs

    engine.step = counted
    try:
        yield used
    finally:
        del engine.step


def measure(args: argparse.Namespace, directory: Path, kept: Measurements) -> None:
    """Measure every way and method in turns, for every number of requests at once.

    The order is reversed in the warm-up and in every second round. What `kept` already holds is not measured again.
    """
    names = dict.fromkeys(f"{way} {name}" for way, method in PAIRS for name in (FULL, method))
    turns = [
        (number, name, size)
        for size in args.at_once
        for number in range(args.repeats + 1)
        for name in (names if number % 2 else reversed(names))
        if (number, name, size) not in kept.rows
    ]
    if not turns:
        return
    model = load(directory, args.dtype, args.device)
    ask = askers(model, directory, args.budget, args.dtype, max(args.at_once))
    seeds, warm = itertools.count(), set[tuple[str, int]]()

    def samples(size: int) -> list[Sample]:
        return [Sample(f"s{seed}", QUESTION, SUFFIX, noise(seed)) for seed in itertools.islice(seeds, size)]

    for number, name, size in tqdm(turns, unit="turn", disable=None):
        if number and (name, size) not in warm:  # continues from a file: this process needs a warm-up of its own
            ask[name](samples(size))
        kept.add(number, name, size, ask[name](samples(size)))
        warm.add((name, size))


# How it is shown


def page(kept: Measurements, sizes: Sequence[int], repeats: int) -> str:
    """The conditions of the measurement, and a table with a row for each way and method at each number of requests."""
    lines = []
    for size in sizes:
        for way, method in PAIRS:
            ours, full, own = (
                [kept.rows[number, name, size] for number in range(1, repeats + 1)]
                for name in (f"{way} {method}", f"{way} {FULL}", f"{OWN} {method}")
            )
            line = [("at once", str(size)), ("answered by", NAMES[way]), ("method", method)]
            for key, title in (("seconds", "requests/s"), ("ttft", "TTFT ms")):
                few, many, theirs = ([row[key] for row in rows] for rows in (ours, full, own))
                for of, seconds in ((title, median(few)), ("of full", median(many))):
                    line.append((of, f"{size / seconds:.3g}" if key == "seconds" else ms(seconds)))
                line.append(("faster than full", str(over_rounds(many, few))))
                line.append(("than own", "" if way == OWN else str(over_rounds(theirs, few))))
            if way != OWN:
                line += [("KV blocks", f"{ours[-1]['blocks']:g}"), ("of full", f"{full[-1]['blocks']:g}")]
            lines.append(line)
    return f"{about(kept, repeats)}\n\n{table(lines)}"


def about(kept: Measurements, repeats: int) -> str:
    """The conditions of the measurement, in a sentence."""
    known, rows = kept.settings, kept.rows.values()
    block, cache = next((row["block"], row["cache"]) for row in rows if "block" in row)
    words = ", ".join(f"{name} {number}" for name, number in known["versions"].items())
    threads = f"{known['threads']} {plural('thread', known['threads'])}"
    return (
        f"{known['model']}, budget {known['budget']}, {known['dtype']}, answers of {LENGTH} tokens, {known['device']} "
        f"({known['hardware']}), {threads}, medians of {repeats} turns after a warm-up, ratios of the same round with "
        f"their range; {cache} blocks of {block} tokens in an engine; {words}, commit "
        f"{', '.join(sorted(kept.commits))}."
    )


# The command


def parser() -> argparse.ArgumentParser:
    """All flags."""
    flags = make_parser("lab.bench.serving", __doc__)
    add = flags.add_argument
    add("--budget", type=value(count), default=64, help="visual tokens to keep per image")
    add("--model", type=Path, default=Path(DEFAULT_MODEL), help="folder of a LLaVA-1.5 in transformers' layout")
    add("--shape", choices=[name for name in SHAPES if name.startswith("llava-1.5")], help="random weights instead")
    add("--layers", type=value(count), default=2, help="with --shape: decoder layers")
    add("--blocks", type=value(count), default=3, help="with --shape: blocks of the tower")
    add("--at-once", type=value(whole_numbers), default=(1, 8, 32), help="requests at once: 1,8,32")
    add("--repeats", type=value(count), default=3, help="turns after one warm-up")
    add("--dtype", default="float32", choices=tuple(DTYPES), help="of the weights")
    add("--device", default="auto", help="torch device")
    add("--measurements", type=Path, help="keep every turn here, and go on from it")
    add("--json", type=Path, help="also write the numbers here")
    add("--markdown", type=Path, help="also write the table here")
    return flags


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = parser().parse_args(arguments)
    vllm, device = import_vllm(), str(device_of(args.device))
    name = args.model.name
    if args.shape:
        name = f"{args.shape} shapes with {args.layers} decoder layers and {args.blocks} tower blocks, random weights"
    settings = {
        "model": name,
        "budget": args.budget,
        "dtype": args.dtype,
        "threads": torch.get_num_threads(),
        "device": device,
        "hardware": hardware(device),
        "versions": {"vLLM": vllm.__version__, "torch": torch.__version__},
    }
    kept = Measurements(args.measurements, settings)
    with tempfile.TemporaryDirectory() as folder:
        directory = locate(args.model, "checkpoint") if not args.shape else Path(folder)
        if args.shape:
            vision = {**CLIP_L_336, "num_hidden_layers": args.blocks}
            text = {**SHAPES[args.shape]["text"], "num_hidden_layers": args.layers}
            save_random({"text": text, "vision": vision}, directory, args.dtype)
        measure(args, directory, kept)
    shown = page(kept, args.at_once, args.repeats)
    print(shown)
    rows = [{"round": number, "row": row, "at_once": size} | found for (number, row, size), found in kept.rows.items()]
    write(args, {**settings, "commits": sorted(kept.commits), "rows": rows}, shown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
