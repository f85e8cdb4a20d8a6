"""What one prefill computes and holds, counted once: nothing here depends on the speed of a machine."""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from eval.efficiency.dispatched import READS, calls_of
from llava.model.llava_arch import Llava
from llava.pipeline.prefill import prefill
from llava.processing.sample import Sample
from llava.reduction.reducer import Reducer

ATTENTION = "attention"


@dataclass(frozen=True)
class Counts:
    """Of one batch up to the choice of the first token.

    Attributes:
        flops: floating point operations of all matrix products that were dispatched.
        formula: the same from the closed formula (llava/reduction/flops.py) at the counted tokens.
        operations: ATen operations that were dispatched, views included.
        waits: how often the host waited for the device.
        tokens_per_layer: visual tokens that enter each decoder layer, of the first question.
        kv_bytes_per_layer: of the batch, read from the cache's tensors after the prefill.
        attention: the fused attention kernels that ran, with the number of calls.
        largest: elements of the largest tensor that an operation made.
        images_decide: the counts were made on the measured model, because the number of tokens depends on values.
    """

    flops: int
    formula: int
    operations: int
    waits: int
    tokens_per_layer: tuple[int, ...]
    kv_bytes_per_layer: tuple[int, ...]
    attention: dict[str, int]
    largest: int
    images_decide: bool = False


class Noted(TorchDispatchMode):
    """Notes attention kernels, and the largest tensor that is made; views make none."""

    def __init__(self) -> None:
        super().__init__()
        self.attention: Counter[str] = Counter()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if ATTENTION in name:
            self.attention[name.strip("_")] += 1
        if not function.is_view:
            made = out if isinstance(out, tuple | list) else (out,)
            self.largest = max([self.largest, *(one.numel() for one in made if isinstance(one, Tensor))])
        return out


def flash_on_cpu(query, key, value, *args, out_shape=None, **kwargs) -> int:
    """Operations of the CPU's fused attention, which torch's counter does not know; arguments are shapes."""
    return sdpa_flop_count(query, key, value)


def flop_counter() -> FlopCounterMode:
    """Counts the matrix products that are dispatched, fused attention on a CPU included."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={kernel: flash_on_cpu})


def count(model: Llava, reducer: Reducer, samples: list[Sample], shapes: Llava | None = None) -> Counts:
    """Count one prefill of a batch.

    Args:
        shapes: the same model on the meta device, which computes shapes alone and counts in seconds; methods that read
            values are counted on `model`.
    """
    if shapes is not None:
        try:
            return counted(shapes, reducer, samples)
        except (NotImplementedError, RuntimeError):  # "Cannot copy out of meta tensor": the method reads values
            pass
    return counted(model, reducer, samples, shapes is not None)


@torch.inference_mode()
def counted(model: Llava, reducer: Reducer, samples: list[Sample], images_decide: bool = False) -> Counts:
    """The counts of one prefill of this model."""
    noted, counter = Noted(), flop_counter()
    with counter, noted:
        state, record = prefill(model, samples, reducer)
        model.logits(state.hidden).argmax(-1)
    held = tuple(layer.keys.nbytes + layer.values.nbytes for layer in state.cache.layers)
    calls = calls_of(model, reducer, samples)
    waits = sum(call.waits for call in calls)
    return Counts(
        flops=counter.get_total_flops(),
        formula=record.operations.total,
        operations=sum(call.name not in READS for call in calls),
        waits=waits,
        tokens_per_layer=tuple(layer[0] for layer in state.visual),
        kv_bytes_per_layer=held,
        attention=dict(noted.attention),
        largest=noted.largest,
        images_decide=images_decide,
    )
