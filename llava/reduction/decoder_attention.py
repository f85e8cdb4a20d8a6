"""Attention of a decoder layer, computed for the few query rows that a method asks for, in float32.

Shapes: B images, T text rows, N visual tokens, L prompt tokens, H heads, d channels per head, D channels.
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


def rotate(states: Tensor, angles: Angles) -> Tensor:
    """Rotary embedding in Llama's half-split convention; states [B, H, T, d] float32."""
    return states * angles.cos + states.roll(states.shape[-1] // 2, -1) * angles.sin


def project(layer: DecoderLayer, projection: nn.Linear, normed: Tensor) -> Tensor:
    """Queries or keys [B, H, L, d] of a decoder layer, not rotated, in the model's dtype.

    Args:
        normed: [B, L, D] inputs of the layer after its norm, which queries and keys share.
    """
    projected = whole_heads(layer, projection(normed), -1)
    return rearrange(projected, "b l (h d) -> b h l d", d=layer.self_attn.head_dim)


def text_to_visual_attention(
    layer: DecoderLayer,
    text: Tensor,
    visual: Tensor,
    text_rotary: Angles | None = None,
    visual_rotary: Angles | None = None,
) -> Tensor:
    """Attention of text rows to the visual tokens through one decoder layer's own projections.

    The softmax runs over the visual keys alone. With layer 0, its input embeddings and rotary angles this equals the
    layer's real attention up to the softmax denominator; without angles it does not depend on distance.

    Args:
        layer: a LlamaDecoderLayer; grouped-query heads are repeated.
        text: [B, T, D] inputs of the layer at the query rows, after its norm.
        visual: [B, N, D] inputs of the layer at the visual tokens, after its norm.
        text_rotary, visual_rotary: angles of the T rows and of the N tokens, or None for no rotation.

    Returns:
        [B, H, T, N] float32, each row sums to 1.
    """
    attention = layer.self_attn
    query = in_float32(project(layer, attention.q_proj, text))
    key = in_float32(project(layer, attention.k_proj, visual))
    if text_rotary is not None and visual_rotary is not None:
        query, key = rotate(query, text_rotary), rotate(key, visual_rotary)
    key = _for_each_query(key, query.shape[1])
    return (query @ key.transpose(-1, -2) * attention.scaling).softmax(-1)


def attention_rows(
    layer: DecoderLayer,
    rows: Tensor,
    keys: Tensor,
    unseen: Tensor | None,
    row_rotary: Angles | None,
) -> Tensor:
    """Rows of a decoder layer's own attention, exactly as the layer computes them.

    Args:
        layer: a LlamaDecoderLayer.
        rows: [B, T, D] inputs of the layer at the query rows, after its norm.
        keys: [B, Hkv, L, d] keys of that layer, rotated if the rows are; grouped-query heads are repeated.
        unseen: [B, 1, T, L] bool, True for the keys that a row may not see; None where it sees all.
        row_rotary: angles of the T rows, or None for no rotation.

    Returns:
        [B, H, T, L] float32; rows sum to 1 over the keys that they see.
    """
    attention = layer.self_attn
    query = in_float32(project(layer, attention.q_proj, rows))
    query = query if row_rotary is None else rotate(query, row_rotary)
    keys = _for_each_query(in_float32(keys), query.shape[1])
    scores = query @ keys.transpose(-1, -2) * attention.scaling
    if unseen is not None:
        scores = scores.masked_fill(unseen, torch.finfo(scores.dtype).min)
    return scores.softmax(-1)


def _for_each_query(keys: Tensor, heads: int) -> Tensor:
    """[B, Hkv, L, d] -> [B, heads, L, d]: grouped-query heads repeated; the keys themselves where there are as many."""
    return keys if keys.shape[1] == heads else keys.repeat_interleave(heads // keys.shape[1], dim=1)


def layer_keys(layer: DecoderLayer, normed: Tensor, rotary: Angles | None) -> Tensor:
    """Keys [B, Hkv, L, d] float32 of a decoder layer, rotated unless `rotary` is None.

    Args:
        normed: [B, L, D] inputs of the layer after its norm.
    """
    keys = in_float32(project(layer, layer.self_attn.k_proj, normed))
    return keys if rotary is None else rotate(keys, rotary)


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
