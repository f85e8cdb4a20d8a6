"""Attention of a decoder layer, computed for the few query rows that a method asks for, in float32.

Shapes: B images, T rows, L tokens of a prompt, H heads, d channels per head, D channels.
"""

from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor, nn

from llava.reduction.modules import Angles, Decoder, DecoderLayer
from llava.reduction.ranking import in_float32

if TYPE_CHECKING:
    from llava.pipeline.sequence import Sequence


def whole_heads(layer: DecoderLayer, part: Tensor, dim: int) -> Tensor:
    """Queries, keys or values of all heads of a decoder layer.

    Where the layer is split over ranks, each has some of the heads; they are gathered in the order of heads, so that
    all ranks rank by the same numbers. A layer that one process holds whole returns its tensor as it is.

    Args:
        part: the heads of this rank.
        dim: the dimension of the heads.
    """
    gather = getattr(layer.self_attn, "gather", None)
    return part if gather is None else gather(part, dim)


def projected_heads(layer: DecoderLayer, projection: nn.Linear, normed: Tensor, angles: Angles | None = None) -> Tensor:
    """Queries or keys [B, H, L, d] float32 of a decoder layer.

    Args:
        projection: the layer's q_proj or k_proj.
        normed: [B, L, D] inputs of the layer after its norm, which queries and keys share.
        angles: of the L tokens, for rotary embedding in Llama's half-split convention; None for no rotation.
    """
    projected = whole_heads(layer, projection(normed), -1)
    heads = in_float32(rearrange(projected, "b l (h d) -> b h l d", d=layer.self_attn.head_dim))
    if angles is None:
        return heads
    return heads * angles.cos + heads.roll(heads.shape[-1] // 2, -1) * angles.sin


def attention_rows(
    layer: DecoderLayer, rows: Tensor, keys: Tensor, unseen: Tensor | None = None, angles: Angles | None = None
) -> Tensor:
    """Rows of a decoder layer's attention: with all keys that a row sees, exactly as the layer computes them.

    With the keys of visual tokens alone, the softmax runs over these. At layer 0, with its input embeddings and angles,
    that equals the layer's real attention up to the softmax denominator; without angles it does not depend on distance.

    Args:
        layer: a LlamaDecoderLayer.
        rows: [B, T, D] inputs of the layer at the query rows, after its norm.
        keys: [B, Hkv, L, d] keys of that layer, rotated if the rows are; grouped-query heads are repeated.
        unseen: [B, 1, T, L] bool, True for the keys that a row may not see; None where it sees all.
        angles: of the T rows, or None for no rotation.

    Returns:
        [B, H, T, L] float32; rows sum to 1 over the keys that they see.
    """
    query, keys = projected_heads(layer, layer.self_attn.q_proj, rows, angles), in_float32(keys)
    if keys.shape[1] != query.shape[1]:
        keys = keys.repeat_interleave(query.shape[1] // keys.shape[1], dim=1)
    scores = query @ keys.transpose(-1, -2) * layer.self_attn.scaling
    if unseen is not None:
        scores = scores.masked_fill(unseen, torch.finfo(scores.dtype).min)
    return scores.softmax(-1)


def angles_of(llm: Decoder, sequence: "Sequence") -> tuple[Tensor, Tensor]:
    """Cosines and sines at the positions of prompts, [B, L, d] each; those of the layer before, if it had the same."""
    known = sequence.rotary
    if known is not None and known.position is sequence.position:
        return known.cos, known.sin
    return rotary_angles(llm, sequence.hidden, sequence.position)


def prepared_angles(llm: Decoder, sequence: "Sequence") -> Angles:
    """`angles_of` for scores: of the columns of `sequence`, and maybe of more behind them."""
    known = sequence.rotary
    if known is not None and known.position is sequence.position:
        return known.angles
    return Angles.of(*rotary_angles(llm, sequence.hidden, sequence.position))


def follows_length(llm: Decoder) -> bool:
    """Whether the angle of a position depends on how long the prompt is (dynamic scaling)."""
    return getattr(llm.rotary_emb, "rope_type", "default") in ("dynamic", "longrope")


def rotary_angles(llm: Decoder, hidden: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of a decoder at given positions, two tensors [B, L, d].

    Args:
        llm: a module with rotary_emb.
        hidden: gives dtype and device.
        position: [B, L], or [B, L, 3] for a decoder whose positions have a frame, a row and a column.
    """
    return llm.rotary_emb(hidden, position if position.dim() == 2 else position.permute(2, 0, 1))
