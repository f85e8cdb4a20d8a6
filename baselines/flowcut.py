"""FlowCut: inside the vision tower, drop patches by an importance that is added up over its blocks.

Paper: https://arxiv.org/abs/2505.19536
Official code read: TungChintao/FlowCut@a2ecd24, flowcut/modeling_clip_flowcut.py, utils_flowcut.py, main.py
Differs from it: patches leave a block between its attention and its MLP, not after the MLP. The MLP acts on each token
alone, so what is kept and what leaves the block is the same, and the dropped patches save the MLP, too. How many leave
is decided for each image; in a batch the release takes the largest number of all images. The tiles of one image share a
number here, too. For LLaVA-NeXT the release keeps half of the budget in each of the five views, and again drops patches
after decoder layer 1; here each view keeps its part of the budget, and the decoder drops none. In a tower of any depth
the budget is reached in the last block but one of those that make the features. Equal scores go to the lower index, and
patches without attention do not make the entropy undefined.

Shapes: B images, N patches that are left, H heads, d channels of a head.
"""

from dataclasses import dataclass
from math import log
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
    keep_top,
    option,
    register,
)


def importance(attention: Tensor, values: Tensor, matmul: MatMul = torch.matmul) -> Tensor:
    """[B, N] importance of the patches in one block.

    Args:
        attention: [B, N], what the CLS token gives to each patch, mean over heads.
        values: [B, H, 1 + N, d], CLS first.
    """
    alike = matmul(values[:, :, :1], values.mT)[:, :, 0].softmax(-1).mean(1)[:, 1:]
    shares = attention / attention.sum(-1, keepdim=True) + alike / alike.sum(-1, keepdim=True)
    return shares * values.mean(1)[:, 1:].abs().sum(-1)


def removals(attention: Tensor, budget: int, later: int) -> int:
    """How many patches leave a block; the host waits for the device.

    The less evenly CLS attends to the patches, the more; the largest number of the tiles of an image.

    Args:
        attention: [B, N] as in `importance`.
        later: number of blocks until the one that leaves the budget, at least 1.
    """
    patches = attention.shape[1]
    evenness = torch.special.entr(attention / attention.sum(-1, keepdim=True)).sum(-1) / log(patches)
    count = (patches - budget) / later**0.5 * (1 - evenness.square())
    return int(count.max().round().nan_to_num().cpu())


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
        patches, later = state.tokens.shape[1] - 1, state.last - state.block
        if patches <= self.budget:
            return None
        attention = state.cls_attention()
        score = importance(attention, state.values(), state.matmul)
        if "score" in state.memory:
            score = (state.memory["score"] + score) / 2
        state.memory["score"] = score
        if later % 2:
            return None
        keep = max(patches - removals(attention, self.budget, later), self.budget) if later else self.budget
        kept = keep_top(score, keep)
        state.memory["score"] = score.gather(1, kept)
        return Reduction(kept, patches).with_cls()
