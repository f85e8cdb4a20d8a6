"""How time to the first token, selection and memory grow with visual tokens (256 to 11,520) and with the batch.

    python -m eval.efficiency.growth --methods full,consensusdrop,visiondrop,divprune

The network is a narrow LLaVA (`--width`), so that a CPU needs seconds. Methods have their default options: most divide
the budget over the tiles of an image. Prints the measured costs and what was fitted to them.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from eval.command import exit_on_user_error, make_parser, value
from eval.config import count
from eval.efficiency.growth.fit import fit
from eval.efficiency.growth.plot import plot
from eval.efficiency.growth.series import Point, Size, measure_growth
from eval.efficiency.latency.__main__ import counts
from eval.efficiency.latency.measure import CLOCKS
from eval.efficiency.latency.table import ms
from eval.results.provenance import commit, hardware
from eval.tables.page import markdown
from llava.errors import UserError
from llava.model.builder import DTYPES, device_of

METHODS = "full,consensusdrop,visiondrop,attnmix,fastervlm,divprune,cdpruner,scope"


def parser() -> argparse.ArgumentParser:
    """All flags."""
    found = make_parser("eval.efficiency.growth", __doc__)
    found.add_argument("--methods", default=METHODS, help="names separated by commas")
    found.add_argument(
        "--tokens", type=value(counts), default=(256, 512, 1280, 2560, 5120, 11520), help="multiples of 256"
    )
    found.add_argument(
        "--batch-size", type=value(counts), default=(1, 2, 4, 8), help="at the smallest number of tokens"
    )
    found.add_argument("--budget", type=value(count), default=128, help="visual tokens to keep per image")
    found.add_argument("--width", type=value(count), default=256, help="channels of decoder and tower")
    found.add_argument("--layers", type=value(count), default=4, help="decoder layers")
    found.add_argument("--blocks", type=value(count), default=3, help="blocks of the tower")
    found.add_argument("--repeats", type=value(count), default=3, help="turns after one warm-up")
    found.add_argument("--dtype", default="float32", choices=tuple(DTYPES), help="of the weights")
    found.add_argument("--device", default="auto", help="torch device")
    found.add_argument("--threads", type=int, default=0, help="of the CPU; 0 leaves torch's choice")
    found.add_argument("--clock", default="wall", choices=CLOCKS, help="cpu: time that this process computes")
    found.add_argument("--json", type=Path, help="also write the numbers here")
    found.add_argument("--markdown", type=Path, help="also write the tables here")
    found.add_argument("--plot", type=Path, help="also draw them here")
    return found


def page(points: Sequence[Point], about: str) -> str:
    """The costs by number of tokens with their fits, then by batch size."""
    blocks = [about]
    methods = list(dict.fromkeys(point.method for point in points))
    tokens = list(dict.fromkeys(point.tokens for point in points if point.batch == 1))
    batches = list(dict.fromkeys(point.batch for point in points if point.tokens == tokens[0]))
    for field, title in (("ttft", "TTFT, ms"), ("selection", "selection and merging, ms"), ("memory", "memory, MB")):
        lines = []
        for name in methods:
            own = [getattr(p, field) for p in points if p.method == name and p.batch == 1]
            fitted = fit(tokens, own) if len(tokens) >= 3 and min(own) > 0 else None
            ends = ["n/a"] * 3
            if fitted:
                ends = [f"{fitted.exponent:.2f}", f"{fitted.last:.2f}", f"{100 * fitted.quadratic:.0f} %"]
            lines.append([name, *(text(cost, field) for cost in own), *ends])
        header = [title, *(f"{count:,}" for count in tokens), "exponent", "of the last three", "quadratic at the end"]
        blocks.append(markdown(header, lines))
    if len(batches) > 1:
        lines = []
        for name in methods:
            own = [p for p in points if p.method == name and p.tokens == tokens[0]]
            lines.append([name, *(f"{text(p.ttft, 'ttft')} / {text(p.memory, 'memory')}" for p in own)])
        header = [f"TTFT, ms / memory, MB at {tokens[0]:,} tokens", *(f"batch {batch}" for batch in batches)]
        blocks.append(markdown(header, lines))
    return "\n\n".join(blocks)


def text(cost: float, field: str) -> str:
    """A cost in the unit of its table."""
    return f"{cost / 1e6:.1f}" if field == "memory" else ms(cost)


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = parser().parse_args(arguments)
    if args.width % 64:
        raise UserError(f"--width should be a multiple of 64, got {args.width}.")
    if args.threads:
        torch.set_num_threads(args.threads)
    device, size = device_of(args.device), Size(args.width, args.layers, args.blocks)
    methods = args.methods.split(",")
    points = measure_growth(
        methods, args.tokens, args.batch_size, args.budget, size, device, args.repeats, args.dtype, args.clock
    )
    about = (
        f"A LLaVA of {args.width} channels, {args.layers} decoder layers and {args.blocks} tower blocks with random "
        f"weights, budget {args.budget}, {args.dtype}, {device} ({hardware(str(device))}), {torch.get_num_threads()} "
        f"threads, {args.clock} clock, median of {args.repeats} turns after a warm-up, methods in turns."
    )
    shown = page(points, about)
    print(shown)
    made = {"about": about, "commit": commit(), "points": [dataclasses.asdict(point) for point in points]}
    for path, content in ((args.json, json.dumps(made, indent=1)), (args.markdown, shown)):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content + "\n")
    if args.plot:
        title = f"Growth with visual tokens, {args.width} channels, {args.layers} decoder layers, budget {args.budget}"
        plot(args.plot, points, title)
    return 0


if __name__ == "__main__":
    sys.exit(main())
