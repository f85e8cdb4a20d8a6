"""The option `--compile`: vision tower, prefill and decoding of a model as compiled graphs of fixed shapes.

Sums are taken in another order than in the plain way, so the last bits of scores and logits differ. There is one graph
for each shape, and their number is bounded. A graph is a chain of equal layers; each layer is a region that is compiled
once for the whole graph, so that compiling takes about as long for 32 layers as for one. On a GPU the whole graph is
captured as a CUDA graph and replayed: its launches are one call.

Tower: shapes are fixed by the size of the images and their number. Scores are computed from the inputs of their blocks,
which the graph gives beside its output.

Prefill: the layers between two reductions are one graph; what a method does between them is its own code. Lengths
follow the question, so prompts are padded on the right to a multiple of COLUMNS: attention is causal, and nothing
behind a column changes it. Keys, values and hidden states are cut to the real columns, so neither the cache nor a
method sees padding.

Decoding: a step computes little and launches much, about forty kernels per layer. One graph of it needs shapes that do
not change from token to token: keys and values stand in tensors of a fixed number of columns, a token writes its column
in place, and attention runs over all columns under a mask that hides those to come.
"""

import logging
import time
from collections.abc import Callable, Hashable
from collections.abc import Sequence as Listed
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import DynamicCache

from llava.errors import UserError
from llava.model.multimodal_encoder import clip_encoder
from llava.pipeline import decoder
from llava.pipeline.decoder import Prefilled, rotary_angles
from llava.pipeline.sequence import Sequence

GRAPHS = 64  # of each part; each belongs to a batch size and a length
TOWER_GRAPHS = 16  # numbers of images in a batch that get a graph
COLUMNS = 16  # prompts are padded to multiples of this
CAPACITY = 128  # a decoded batch has columns in multiples of this, so that prompts of different lengths share a graph

Backend = str | Callable[..., Any]  # of torch.compile

compiled_once = torch.compiler.nested_compile_region
log = logging.getLogger(__name__)


class Graphs:
    """torch.compile of one function, for the first shapes that come.

    Batches smaller than the largest so far, which end a run, and shapes beyond the first `most` take the plain way:
    compiling takes longer than they do. The log says so, once for each reason.

    Args:
        part: for messages, "decoding".
        function: tensors, modules and whole numbers -> tensors; run twice on the same arguments it gives the same.
        module: tells the device.
        backend: of torch.compile.
        most: graphs.

    Attributes:
        shapes: that have a graph.
        seconds: wall clock of the calls that compiled, each with one run.
    """

    def __init__(self, part: str, function: Callable[..., Any], module: nn.Module, backend: Backend, most: int = 0):
        self.part, self.most = part, most or GRAPHS
        # A captured graph writes its outputs where the next replay writes them again.
        self.captured = next(module.parameters()).is_cuda and backend == "inductor"
        compile_: Any = torch.compile  # its newest options have no types yet
        self._compiled = compile_(
            function,
            fullgraph=True,
            dynamic=False,
            backend=backend,
            mode="reduce-overhead" if self.captured else None,
            recompile_limit=8 * self.most,  # the capacity of a decoded batch grows, and each size has a graph
            isolate_recompiles=True,
        )
        self.shapes: set[Hashable] = set()
        self.seconds = 0.0
        self._largest = 0
        self._said: set[str] = set()

    def should_compile(self, shape: Hashable, rows: int = 0) -> bool:
        """Whether a batch of this shape runs as a graph, which is compiled at the first call.

        Args:
            rows: samples of the batch; 0 where smaller batches are no exception.
        """
        if rows < self._largest:
            self.say("smaller", f"a batch of {rows} is smaller than one before ({self._largest})")
            return False
        self._largest = max(self._largest, rows)
        if shape not in self.shapes and len(self.shapes) == self.most:
            self.say("full", f"there are {self.most} graphs already, one for each shape")
            return False
        self.shapes.add(shape)
        return True

    def say(self, kind: str, reason: str) -> None:
        """Write to the log why batches take the plain way; each kind of reason once."""
        if kind not in self._said:
            self._said.add(kind)
            log.warning("--compile: %s takes the plain way for some batches: %s.", self.part, reason)

    def run(self, *arguments: Any) -> Any:
        """The function's outputs.

        Raises:
            UserError: it could not be compiled.
        """
        stats = torch._dynamo.utils.counters["stats"]  # of this process
        compiled, began = stats["unique_graphs"], time.monotonic()
        try:
            outputs = self._compiled(*arguments)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = " ".join(str(error).split("\n")[:2])
            raise UserError(
                f"torch.compile could not compile the {self.part} ({reason}); see that there is a C++ compiler, or "
                "leave --compile out."
            ) from error
        if stats["unique_graphs"] > compiled:
            self.seconds += time.monotonic() - began
            # Run again, so that what is left of the time is that of the graph; it writes the same to the same places.
            outputs = self._compiled(*arguments)
        if self.captured:
            return tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, outputs)
        return outputs


# -- tower ---------------------------------------------------------------------------------------------------------


@compiled_once
def block_on_images(block: nn.Module, hidden: Tensor) -> Tensor:
    """One block, [B, n, D] -> [B, n, D]."""
    after: Tensor = block(hidden, None)
    return after


def blocks_on_images(blocks: list[nn.Module], hidden: Tensor, places: list[int]) -> list[Tensor]:
    """Hidden states behind the first k blocks, for each k in `places`."""
    states = []
    for done, block in enumerate(blocks, 1):
        hidden = block_on_images(block, hidden)
        if done in places:
            states.append(hidden)
    return states


class CompiledTower(Graphs):
    """Takes the place of `clip_encoder.run_blocks`.

    Args:
        tower: tells the device; another tower on it may be run too.
    """

    def __init__(self, tower: Any, backend: Backend = "inductor"):
        super().__init__("vision tower", blocks_on_images, tower, backend, TOWER_GRAPHS)

    def __call__(self, tower: Any, hidden: Tensor, places: Listed[int]) -> list[Tensor]:
        """`clip_encoder.run_blocks`: hidden states [B, n, D] behind the first k blocks, for each k in `places`."""
        if not self.should_compile((id(tower), tuple(hidden.shape), tuple(places))):
            return clip_encoder.run_blocks(tower, hidden, places)
        inside = [place for place in places if place > 0]
        blocks = list(tower.encoder.layers[: places[-1]])
        return [hidden] * (len(places) - len(inside)) + (self.run(blocks, hidden, inside) if inside else [])


# -- prefill -------------------------------------------------------------------------------------------------------


class CaughtKeys:
    """The cache that a layer sees while the graph is traced: it keeps what it is given."""

    keys: Tensor
    values: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values = key_states, value_states
        return key_states, value_states


@compiled_once
def layer_on_prompts(
    layer: nn.Module, hidden: Tensor, mask: Tensor | None, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer on whole prompts: hidden [B, P, D], keys and values [B, Hkv, P, d]."""
    caught = CaughtKeys()
    hidden = layer(hidden, attention_mask=mask, position_embeddings=(cos, sin), past_key_values=caught, use_cache=True)
    return hidden, caught.keys, caught.values


def layers_on_prompts(
    layers: list[nn.Module], hidden: Tensor, cos: Tensor, sin: Tensor, valid: Tensor | None
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Hidden states behind the last layer and before it, and keys and values of every layer.

    Args:
        valid: [B, P] bool, False in the padding on the left; None where there is none.
    """
    mask = None if valid is None else decoder.causal_mask(valid, hidden.shape[1], hidden.dtype, False)
    keys, values = [], []
    for layer in layers:
        entered = hidden
        hidden, own, held = layer_on_prompts(layer, entered, mask, cos, sin)
        keys.append(own)
        values.append(held)
    return hidden, entered, keys, values


class CompiledLayers(Graphs):
    """Takes the place of `decoder.run_segment`.

    Args:
        llm: layers (a LlamaModel), whole on one device.
    """

    def __init__(self, llm: Any, backend: Backend = "inductor"):
        super().__init__("prefill", layers_on_prompts, llm, backend)

    def __call__(
        self, llm: Any, sequence: Sequence, layers: range, rotary: tuple[Tensor, Tensor], cache: DynamicCache
    ) -> tuple[Tensor, Tensor]:
        """`decoder.run_segment`: hidden states [B, L, D] behind the last of some layers, and as they entered it."""
        rows, length = sequence.hidden.shape[:2]
        width = -(-length // COLUMNS) * COLUMNS
        if not self.should_compile((rows, width, layers, sequence.padded), rows):
            return decoder.run_segment(llm, sequence, layers, rotary, cache)
        behind = 0, 0, 0, width - length
        hidden, entered, keys, values = self.run(
            [llm.layers[index] for index in layers],
            F.pad(sequence.hidden, behind),
            *(F.pad(angles, behind) for angles in rotary),
            # The columns behind are told to be real, so that no row is without a column to see.
            F.pad(sequence.valid(), behind[2:], value=True) if sequence.padded else None,
        )
        for index, own, held in zip(layers, keys, values, strict=True):
            cache.update(own[:, :, :length], held[:, :, :length], index)
        return hidden[:, :length], entered[:, :length]


# -- decoding ------------------------------------------------------------------------------------------------------


@dataclass
class FixedSegment:
    """`decoder.Segment` in keys and values of R columns.

    Attributes:
        layers: how many.
        length: columns so far.
        place: [1] int64, the column that the next token takes.
        position: [B, 1] or [B, 1, 3], position id of the next token.
        valid: [B, R] bool, False in the padding.
    """

    layers: int
    length: int
    place: Tensor
    position: Tensor
    valid: Tensor


@dataclass
class FixedCache:
    """The cache of a batch in tensors whose sizes stay; their columns may differ between segments.

    Attributes:
        keys, values: per layer [B, Hkv, R, d].
    """

    keys: list[Tensor]
    values: list[Tensor]
    segments: list[FixedSegment]

    @classmethod
    def of(cls, state: Prefilled) -> "FixedCache":
        """A copy of the cache after a prefill."""
        fixed = cls([], [], [])
        held: list[Any] = state.cache.layers
        for segment in state.segments:
            layers = [held[index] for index in segment.layers]
            length, device = layers[0].get_seq_length(), layers[0].keys.device
            columns = capacity(length)
            fixed.keys += [with_columns(layer.keys, columns) for layer in layers]
            fixed.values += [with_columns(layer.values, columns) for layer in layers]
            valid = torch.ones(len(state.hidden), columns, dtype=torch.bool, device=device)
            if segment.valid is not None:
                valid[:, :length] = segment.valid
            place, position = torch.tensor([length], device=device), segment.next_position.clone()
            fixed.segments.append(FixedSegment(len(layers), length, place, position, valid))
        return fixed

    def enlarge_where_full(self) -> None:
        """Twice as many columns where one has none left: each size needs a graph, so they do not grow by blocks."""
        if all(segment.length < segment.valid.shape[1] for segment in self.segments):
            return
        self.keys = [with_columns(keys, 2 * keys.shape[2]) for keys in self.keys]
        self.values = [with_columns(values, 2 * values.shape[2]) for values in self.values]
        for segment in self.segments:
            segment.valid = torch.cat([segment.valid, torch.ones_like(segment.valid)], 1)

    def advance(self) -> None:
        """One token was written."""
        for segment in self.segments:
            segment.length += 1
            segment.place += 1
            segment.position += 1


def capacity(length: int) -> int:
    """Columns that hold `length` tokens and more."""
    return CAPACITY * (length // CAPACITY + 1)


def with_columns(tensor: Tensor, columns: int) -> Tensor:
    """A copy of [B, H, L, d] in [B, H, columns, d], zero behind."""
    # Not empty: what is hidden by the mask is still multiplied, by zero, and NaN times zero is NaN.
    larger = tensor.new_zeros(*tensor.shape[:2], columns, tensor.shape[3])
    larger[:, :, : tensor.shape[2]] = tensor
    torch._dynamo.mark_static_address(larger)  # lets a captured graph write into it
    return larger


class OneColumn:
    """The cache that a layer sees while the graph is traced: it writes one column and shows all of them."""

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
    cache = OneColumn(keys, values, place)
    after: Tensor = layer(
        hidden, attention_mask=mask, position_embeddings=(cos, sin), past_key_values=cache, use_cache=True
    )
    return after


class CompiledStep(Graphs):
    """Takes the place of `decoder.step`.

    Args:
        llm: layers and rotary_emb (a LlamaModel), whole on one device.
    """

    def __init__(self, llm: Any, backend: Backend = "inductor"):
        super().__init__("decoding", self._on_token, llm, backend)
        self.llm = llm

    def __call__(self, llm: Any, state: Prefilled, token: Tensor) -> Tensor:
        """`decoder.step`: one embedded token per sample, [B, 1, D] -> [B, 1, D] before the final norm."""
        # A batch that `decoder.step` has begun is ended by it: its cache is not of fixed size.
        if state.fixed is None and not state.steps:
            held: list[Any] = state.cache.layers
            lengths = [held[segment.layers[0]].get_seq_length() for segment in state.segments]
            columns = tuple((len(one.layers), capacity(n)) for one, n in zip(state.segments, lengths, strict=True))
            if self.should_compile((len(state.hidden), columns), len(state.hidden)):
                state.fixed = FixedCache.of(state)
        if state.fixed is None:
            return decoder.step(llm, state, token)
        fixed = state.fixed
        fixed.enlarge_where_full()
        parts = [(one.layers, one.place, one.position, one.valid) for one in fixed.segments]
        hidden: Tensor = self.run(token, fixed.keys, fixed.values, parts)
        fixed.advance()
        return hidden

    def _on_token(
        self,
        token: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
        segments: list[tuple[int, Tensor, Tensor, Tensor]],
    ) -> Tensor:
        hidden, done = token, 0
        for count, place, position, valid in segments:
            cos, sin = rotary_angles(self.llm, token, position)
            mask = (valid & (torch.arange(valid.shape[1], device=valid.device) <= place))[:, None, None]
            for index in range(done, done + count):
                layer = self.llm.layers[index]
                hidden = layer_on_token(layer, hidden, mask, cos, sin, keys[index], values[index], place)
            done += count
        return hidden


# -- the model -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compiled:
    """The compiled parts of a model.

    Attributes:
        tower: in place of `clip_encoder.run_blocks`; None for a tower of another kind.
        layers: in place of `decoder.run_segment`.
        step: in place of `decoder.step`.
    """

    tower: CompiledTower | None
    layers: CompiledLayers
    step: CompiledStep

    @property
    def by_stage(self) -> dict[str, float]:
        """Seconds of `Timing` that compiling has taken so far, by the wall clock."""
        tower = 0.0 if self.tower is None else self.tower.seconds
        return {"vision": tower, "prefill": self.layers.seconds, "decode": self.step.seconds}

    @property
    def seconds(self) -> float:
        """The same of all stages together."""
        return sum(self.by_stage.values())


def compile_model(model: Any, backend: Backend = "inductor") -> Compiled:
    """What goes to `model.compiled`; each graph is compiled when its shape first comes.

    Args:
        model: a Llava.
        backend: of torch.compile.

    Raises:
        UserError: the decoder's attention is eager, or its weights are spread over ranks.
    """
    llm = model.llm
    if llm.config._attn_implementation == "eager":
        raise UserError("--compile needs attention by the kernel (sdpa), but this model is set to eager.")
    if getattr(llm, "ranks", 1) > 1 or any(hasattr(weight, "ds_id") for weight in llm.parameters()):
        raise UserError("--compile needs the decoder whole on one device; leave --tensor-parallel and --zero out.")
    common = hasattr(model.tower, "encoder")  # Qwen's has blocks of its own kind
    if not common:
        log.warning("--compile: the vision tower of %s is not compiled; prefill and decoding are.", model.name)
    tower = CompiledTower(model.tower, backend) if common else None
    return Compiled(tower, CompiledLayers(llm, backend), CompiledStep(llm, backend))
