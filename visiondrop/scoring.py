"""Attention that the visual tokens of a decoder layer receive from each other, without text among the queries.

Paper: https://arxiv.org/abs/2506.22283
Official code read: Ruixxxx/VisionDrop@f7a9444, llava/model/modeling_llama_visiondrop.py
Differs from it: computed for the visual rows alone and in slices; grouped-query heads; the choices of softmax and mean.

Shapes: B images, n visual tokens, W keys up to the last visual token, H heads of width d, D channels.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llava.reduction import (
    Angles,
    DecoderLayer,
    DecoderState,
    angles_at,
    at_spans,
    attention_rows,
    layer_keys,
    linear_flops,
    places,
    prepared_angles,
    row_index,
    unseen,
)

ATTENTIONS = ("causal", "visual", "bidirectional")
AVERAGES = ("all", "viewers")
METRICS = ("rotated", "unrotated", "hidden")
SLICE = 2**24  # attention weights held at a time: 64 MB in float32


@dataclass
class Look:
    """Hidden states, keys and mask for the attention among the visual tokens in the next layer.

    Attributes:
        rows: [B, n, D] inputs of the layer at the visual tokens, after its norm.
        rotary: angles at their positions.
        keys: [B, Hkv, W, d] rotated keys.
        unseen: [B, 1, n, W] bool, True for the keys that a row may not see; None where all rows see all.
        columns: [B, n] int64, which of the W keys are the visual tokens.
        span: the same as [start, stop), where it is that of all images.
    """

    rows: Tensor
    rotary: Angles
    keys: Tensor
    unseen: Tensor | None
    columns: Tensor
    span: tuple[int, int] | None = None

    def of_rows(self, part: slice) -> "Look":
        """Some of the rows, which see the same keys."""
        unseen = None if self.unseen is None else self.unseen[:, :, part]
        return replace(self, rows=self.rows[:, part], rotary=self.rotary.rows(part), unseen=unseen)

    def visual_keys(self) -> Tensor:
        """[B, Hkv, n, d] keys of the visual tokens."""
        if self.span is not None:
            return self.keys[:, :, slice(*self.span)]
        index = self.columns[:, None, :, None].expand(-1, self.keys.shape[1], -1, self.keys.shape[-1])
        return self.keys.gather(2, index)

    def to_visual(self, weights: Tensor) -> Tensor:
        """[B, T, W] weights of rows -> [B, T, n], those of the visual tokens."""
        if self.span is not None:
            return weights[:, :, slice(*self.span)]
        return weights.gather(2, self.columns[:, None].expand(-1, weights.shape[1], -1))


def look(state: DecoderState, attention: str) -> Look:
    """Prepare a kind of attention; the operations of its keys are counted in `state.flops`.

    Args:
        attention: "causal", the layer's own: every visual token sees the text and images before it, and visual
            tokens up to itself. "visual": only the latter. "bidirectional": all visual tokens of its image.
    """
    seen = _own_attention(state) if attention == "causal" else _visual_attention(state, attention == "bidirectional")
    projection = state.llm.layers[state.layer].self_attn.k_proj
    state.flops += len(seen.keys) * linear_flops(projection, seen.keys.shape[2])
    return seen


def _own_attention(state: DecoderState) -> Look:
    """Visual rows among all tokens before them."""
    sequence, layer = state.sequence, state.llm.layers[state.layer]
    # Causality: no visual token sees the text after the image, so that text needs no keys.
    width = max(sequence.padding(s) + stop for s, (_, stop) in enumerate(sequence.images))
    angles = prepared_angles(state.llm, sequence)
    normed = layer.input_layernorm(sequence.hidden[:, :width])
    spans = set(sequence.padded_spans(sequence.images))
    span = spans.pop() if len(spans) == 1 else None
    return Look(
        rows=at_spans(normed, sequence, sequence.images),
        rotary=angles_at(angles, sequence, sequence.images),
        keys=layer_keys(layer, normed, angles.rows(slice(width))),
        unseen=unseen(sequence, sequence.images, width),
        columns=row_index(sequence, sequence.images)[0],
        span=span,
    )


def _visual_attention(state: DecoderState, both_ways: bool) -> Look:
    """Visual rows among themselves."""
    layer, (batch, count) = state.llm.layers[state.layer], state.tokens.shape[:2]
    rows = layer.input_layernorm(state.tokens)
    rotary = angles_at(prepared_angles(state.llm, state.sequence), state.sequence, state.sequence.images)
    columns = places(batch, count, rows.device)
    later = None if both_ways else (columns[:, None] > columns[..., None])[:, None]
    return Look(rows, rotary, layer_keys(layer, rows, rotary), later, columns, (0, count))


def received_attention(layer: DecoderLayer, seen: Look, diagonal: bool) -> Tensor:
    """Attention that each visual token receives: mean over heads, sum over visual tokens.

    Args:
        layer: a LlamaDecoderLayer.
        diagonal: count the attention of a token to itself.

    Returns:
        [B, n] float32. Rows are processed in slices, so the full attention map is never held.
    """
    batch, count, width = *seen.rows.shape[:2], seen.keys.shape[2]
    heads = layer.self_attn.q_proj.out_features // layer.self_attn.head_dim
    step = max(1, SLICE // (batch * heads * width))
    received = []
    for start in range(0, count, step):
        some = seen if step >= count else seen.of_rows(slice(start, start + step))
        weights = attention_rows(layer, some.rows, some.keys, some.unseen, some.rotary).mean(1)
        weights = seen.to_visual(weights)
        if not diagonal:
            own = torch.eye(count, dtype=torch.bool, device=weights.device)
            weights = weights.masked_fill(own[start : start + step], 0)
        received.append(weights.sum(1))
    return sum(received[1:], received[0])


def viewers(count: int, attention: str, diagonal: bool, device: torch.device) -> Tensor:
    """[n] float32, the number of visual tokens that may see each one; at least 1, as it is used as a divisor."""
    if attention == "bidirectional":
        number = torch.full((count,), float(count), device=device)
    else:
        number = torch.arange(count, 0, -1, device=device, dtype=torch.float32)
    return (number if diagonal else number - 1).clamp(min=1)


def visual_scores(state: DecoderState, seen: Look, attention: str, average: str, diagonal: bool) -> Tensor:
    """[B, n] float32, mean attention received by every visual token, higher is more important.

    The operations are counted in `state.flops`.

    Args:
        average: mean over "all" visual tokens, with zeros from those that cannot see the token, or over its "viewers".
    """
    layer, count, width = state.llm.layers[state.layer], seen.rows.shape[1], seen.keys.shape[2]
    received = received_attention(layer, seen, diagonal)
    query = layer.self_attn.q_proj
    state.flops += len(received) * (linear_flops(query, count) + 2 * count * width * query.out_features)
    if average == "all":
        return received / count
    return received / viewers(count, attention, diagonal, received.device)


def merge_metric(state: DecoderState, seen: Look, metric: str) -> Tensor:
    """[B, n, d] (or [B, n, D]) float32 vectors; merging compares tokens by their cosine.

    Args:
        metric: keys of the next layer, mean over heads, "rotated" by position or "unrotated"; or the "hidden" states.
    """
    if metric == "hidden":
        return state.tokens.float()
    if metric == "rotated":
        return seen.visual_keys().mean(1)
    layer = state.llm.layers[state.layer]
    state.flops += len(state.tokens) * linear_flops(layer.self_attn.k_proj, state.tokens.shape[1])
    return layer_keys(layer, seen.rows, None).mean(1)
