"""uniform: tokens spread evenly over the image, independent of its content.

Paper: none, a control.
Official code read: none.
Differs from it: nothing known.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llava.reduction import MethodMetadata, PatchGrid, PromptState, Reducer, Reduction, option, register


def even_grid(layout: PatchGrid, budget: int) -> Tensor:
    """[budget] int64 indices, ascending, spaced as evenly as the budget allows.

    The budget is split over evenly spaced rows, and each row's share is spaced evenly along it. A square budget gives a
    square grid.
    """
    used = max(1, min(layout.rows, round(math.sqrt(budget * layout.rows / layout.columns))))
    used = max(used, math.ceil(budget / layout.columns))
    picked = []
    for index in range(used):
        row = (2 * index + 1) * layout.rows // (2 * used)
        share = budget * (index + 1) // used - budget * index // used
        picked += [row * layout.columns + (2 * i + 1) * layout.columns // (2 * share) for i in range(share)]
    return torch.tensor(picked)


@register("uniform")
@dataclass(frozen=True, kw_only=True)
class Uniform(Reducer):
    """The same indices in every image."""

    summary: ClassVar[str] = "an even grid of tokens"
    metadata: ClassVar[MethodMetadata] = MethodMetadata(acts="before decoder layer 0", score="an even grid")

    crops: str = option("each", "the budget over tiles: even, or by the base image's attention", ("each", "thumbnail"))

    def prompt(self, state: PromptState) -> Reduction:
        kept = even_grid(state.layout, self.budget).to(state.tokens.device, non_blocking=True)
        return Reduction(kept.expand(len(state.tokens), -1), state.tokens.shape[1])
