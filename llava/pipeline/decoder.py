"""The decoder and its cache: layers between which nothing is reduced, and one token at a time.

Each layer has its own key/value length and its own mask of valid keys.

transformers' own cache concatenates at every step, which copies all that is there to append one token. Here a layer's
tensors have space for the tokens to come: a step writes one column, and attention reads a slice. The space grows in
blocks, so a long `max_new_tokens` costs memory only as an answer becomes long.

Read: transformers 5.23.0, cache_utils.py (DynamicLayer, whose contract `PreallocatedLayer` keeps).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, DynamicLayer

from llava.pipeline.sequence import PromptBatch
from llava.transformers_names import CACHE, kernel_of

BLOCK = 32  # columns of space that are added at once
# cuDNN's attention, which torch prefers on the newest GPUs, plans anew for every size and stride. A growing cache has
# others at each step.
torch.backends.cuda.enable_cudnn_sdp(False)


class PreallocatedLayer(DynamicLayer):
    """Keys and values of one layer, slices of tensors with space behind them.

    Attributes:
        keys, values: [B, Hkv, L, d], of the L tokens so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers'
        self._space: tuple[Tensor, Tensor] | None = None
        self._shown: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, Hkv, new, d]; returns those of all tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past, total = self.get_seq_length(), self.get_seq_length() + key_states.shape[-2]
        if not past:
            # A prompt is kept as it is, without a copy; space is made when the first token is to be decoded.
            self.keys, self.values, self._space = key_states, value_states, None
            return key_states, value_states
        assert self.keys is not None and self.values is not None
        # Columns can be written behind the others, where they are. They cannot after a call that replaced `keys` and
        # `values` (a beam search reorders them), or outside of the inference mode in which the memory was made.
        shown, space = self._shown, self._space
        there = shown is not None and self.keys is shown[0] and self.values is shown[1]
        if (
            space is None
            or not there
            or total > space[0].shape[2]
            or (space[0].is_inference() and not torch.is_inference_mode_enabled())
        ):
            self._space = space = grow(self.keys, total), grow(self.values, total)
        space[0].narrow(2, past, total - past).copy_(key_states)
        space[1].narrow(2, past, total - past).copy_(value_states)
        self.keys, self.values = space[0].narrow(2, 0, total), space[1].narrow(2, 0, total)
        self._shown = self.keys, self.values
        return self._shown

    def reset(self) -> None:
        super().reset()
        self._space, self._shown = None, None


def grow(present: Tensor, total: int) -> Tensor:
    """[B, Hkv, total + BLOCK, d]: the columns so far, [B, Hkv, past, d], and space for more."""
    larger = present.new_empty(*present.shape[:2], total + BLOCK, present.shape[3])
    larger.narrow(2, 0, present.shape[2]).copy_(present)
    return larger


@dataclass
class Segment:
    """Decoder layers between which nothing is reduced: they share lengths, masks and positions.

    Attributes:
        layers: their numbers.
        lengths: the real length of each sample.
        visual: the visual tokens of each sample.
        valid: [B, keys so far] bool, False in the padding on the left; None where no sample is padded.
        next_position: [B, 1] or [B, 1, 3], position id of the next token: one after the last position of these layers'
            prompt, so that decoding equals a longer prefill.
    """

    layers: range
    lengths: tuple[int, ...]
    visual: tuple[int, ...]
    valid: Tensor | None
    next_position: Tensor


@dataclass
class Prefilled:
    """State after prefill.

    Attributes:
        hidden: [B, 1, D] last hidden state of the last prompt token, before the final norm.
        cache: keys and values, one length per layer.
        segments: all layers in order.
        kv_bytes: of each sample, the bytes that hold the keys and values of its real tokens, on all ranks together.
        kv_bytes_held: bytes of all keys and values after prefill, with padding, without the space for new tokens, on
            all ranks together.
    """

    hidden: Tensor
    cache: DynamicCache
    segments: list[Segment]
    kv_bytes: list[int]
    kv_bytes_held: int

    @property
    def lengths(self) -> list[tuple[int, ...]]:
        """Per layer, the real length of each sample after prefill."""
        return [segment.lengths for segment in self.segments for _ in segment.layers]

    @property
    def visual(self) -> list[tuple[int, ...]]:
        """Per layer, the visual tokens of each sample."""
        return [segment.visual for segment in self.segments for _ in segment.layers]

    @property
    def kv_bytes_allocated(self) -> int:
        """Bytes of the memory in which the keys and values of this rank stand now, with the space for new tokens."""
        layers: list[Any] = self.cache.layers
        return sum(part.untyped_storage().nbytes() for layer in layers for part in (layer.keys, layer.values))


def causal_mask(valid: Tensor, queries: int, dtype: torch.dtype, attention: str) -> Tensor:
    """[B, 1, queries, keys]: the last `queries` of the keys, each seeing valid keys up to itself.

    Boolean for SDPA, additive for eager attention. FlashAttention, causal by itself, takes `valid` [B, keys].

    Args:
        attention: the kernel of the decoder's configuration.
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
    """Cosine and sine of a decoder at given positions, two tensors [B, L, d].

    Args:
        llm: a module with rotary_emb.
        hidden: gives dtype and device.
        position: [B, L], or [B, L, 3] for a decoder whose positions have a frame, a row and a column.
    """
    angles: tuple[Tensor, Tensor] = llm.rotary_emb(
        hidden, position if position.dim() == 2 else position.permute(2, 0, 1)
    )
    return angles


def run_segment(
    llm: Any, sequence: PromptBatch, layers: range, rotary: tuple[Tensor, Tensor], cache: DynamicCache | None
) -> tuple[Tensor, Tensor]:
    """Run some layers, between which nothing is reduced, on the prompts; keys and values go to the cache.

    The attention mask is None, for the kernel's own causal mask, unless there is padding or attention is eager.

    Returns:
        Hidden states [B, L, D] behind the last of these layers, and as they entered it; on the device of the prompts,
        wherever the layers are.
    """
    hidden = entered = sequence.hidden
    attention, device, mask = kernel_of(llm.config), hidden.device, None
    if attention == "eager" or min(sequence.lengths) < hidden.shape[1]:
        mask = causal_mask(sequence.valid(), hidden.shape[1], hidden.dtype, attention)
    for index in layers:
        entered = hidden
        hidden = llm.layers[index](entered, attention_mask=mask, position_embeddings=rotary, **{CACHE: cache})
    return hidden.to(device), entered.to(device)


def run_layers(llm: Any, sequence: PromptBatch, count: int) -> Tensor:
    """Hidden states [B, L, D] after the first `count` layers, without a cache; for contextual text attention."""
    rotary = rotary_angles(llm, sequence.hidden, sequence.position)
    return run_segment(llm, sequence, range(count), rotary, None)[0]


def step(llm: Any, state: Prefilled, token: Tensor) -> Tensor:
    """Feed one embedded token per sample, [B, 1, D] -> [B, 1, D], growing every layer's cache by one."""
    hidden = token
    for segment in state.segments:
        rotary, mask = rotary_angles(llm, token, segment.next_position), None
        if segment.valid is not None:
            segment.valid = valid = F.pad(segment.valid, (0, 1), value=True)
            # The one query is the last key, so it sees all that are real: no causal part is needed.
            attention = kernel_of(llm.config)
            mask = valid[:, None, None, :] if attention == "sdpa" else causal_mask(valid, 1, token.dtype, attention)
        for index in segment.layers:
            layer = llm.layers[index]
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, **{CACHE: state.cache})
        segment.next_position = segment.next_position + 1
    return hidden
