"""What one prefill computes and holds, counted once: nothing here depends on the speed of a machine."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from eval.efficiency.dispatched import READS, calls_of, kernels
from eval.efficiency.latency.noted import Noted
from llava.model.llava_arch import Llava
from llava.pipeline.prefill import prefill
from llava.processing.sample import Sample
from llava.reduction.reducer import Reducer


@dataclass(frozen=True)
class Computed:
    """What one batch computes and holds up to the choice of the first token.

    Attributes:
        flops: floating point operations of all matrix products that were dispatched.
        formula: the same from the closed formula (llava/reduction/flops.py) at the counted tokens.
        tokens_per_layer: visual tokens that enter each decoder layer, of the first question.
        kv_bytes_per_layer: of the batch, read from the cache's tensors after the prefill.
        largest: elements of the largest tensor that an operation made.
    """

    flops: int
    formula: int
    tokens_per_layer: tuple[int, ...]
    kv_bytes_per_layer: tuple[int, ...]
    largest: int


@dataclass(frozen=True)
class Counts(Computed):
    """The same, and what the host asks of the device.

    Attributes:
        operations: ATen operations that were dispatched, views included, on the measured model.
        kernels: those that are no views.
        waits: how often the host waited for the device; None where it was counted on a CPU, on which nothing waits.
    """

    operations: int
    kernels: int
    waits: int | None


def flash_on_cpu(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Operations of the CPU's fused attention, which torch's counter does not know; arguments are shapes."""
    return sdpa_flop_count(query, key, value)


def flop_counter() -> FlopCounterMode:
    """Counts the matrix products that are dispatched, fused attention on a CPU included."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={kernel: flash_on_cpu})


def count(model: Llava, reducer: Reducer, samples: list[Sample], shapes: Llava | None = None) -> Counts:
    """Count one prefill of a batch.

    Operations are counted on `model`: a greedy choice is a loop of hundreds of them on the meta device and on a GPU,
    and arrays of numpy on a CPU (llava/reduction/greedy/).

    Args:
        shapes: the same model on the meta device, which computes shapes alone and counts products and bytes in seconds,
            and the waits of a model on a CPU; of methods that read values products and bytes are counted on `model`.
    """
    asked = calls_of(model, reducer, samples)
    waiting, found = None if model.device.type == "cpu" else asked, None
    if shapes is not None:
        try:
            found = computed(shapes, reducer, samples)
            waiting = waiting or calls_of(shapes, reducer, samples)
        except RuntimeError:  # "Cannot copy out of meta tensor": the method reads values
            found = None
    return Counts(
        **vars(found or computed(model, reducer, samples)),
        operations=sum(call.name not in READS for call in asked),
        kernels=kernels(asked),
        waits=None if waiting is None else sum(call.waits for call in waiting),
    )


@torch.inference_mode()
def computed(model: Llava, reducer: Reducer, samples: list[Sample]) -> Computed:
    """What one prefill computes and holds, by the operations that are dispatched."""
    if reducer.needs_text_tower:
        _ = model.clip  # read when it is first asked for, which is no part of a prefill
    noted, counter = Noted(), flop_counter()
    with counter, noted:
        state, record = prefill(model, samples, reducer)
        model.logits(state.hidden).argmax(-1)
    layers: list[Any] = state.cache.layers
    return Computed(
        flops=counter.get_total_flops(),
        formula=record.operations.total,
        tokens_per_layer=tuple(layer[0] for layer in state.visual),
        kv_bytes_per_layer=tuple(layer.keys.nbytes + layer.values.nbytes for layer in layers),
        largest=noted.largest,
    )
