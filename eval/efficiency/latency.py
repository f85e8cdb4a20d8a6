"""Time to first token of methods beside `full`, on one model, in one process.

    python -m eval.efficiency.latency --method consensusdrop --budget 64
    python -m eval.efficiency.latency --method all --budget 64 --shape llava-1.5-7b --dtype bfloat16

The methods take turns, so that a busy machine slows all. With `--shape` the model has random weights: tower and decoder
have their full depth, but only `--distinct` decoder layers have weights of their own, which the others share. Medians
over the repeats. With `--laps FILE` every measurement is kept as it comes, and an interrupted run goes on from there.
"""

import argparse
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from eval.config import DEFAULT_MODEL, pairs
from eval.efficiency.laps import Laps
from eval.efficiency.shapes import SHAPES, random_llava
from eval.results.provenance import hardware
from llava.errors import UserError, unknown
from llava.model.builder import load, parse
from llava.model.llava_arch import Llava
from llava.pipeline.accounting import Timer
from llava.pipeline.prefill import prefill
from llava.processing.sample import Sample
from llava.reduction import registry
from llava.reduction.crop_budget import require
from llava.reduction.reducer import Reducer

PARTS = ("vision", "selection", "prefill")
QUESTION = "What is the color of the small object on the left side of the image?"


@dataclass(frozen=True)
class Measured:
    """Medians of one method at one depth: seconds by part, bytes, operations."""

    seconds: dict[str, float]
    kv_bytes: int
    flops: int
    peak_bytes: int

    @property
    def ttft(self) -> float:
        return sum(self.seconds.values())


def measure(
    model: Llava, reducers: dict[str, Reducer], samples: list[Sample], repeats: int, laps: Laps | None = None
) -> dict[str, Measured]:
    """Prefill each method `repeats` times in turns, after one warm-up each."""
    laps = laps or Laps()
    rounds = [(turn, name) for turn in range(repeats + 1) for name in reducers]
    for turn, name in tqdm(rounds, desc="latency", unit="prefill", disable=None):
        if (turn, name) not in laps.found:
            laps.add(turn, name, once(model, reducers[name], samples))
    return {name: medians([laps.found[turn, name] for turn in range(1, repeats + 1)]) for name in reducers}


def once(model: Llava, reducer: Reducer, samples: list[Sample]) -> dict[str, Any]:
    """One prefill: seconds by part, bytes of the cache, operations, peak memory."""
    timer = Timer(model.device)
    start_peak(model.device)
    state, record = prefill(model, samples, reducer, timer)
    model.logits(state.hidden).argmax(-1)
    timer.mark("prefill")
    return {
        "seconds": {part: timer.seconds.get(part, 0.0) for part in PARTS},
        "kv_bytes": state.kv_bytes_held,
        "flops": record.operations.total,
        "peak_bytes": read_peak(model.device),
    }


def medians(laps: list[dict[str, Any]]) -> Measured:
    last = laps[-1]
    seconds = {part: statistics.median(lap["seconds"][part] for lap in laps) for part in PARTS}
    return Measured(seconds, last["kv_bytes"], last["flops"], max(lap["peak_bytes"] for lap in laps))


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


def reducers_of(names: list[str], budget: int, options: dict[str, str], model: Llava) -> dict[str, Reducer]:
    """`full` and the methods that can run at this budget; what cannot is said on standard error.

    Args:
        names: methods, or "all".
    """
    found = {"full": registry.build("full", model.visual_tokens)}
    everything = names == ["all"]
    for name in [n for n in registry.names() if n != "full"] if everything else names:
        reducer = registry.build(name, budget, {} if everything else options)
        try:
            require(reducer, model.facts)
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
        raise UserError(str(unknown("shape", args.shape, SHAPES)))
    picture = {key: parse(key, value) for key, value in pairs("--picture", args.picture).items()}
    if args.shape:
        model = random_llava(args.shape, args.distinct, args.dtype, args.layers, **picture)
    else:
        model = load(args.model, args.dtype, args.device, **picture)
    options = dict(pair.split("=", 1) for pair in args.set)
    reducers = reducers_of(args.method.split(","), args.budget, options, model)
    samples = [Sample(f"s{i}", QUESTION, image=noise(i)) for i in range(args.batch_size)]
    settings = {
        "budget": args.budget,
        "model": args.shape or args.model,
        "distinct_layers": args.distinct if args.shape else None,
        "layers": len(model.llm.layers),
        "picture": model.conventions,
        "dtype": args.dtype,
        "batch_size": args.batch_size,
        "options": options,
        "threads": torch.get_num_threads(),
        "hardware": hardware(str(model.device)),
    }
    measured = measure(model, reducers, samples, args.repeats, Laps(args.laps, settings))
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


def noise(seed: int):
    """A picture without meaning: timing does not depend on what is in it."""
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (336, 336, 3), dtype=np.uint8))


def table(result: dict[str, Any]) -> str:
    """The measurement as text."""
    heads = (*PARTS, "TTFT", "KV MB", "GFLOP", "peak MB", "TTFT x", "selection")
    lines = [f"{'':14}" + "".join(f"{head:>13}" for head in heads)]
    for name, row in result["methods"].items():
        values = [*(1000 * row["seconds"][part] for part in PARTS), 1000 * row["ttft"]]
        cells = [f"{value:10.1f} ms" for value in values]
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", required=True, help="a name, several separated by commas, or all")
    parser.add_argument("--budget", type=int, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="option of the method")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--shape", help=f"random weights in the shape of: {', '.join(SHAPES)}")
    parser.add_argument("--distinct", type=int, default=4, help="with --shape: decoder layers with their own weights")
    parser.add_argument("--layers", type=int, help="with --shape: so many decoder layers instead of all")
    parser.add_argument("--picture", action="append", default=[], metavar="KEY=VALUE", help="how pictures are read")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--laps", type=Path, help="keep every measurement here and go on from what is there")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    args = parser.parse_args()
    try:
        result = run(args)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(table(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
