"""FlowCut: inside the vision tower, drop patches by an importance that is added up over its blocks.

Paper: https://arxiv.org/abs/2505.19536
Official code read: TungChintao/FlowCut@a2ecd24, flowcut/modeling_clip_flowcut.py, utils_flowcut.py, main.py
Differs from it: patches leave a block between its attention and its MLP, not after the MLP. The MLP acts on each token
alone, so what is kept and what leaves the block is the same, and the dropped patches save the MLP, too. How many leave
is decided for each image; in a batch the release takes the largest number of all images. The tiles of one image share a
number here, too: the largest. For LLaVA-NeXT the release keeps half of the budget in each of the five views, and again
drops patches after decoder layer 1; here each view keeps its part of the budget, and the decoder drops none. In a tower
of any depth the budget is reached in the last block but one of those that make the features. Equal scores go to the
lower index, and patches without attention do not make the entropy undefined.

Shapes: B tiles, N patches that are left in the one with most, H heads, d channels of a head.
"""

from dataclasses import dataclass
from itertools import islice
from math import isnan, log
from typing import ClassVar

import torch
from torch import Tensor

from llava.reduction import (
    BlockState,
    MatMul,
    MethodMetadata,
    Reducer,
    Reduction,
    Release,
    option,
    places,
    register,
)


def importance(
    attention: Tensor, values: Tensor, matmul: MatMul = torch.matmul, filling: Tensor | None = None
) -> Tensor:
    """[B, N] importance of the patches in one block.

    Args:
        attention: [B, N], what the CLS token gives to each patch, mean over heads.
        values: [B, H, 1 + N, d], CLS first.
        filling: [B, 1 + N] bool, True for tokens that are not compared; None without any.
    """
    products = matmul(values[:, :, :1], values.mT)[:, :, 0]
    if filling is not None:
        products = products.masked_fill(filling[:, None], -torch.inf)
    alike = products.softmax(-1).mean(1)[:, 1:]
    shares = attention / attention.sum(-1, keepdim=True) + alike / alike.sum(-1, keepdim=True)
    return shares * values.mean(1)[:, 1:].abs().sum(-1)


def removals(attention: Tensor, left: list[int], budget: int, later: int) -> list[int]:
    """For each tile, how many of its patches leave a block; the host waits for the device.

    The less evenly CLS attends to the patches, the more.

    Args:
        attention: [B, N] as in `importance`.
        left: for each tile, how many patches it has.
        later: number of blocks until the one that leaves the budget, at least 1.
    """
    entropy = torch.special.entr(attention / attention.sum(-1, keepdim=True)).sum(-1)
    counts = []
    for own, patches in zip(entropy.tolist(), left, strict=True):
        evenness = own / log(max(patches, 2))
        counts.append(0 if isnan(evenness) else round((patches - budget) / later**0.5 * (1 - evenness**2)))
    return counts


def keep_first(score: Tensor, counts: list[int]) -> Tensor:
    """[B, K] indices: of each row its own number of the highest scores in raster order, then the next ones."""
    total, widest = score.shape[1], max(counts)
    order = score.argsort(dim=1, descending=True, stable=True)[:, :widest]
    if min(counts) < widest:
        number = torch.tensor(counts).to(score.device, non_blocking=True)
        order = order + total * (places(1, widest, score.device) >= number[:, None])
    return order.sort(1).values % total


@register("flowcut")
@dataclass(frozen=True, kw_only=True)
class FlowCut(Reducer):
    """Acts in every second block, between attention and MLP; the blocks in between only add to the importance."""

    summary: ClassVar[str] = (
        "drop patches in every second block of the vision tower, by importance in all blocks so far"
    )
    metadata: ClassVar[MethodMetadata] = MethodMetadata(
        acts="inside the tower, in every second block",
        score="in each block CLS attention plus similarity to the value of CLS, times the length of the value",
        reads=("attention", "values"),
        paper="FlowCut, 2505.19536",
        url="https://arxiv.org/abs/2505.19536",
        code="TungChintao/FlowCut@a2ecd24",
        release=Release(
            batch="as many patches leave a block as the image of the batch with most removals asks for",
            dtype="scores have the precision of the model",
            ours="each image alone, its tiles together; float32; ties go to the lower index",
            licence="Apache-2.0",
        ),
    )
    tower_by_image: ClassVar[bool] = True

    tile_budget: str = option("each", "every tile keeps as many patches inside the tower", ("each",))

    def merging_blocks(self, selected: int) -> tuple[int, ...]:
        return tuple(range(max(1, selected - 1)))

    def tower(self, state: BlockState) -> Reduction | None:
        left, later = [count - 1 for count in state.left], state.last - state.block
        if max(left) <= self.budget:
            return None
        attention, filling = state.cls_attention(), state.filling
        score = importance(attention, state.values(), state.matmul, filling)
        if "score" in state.memory:
            score = (state.memory["score"] + score) / 2
        state.memory["score"] = score
        if later % 2:
            return None
        keep = [self.budget] * len(left)
        if later:
            gone = iter(removals(attention, left, self.budget, later))
            most = [most for tiles in state.tiles for most in [max(islice(gone, tiles))] * tiles]
            keep = [max(count - most, self.budget) for count, most in zip(left, most, strict=True)]
        if filling is not None:
            score = score.masked_fill(filling[:, 1:], -1)  # below all others
        kept = keep_first(score, keep)
        state.memory["score"] = score.gather(1, kept)
        state.leaves = [count + 1 for count in keep]
        return Reduction(kept, attention.shape[1], appended=max(keep) - min(keep)).with_cls()
