"""A timer that knows merging apart from selection."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from llava.pipeline.accounting import Timer
from llava.reduction.reduction import Reduction


class StageTimer(Timer):
    """Seconds by stage, and "merging" taken out of the stage in which it happens.

    Merging is the time inside `Reduction.apply` of reductions that average tokens. Gathering kept tokens is selection,
    and so is projecting merged features again.
    """

    def __init__(self, device: torch.device):
        super().__init__(device)
        self._merged: list[tuple[int, Any, Any]] = []

    @contextmanager
    def merging(self) -> Iterator[None]:
        """While active, the averages of every reduction are timed."""
        plain = Reduction.apply

        def apply(reduction: Reduction, tokens: Tensor) -> Tensor:
            if not reduction.merges:
                return plain(reduction, tokens)
            interval, began = len(self._stages), self._now()
            merged = plain(reduction, tokens)
            self._merged.append((interval, began, self._now()))
            return merged

        with patch.object(Reduction, "apply", apply):
            yield

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by stage so far; their sum is that of a Timer."""
        found = super().seconds
        for interval, began, ended in self._merged:
            cuda = self.device.type == "cuda"
            passed = began.elapsed_time(ended) / 1000 if cuda else ended - began
            found[self._stages[interval]] -= passed
            found["merging"] = found.get("merging", 0.0) + passed
        return found
