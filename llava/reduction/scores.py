"""Tower scores: importance scores and keys that methods read from blocks of the vision tower.

Each is computed from the query rows it needs, in float32, apart from the forward pass, which can therefore always use
the fused attention kernel. Shapes: B images, N patches, D channels, H heads, T text rows.
"""

from collections.abc import Callable
from dataclasses import dataclass

from einops import rearrange
from torch import Tensor

from llava.errors import unknown
from llava.reduction.flops import linear_flops
from llava.reduction.modules import VisionBlock


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


def _heads(projected: Tensor, heads: int) -> Tensor:
    """[B, N, H*d] -> [B, H, N, d]."""
    return rearrange(projected, "b n (h d) -> b h n d", h=heads)


def cls_attention(block: VisionBlock, hidden: Tensor) -> Tensor:
    """Attention of the CLS token to the patches, mean over heads.

    Args:
        block: a CLIPEncoderLayer.
        hidden: [B, 1+N, D], the block's input, CLS first.

    Returns:
        [B, N] float32. The softmax runs over CLS and patches, so a row sums to less than 1.
    """
    attention = block.self_attn
    normed = block.layer_norm1(hidden)
    query = _heads(attention.q_proj(normed[:, :1]), attention.num_heads).float()
    key = _heads(attention.k_proj(normed), attention.num_heads).float()
    weights = (query @ key.transpose(-1, -2) * attention.scale).softmax(-1)
    return weights[:, :, 0, 1:].mean(1)


def cls_logits(block: VisionBlock, hidden: Tensor) -> Tensor:
    """Products of the CLS query with the patches' keys, scaled as in attention, before the softmax, mean over heads.

    Returns:
        [B, N] float32, of any sign.
    """
    attention = block.self_attn
    normed = block.layer_norm1(hidden)
    query, key = attention.q_proj(normed[:, :1]).float(), attention.k_proj(normed[:, 1:]).float()
    # The sum of the heads' products is the product over all channels.
    return (query @ key.transpose(-1, -2))[:, 0] * (attention.scale / attention.num_heads)


def received_attention(block: VisionBlock, hidden: Tensor) -> Tensor:
    """Average attention each patch receives from all patches, mean over heads: a saliency without CLS.

    Returns:
        [B, N] float32. Query rows are processed in slices, so the full attention map is never held.
    """
    attention = block.self_attn
    normed = block.layer_norm1(hidden)
    query = _heads(attention.q_proj(normed[:, 1:]), attention.num_heads).float()
    key = _heads(attention.k_proj(normed), attention.num_heads).float()
    received = key.new_zeros(hidden.shape[0], hidden.shape[1])
    for rows in query.split(64, dim=2):
        received += (rows @ key.transpose(-1, -2) * attention.scale).softmax(-1).sum((1, 2))
    return received[:, 1:] / (query.shape[1] * query.shape[2])


def keys(block: VisionBlock, hidden: Tensor) -> Tensor:
    """Keys of the patches, mean over heads: the similarity space of VisionZip-like merging.

    Returns:
        [B, N, d] float32, not normalised.
    """
    return mean_keys(block, block.layer_norm1(hidden[:, 1:]))


def mean_keys(block: VisionBlock, normed: Tensor) -> Tensor:
    """[B, n, D] normed inputs of a block's attention -> keys [B, n, d] float32, mean over heads."""
    attention = block.self_attn
    return _heads(attention.k_proj(normed), attention.num_heads).float().mean(1)


def fused_cls_attention(block: VisionBlock, hidden: Tensor) -> Tensor:
    """Attention of the CLS token to the patches with all heads taken as one: softmax(q k / sqrt(D)), as PruMerge does.

    Returns:
        [B, N] float32, a row sums to less than 1.
    """
    attention = block.self_attn
    normed = block.layer_norm1(hidden)
    query, key = attention.q_proj(normed[:, :1]).float(), attention.k_proj(normed).float()
    return (query @ key.transpose(-1, -2) * key.shape[-1] ** -0.5).softmax(-1)[:, 0, 1:]


def whole_keys(block: VisionBlock, hidden: Tensor) -> Tensor:
    """Keys of the patches, all heads side by side.

    Returns:
        [B, N, D] float32, not normalised.
    """
    return block.self_attn.k_proj(block.layer_norm1(hidden[:, 1:])).float()


TOWER_SCORES: dict[str, Callable[[VisionBlock, Tensor], Tensor]] = {
    "cls_attention": cls_attention,
    "cls_logits": cls_logits,
    "received_attention": received_attention,
    "keys": keys,
    "fused_cls_attention": fused_cls_attention,
    "whole_keys": whole_keys,
}


def tower_score(score: TowerScore, block: VisionBlock, hidden: Tensor) -> Tensor:
    """Compute one requested score from the input of its block."""
    if score.kind not in TOWER_SCORES:
        raise unknown("tower score", score.kind, TOWER_SCORES)
    return TOWER_SCORES[score.kind](block, hidden)


def score_flops(score: TowerScore, block: VisionBlock, patches: int) -> int:
    """Operations of one requested score for one image, matrix products only."""
    attention = block.self_attn
    key, width = attention.k_proj, attention.q_proj.out_features
    if score.kind in ("keys", "whole_keys"):
        return linear_flops(key, patches)
    if score.kind == "cls_logits":
        return linear_flops(attention.q_proj, 1) + linear_flops(key, patches) + 2 * patches * width
    queries = patches if score.kind == "received_attention" else 1
    return (
        linear_flops(attention.q_proj, queries) + linear_flops(key, patches + 1) + 2 * queries * (patches + 1) * width
    )
