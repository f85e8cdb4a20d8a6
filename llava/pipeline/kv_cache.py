"""Keys and values of the decoder layers, written in place.

transformers' own cache concatenates at every step, which copies all that is there to append one token. Here a layer's
tensors have room for the tokens to come: a step writes one column, and attention reads a slice. The room grows in
blocks, so a long `max_new_tokens` costs memory only as an answer becomes long.

Read: transformers 5.23.0, cache_utils.py (DynamicLayer, whose contract this keeps).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

BLOCK = 32  # columns of room that are added at once


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer, slices of tensors with room behind them.

    Attributes:
        keys, values: [B, Hkv, L, d], of the L tokens so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self._room: tuple[Tensor, Tensor] | None = None
        self._shown: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, Hkv, new, d]; returns those of all tokens."""
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            return super().update(key_states, value_states, *args, **kwargs)  # gradients forbid writing in place
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past = self.get_seq_length()
        stop = past + key_states.shape[-2]
        room = self._room
        if room is None or not self._fits(stop):
            keys, values = self._larger(self.keys, key_states, past), self._larger(self.values, value_states, past)
            room = self._room = keys, values
        room[0].narrow(2, past, stop - past).copy_(key_states)
        room[1].narrow(2, past, stop - past).copy_(value_states)
        self._shown = room[0].narrow(2, 0, stop), room[1].narrow(2, 0, stop)
        self.keys, self.values = self._shown
        return self._shown

    def _fits(self, stop: int) -> bool:
        """Whether columns up to `stop` can be written where the others are.

        They cannot after a call that replaced `keys` and `values` (a beam search reorders them), or outside of the
        inference mode in which the memory was made.
        """
        assert self._room is not None and self._shown is not None
        own = self.keys is self._shown[0] and self.values is self._shown[1]
        writable = torch.is_inference_mode_enabled() or not self._room[0].is_inference()
        return own and writable and stop <= self._room[0].shape[2]

    @staticmethod
    def _larger(present: Tensor, new: Tensor, past: int) -> Tensor:
        """Memory for the columns so far, the new ones and a block, with the columns so far in it."""
        room = new.new_empty(*new.shape[:2], past + new.shape[2] + BLOCK, new.shape[3])
        if past:
            room.narrow(2, 0, past).copy_(present)
        return room

    def reset(self) -> None:
        super().reset()
        self._room = self._shown = None


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
