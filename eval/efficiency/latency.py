"""Time to first token of methods beside `full`, on one model, in one process.

    python -m eval.efficiency.latency --method consensusdrop --budget 64
    python -m eval.efficiency.latency --method all --budget 64 --shape llava-1.5-7b --dtype bfloat16

The methods take turns, so that a busy machine slows all. With `--shape` the model has random weights: tower and decoder
have their full depth, but only `--distinct` decoder layers have weights of their own, which the others share. Times are
medians over the repeats, of a whole batch. Time to first token (TTFT) is vision, selection and prefill, from prepared
pixels and token ids; preprocessing on the CPU is listed apart. With `--measurements FILE` every measurement is written
at once, and an interrupted run continues from the file.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from eval.command import exit_on_user_error, make_parser
from eval.config import DEFAULT_MODEL, options_by_method, pairs
from eval.efficiency.shapes import SHAPES, random_llava
from eval.results.provenance import hardware
from llava.errors import UserError, unknown
from llava.model.builder import DTYPES, device_of, load, parse
from llava.model.llava_arch import Llava
from llava.pipeline.accounting import Timer
from llava.pipeline.prefill import prefill
from llava.processing.sample import Sample
from llava.reduction import registry
from llava.reduction.crop_budget import require
from llava.reduction.reducer import Reducer

PARTS = ("vision", "selection", "prefill")
QUESTION = "What is the color of the small object on the left side of the image?"


class Measurements:
    """Measurements by (turn, method), turn 0 being the warm-up; kept in a JSONL file when there is one.

    Raises:
        UserError: the file holds measurements under other settings.
    """

    def __init__(self, path: Path | None = None, settings: dict[str, Any] | None = None):
        self.path = path
        self.found: dict[tuple[int, str], dict[str, Any]] = {}
        if path is None:
            return
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(settings) + "\n")
        first, *lines = path.read_text().splitlines()
        if json.loads(first) != settings:
            raise UserError(
                f"{path} holds measurements under other settings ({first}), not {json.dumps(settings)}; "
                "name another file."
            )
        for row in map(json.loads, lines):
            self.found[row.pop("turn"), row.pop("method")] = row

    def add(self, turn: int, name: str, row: dict[str, Any]) -> None:
        self.found[turn, name] = row
        if self.path:
            with self.path.open("a") as file:
                file.write(json.dumps({"turn": turn, "method": name} | row) + "\n")


@dataclass(frozen=True)
class Measured:
    """Medians of one method, of a whole batch.

    Attributes:
        seconds: vision, selection and prefill, whose sum is the time to the first token.
        preprocess: seconds of tokenizing and of preparing images on the CPU, before that time starts.
    """

    seconds: dict[str, float]
    kv_bytes: int
    flops: int
    peak_bytes: int
    preprocess: float = 0.0

    @property
    def ttft(self) -> float:
        return sum(self.seconds.values())


def measure(
    model: Llava, reducers: dict[str, Reducer], samples: list[Sample], repeats: int, kept: Measurements | None = None
) -> dict[str, Measured]:
    """Prefill each method `repeats` times in turns, after one warm-up each."""
    kept = kept or Measurements()
    rounds = [(turn, name) for turn in range(repeats + 1) for name in reducers]
    for turn, name in tqdm(rounds, desc="latency", unit="prefill", disable=None):
        if (turn, name) not in kept.found:
            kept.add(turn, name, once(model, reducers[name], samples))
    return {name: medians([kept.found[turn, name] for turn in range(1, repeats + 1)]) for name in reducers}


def once(model: Llava, reducer: Reducer, samples: list[Sample]) -> dict[str, Any]:
    """One prefill: seconds by part, bytes of the cache, operations, peak memory."""
    start_peak(model.device)
    timer = Timer(model.device)
    state, record = prefill(model, samples, reducer, timer)
    model.logits(state.hidden).argmax(-1)
    timer.mark("prefill")
    spent = timer.seconds
    return {
        "seconds": {part: spent.get(part, 0.0) for part in PARTS},
        "preprocess": spent.get("preprocess", 0.0),
        "kv_bytes": state.kv_bytes_held,
        "flops": record.operations.total,
        "peak_bytes": read_peak(model.device),
    }


def medians(rows: list[dict[str, Any]]) -> Measured:
    last = rows[-1]
    seconds = {part: statistics.median(row["seconds"][part] for row in rows) for part in PARTS}
    return Measured(
        seconds,
        last["kv_bytes"],
        last["flops"],
        max(row["peak_bytes"] for row in rows),
        statistics.median(row["preprocess"] for row in rows),
    )


def start_peak(device: torch.device) -> None:
    """Forget the highest memory seen so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def read_peak(device: torch.device) -> int:
    """Highest memory since `start_peak`: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def chosen_options(settings: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Options of --set by method: METHOD.KEY=VALUE for one method, KEY=VALUE for each that is named.

    Args:
        names: the measured methods, or "all".
    """
    everything = list(names) == ["all"]
    for setting in settings:
        if everything and "." not in setting.partition("=")[0]:
            raise UserError(f"--set {setting} names no method; with --method all write METHOD.{setting}.")
    found = options_by_method(registry.names() if everything else names, settings)
    return {method: options for method, options in found.items() if options}


def reducers_of(
    names: Sequence[str], budget: int, options: dict[str, dict[str, str]], model: Llava
) -> dict[str, Reducer]:
    """`full` and the methods that can run at this budget; those that cannot are listed on standard error.

    Args:
        names: methods, or "all".
        options: by method.
    """
    found = {"full": registry.build("full", model.visual_tokens)}
    everything = list(names) == ["all"]
    for name in [n for n in registry.names() if n != "full"] if everything else names:
        reducer = registry.build(name, model.visual_tokens if name == "full" else budget, options.get(name, {}))
        try:
            require(reducer, model.spec)
        except UserError as error:
            if not everything:
                raise
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        found[name] = reducer
    return found


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, and return what is printed and written."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.shape and args.shape not in SHAPES:
        raise unknown("shape", args.shape, SHAPES)
    names = args.method.split(",")
    options = chosen_options(args.set, names)
    picture = {key: parse(key, value) for key, value in pairs("--picture", args.picture).items()}
    if args.shape:
        device = device_of(args.device)
        model = random_llava(args.shape, args.distinct, args.dtype, args.layers, device=device, **picture)
    else:
        model = load(args.model, args.dtype, args.device, **picture)
    reducers = reducers_of(names, args.budget, options, model)
    samples = [Sample(f"s{i}", QUESTION, image=noise(i)) for i in range(args.batch_size)]
    settings = {
        "budget": args.budget,
        "model": args.shape or args.model,
        "distinct_layers": args.distinct if args.shape else None,
        "layers": model.spec.layers,
        "picture": model.conventions,
        "dtype": args.dtype,
        "batch_size": args.batch_size,
        "options": options,
        "threads": torch.get_num_threads(),
        "device": str(model.device),
        "hardware": hardware(str(model.device)),
        "ttft": "vision, selection and prefill of the batch, without preprocessing",
    }
    measured = measure(model, reducers, samples, args.repeats, Measurements(args.measurements, settings))
    full = measured["full"]
    return {
        **settings,
        "repeats": args.repeats,
        "methods": {
            name: vars(found) | {"ttft": found.ttft, "ratios": ratios(full, found)} for name, found in measured.items()
        },
    }


def ratios(full: Measured, ours: Measured) -> dict[str, float]:
    """How much less than full; selection as a share of the time to the first token.

    Signals are computed while the tower runs: what the tower takes longer than for full is counted as selection.
    """
    longer = max(0.0, ours.seconds["vision"] - full.seconds["vision"])
    return {
        "ttft": full.ttft / ours.ttft,
        "prefill": full.seconds["prefill"] / ours.seconds["prefill"],
        "selection share of ttft": ours.seconds["selection"] / ours.ttft,
        "selection and signals share of ttft": (ours.seconds["selection"] + longer) / ours.ttft,
        "kv_bytes": full.kv_bytes / ours.kv_bytes,
        "flops": full.flops / ours.flops,
        "peak memory": ours.peak_bytes / full.peak_bytes,
    }


def noise(seed: int) -> Image.Image:
    """An image without meaning: timing does not depend on what is in it."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (336, 336, 3), dtype=np.uint8))


def table(result: dict[str, Any]) -> str:
    """The measurement as text."""
    heads = (*PARTS, "TTFT", "preprocess", "KV MB", "GFLOP", "peak MB", "TTFT x", "selection")
    batch = result["batch_size"]
    lines = [
        f"{'one question' if batch == 1 else f'a batch of {batch} questions'} on {result['device']} "
        f"({result['hardware']}), {result['dtype']}, {result['threads']} threads, median of {result['repeats']}",
        f"{'':14}" + "".join(f"{head:>13}" for head in heads),
    ]
    for name, row in result["methods"].items():
        values = [*(row["seconds"][part] for part in PARTS), row["ttft"], row["preprocess"]]
        cells = [f"{1000 * value:10.1f} ms" for value in values]
        cells += [f"{row['kv_bytes'] / 1e6:13.2f}", f"{row['flops'] / 1e9:13.1f}", f"{row['peak_bytes'] / 1e6:13.0f}"]
        cells += [f"{row['ratios']['ttft']:13.2f}", f"{100 * row['ratios']['selection share of ttft']:11.2f} %"]
        lines.append(f"{name[:14]:14}" + "".join(cells))
    for name, row in result["methods"].items():
        if name != "full" and len(result["methods"]) == 2:
            lines.append(sentence(name, result["budget"], row["ratios"]))
    return "\n".join(lines)


def sentence(name: str, budget: int, found: dict[str, float]) -> str:
    return (
        f"{name} at {budget}: prefill {found['prefill']:.2f}x and time to first token {found['ttft']:.2f}x faster than "
        f"full, selection {100 * found['selection share of ttft']:.2f} % of TTFT, KV cache {found['kv_bytes']:.2f}x "
        f"smaller, peak memory {found['peak memory']:.2f} of full."
    )


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = make_parser("eval.efficiency.latency", __doc__)
    parser.add_argument("--method", required=True, help="a name, several separated by commas, or all")
    parser.add_argument("--budget", type=int, required=True, help="visual tokens to keep per image")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="[METHOD.]KEY=VALUE",
        help="option of one method, or without METHOD of each that is named",
    )
    parser.add_argument("--model", default=DEFAULT_MODEL, help="folder or hub name of a checkpoint")
    parser.add_argument("--shape", help=f"random weights in the shape of: {', '.join(SHAPES)}")
    parser.add_argument("--distinct", type=int, default=4, help="with --shape: decoder layers with their own weights")
    parser.add_argument("--layers", type=int, help="with --shape: so many decoder layers instead of all")
    parser.add_argument("--picture", action="append", default=[], metavar="KEY=VALUE", help="how images are read")
    parser.add_argument("--dtype", default="float32", choices=tuple(DTYPES), help="of the weights")
    parser.add_argument("--device", default="auto", help="torch device")
    parser.add_argument("--batch-size", type=int, default=1, help="questions in the batch, each about its own image")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each method after one warm-up")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; 0 leaves torch's choice")
    parser.add_argument(
        "--measurements",
        "--laps",
        type=Path,
        metavar="FILE",
        help="write every measurement to this file and continue from what is there",
    )
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    args = parser.parse_args(arguments)
    result = run(args)
    print(table(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
