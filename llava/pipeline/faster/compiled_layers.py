"""Prefill as compiled graphs of fixed shapes: a part of the option `--compile`.

The layers between two reductions are one graph; what a method does between them is its own code. Lengths follow the
question, so prompts are padded on the right to a multiple of COLUMNS: attention is causal, and nothing behind a column
changes it. Keys, values and hidden states are cut to the real columns, so neither the cache nor a method sees padding.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from llava.pipeline import decoder
from llava.pipeline.faster.graphs import Backend, Graphs, compiled_once
from llava.pipeline.sequence import Sequence

COLUMNS = 16


class Caught:
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
    caught = Caught()
    hidden = layer(hidden, attention_mask=mask, position_embeddings=(cos, sin), past_key_values=caught, use_cache=True)
    return hidden, caught.keys, caught.values


class CompiledLayers:
    """Takes the place of `decoder.run_segment`, with torch.compile.

    Args:
        llm: layers (a LlamaModel), whole on one device.
        backend: of torch.compile.
    """

    def __init__(self, llm: nn.Module, backend: Backend = "inductor"):
        self.graphs = Graphs("prefill", layers_on_prompts, llm, backend)

    def __call__(
        self, llm: nn.Module, sequence: Sequence, layers: range, rotary: tuple[Tensor, Tensor], cache: DynamicCache
    ) -> tuple[Tensor, Tensor]:
        """`decoder.run_segment`: hidden states [B, L, D] behind the last of some layers, and as they entered it."""
        rows, length = sequence.hidden.shape[:2]
        width = -(-length // COLUMNS) * COLUMNS
        if not self.graphs.take((rows, width, layers, sequence.padded), rows):
            return decoder.run_segment(llm, sequence, layers, rotary, cache)
        behind = 0, 0, 0, width - length
        hidden, entered, keys, values = self.graphs(
            [llm.layers[index] for index in layers],
            F.pad(sequence.hidden, behind),
            *(F.pad(angles, behind) for angles in rotary),
            # The columns behind are told to be real, so that no row is without a column to see.
            F.pad(sequence.valid(), behind[2:], value=True) if sequence.padded else None,
        )
        for index, own, held in zip(layers, keys, values, strict=True):
            cache.update(own[:, :, :length], held[:, :, :length], index)
        return hidden[:, :length], entered[:, :length]


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
