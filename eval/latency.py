"""Time to first token of a method beside `full`, on one model, in one process.

    python -m eval.latency --method consensusdrop --budget 64
    python -m eval.latency --method consensusdrop --budget 64 --shape llava-1.5-7b --depths 2,4 --dtype bfloat16

The two methods take turns, so that a busy machine slows both. With `--shape` the model has random weights and only a
few decoder layers: prefill time is measured at two depths, and the line through both is continued to the full depth.
The tower always has its full depth. Medians over the repeats.
"""

import argparse
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eval.config import DEFAULT_MODEL
from eval.provenance import hardware
from llava import registry
from llava.errors import UserError, unknown
from llava.model import Llava, load
from llava.pipeline import Clock, Pipeline
from llava.reducer import Reducer
from llava.sample import Sample
from llava.shapes import SHAPES, random_llava

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


def measure(model: Llava, reducers: dict[str, Reducer], samples: list[Sample], repeats: int) -> dict[str, Measured]:
    """Prefill each method `repeats` times in turns, after one warm-up each."""
    laps: dict[str, list[dict[str, float]]] = {name: [] for name in reducers}
    last: dict[str, tuple[int, int]] = {}
    peaks = dict.fromkeys(reducers, 0)
    for turn in range(repeats + 1):
        for name, reducer in reducers.items():
            pipeline, clock = Pipeline(model, reducer), Clock(model.device)
            start_peak(model.device)
            state, record = pipeline.prepare(samples, clock)
            model.next_token(state.hidden)
            clock.lap("prefill")
            if turn:
                laps[name].append({part: clock.seconds.get(part, 0.0) for part in PARTS})
                peaks[name] = max(peaks[name], read_peak(model.device))
            last[name] = (state.kv_bytes_held(), record.flops)
            del state
    return {
        name: Measured(
            {part: statistics.median(lap[part] for lap in laps[name]) for part in PARTS}, *last[name], peaks[name]
        )
        for name in reducers
    }


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


def extend(shallow: Measured, deep: Measured, depths: tuple[int, int], full: int) -> Measured:
    """The line through two depths, continued to `full` layers. Tower and selection do not depend on the depth."""
    share = (full - depths[1]) / (depths[1] - depths[0])

    def line(a: float, b: float) -> float:
        return b + share * (b - a)

    seconds = dict(deep.seconds)
    seconds["prefill"] = line(shallow.seconds["prefill"], deep.seconds["prefill"])
    kv, operations = line(shallow.kv_bytes, deep.kv_bytes), line(shallow.flops, deep.flops)
    return Measured(seconds, round(kv), round(operations), deep.peak_bytes)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, and return what is printed and written."""
    if args.threads:
        torch.set_num_threads(args.threads)
    reducer = None
    results = {}
    depths = tuple(int(depth) for depth in args.depths.split(","))
    if args.shape and args.shape not in SHAPES:
        raise UserError(str(unknown("shape", args.shape, SHAPES)))
    if args.shape and (len(depths) != 2 or not 0 < depths[0] < depths[1]):
        raise UserError(f"--depths should be two numbers of layers, the smaller first, got {args.depths!r}.")
    for depth in depths if args.shape else (None,):
        model = random_llava(args.shape, depth, args.dtype) if args.shape else load(args.model, args.dtype, args.device)
        reducer = registry.build(args.method, args.budget, dict(pair.split("=", 1) for pair in args.set))
        reducer.check(model.facts())
        reducers = {"full": registry.build("full", model.visual_tokens), args.method: reducer}
        samples = [Sample(f"s{i}", QUESTION, image=noise(i)) for i in range(args.batch_size)]
        results[depth] = measure(model, reducers, samples, args.repeats)
        device = str(model.device)
        del model
    names = ("full", args.method)
    if args.shape:
        layers = SHAPES[args.shape]["text"]["num_hidden_layers"]
        final = {n: extend(results[depths[0]][n], results[depths[1]][n], depths, layers) for n in names}
    else:
        final = results[None]
    full, ours = (final[name] for name in names)
    return {
        "method": args.method,
        "budget": args.budget,
        "model": args.shape or args.model,
        "depths": depths if args.shape else None,
        "dtype": args.dtype,
        "batch_size": args.batch_size,
        "repeats": args.repeats,
        "threads": torch.get_num_threads(),
        "hardware": hardware(device),
        "full": vars(full) | {"ttft": full.ttft},
        "reduced": vars(ours) | {"ttft": ours.ttft},
        "ratios": {
            "ttft": full.ttft / ours.ttft,
            "prefill": full.seconds["prefill"] / ours.seconds["prefill"],
            "selection share of ttft": ours.seconds["selection"] / ours.ttft,
            "kv_bytes": full.kv_bytes / ours.kv_bytes,
            "flops": full.flops / ours.flops,
            "peak memory": ours.peak_bytes / full.peak_bytes,
        },
    }


def noise(seed: int):
    """A picture without meaning: timing does not depend on what is in it."""
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (336, 336, 3), dtype=np.uint8))


def table(result: dict[str, Any]) -> str:
    """The measurement as text."""
    lines = [f"{'':10}" + "".join(f"{part:>12}" for part in (*PARTS, "TTFT", "KV MB", "GFLOP", "peak MB"))]
    for name, key in (("full", "full"), (result["method"], "reduced")):
        row = result[key]
        values = [*(1000 * row["seconds"][part] for part in PARTS), 1000 * row["ttft"]]
        cells = [f"{value:9.1f} ms" for value in values]
        cells += [f"{row['kv_bytes'] / 1e6:12.2f}", f"{row['flops'] / 1e9:12.1f}", f"{row['peak_bytes'] / 1e6:12.0f}"]
        lines.append(f"{name[:10]:10}" + "".join(cells))
    ratios = result["ratios"]
    lines.append(
        f"{result['method']} at {result['budget']}: prefill {ratios['prefill']:.2f}x and time to first token "
        f"{ratios['ttft']:.2f}x faster than full, selection {100 * ratios['selection share of ttft']:.2f} % of TTFT, "
        f"KV cache {ratios['kv_bytes']:.2f}x smaller, peak memory {ratios['peak memory']:.2f} of full."
    )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", required=True)
    parser.add_argument("--budget", type=int, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="option of the method")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--shape", help=f"random weights in the shape of: {', '.join(SHAPES)}")
    parser.add_argument("--depths", default="2,4", help="decoder layers to measure with --shape")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
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
