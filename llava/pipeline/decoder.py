"""The decoder and its cache: running some layers on whole prompts, and all layers on one more token.

Prompts become shorter between layers, so each layer has its own key/value length and its own mask of valid keys.

The cache of transformers concatenates at every step, which copies all keys and values to append one token. Here the
tensors of a layer have space for tokens to come: a step writes one column, and attention reads a slice. The space grows
in blocks, so a large `max_new_tokens` costs memory only when an answer becomes long.

Read: transformers 5.23.0, cache_utils.py (DynamicLayer, whose contract `PreallocatedLayer` keeps).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, DynamicLayer

from llava.pipeline.sequence import PromptBatch
from llava.transformers_names import CACHE, KERNEL

BLOCK = 32  # tokens for which space is added at once
# cuDNN's attention, which torch prefers on the newest GPUs, makes a new plan for every size and stride. In a growing
# cache these change at every step.
torch.backends.cuda.enable_cudnn_sdp(False)


class PreallocatedLayer(DynamicLayer):
    """Keys and values of one layer, as slices of larger tensors.

    Attributes:
        keys, values: [B, Hkv, L, d] for the L tokens so far.
    """

    _space: tuple[Tensor, Tensor] | None = None
    _shown: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, Hkv, new, d], and return the keys and values of all tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past, total = self.get_seq_length(), self.get_seq_length() + key_states.shape[-2]
        if not past:
            # The prompt's tensors are kept without a copy. Space is allocated when the first token is decoded.
            self.keys, self.values, self._space = key_states, value_states, None
            return key_states, value_states
        assert self.keys is not None and self.values is not None
        # New columns are written into the space, unless there is too little of it, `keys` and `values` were replaced
        # since the last step (beam search reorders them), or it was allocated in an inference mode that has ended.
        shown, space = self._shown, self._space
        there = shown is not None and self.keys is shown[0] and self.values is shown[1]
        if (
            space is None
            or not there
            or total > space[0].shape[2]
            or (space[0].is_inference() and not torch.is_inference_mode_enabled())
        ):
            wider = [one.new_empty(*one.shape[:2], total + BLOCK, one.shape[3]) for one in (self.keys, self.values)]
            wider[0].narrow(2, 0, past).copy_(self.keys)
            wider[1].narrow(2, 0, past).copy_(self.values)
            self._space = space = wider[0], wider[1]
        space[0].narrow(2, past, total - past).copy_(key_states)
        space[1].narrow(2, past, total - past).copy_(value_states)
        self.keys, self.values = space[0].narrow(2, 0, total), space[1].narrow(2, 0, total)
        self._shown = self.keys, self.values
        return self._shown

    def reset(self) -> None:
        super().reset()
        self._space, self._shown = None, None


@dataclass
class Segment:
    """Consecutive decoder layers without a reduction between them; they share lengths, masks and positions.

    Attributes:
        layers: indices of the layers.
        lengths: length of each prompt, without padding.
        visual: number of visual tokens of each sample.
        valid: [B, keys so far] bool, False in the padding on the left; None if no sample is padded.
        next_position: [B, 1] or [B, 1, 3], position id of the next token. It continues the positions of the prompt in
            these layers, so that decoding a token equals prefilling a prompt that is one token longer.
        cached: length of each prompt in the cache if a method has cut it since; None if it is still `lengths`.
    """

    layers: range
    lengths: tuple[int, ...]
    visual: tuple[int, ...]
    valid: Tensor | None
    next_position: Tensor
    cached: tuple[int, ...] | None = None


@dataclass
class Prefilled:
    """State after prefill.

    Attributes:
        hidden: [B, 1, D] output of the last layer at the last prompt token, before the final norm.
        cache: keys and values, with a different length in each layer.
        segments: all layers in order.
        kv_bytes: for each sample, bytes of the keys and values of its tokens, without padding; all ranks together.
        kv_bytes_held: bytes of all keys and values after prefill, with padding, without space for new tokens; all ranks
            together.
    """

    hidden: Tensor
    cache: DynamicCache
    segments: list[Segment]
    kv_bytes: list[int]
    kv_bytes_held: int

    @property
    def lengths(self) -> list[tuple[int, ...]]:
        """For each layer, the length of each prompt after prefill, without padding."""
        return [segment.lengths for segment in self.segments for _ in segment.layers]

    @property
    def visual(self) -> list[tuple[int, ...]]:
        """For each layer, the number of visual tokens of each sample."""
        return [segment.visual for segment in self.segments for _ in segment.layers]


def cut_caches(
    cache: Sequence[Any], segments: list[Segment], layers: range, sequence: PromptBatch, columns: Tensor
) -> None:
    """Remove tokens from the keys and values of layers that have run, so that decoding no longer attends to them.

    Args:
        cache: the layers of the cache.
        segments: of the layers that have run; one of them is divided where `layers` begins or ends inside it.
        layers: the layers to cut, in which no token was removed since the prompts got as long as `columns` counts.
        sequence: the prompts after the removal.
        columns: [B, L] int64, the columns of the cache that stay.
    """
    divided: list[Segment] = []
    for one in segments:
        bounds = sorted({one.layers.start, one.layers.stop, *(set(one.layers) & {layers.start, layers.stop})})
        divided += [replace(one, layers=range(*pair)) for pair in pairwise(bounds)]
    segments[:] = divided
    for one in segments:
        if one.layers and one.layers[0] in layers:
            one.cached, one.valid = sequence.lengths, sequence.valid() if sequence.padded else None
            for held in (cache[index] for index in one.layers):
                held.keys, held.values = (
                    part.take_along_dim(columns.to(part.device)[:, None, :, None], dim=2)
                    for part in (held.keys, held.values)
                )


def causal_mask(valid: Tensor, queries: int, dtype: torch.dtype, attention: str) -> Tensor:
    """The mask [B, 1, queries, keys] with which the last `queries` tokens each see the valid keys up to themselves.

    It is boolean for SDPA and additive for eager attention. FlashAttention is causal by itself and takes `valid`.

    Args:
        valid: [B, keys] bool, False for padding.
        attention: the attention kernel that the decoder's configuration names.
    """
    if "flash" in attention:
        return valid
    keys = valid.shape[1]
    place = torch.arange(keys, device=valid.device)
    allowed = (place[None] <= place[keys - queries :, None])[None, None] & valid[:, None, None, :]
    if attention != "eager":
        return allowed
    return torch.zeros(allowed.shape, dtype=dtype, device=valid.device).masked_fill(~allowed, torch.finfo(dtype).min)


def rotary_angles(llm: Any, hidden: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of a decoder's rotary embedding at given positions, two tensors [B, L, d].

    Args:
        llm: a module with rotary_emb.
        hidden: the result has its dtype and device.
        position: [B, L], or [B, L, 3] for a decoder whose positions have a frame, a row and a column.
    """
    angles: tuple[Tensor, Tensor] = llm.rotary_emb(
        hidden, position if position.dim() == 2 else position.permute(2, 0, 1)
    )
    return angles


def run_segment(
    llm: Any, sequence: PromptBatch, layers: range, rotary: tuple[Tensor, Tensor], cache: DynamicCache | None
) -> tuple[Tensor, Tensor]:
    """Run consecutive layers on the prompts, without a reduction between them; keys and values go to the cache.

    Without padding, the kernel's own causal mask is used, except by eager attention, which has none.

    Returns:
        Hidden states [B, L, D] after the last of these layers, and those that entered it. Both are on the device of the
        prompts, even if the layers are on others.
    """
    hidden = entered = sequence.hidden
    attention, device, mask = getattr(llm.config, KERNEL), hidden.device, None
    if attention == "eager" or min(sequence.lengths) < hidden.shape[1]:
        mask = causal_mask(sequence.valid(), hidden.shape[1], hidden.dtype, attention)
    for index in layers:
        entered = hidden
        hidden = llm.layers[index](entered, attention_mask=mask, position_embeddings=rotary, **{CACHE: cache})
    return hidden.to(device), entered.to(device)


def run_layers(llm: Any, sequence: PromptBatch, count: int) -> Tensor:
    """Hidden states [B, L, D] after the first `count` layers, computed ahead of the prefill and without a cache."""
    rotary = rotary_angles(llm, sequence.hidden, sequence.position)
    return run_segment(llm, sequence, range(count), rotary, None)[0]


def step(llm: Any, state: Prefilled, tokens: Tensor) -> Tensor:
    """Run all layers on the next embedded tokens of every sample, [B, n, D] -> [B, n, D]; every cache grows by n.

    One token continues an answer, several continue a conversation. No sample has padding among them.
    """
    hidden, count, attention = tokens, tokens.shape[1], getattr(llm.config, KERNEL)
    for segment in state.segments:
        position, mask = segment.next_position, None
        if count > 1:
            ahead = torch.arange(count, device=position.device)
            position = position + (ahead if position.dim() == 2 else ahead[:, None])
        rotary = rotary_angles(llm, tokens, position)
        valid = segment.valid
        if valid is not None:
            segment.valid = valid = F.pad(valid, (0, count), value=True)
        elif count > 1 and "flash" not in attention:
            # The kernel's own causal mask would let the first new token see only the first key.
            held: Any = state.cache.layers[segment.layers[0]]
            valid = torch.ones(1, held.get_seq_length() + count, dtype=torch.bool, device=tokens.device)
        if valid is not None:
            # A single query is the last token. It sees all valid keys, so its mask needs no causal part.
            alone = count == 1 and attention == "sdpa"
            mask = valid[:, None, None, :] if alone else causal_mask(valid, count, tokens.dtype, attention)
        for index in segment.layers:
            layer = llm.layers[index]
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, **{CACHE: state.cache})
        segment.next_position = segment.next_position + count
    return hidden


def forget_last(layers: Sequence[Any], segments: Sequence[Segment], count: int) -> None:
    """Remove the last `count` tokens of every sample from every layer, so that others may follow in their place.

    Args:
        layers: of the cache.
        segments: the same layers.
    """
    if not count:
        return
    for held in layers:
        held.crop(-count)
    for segment in segments:
        segment.next_position = segment.next_position - count
        if segment.valid is not None:
            segment.valid = segment.valid[:, :-count]
