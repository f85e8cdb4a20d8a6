"""Keys and values of the decoder layers, written in place.

transformers' own cache concatenates at every step, which copies all that is there to append one token. Here a layer's
tensors have room for the tokens to come: a step writes one column, and attention reads a slice. The room grows in
blocks, so a long `max_new_tokens` costs memory only as an answer becomes long.

Read: transformers 5.23.0, cache_utils.py (DynamicLayer, whose contract this keeps).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

BLOCK = 32  # columns of room that are added at once
CUT = 8  # columns that are cut out of the room at once


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer, slices of tensors with room behind them.

    Attributes:
        keys, values: [B, Hkv, L, d], of the L tokens so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self._room: tuple[Tensor, Tensor] | None = None
        self._shown: tuple[Tensor, Tensor] | None = None
        self._columns: list[tuple[Tensor, Tensor]] = []  # of the next tokens, the last one first

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, Hkv, new, d]; returns those of all tokens."""
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            return super().update(key_states, value_states, *args, **kwargs)  # gradients forbid writing in place
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past, new = self.get_seq_length(), key_states.shape[-2]
        if not past:
            # A prompt is kept as it is, without a copy; room is made when the first token is to be decoded.
            self.keys, self.values, self._room = key_states, value_states, None
            return key_states, value_states
        if new == 1 and self._fits(past):
            key, value = self._columns.pop()
            key.copy_(key_states)
            value.copy_(value_states)
        else:
            self._room = with_room(self.keys, key_states, past), with_room(self.values, value_states, past)
            self._columns = []
        assert self._room is not None
        self.keys, self.values = self._room[0].narrow(2, 0, past + new), self._room[1].narrow(2, 0, past + new)
        self._shown = self.keys, self.values
        return self._shown

    def _fits(self, past: int) -> bool:
        """Whether a column can be written behind `past` others, where they are; it is then among `_columns`.

        It cannot after a call that replaced `keys` and `values` (a beam search reorders them), or outside of the
        inference mode in which the memory was made.
        """
        if self._room is None or self._shown is None:
            return False
        keys, values = self._room
        if self.keys is not self._shown[0] or self.values is not self._shown[1] or past == keys.shape[2]:
            return False
        if not torch.is_inference_mode_enabled() and keys.is_inference():
            return False
        if not self._columns:
            # One call for several tokens: on a GPU short steps wait for the host.
            count = min(CUT, keys.shape[2] - past)
            ahead = [rows.narrow(2, past, count).split(1, 2) for rows in (keys, values)]
            self._columns = list(zip(*ahead, strict=True))[::-1]
        return True

    def reset(self) -> None:
        super().reset()
        self._room, self._shown, self._columns = None, None, []


def with_room(present: Tensor, new: Tensor, past: int) -> Tensor:
    """[B, Hkv, past + new + BLOCK, d]: the columns so far, the new ones, and room.

    Args:
        present: [B, Hkv, past, d].
    """
    room = new.new_empty(*new.shape[:2], past + new.shape[2] + BLOCK, new.shape[3])
    room.narrow(2, 0, past).copy_(present)
    room.narrow(2, past, new.shape[2]).copy_(new)
    return room


def empty_cache() -> DynamicCache:
    """A cache without tokens; every layer gets its own length and its own room."""
    # Without the configuration, which could set a sliding window; it is not applied, see the notes of
    # llava.model.checkpoint.load.
    cache = DynamicCache()
    cache.layer_class_to_replicate = RoomyLayer
    return cache


@dataclass
class ValidKeys:
    """Which keys of a layer are real. Layers of equal length share one object.

    Attributes:
        room: [B, R] bool, False in the padding on the left and True elsewhere, also for tokens to come.
        length: keys so far.
    """

    room: Tensor
    length: int

    @classmethod
    def of(cls, valid: Tensor) -> "ValidKeys":
        """Of a prompt: valid [B, L] bool."""
        return cls(F.pad(valid, (0, BLOCK), value=True), valid.shape[1])

    @property
    def columns(self) -> Tensor:
        """[B, length] bool."""
        return self.room[:, : self.length]

    def append(self) -> None:
        """One more real token per sample."""
        if self.length == self.room.shape[1]:
            self.room = F.pad(self.room, (0, BLOCK), value=True)
        self.length += 1

    def remove(self, count: int) -> None:
        """Forget the last `count` keys, which are real tokens: padding is on the left."""
        self.length -= count
