"""Tower scores: importance scores and keys that methods read from blocks of the vision tower.

Each is computed from the query rows it needs, in float32, apart from the forward pass, which can therefore always use
the fused attention kernel. Shapes: B images, N patches, D channels, H heads, T text rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from einops import rearrange
from torch import Tensor

from llava.errors import unknown
from llava.reduction.modules import VisionBlock, linear_flops
from llava.reduction.ranking import in_float32

BY_HEADS = "b n (h d) -> b h n d"


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


class BlockInput:
    """The input of a tower block, with what several scores compute from it; each is computed once.

    Args:
        block: a CLIPEncoderLayer.
        hidden: [B, 1+N, D], the block's input, CLS first.
    """

    def __init__(self, block: VisionBlock, hidden: Tensor):
        self.block, self.hidden = block, hidden

    @cached_property
    def normed(self) -> Tensor:
        """[B, 1+N, D] input of the attention."""
        return self.block.layer_norm1(self.hidden)

    @cached_property
    def keys(self) -> Tensor:
        """[B, 1+N, D] keys, all heads side by side."""
        return self.block.self_attn.k_proj(self.normed)

    @cached_property
    def head_keys(self) -> Tensor:
        """[B, H, 1+N, d] float32, the same by heads."""
        return in_float32(rearrange(self.keys, BY_HEADS, h=self.block.self_attn.num_heads))


def cls_attention(seen: BlockInput) -> Tensor:
    """Attention of the CLS token to the patches, mean over heads.

    Returns:
        [B, N] float32. The softmax runs over CLS and patches, so a row sums to less than 1.
    """
    attention = seen.block.self_attn
    query = in_float32(rearrange(attention.q_proj(seen.normed[:, :1]), BY_HEADS, h=attention.num_heads))
    weights = (query @ seen.head_keys.mT * attention.scale).softmax(-1)
    return weights[:, :, 0, 1:].mean(1)


def cls_logits(seen: BlockInput) -> Tensor:
    """Products of the CLS query with the patches' keys, scaled as in attention, before the softmax, mean over heads.

    Returns:
        [B, N] float32, of any sign.
    """
    attention = seen.block.self_attn
    query, key = attention.q_proj(seen.normed[:, :1]).float(), seen.keys[:, 1:].float()
    # The sum of the heads' products is the product over all channels.
    return (query @ key.transpose(-1, -2))[:, 0] * (attention.scale / attention.num_heads)


def received_attention(seen: BlockInput) -> Tensor:
    """Average attention each patch receives from all patches, mean over heads: a saliency without CLS.

    Returns:
        [B, N] float32. Query rows are processed in slices, so the full attention map is never held.
    """
    attention = seen.block.self_attn
    query = in_float32(rearrange(attention.q_proj(seen.normed[:, 1:]), BY_HEADS, h=attention.num_heads))
    key = seen.head_keys.mT
    received = key.new_zeros(seen.hidden.shape[:2])
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
    return rearrange(attention.k_proj(normed), BY_HEADS, h=attention.num_heads).float().mean(1)


def fused_cls_attention(seen: BlockInput) -> Tensor:
    """Attention of the CLS token to the patches with all heads taken as one: softmax(q k / sqrt(D)), as PruMerge does.

    Returns:
        [B, N] float32, a row sums to less than 1.
    """
    query, key = seen.block.self_attn.q_proj(seen.normed[:, :1]).float(), seen.keys.float()
    return (query @ key.transpose(-1, -2) * key.shape[-1] ** -0.5).softmax(-1)[:, 0, 1:]


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


def tower_score(score: TowerScore, seen: BlockInput) -> Tensor:
    """Compute one requested score from the input of its block."""
    if score.kind not in TOWER_SCORES:
        raise unknown("tower score", score.kind, TOWER_SCORES)
    return TOWER_SCORES[score.kind](seen)


def score_flops(scores: Sequence[TowerScore], block: VisionBlock, patches: int) -> int:
    """Operations of the scores of one block for one image, matrix products only; all read the same keys."""
    query, total = block.self_attn.q_proj, linear_flops(block.self_attn.k_proj, patches + 1)
    for score in scores:
        if score.kind in ("keys", "whole_keys"):
            continue
        queries = patches if score.kind == "received_attention" else 1
        seen = patches if score.kind == "cls_logits" else patches + 1
        total += linear_flops(query, queries) + 2 * queries * seen * query.out_features
    return total
