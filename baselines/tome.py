"""ToMe: merge pairs of similar tokens inside the vision tower, some in every block.

Paper: https://arxiv.org/abs/2210.09461
Official code read: facebookresearch/ToMe@af95e4b, tome/merge.py and tome/patch/timm.py
Differs from it: it runs in CLIP. The number of tokens to merge is planned for each block so that the budget is met
exactly. Raster order is restored after the tower (`order=release` keeps the order of the last matching; there is no
`official`).

Shapes: B images, n tokens in a block, CLS first, d channels of the keys.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.reduction import (
    BlockState,
    EncoderState,
    MethodMetadata,
    ModelSpec,
    Reducer,
    Reduction,
    Release,
    option,
    refuse_budget,
    register,
)


def removals(patches: int, budget: int, blocks: int) -> tuple[int, ...]:
    """Patches that each block merges away so that `budget` are left: equal numbers, or one more in earlier blocks.

    A block can merge at most half of its patches, which limits the last blocks of a small budget.

    Returns:
        One number per block. Their sum is less than patches - budget if the budget cannot be reached.
    """
    plan, left, remaining = [], budget, patches - budget
    for block in reversed(range(blocks)):
        share = min(left, remaining // (block + 1))
        plan.append(share)
        left, remaining = left + share, remaining - share
    return tuple(reversed(plan))


def merge_most_similar(
    keys: Tensor, sizes: Tensor, count: int, matmul: Callable[[Tensor, Tensor], Tensor] = torch.matmul
) -> Reduction:
    """Bipartite soft matching: each token at an even index is paired with the most similar one at an odd index.

    Args:
        keys: [B, n, d]; similarity is their cosine.
        sizes: [B, n] number of patches merged into each token.
        count: number of pairs to merge, those with the highest similarity; at most half of the tokens. CLS is not
            merged.

    Returns:
        The outputs are the unmerged even tokens in order, CLS first, then all odd ones. Averages are weighted by size.
    """
    count = min(count, (keys.shape[1] - 1) // 2)
    unit = F.normalize(keys, dim=-1)
    score = matmul(unit[:, ::2], unit[:, 1::2].transpose(1, 2))
    nearest = score.argmax(-1)
    best = score.gather(2, nearest.unsqueeze(-1)).squeeze(-1)
    best = torch.cat([torch.full_like(best[:, :1], -torch.inf), best[:, 1:]], 1)  # CLS comes last
    order = best.argsort(dim=1, descending=True, stable=True)
    merged, alone = order[:, :count], order[:, count:].sort(1).values
    odd = torch.arange(1, keys.shape[1], 2, device=keys.device).expand(len(keys), -1)
    slots = torch.arange(alone.shape[1] + odd.shape[1], device=keys.device).expand(len(keys), -1)
    kept = torch.cat([2 * alone, odd], 1)
    assignment = torch.empty(sizes.shape, dtype=torch.int64, device=keys.device).scatter(1, kept, slots)
    assignment = assignment.scatter(1, 2 * merged, alone.shape[1] + nearest.gather(1, merged))
    whole = sizes.new_zeros(slots.shape).scatter_add(1, assignment, sizes)
    return Reduction(kept, keys.shape[1], assignment, sizes / whole.gather(1, assignment))


@register("tome")
@dataclass(frozen=True, kw_only=True)
class ToMe(Reducer):
    """Acts in every block up to the features, between attention and MLP; attention is weighted by token sizes."""

    summary: ClassVar[str] = "merge the most similar pairs of tokens in every block of the vision tower"
    metadata: ClassVar[MethodMetadata] = MethodMetadata(
        acts="inside the tower, in every block",
        score="cosine of keys (mean over heads) between even and odd tokens",
        rest="averaged into the most similar token, weighted by size",
        reads=("keys", "order"),
        similarity="keys",
        weights="size",
        paper="ToMe, ICLR 2023",
        url="https://arxiv.org/abs/2210.09461",
        code="facebookresearch/ToMe@af95e4b",
        release=Release(
            order="the even tokens of the last matching, then the odd ones",
            ours="raster order after the tower",
            licence="CC BY-NC 4.0",
        ),
    )

    known_deviations: ClassVar[dict[str, str]] = {
        "unsorted": "even tokens stand before odd ones inside the tower, and after it with `order=release`"
    }

    tile_budget: str = option("each", "every tile is merged alike inside the tower", ("each",))
    order: str = option("raster", "order of the tokens after the tower", ("raster", "release"))

    def check(self, spec: ModelSpec) -> None:
        super().check(spec)
        blocks = spec.tower_blocks - 1  # LLaVA takes the output of the last block but one
        least = spec.visual_tokens
        for _ in range(blocks):
            least -= least // 2
        if self.budget < least:
            why = f"each of the {blocks} blocks up to the features can merge at most half of the tokens"
            raise refuse_budget(self.name, self.budget, least, spec.visual_tokens, why)

    def merging_blocks(self, selected: int) -> tuple[int, ...]:
        return tuple(range(selected))

    def tower(self, state: BlockState) -> Reduction | None:
        patches, blocks = state.tokens.shape[1] - 1, state.spec.tower_blocks - 1 - state.block
        # The plan for the remaining blocks equals the end of the plan for all blocks.
        count = removals(patches, self.budget, blocks)[0] if blocks > 0 and patches > self.budget else 0
        return merge_most_similar(state.keys, state.sizes, count, state.matmul) if count else None

    def keeps_all(self, tokens: int) -> bool:
        return False  # the encoder stage restores raster order

    def encoder(self, state: EncoderState) -> Reduction | None:
        if state.merged is None or self.order == "release":
            return None
        return Reduction(state.merged.kept.argsort(1), state.features.shape[1])
