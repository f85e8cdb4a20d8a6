"""What is written down while a batch is on its way to the first token: times, operations, reductions."""

import time
from dataclasses import dataclass, field

import torch

from llava.pipeline.sequence import Row
from llava.reduction.reduction import Reduction, Step
from llava.reduction.token_layout import Arrangement


class Clock:
    """Adds up seconds by name, with the device synchronised at both ends of every interval."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = {}
        self._last = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def lap(self, name: str) -> None:
        """Book the time since the last lap under `name`."""
        now = self._now()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


@dataclass
class Record:
    """What happened to the samples of one batch on their way to the first token.

    Attributes:
        inputs: visual tokens of each sample before any reduction, all images together.
        runs: the unreduced run of every image.
        planned: visual tokens planned to enter each layer, all images together; None where a picture decides.
        merged: visual tokens made of several, by image, after the last reduction that merged.
    """

    steps: list[list[Step]]
    inputs: list[int]
    images: list[int]
    merged: list[dict[int, int]]
    planned: list[tuple[int, ...] | None]
    runs: list[list[Arrangement]]
    flops: int = 0
    cost: dict[str, int] = field(default_factory=dict)

    def spend(self, part: str, amount: int) -> None:
        self.cost[part] = self.cost.get(part, 0) + amount
        self.flops += amount

    def plan(self, sample: int, entering: tuple[int, ...] | None) -> None:
        """Add what is planned for one more image."""
        known = self.planned[sample]
        both = known is not None and entering is not None
        self.planned[sample] = tuple(a + b for a, b in zip(known, entering, strict=True)) if both else None

    def applied(self, image: Row, place: str, reduction: Reduction, row: int = 0) -> None:
        sample, number = image
        one = reduction.row(row)
        self.steps[sample].append(Step(place if number == 0 else f"{place} #{number + 1}", one))
        self.merged[sample][number] = int(one.merged_count()[0])
