"""HiRED: the patches that CLS looks at; early attention splits the budget over the crops of a large picture.

Paper: https://arxiv.org/abs/2408.10945
Official code read: hasanar1f/HiRED@502d6dd, transformers/src/transformers/models/llava/modeling_llava.py and
    llava_next/modeling_llava_next.py, both under the same fork
Differs from it: nothing known for one crop, the form of LLaVA-1.5. `crop_budgets` counts the patches under each crop
    (the release counts consecutive strips of the raster instead) and hands out what the release loses by rounding down.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from baselines.holov import deal
from llava.card import Card
from llava.reducer import EncoderState, Reducer
from llava.reduction import Reduction, keep_top
from llava.registry import register
from llava.signals import Signal


def crop_budgets(early: Tensor, crops: tuple[int, int], salient: int, budget: int) -> Tensor:
    """Split a budget over the crops of a picture, in proportion to the salient patches that each crop covers.

    Args:
        early: [B, rows, columns] CLS attention of the first block on the whole picture, shrunk to one crop.
        crops: rows and columns of crops that tile the picture; each has as many patches as `early`.
        salient: how many of the patches with the highest attention are counted.

    Returns:
        [B, crops] int64 in raster order, `budget` together.
    """
    rows, columns = early.shape[1:]
    row = torch.arange(rows, device=early.device) * crops[0] // rows
    column = torch.arange(columns, device=early.device) * crops[1] // columns
    crop = (row[:, None] * crops[1] + column).flatten()
    of_crop = crop[keep_top(early.flatten(1), salient)]  # [B, salient]
    count = early.new_zeros(len(early), crops[0] * crops[1]).float()
    return deal(count.scatter_add_(1, of_crop, torch.ones_like(of_crop, dtype=count.dtype)), rows * columns, budget)


@register("hired")
@dataclass(frozen=True, kw_only=True)
class HiRED(Reducer):
    """With one crop there is nothing to split: the ranking of FasterVLM."""

    summary: ClassVar[str] = "highest CLS attention, the budget of crops by early attention"
    card: ClassVar[Card] = Card(
        acts="after the tower",
        score="CLS attention, block −2",
        needs="CLS token",
        paper="HiRED, 2408.10945",
        url="https://arxiv.org/abs/2408.10945",
        code="hasanar1f/HiRED@502d6dd",
    )

    def signals(self) -> tuple[Signal, ...]:
        return (Signal("cls_attention"),)

    def encoder(self, state: EncoderState) -> Reduction | None:
        tokens = state.features.shape[1]
        if self.budget >= tokens:
            return None
        return Reduction(keep_top(state.signals[Signal("cls_attention")], self.budget), tokens)
