"""Time to the first token, selection and memory at growing numbers of visual tokens, or growing batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any
from unittest.mock import patch

import psutil
import torch
from tqdm import tqdm

from eval.config import FULL
from eval.efficiency.growth.narrow import narrow
from eval.efficiency.latency.measure import once, ticking
from eval.efficiency.latency.memory_peak import start_peak
from eval.efficiency.latency.questions import noise_batches
from eval.efficiency.shapes import SHAPES, random_llava
from llava.errors import UserError
from llava.model.llava_arch import Llava
from llava.reduction import registry
from llava.reduction.crop_budget import require
from llava.reduction.reducer import Reducer

SIDE, TILE = 224, 256  # pixels of a tile, and its visual tokens


@dataclass(frozen=True)
class Size:
    """How large a network stands in for the real one."""

    width: int
    layers: int
    blocks: int


@dataclass(frozen=True)
class Point:
    """One method at one number of visual tokens and one batch size; seconds are medians.

    Attributes:
        selection: with merging.
        memory: bytes above those before the prefill, at their peak.
    """

    method: str
    tokens: int
    batch: int
    ttft: float
    selection: float
    memory: int


def grid(tokens: int) -> tuple[int, int] | None:
    """(rows, columns) of tiles that give so many visual tokens with the base image; None for the base image alone.

    Raises:
        UserError: it is no multiple of a tile's tokens.
    """
    if tokens < TILE or tokens % TILE:
        raise UserError(f"Visual tokens should be multiples of {TILE} (tiles of {SIDE} pixels), got {tokens}.")
    tiles = tokens // TILE - 1
    if not tiles:
        return None
    rows = next(rows for rows in range(int(tiles**0.5), 0, -1) if tiles % rows == 0)
    return rows, tiles // rows


def model_of(tokens: int, size: Size, device: torch.device, dtype: str) -> Llava:
    """A narrow model whose images have so many visual tokens: LLaVA-NeXT's tiles, or LLaVA-1.5 for one tile."""
    tiles = grid(tokens)
    shape = "llava-1.5-7b" if tiles is None else "llava-next-7b"
    reading: dict[str, Any] = {}
    if tiles is not None:
        reading = {"merge": "spatial", "force": (tiles[1] * SIDE, tiles[0] * SIDE)}
    small = narrow(shape, size.width, size.layers, size.blocks, SIDE)
    with patch.dict(SHAPES, {"narrow": small}):
        return random_llava("narrow", None, dtype, device=device, **reading)


def reducer_of(name: str, budget: int, model: Llava) -> Reducer:
    """The method with its default options."""
    return registry.build(name, model.visual_tokens if name == FULL else min(budget, model.visual_tokens))


def refuse(methods: Sequence[str], budget: int, model: Llava) -> None:
    """Raise UserError, with the number of tokens, where a method cannot meet the budget on this model."""
    for name in methods:
        reducer = reducer_of(name, budget, model)
        try:
            require(reducer, model.spec)
        except UserError as error:
            raise UserError(f"At {model.visual_tokens:,} visual tokens: {error}") from error


def measure_growth(
    methods: Sequence[str],
    tokens: Sequence[int],
    batches: Sequence[int],
    budget: int,
    size: Size,
    device: torch.device,
    repeats: int = 3,
    dtype: str = "float32",
    clock: str = "wall",
) -> list[Point]:
    """Measure every method at every number of tokens (batch 1) and at every batch size (the smallest number).

    Raises:
        UserError: before anything is measured, where a method cannot meet the budget at one of the numbers of tokens.
    """
    for count in tokens:
        refuse(methods, budget, model_of(count, size, torch.device("meta"), dtype))
    found = []
    places = [(count, 1) for count in tokens] + [(tokens[0], batch) for batch in batches if batch > 1]
    for count, batch in tqdm(places, desc="growth", unit="size", disable=None):
        model = model_of(count, size, device, dtype)
        reducers = {name: reducer_of(name, budget, model) for name in methods}
        asked = noise_batches(model, batch, False)(0)
        rows: dict[str, list[tuple[float, float, int]]] = {name: [] for name in reducers}
        for turn in range(repeats + 1):
            for name, reducer in reducers.items():
                start_peak(device)
                before = held(device)
                with ticking(clock):
                    row = once(model, reducer, asked)
                chosen = row["seconds"]["selection"] + row["seconds"]["merging"]
                if turn:
                    rows[name].append((sum(row["seconds"].values()), chosen, row["peak_bytes"] - before))
        for name, turns in rows.items():
            seconds, selection, memory = zip(*turns, strict=True)
            found.append(Point(name, count, batch, median(seconds), median(selection), max(memory)))
    return found


def held(device: torch.device) -> int:
    """Bytes in use now: allocated on a GPU, resident on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
