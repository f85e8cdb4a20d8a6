"""Measure how time to the first token, selection and memory grow with the visual tokens of an image (256 to 11,520).

    python -m lab.bench.growth --methods full,consensusdrop,visiondrop,divprune

The network is a narrow LLaVA (`--width`), so that a CPU needs seconds. Methods have their default options, so most
divide the budget over the tiles of an image. The command prints the measured costs and the powers fitted to them.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from eval.command import exit_on_user_error, make_parser, value
from eval.config import count
from eval.efficiency.latency import add_machine_flags, whole_numbers
from eval.efficiency.latency_table import ms, table, write
from eval.efficiency.measure import measure
from eval.efficiency.oracle import reducers_of
from eval.efficiency.shapes import narrow, noise_batches, random_llava
from eval.results.report import hardware
from eval.tables import COLOURS, MARKERS
from eval.versions import commit
from llava.errors import UserError
from llava.model.builder import device_of
from llava.model.llava_arch import Llava

METHODS = "full,consensusdrop,visiondrop,attnmix,fastervlm,divprune,cdpruner,scope"
SIDE, TILE = 224, 256  # pixels of a tile, and its visual tokens

# What is measured


@dataclass(frozen=True)
class Point:
    """One method at one number of visual tokens.

    Attributes:
        ttft: seconds to the first token, median over rounds.
        selection: seconds of selection and merging, medians over rounds.
        memory: the most bytes that a prefill added to those in use before it.
    """

    method: str
    tokens: int
    ttft: float
    selection: float
    memory: int


def grid(tokens: int) -> tuple[int, int] | None:
    """(rows, columns) of the tiles that have this many visual tokens with the base image; None if there are no tiles.

    Raises:
        UserError: `tokens` is not a multiple of a tile's tokens.
    """
    if tokens < TILE or tokens % TILE:
        raise UserError(f"Visual tokens should be multiples of {TILE} (tiles of {SIDE} pixels), got {tokens}.")
    tiles = tokens // TILE - 1
    if not tiles:
        return None
    rows = next(rows for rows in range(int(tiles**0.5), 0, -1) if tiles % rows == 0)
    return rows, tiles // rows


def model_of(tokens: int, width: int, layers: int, blocks: int, device: torch.device, dtype: str) -> Llava:
    """A narrow model whose images have this many visual tokens: LLaVA-NeXT's tiles, or LLaVA-1.5 for one tile.

    Args:
        width: channels of decoder and tower.
        layers: number of decoder layers.
        blocks: number of tower blocks.
    """
    tiles = grid(tokens)
    shape, reading = "llava-1.5-7b", dict[str, Any]()
    if tiles is not None:
        shape, reading = "llava-next-7b", {"merge": "spatial", "force": (tiles[1] * SIDE, tiles[0] * SIDE)}
    return random_llava(narrow(shape, width, layers, blocks, SIDE), None, dtype, device=device, **reading)


def measure_growth(args: argparse.Namespace, device: torch.device) -> list[Point]:
    """Measure every method on one question at every number of tokens.

    Args:
        args: the flags of the command.

    Raises:
        UserError: before anything is measured, if a method cannot meet the budget at one of the numbers of tokens; or a
            number of tokens does not fit into the memory.
    """
    methods, size = args.methods.split(","), (args.width, args.layers, args.blocks)
    for tokens in args.tokens:
        try:
            reducers_of(methods, args.budget, {}, model_of(tokens, *size, torch.device("meta"), args.dtype))
        except UserError as error:
            raise UserError(f"At {tokens:,} visual tokens: {error}") from error
    points = []
    for tokens in args.tokens:
        model = model_of(tokens, *size, device, args.dtype)
        reducers = reducers_of(methods, args.budget, {}, model)
        ask = noise_batches(model, 1, False)
        for name, found in measure(model, reducers, ask, args.repeats, clock=args.clock).items():
            if found is None:
                raise UserError(f"{tokens:,} visual tokens do not fit into the memory with {name}.")
            chosen = found.seconds["selection"] + found.seconds["merging"]
            points.append(Point(name, tokens, median(found.ttfts), chosen, found.above_bytes))
    return points


# How it grows


def exponent(tokens: Sequence[int], costs: Sequence[float]) -> float:
    """The power e of cost ~ tokens^e: the slope of a line through the logarithms of positive costs."""
    return float(np.polyfit(np.log(tokens), np.log(costs), 1)[0])


# How it is shown


def page(points: Sequence[Point], about: str) -> str:
    """Tables of the costs by number of tokens, and of the power with which they grow.

    The power is fitted to all points and to the last three, in which constant parts of a cost weigh least.
    """
    blocks = [about]
    for field, title in (("ttft", "TTFT, ms"), ("selection", "selection and merging, ms"), ("memory", "memory, MB")):
        lines = []
        for name in dict.fromkeys(point.method for point in points):
            own = {point.tokens: getattr(point, field) for point in points if point.method == name}
            tokens, costs = list(own), list(own.values())
            line = [(title, name)]
            for number, cost in own.items():
                line.append((f"{number:,}", f"{cost / 1e6:.1f}" if field == "memory" else ms(cost)))
            for column, start in (("exponent", 0), ("of the last three", -3)):
                fits = len(costs) >= 3 and min(costs) > 0
                line.append((column, f"{exponent(tokens[start:], costs[start:]):.2f}" if fits else "n/a"))
            lines.append(line)
        blocks.append(table(lines))
    return "\n\n".join(blocks)


def plot(path: Path, points: Sequence[Point], title: str) -> None:
    """Plot time, selection and memory against visual tokens, on logarithmic axes."""
    fields: dict[str, tuple[float, str]] = {
        "ttft": (1e3, "time to the first token, ms"),
        "selection": (1e3, "selection and merging, ms"),
        "memory": (1e-6, "peak memory above the weights, MB"),
    }
    figure = Figure(figsize=(13, 4.4), dpi=140)
    for axes, (field, (scale, label)) in zip(figure.subplots(1, 3), fields.items(), strict=True):
        for index, name in enumerate(dict.fromkeys(point.method for point in points)):
            own = [point for point in points if point.method == name]
            places, values = [point.tokens for point in own], [getattr(point, field) * scale for point in own]
            if min(values) <= 0:
                continue  # full selects nothing
            style: dict[str, Any] = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
            slope = f", ~ N^{exponent(places[-3:], values[-3:]):.2f}" if len(places) >= 3 else ""
            axes.plot(places, values, label=f"{name}{slope}", linewidth=1.4, markersize=4, **style)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(places, [f"{place:,}" for place in places], fontsize=7.5)
        axes.minorticks_off()
        axes.set_xlabel("visual tokens N of the image, before any reduction")
        axes.set_ylabel(label)
        axes.set_title(label.partition(",")[0], fontsize=10)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=7.5)
    figure.suptitle(title, fontsize=10.5)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


# The command


def parser() -> argparse.ArgumentParser:
    """All flags."""
    flags = make_parser("lab.bench.growth", __doc__)
    add = flags.add_argument
    tokens = (256, 512, 1280, 2560, 5120, 11520)
    add("--methods", default=METHODS, help="names separated by commas")
    add("--tokens", type=value(whole_numbers), default=tokens, help=f"multiples of {TILE}")
    add("--budget", type=value(count), default=128, help="visual tokens to keep per image")
    add("--width", type=value(count), default=256, help="channels of decoder and tower")
    add("--layers", type=value(count), default=4, help="decoder layers")
    add("--blocks", type=value(count), default=3, help="blocks of the tower")
    add("--repeats", type=value(count), default=3, help="turns after one warm-up")
    add_machine_flags(flags)
    return flags


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = parser().parse_args(arguments)
    if args.width % 64:
        raise UserError(f"--width should be a multiple of 64, got {args.width}.")
    if args.threads:
        torch.set_num_threads(args.threads)
    device = device_of(args.device)
    points = measure_growth(args, device)
    about = (
        f"A LLaVA of {args.width} channels, {args.layers} decoder layers and {args.blocks} tower blocks with random "
        f"weights, budget {args.budget}, {args.dtype}, {device} ({hardware(str(device))}), {torch.get_num_threads()} "
        f"threads, {args.clock} clock, median of {args.repeats} turns after a warm-up, methods in turns."
    )
    shown = page(points, about)
    print(shown)
    result = {"about": about, "commit": commit(), "points": [dataclasses.asdict(point) for point in points]}
    write(args, result, shown)
    if args.plot:
        title = f"Growth with visual tokens, {args.width} channels, {args.layers} decoder layers, budget {args.budget}"
        plot(args.plot, points, title)
    return 0


if __name__ == "__main__":
    sys.exit(main())
