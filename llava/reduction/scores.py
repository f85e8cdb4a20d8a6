"""Tower scores: importance scores and keys that methods read from blocks of the vision tower.

A score is defined once, in TOWER_SCORES, as a function of one block's attention. The entry also says which queries the
function reads, so that its operations can be counted. Every tower provides its attention as a `BlockAttention`: CLIP's
is computed from a block's input (`clip_attention` below); other towers and serving engines record what their attention
modules pass to the kernel (llava/model/multimodal_encoder/stock_tower.py). To add a score, write a function of a
`BlockAttention` and register it here.

Scores are computed in float32 and outside of the forward pass, which can therefore always use a fused attention kernel.
Shapes: B images, P patches, C = 1 class token or 0 before them, D channels, H heads of d channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial

import torch
from einops import rearrange
from torch import Tensor

from llava.errors import UserError, unknown
from llava.reduction.modules import VisionAttention, VisionBlock, linear_flops
from llava.reduction.ranking import in_float32

# Rows of an attention map that are held at once; fewer if these would have more than WEIGHTS entries.
ROWS = 64
WEIGHTS = 1 << 26
BY_HEADS = "b n (h d) -> b h n d"


@dataclass(frozen=True)
class TowerScore:
    """A request for a tower score.

    Attributes:
        kind: a key of TOWER_SCORES.
        block: tower block as a Python index; -2 is the block whose output LLaVA uses.
        depth: number of blocks of the tower for which `block` was chosen; in another tower, `block` is scaled. 0 uses
            `block` as it is.
    """

    kind: str
    block: int = -2
    depth: int = 0

    def index(self, blocks: int) -> int:
        """The block in a tower of `blocks` blocks."""
        return min(int(self.block * blocks / self.depth + 0.5), blocks - 1) if self.depth else self.block


# -- what a score reads


@dataclass(frozen=True)
class BlockAttention:
    """The attention of one tower block over B images, as the scores read it.

    Attributes:
        queries: (tokens) -> [B, n, D] float32, queries of these tokens as the block compares them, after norms and
            rotations, all heads side by side.
        keys: [B, C + P, D] float32 as the block compares them.
        projected_keys: [B, C + P, D] float32, before norms and rotations. Methods compare these with each other: a
            rotation makes keys of two similar patches differ by where the patches stand.
        heads: H.
        scale: factor of the products of queries and keys.
        cls: C, 1 if a class token stands before the patches, else 0.
        values: returns [B, C + P, D] float32, all heads side by side; None where nothing reads values.
        filling: [B, C + P] bool, True for tokens that only fill up a row, to which nothing attends; None without any.
            Only `cls_attention` looks at it.
    """

    queries: Callable[[slice], Tensor]
    keys: Tensor
    projected_keys: Tensor
    heads: int
    scale: float
    cls: int = 1
    values: Callable[[], Tensor] | None = None
    filling: Tensor | None = None

    @cached_property
    def head_keys(self) -> Tensor:
        """[B, H, C + P, d], the keys by heads."""
        return rearrange(self.keys, BY_HEADS, h=self.heads)


# -- the scores


def cls_attention(block: BlockAttention) -> Tensor:
    """Attention of the CLS token to the patches, mean over heads.

    Returns:
        [B, P]. The softmax runs over CLS and patches, so a row sums to less than 1.
    """
    query = rearrange(block.queries(slice(0, 1)), BY_HEADS, h=block.heads)
    products = query @ block.head_keys.mT * block.scale
    if block.filling is not None:
        products = products.masked_fill(block.filling[:, None, None], -torch.inf)
    return products.softmax(-1)[:, :, 0, 1:].mean(1)


def cls_logits(block: BlockAttention) -> Tensor:
    """Products of the CLS query with the patches' keys, scaled as in attention, before the softmax, mean over heads.

    Returns:
        [B, P], positive or negative.
    """
    # The sum of the heads' products is the product over all channels.
    query, key = block.queries(slice(0, 1)), block.keys[:, 1:]
    products: Tensor = (query @ key.mT)[:, 0] * (block.scale / block.heads)
    return products


def fused_cls_attention(block: BlockAttention) -> Tensor:
    """Attention of the CLS token to the patches as in PruMerge, with all heads taken as one: softmax(q k / sqrt(D)).

    Returns:
        [B, P]; a row sums to less than 1.
    """
    query, key = block.queries(slice(0, 1)), block.keys
    shares: Tensor = (query @ key.mT * key.shape[-1] ** -0.5).softmax(-1)[:, 0, 1:]
    return shares


def received_attention(block: BlockAttention, from_cls: bool = False, from_itself: bool = True) -> Tensor:
    """Attention that each patch receives, mean over the tokens that it comes from and over heads.

    Query rows are processed in slices, so the full attention map is never in memory.

    Args:
        from_cls: count what the CLS token gives, too, if there is one.
        from_itself: count what a patch gives itself.

    Returns:
        [B, P].
    """
    first = 0 if from_cls else block.cls
    query = rearrange(block.queries(slice(first, None)), BY_HEADS, h=block.heads)
    key = block.head_keys.mT
    images, heads, count, _ = query.shape
    received = key.new_zeros(images, key.shape[-1])
    for rows in query.split(max(1, min(ROWS, WEIGHTS // (images * heads * key.shape[-1]))), dim=2):
        weights = (rows @ key * block.scale).softmax(-1)
        if not from_itself:
            weights.diagonal(first, 2, 3).zero_()
        received += weights.sum((1, 2))
        first += rows.shape[2]
    return received[:, block.cls :] / (heads * (count - (not from_itself)))


def keys(block: BlockAttention) -> Tensor:
    """[B, P, d] keys of the patches, mean over heads, not normalised: the space in which VisionZip and others merge."""
    same, projected = block.projected_keys is block.keys, block.projected_keys
    keys = block.head_keys if same else rearrange(projected, BY_HEADS, h=block.heads)
    return keys[:, :, block.cls :].mean(1)


def whole_keys(block: BlockAttention) -> Tensor:
    """[B, P, D] keys of the patches, all heads side by side, not normalised."""
    return block.projected_keys[:, block.cls :]


@dataclass(frozen=True)
class ScoreKind:
    """A kind of tower score.

    Attributes:
        compute: computes the score from the attention of a block.
        queries: the tokens whose queries the score reads: "cls", "patches", "all" for both, or "" for none.
        reads_cls: True if these queries are compared with the key of the class token too.
    """

    compute: Callable[[BlockAttention], Tensor]
    queries: str = ""
    reads_cls: bool = True

    def rows(self, patches: int, cls: int) -> int:
        """Queries per image of `cls` class tokens, 0 or 1."""
        return {"cls": 1, "patches": patches, "all": patches + cls, "": 0}[self.queries]

    def product_flops(self, patches: int, cls: int, width: int) -> int:
        """Operations of one image's products of queries and keys.

        Args:
            cls: class tokens, 0 or 1.
            width: channels of all heads together.
        """
        return 2 * self.rows(patches, cls) * (patches + cls * self.reads_cls) * width


TOWER_SCORES: dict[str, ScoreKind] = {
    "cls_attention": ScoreKind(cls_attention, "cls"),
    "cls_logits": ScoreKind(cls_logits, "cls", reads_cls=False),
    "fused_cls_attention": ScoreKind(fused_cls_attention, "cls"),
    "received_attention": ScoreKind(received_attention, "patches"),
    "received_from_all": ScoreKind(partial(received_attention, from_cls=True), "all"),
    "received_from_others": ScoreKind(partial(received_attention, from_itself=False), "patches"),
    "keys": ScoreKind(keys),
    "whole_keys": ScoreKind(whole_keys),
}

# For a tower without a CLS token: how each score of that token is replaced by a function of `received_attention`.
# Attention logits are the logarithm of the attention, up to a constant. The rule is from VisPruner's author
# (Theia-4869/VisPruner, issue 1).
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


@lru_cache(maxsize=256)
def by_block(scores: tuple[TowerScore, ...], depth: int) -> dict[int, list[TowerScore]]:
    """The scores grouped by the block that they are read from, in a tower of `depth` blocks.

    Raises:
        UserError: a score or its block does not exist.
    """
    blocks: dict[int, list[TowerScore]] = {}
    for score in scores:
        index = score.index(depth)
        if not -depth <= index < depth:
            raise UserError(f"TowerScore {score.kind} needs tower block {index}, but the tower has {depth} blocks.")
        if score.kind not in TOWER_SCORES:
            raise unknown("tower score", score.kind, TOWER_SCORES)
        blocks.setdefault(index % depth, []).append(score)
    return blocks


# -- CLIP's towers


def clip_attention(attention: VisionAttention, normed: Tensor) -> BlockAttention:
    """The attention of a CLIPEncoderLayer, whose keys are not rotated.

    Args:
        normed: [B, 1 + P, D] its input after the norm, CLS first.
    """
    keys = in_float32(attention.k_proj(normed))
    return BlockAttention(
        lambda tokens: in_float32(attention.q_proj(normed[:, tokens])),
        keys,
        keys,
        attention.num_heads,
        attention.scale,
        values=lambda: in_float32(attention.v_proj(normed)),
    )


def score_flops(scores: tuple[TowerScore, ...], blocks: Sequence[VisionBlock], patches: int) -> int:
    """Operations of scores for one image: each block's keys once, each score's queries, and their products."""
    total = 0
    for index, asked in by_block(scores, len(blocks)).items():
        attention = blocks[index].self_attn
        total += linear_flops(attention.k_proj, patches + 1)
        for kind in (TOWER_SCORES[score.kind] for score in asked):
            total += linear_flops(attention.q_proj, kind.rows(patches, 1))
            total += kind.product_flops(patches, 1, attention.q_proj.out_features)
    return total
