"""Tower scores: importance scores and keys that methods read from blocks of the vision tower.

Each is computed from the query rows it needs, in float32, apart from the forward pass, which can therefore always use
the fused attention kernel. Shapes: B images, N patches, D channels, H heads, T text rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from einops import rearrange
from torch import Tensor

from llava.errors import UserError, unknown
from llava.reduction.modules import VisionAttention, VisionBlock, linear_flops
from llava.reduction.ranking import in_float32

BY_HEADS = "b n (h d) -> b h n d"

# A tower without a CLS token: what is made of `received_attention` in place of each score of that token. Logits of an
# attention are its logarithm, up to a constant. VisPruner's author gives the rule: Theia-4869/VisPruner, issue 1.
WITHOUT_CLS: dict[str, Callable[[Tensor], Tensor]] = {
    "cls_attention": torch.clone,
    "fused_cls_attention": torch.clone,
    "cls_logits": lambda received: received.clamp(min=1e-12).log(),
}
WITHOUT_CLS_RULE = (
    "the tower has no CLS token: in place of its attention stands the attention that a patch receives, mean over heads "
    "and over all patches of its image, then over the patches of a token (in Qwen2.5-VL of the next block that attends "
    "within whole images); no CLS token is kept, so the budget counts patches alone"
)


@dataclass(frozen=True)
class TowerScore:
    """A request for a tower score.

    Attributes:
        kind: a key of TOWER_SCORES.
        block: tower block as a Python index; -2 is the block whose output LLaVA uses.
        depth: number of blocks of the tower that `block` was chosen for; `block` is scaled to a tower of another
            depth. 0 uses `block` as it is.
    """

    kind: str
    block: int = -2
    depth: int = 0

    def index(self, blocks: int) -> int:
        """The block in a tower of `blocks` blocks."""
        return min(int(self.block * blocks / self.depth + 0.5), blocks - 1) if self.depth else self.block


@dataclass(frozen=True)
class BlockInput:
    """What the scores of a tower block are computed from.

    Attributes:
        attention: of the block, a CLIPEncoderLayer.
        normed: [B, 1+N, D] its input, CLS first.
        keys: [B, 1+N, D] its keys, all heads side by side.
    """

    attention: VisionAttention
    normed: Tensor
    keys: Tensor

    @cached_property
    def head_keys(self) -> Tensor:
        """[B, H, 1+N, d] float32, the keys by heads."""
        return in_float32(rearrange(self.keys, BY_HEADS, h=self.attention.num_heads))


def cls_attention(seen: BlockInput) -> Tensor:
    """Attention of the CLS token to the patches, mean over heads.

    Returns:
        [B, N] float32. The softmax runs over CLS and patches, so a row sums to less than 1.
    """
    attention = seen.attention
    query = in_float32(rearrange(attention.q_proj(seen.normed[:, :1]), BY_HEADS, h=attention.num_heads))
    weights = (query @ seen.head_keys.mT * attention.scale).softmax(-1)
    return weights[:, :, 0, 1:].mean(1)


def cls_logits(seen: BlockInput) -> Tensor:
    """Products of the CLS query with the patches' keys, scaled as in attention, before the softmax, mean over heads.

    Returns:
        [B, N] float32, of any sign.
    """
    attention = seen.attention
    query, key = attention.q_proj(seen.normed[:, :1]).float(), seen.keys[:, 1:].float()
    # The sum of the heads' products is the product over all channels.
    products: Tensor = (query @ key.transpose(-1, -2))[:, 0] * (attention.scale / attention.num_heads)
    return products


def received_attention(seen: BlockInput) -> Tensor:
    """Average attention each patch receives from all patches, mean over heads: a saliency without CLS.

    Returns:
        [B, N] float32. Query rows are processed in slices, so the full attention map is never held.
    """
    attention = seen.attention
    query = in_float32(rearrange(attention.q_proj(seen.normed[:, 1:]), BY_HEADS, h=attention.num_heads))
    key = seen.head_keys.mT
    received = key.new_zeros(seen.normed.shape[:2])
    for rows in query.split(64, dim=2):
        received += (rows @ key * attention.scale).softmax(-1).sum((1, 2))
    return received[:, 1:] / (query.shape[1] * query.shape[2])


def keys(seen: BlockInput) -> Tensor:
    """Keys of the patches, mean over heads: the similarity space of VisionZip-like merging.

    Returns:
        [B, N, d] float32, not normalised.
    """
    return seen.head_keys[:, :, 1:].mean(1)


def mean_keys(block: VisionBlock, normed: Tensor) -> Tensor:
    """[B, n, D] normed inputs of a block's attention -> keys [B, n, d] float32, mean over heads."""
    attention = block.self_attn
    mean: Tensor = rearrange(attention.k_proj(normed), BY_HEADS, h=attention.num_heads).float().mean(1)
    return mean


def fused_cls_attention(seen: BlockInput) -> Tensor:
    """Attention of the CLS token to the patches with all heads taken as one: softmax(q k / sqrt(D)), as PruMerge does.

    Returns:
        [B, N] float32, a row sums to less than 1.
    """
    query, key = seen.attention.q_proj(seen.normed[:, :1]).float(), seen.keys.float()
    shares: Tensor = (query @ key.transpose(-1, -2) * key.shape[-1] ** -0.5).softmax(-1)[:, 0, 1:]
    return shares


def whole_keys(seen: BlockInput) -> Tensor:
    """Keys of the patches, all heads side by side.

    Returns:
        [B, N, D] float32, not normalised.
    """
    return seen.keys[:, 1:].float()


TOWER_SCORES: dict[str, Callable[[BlockInput], Tensor]] = {
    "cls_attention": cls_attention,
    "cls_logits": cls_logits,
    "received_attention": received_attention,
    "keys": keys,
    "fused_cls_attention": fused_cls_attention,
    "whole_keys": whole_keys,
}


@lru_cache(maxsize=256)
def by_block(scores: tuple[TowerScore, ...], depth: int) -> dict[int, list[TowerScore]]:
    """Scores by the block they are read from, in a tower of `depth` blocks."""
    blocks: dict[int, list[TowerScore]] = {}
    for score in scores:
        index = score.index(depth)
        if not -depth <= index < depth:
            raise UserError(f"TowerScore {score.kind} needs tower block {index}, but the tower has {depth} blocks.")
        blocks.setdefault(index % depth, []).append(score)
    return blocks


def block_scores(asked: Sequence[TowerScore], block: VisionBlock, hidden: Tensor) -> dict[TowerScore, Tensor]:
    """The requested scores of one block.

    Args:
        block: a CLIPEncoderLayer.
        hidden: [B, 1+N, D] the block's input, CLS first.
    """
    # What the attention in space of a video block works on is what attention over time makes of its input.
    before_space = getattr(block, "before_space", None)
    normed = block.layer_norm1(hidden if before_space is None else before_space(hidden))
    seen = BlockInput(block.self_attn, normed, block.self_attn.k_proj(normed))
    scores = {}
    for score in asked:
        if score.kind not in TOWER_SCORES:
            raise unknown("tower score", score.kind, TOWER_SCORES)
        scores[score] = TOWER_SCORES[score.kind](seen)
    return scores


def score_flops(scores: tuple[TowerScore, ...], blocks: Sequence[VisionBlock], patches: int) -> int:
    """Operations of scores for one image, matrix products only; those of one block all read the same keys."""
    total = 0
    for index, asked in by_block(scores, len(blocks)).items():
        query = blocks[index].self_attn.q_proj
        total += linear_flops(blocks[index].self_attn.k_proj, patches + 1)
        for score in asked:
            if score.kind in ("keys", "whole_keys"):
                continue
            queries = patches if score.kind == "received_attention" else 1
            seen = patches if score.kind == "cls_logits" else patches + 1
            total += linear_flops(query, queries) + 2 * queries * seen * query.out_features
    return total
