"""The decoder loop: prefill with reductions before any layer, then one token at a time.

Each layer has its own key/value length and its own mask of valid keys.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from llava.pipeline.kv_cache import ValidKeys, empty_cache
from llava.pipeline.sequence import Rotary, Sequence
from llava.reduction.decoder_attention import angles_of, follows_length, rotary_angles

# (sequence, layer, the sequence as it entered the layer before, keys of that layer) -> shorter sequence
ReduceAt = Callable[[Sequence, int, Sequence, Tensor], Sequence]
# (llm, sequence, layers, cosines and sines, cache) -> hidden states [B, L, D] behind the layers and before the last one
RunLayers = Callable[[nn.Module, Sequence, range, tuple[Tensor, Tensor], DynamicCache], tuple[Tensor, Tensor]]


def causal_mask(valid: Tensor, queries: int, dtype: torch.dtype, eager: bool) -> Tensor:
    """[B, 1, queries, keys]: the last `queries` of the keys, each seeing valid keys up to itself.

    Boolean for SDPA, additive for eager attention.
    """
    keys = valid.shape[1]
    place = torch.arange(keys, device=valid.device)
    allowed = (place[None] <= place[keys - queries :, None])[None, None] & valid[:, None, None, :]
    if not eager:
        return allowed
    return torch.zeros(allowed.shape, dtype=dtype, device=valid.device).masked_fill(~allowed, torch.finfo(dtype).min)


def step_mask(valid: Tensor, dtype: torch.dtype, eager: bool) -> Tensor:
    """`causal_mask` for one query, the last key: [B, 1, 1, keys]. Nothing is computed unless attention is eager."""
    if not eager:
        return valid[:, None, None, :]
    return causal_mask(valid, 1, dtype, eager)


@dataclass
class Prefilled:
    """State after prefill.

    Attributes:
        hidden: [B, 1, D] last hidden state of the last prompt token, before the final norm.
        cache: keys and values, one length per layer.
        valid: per layer which keys are real, or None where no sample is padded; layers of equal length share one
            object.
        next_position: per layer [B, 1] or [B, 1, 3], position id of the first generated token: one after the last
            position of that layer's prompt, so that decoding equals a longer prefill; layers of equal length share one
            tensor.
        lengths: per layer, the real length of each sample.
        visual: per layer, the visual tokens of each sample.
        kv_bytes: of each sample, the bytes that hold the keys and values of its real tokens, on all ranks together.
        kv_bytes_held: bytes of all keys and values after prefill, with padding, without the room for new tokens, on
            all ranks together.
        steps: tokens that `step` has fed.
        fixed: the cache in rooms of fixed size, where decoding is compiled (llava/pipeline/faster/compiled_step.py).
    """

    hidden: Tensor
    cache: DynamicCache
    valid: list[ValidKeys | None]
    next_position: list[Tensor]
    lengths: list[tuple[int, ...]] = field(default_factory=list)
    visual: list[tuple[int, ...]] = field(default_factory=list)
    kv_bytes: list[int] = field(default_factory=list)
    kv_bytes_held: int = 0
    steps: int = 0
    fixed: Any = None

    @property
    def kv_bytes_allocated(self) -> int:
        """Bytes of the memory in which the keys and values of this rank stand now, with the room for new tokens."""
        fixed, layers = self.fixed, self.cache.layers
        tensors = (
            [*fixed.keys, *fixed.values] if fixed else [one for layer in layers for one in (layer.keys, layer.values)]
        )
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def _mask_of(sequence: Sequence, eager: bool) -> Tensor | None:
    """Attention mask; None, for the kernel's own causal mask, unless there is padding or attention is eager."""
    if not sequence.padded and not eager:
        return None
    return causal_mask(sequence.valid(), sequence.hidden.shape[1], sequence.hidden.dtype, eager)


def is_eager(llm: nn.Module) -> bool:
    return llm.config._attn_implementation == "eager"


def run_segment(
    llm: nn.Module, sequence: Sequence, layers: range, rotary: tuple[Tensor, Tensor], cache: DynamicCache
) -> tuple[Tensor, Tensor]:
    """Run some layers, between which nothing is reduced, on the prompts; keys and values go to the cache.

    Returns:
        Hidden states [B, L, D] behind the last of these layers, and as they entered it.
    """
    mask, hidden = _mask_of(sequence, is_eager(llm)), sequence.hidden
    for index in layers:
        entered = hidden
        hidden = llm.layers[index](
            entered, attention_mask=mask, position_embeddings=rotary, past_key_values=cache, use_cache=True
        )
    return hidden, entered


def prefill(
    llm: nn.Module,
    sequence: Sequence,
    stages: tuple[int, ...],
    reduce_at: ReduceAt | None,
    run: RunLayers = run_segment,
) -> Prefilled:
    """Run all layers on the prompts.

    Args:
        llm: layers and rotary_emb (a LlamaModel).
        stages: layers before which `reduce_at` is called; layer 0 is not one of them.
        run: runs the layers between two of these places.
    """
    cache, before, depth = empty_cache(), sequence, len(llm.layers)
    valid, lengths, visual, following = [], [], [], []
    for first, last in pairwise((0, *sorted({stage for stage in stages if 0 < stage < depth}), depth)):
        if first and reduce_at is not None:
            sequence = reduce_at(sequence, first, before, cache.layers[first - 1].keys)
        rotary = angles_of(llm, sequence)
        same = sequence.rotary is not None and sequence.rotary.position is sequence.position
        if not same and sequence.position.dim() == 2 and not follows_length(llm):
            sequence = replace(sequence, rotary=Rotary(sequence.position, *rotary))
        known = ValidKeys.of(sequence.valid()) if sequence.padded else None
        place = sequence.next_position()
        hidden, entered = run(llm, sequence, range(first, last), rotary, cache)
        before, sequence = replace(sequence, hidden=entered), replace(sequence, hidden=hidden)
        valid += [known] * (last - first)
        following += [place] * (last - first)
        lengths += [sequence.lengths] * (last - first)
        visual += [sequence.visual_counts] * (last - first)
    # Read now, because decoding makes the cache longer. Where heads are split over ranks, each holds as many.
    ranks = getattr(llm, "ranks", 1)
    held = [ranks * (layer.keys.nbytes + layer.values.nbytes) for layer in cache.layers]
    token_bytes = [
        total // (len(lengths[0]) * layer.keys.shape[-2]) for total, layer in zip(held, cache.layers, strict=True)
    ]
    used = [
        sum(own * size for own, size in zip(sample, token_bytes, strict=True)) for sample in zip(*lengths, strict=True)
    ]
    return Prefilled(sequence.hidden[:, -1:], cache, valid, following, lengths, visual, used, sum(held))


def run_layers(llm: nn.Module, sequence: Sequence, count: int) -> Tensor:
    """Hidden states [B, L, D] after the first `count` layers, without a cache; for contextual text attention."""
    rotary, mask = rotary_angles(llm, sequence.hidden, sequence.position), _mask_of(sequence, is_eager(llm))
    hidden = sequence.hidden
    for layer in llm.layers[:count]:
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
    return hidden


def step(llm: nn.Module, state: Prefilled, token: Tensor) -> Tensor:
    """Feed one embedded token per sample, [B, 1, D] -> [B, 1, D], growing every layer's cache by one."""
    eager = is_eager(llm)
    places = {id(place): place for place in state.next_position}
    rotary = {key: rotary_angles(llm, token, place) for key, place in places.items()}
    masks: dict[int, Tensor] = {}
    for known in {id(known): known for known in state.valid if known is not None}.values():
        known.append()
        masks[id(known)] = step_mask(known.columns, token.dtype, eager)
    hidden = token
    for index, layer in enumerate(llm.layers):
        hidden = layer(
            hidden,
            attention_mask=masks.get(id(state.valid[index])),
            position_embeddings=rotary[id(state.next_position[index])],
            past_key_values=state.cache,
            use_cache=True,
        )
    moved = {key: place + 1 for key, place in places.items()}
    state.next_position = [moved[id(place)] for place in state.next_position]
    state.steps += 1
    return hidden
