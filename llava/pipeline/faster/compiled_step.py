"""Decoding one token as one compiled graph of fixed shapes: a part of the option `--compile`.

A decoding step computes little and launches much: about forty kernels per layer. Compiled it is one graph, which on a
GPU is captured once and replayed. That needs shapes that do not change from token to token: keys and values stand in
rooms of a fixed number of columns, a token writes its column in place, and attention runs over the whole room under a
mask that hides the columns to come. So the last bits of the logits differ from those of `decoder.step`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llava.pipeline import decoder
from llava.pipeline.decoder import Prefilled
from llava.pipeline.faster.graphs import Backend, Graphs, compiled_once
from llava.reduction.decoder_attention import rotary_angles

ROOM = 128  # rooms are multiples of this, so that prompts of different lengths share a graph


@dataclass
class Group:
    """Layers of equal length.

    Attributes:
        place: [1] int64, the column that the next token takes.
        position: [B, 1] or [B, 1, 3], position id of the next token.
        valid: [B, R] bool, False in the padding.
    """

    place: Tensor
    position: Tensor
    valid: Tensor


@dataclass
class FixedState:
    """The cache of a batch in rooms of R columns; R may differ between layers.

    Attributes:
        keys, values: per layer [B, Hkv, R, d].
        group: per layer, its number in `groups`.
        lengths: per layer, the columns so far.
    """

    keys: list[Tensor]
    values: list[Tensor]
    groups: list[Group]
    group: list[int]
    lengths: list[int]

    @property
    def rooms(self) -> list[int]:
        """R of each layer."""
        return [keys.shape[2] for keys in self.keys]

    @property
    def full(self) -> bool:
        """Whether a layer has no column left."""
        return any(length == room for length, room in zip(self.lengths, self.rooms, strict=True))

    def advance(self) -> None:
        """One token was written."""
        self.lengths = [length + 1 for length in self.lengths]
        for group in self.groups:
            group.place += 1
            group.position += 1


class Columns:
    """The cache that a layer sees while the graph is traced: it writes one column and shows the whole room."""

    def __init__(self, keys: Tensor, values: Tensor, place: Tensor):
        self.keys, self.values, self.place = keys, values, place

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.place, key_states)
        self.values.index_copy_(2, self.place, value_states)
        return self.keys, self.values


@compiled_once
def layer_on_token(
    layer: nn.Module,
    hidden: Tensor,
    mask: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    place: Tensor,
) -> Tensor:
    """One layer on one token of each sample, [B, 1, D] -> [B, 1, D]; keys and values are written at `place`."""
    columns = Columns(keys, values, place)
    return layer(hidden, attention_mask=mask, position_embeddings=(cos, sin), past_key_values=columns, use_cache=True)


class CompiledStep:
    """Takes the place of `decoder.step`, with torch.compile.

    Args:
        llm: layers and rotary_emb (a LlamaModel), whole on one device.
        backend: of torch.compile.
    """

    def __init__(self, llm: nn.Module, backend: Backend = "inductor"):
        self.llm = llm
        self.graphs = Graphs("decoding", self._graph, llm, backend)

    def __call__(self, llm: nn.Module, state: Prefilled, token: Tensor) -> Tensor:
        """`decoder.step`: one embedded token per sample, [B, 1, D] -> [B, 1, D] before the final norm."""
        # A batch that `decoder.step` has begun is ended by it: its cache is not in rooms.
        if state.fixed is None and not state.steps and self.graphs.take(shape_of(state), len(state.hidden)):
            state.fixed = fixed_state(state)
        if state.fixed is None:
            return decoder.step(llm, state, token)
        if state.fixed.full:
            state.fixed = enlarged(state.fixed)
        fixed = state.fixed
        hidden = self.graphs(
            token,
            fixed.keys,
            fixed.values,
            [group.place for group in fixed.groups],
            [group.position for group in fixed.groups],
            [group.valid for group in fixed.groups],
            fixed.group,
        )
        fixed.advance()
        return hidden

    def _graph(
        self,
        token: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
        places: list[Tensor],
        positions: list[Tensor],
        valid: list[Tensor],
        group: list[int],
    ) -> Tensor:
        rotary = [rotary_angles(self.llm, token, position) for position in positions]
        masks = [
            (known & (torch.arange(known.shape[1], device=known.device) <= place))[:, None, None]
            for known, place in zip(valid, places, strict=True)
        ]
        hidden = token
        for layer, number, own, held in zip(self.llm.layers, group, keys, values, strict=True):
            hidden = layer_on_token(layer, hidden, masks[number], *rotary[number], own, held, places[number])
        return hidden


def shape_of(state: Prefilled) -> tuple[Any, ...]:
    """What the graph of a batch depends on: its size, the rooms, and which layers are of equal length."""
    lengths = [layer.get_seq_length() for layer in state.cache.layers]
    return len(state.hidden), tuple(map(room_of, lengths)), tuple(map(lengths.index, lengths))


def room_of(length: int) -> int:
    """Columns of a room that holds `length` tokens and more."""
    return ROOM * (length // ROOM + 1)


def fixed_state(state: Prefilled) -> FixedState:
    """The cache after a prefill, copied into rooms."""
    lengths = [layer.get_seq_length() for layer in state.cache.layers]
    numbers: dict[tuple[int, int], int] = {}
    fixed = FixedState([], [], [], [], lengths)
    for layer, length, known, position in zip(
        state.cache.layers, lengths, state.valid, state.next_position, strict=True
    ):
        name = id(position), length
        if name not in numbers:
            numbers[name] = len(numbers)
            valid = torch.ones(len(layer.keys), room_of(length), dtype=torch.bool, device=layer.keys.device)
            if known is not None:
                valid[:, :length] = known.columns
            fixed.groups.append(Group(torch.tensor([length], device=layer.keys.device), position.clone(), valid))
        fixed.group.append(numbers[name])
        fixed.keys.append(with_columns(layer.keys, room_of(length)))
        fixed.values.append(with_columns(layer.values, room_of(length)))
    return fixed


def enlarged(fixed: FixedState) -> FixedState:
    """Rooms twice as large: each size needs a graph of its own, so they do not grow by blocks."""
    keys = [with_columns(one, 2 * room) for one, room in zip(fixed.keys, fixed.rooms, strict=True)]
    values = [with_columns(one, 2 * room) for one, room in zip(fixed.values, fixed.rooms, strict=True)]
    groups = [
        Group(group.place, group.position, torch.cat([group.valid, torch.ones_like(group.valid)], 1))
        for group in fixed.groups
    ]
    return FixedState(keys, values, groups, fixed.group, fixed.lengths)


def with_columns(tensor: Tensor, room: int) -> Tensor:
    """A copy of [B, H, L, d] in [B, H, room, d], zero behind."""
    # Not empty: what is hidden by the mask is still multiplied, by zero, and NaN times zero is NaN.
    larger = tensor.new_zeros(*tensor.shape[:2], room, tensor.shape[3])
    larger[:, :, : tensor.shape[2]] = tensor
    torch._dynamo.mark_static_address(larger)  # lets a captured graph write into it
    return larger
