"""Count what one prefill computes, holds and asks of the device. No count depends on the speed of a machine.

On a GPU the host limits a short prefill: each dispatched operation costs it microseconds, and at each synchronisation
it waits until the device has caught up. The counts cover everything from prepared pixels to the first token, after one
warm-up.

* An operation is one call of an ATen function (`aten::...`) in inference mode. It launches a kernel unless it is a
  view.
* The host synchronises when it reads a value (`item`, `tolist`, `bool`, `cpu`, `numpy`), when a shape depends on values
  (`nonzero`, a boolean mask as index), or when it waits for a copy to the device. This can be seen only if host and
  device differ: on a GPU, or on the "meta" device, which computes shapes only and needs no hardware.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from llava.model.llava_arch import Llava
from llava.pipeline.accounting import Record, Timer
from llava.pipeline.decoder import Prefilled
from llava.pipeline.generate import prefill
from llava.places import PACKAGES
from llava.processing.prompt import Sample
from llava.reduction.reducer import Reducer

# Python functions with which the host reads values. (`cpu` and `tolist` are dispatched as a copy to the host.)
READS = {"item", "numpy", "equal", "__bool__", "__int__", "__float__", "__index__", "__contains__", "__array__"}
# Operations whose result has a size that depends on values.
SIZES = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount"}
# In inference mode attention is dispatched as one operation; its parts show which kernel it becomes.
ATTENTION = torch.ops.aten.scaled_dot_product_attention.default

# Operations and synchronisations


@dataclass(frozen=True)
class Call:
    """One dispatched operation, or one Python function that makes the host wait.

    Attributes:
        part: "vision", "selection" or "prefill".
        line: the innermost line of the project that called it, as "folder/file.py:12 function".
        name: of the ATen operation, or of the Python function.
        kernel: it is not a view, so it launches a kernel.
        synchronisations: the host waits for the device here.
    """

    part: str
    line: str
    name: str
    kernel: bool = False
    synchronisations: bool = False


class OperationCounter(TorchDispatchMode):
    """While active, collects the operations that are dispatched and notes which of them make the host wait.

    Attributes:
        calls: of the parts that have ended.
        attention: names of the fused attention kernels that ran; "math" if attention ran as separate products.
        largest: number of elements of the largest tensor that an operation made, views excluded.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.calls: list[Call] = []
        self.attention: set[str] = set()
        self.largest = 0
        self._part: list[tuple[str, str, bool, bool]] = []
        self._in_attention = False

    def mark(self, part: str) -> None:
        """End a part, like `Timer.mark`."""
        self.calls += [Call(part, *call) for call in self._part]
        self._part.clear()

    def note(self, name: str, kernel: bool = False, synchronisations: bool = False) -> None:
        """Add a call to the current part. Must be called by the hook of a mode, whose caller is noted as the source."""
        self._part.append((source_line(sys._getframe(2)), name, kernel, synchronisations))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, kernel = function.overloadpacket.__name__, not function.is_view
        early = waits_for_values(name, args, kwargs)
        if early and not self._in_attention:
            self.note(name, kernel, synchronisations=True)  # before the call, which fails on the meta device
        if function is ATTENTION:  # one operation of the model: its parts are watched but not counted
            self._in_attention = True
            try:
                with self:
                    out = ATTENTION.decompose(*args, **kwargs)
            finally:
                self._in_attention = False
        else:
            out = function(*args, **kwargs)
        if not early and not self._in_attention:
            self.note(name, kernel, copies_from_host(args, out) and not kwargs.get("non_blocking"))
        if "attention" in name and function is not ATTENTION and "choice" not in name:
            self.attention.add("math" if name.endswith("math") else name.strip("_"))
        if kernel:
            made = out if isinstance(out, tuple | list) else (out,)
            self.largest = max([self.largest, *(one.numel() for one in made if isinstance(one, Tensor))])
        return out


class PythonWaits(TorchFunctionMode):
    """Reports to a counter the Python calls that read values of a device's tensor or send a list to the device."""

    def __init__(self, counter: OperationCounter):
        super().__init__()
        self.counter = counter

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if waits_in_python(name, args, kwargs or {}):
            self.counter.note(name, synchronisations=True)
        return function(*args, **(kwargs or {}))


def on_device(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type != "cpu"


def waits_in_python(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a Python function reads values on the device or copies a list to it, as a new tensor or as an index.

    Such a copy blocks the host.
    """
    if name in ("tensor", "as_tensor"):
        return torch.device(kwargs.get("device") or "cpu").type != "cpu" and bool(args) and args[0] != []
    if not args or not on_device(args[0]):
        return False
    if name in ("__getitem__", "__setitem__"):
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(isinstance(one, list) for one in index)
    return name in READS


def waits_for_values(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether an operation copies to the host, or its result has a size that depends on values on the device.

    An example of the latter is an index by a boolean mask.
    """
    if name == "copy_" and not on_device(args[0]):
        return on_device(args[1])
    if not args or not on_device(args[0]):
        return False
    if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cpu":
        return True
    masked = name == "index" and any(isinstance(one, Tensor) and one.dtype == torch.bool for one in args[1])
    return masked or name in SIZES


def copies_from_host(args: Iterable[Any], out: Any) -> bool:
    """Whether an operation with a result on the device takes a tensor of the host; scalars cost nothing."""
    if not on_device(out):
        return False
    listed = [one for arg in args for one in (arg if isinstance(arg, list | tuple) else [arg])]
    return any(isinstance(one, Tensor) and one.device.type == "cpu" and one.dim() for one in listed)


def source_line(frame: FrameType | None) -> str:
    """The innermost line of the project at or above `frame`, outside this file; "" if there is none."""
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(f"{PACKAGES}/") and "/site-packages/" not in file and file != __file__:
            return f"{file.removeprefix(f'{PACKAGES}/')}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return ""


class MarkedTimer(Timer):
    """A timer that also calls a function with the name of each stage that has ended."""

    def __init__(self, device: torch.device, on_mark: Callable[[str], None]):
        super().__init__(device)
        self.on_mark = on_mark

    def mark(self, stage: str) -> None:
        super().mark(stage)
        self.on_mark(stage)


def first_token(model: Llava, reducer: Reducer, samples: list[Sample], timer: Timer) -> tuple[Prefilled, Record]:
    """Prefill a batch and choose the first token of every answer, without copying it to the host."""
    state, record = prefill(model, samples, reducer, timer)
    model.logits(state.hidden).argmax(-1)
    timer.mark("prefill")
    return state, record


@torch.inference_mode()
def calls_of(model: Llava, reducer: Reducer, samples: list[Sample]) -> list[Call]:
    """Operations and synchronisations of one prefill of a batch, up to the choice of the first token.

    Preprocessing is left out, because it runs on the host. On the "meta" device the first value that the host reads
    ends the prefill; then the calls up to that one are returned.
    """
    # The first prefill makes tensors that are kept for batches of equal sizes, and a text tower; the second is counted.
    for _ in range(2):
        counter = OperationCounter()
        try:
            with PythonWaits(counter), counter:
                first_token(model, reducer, samples, MarkedTimer(model.device, counter.mark))
        except (NotImplementedError, RuntimeError, TypeError):
            counter.mark("unfinished")
            read = any(call.synchronisations for call in counter.calls if call.part == "unfinished")
            if model.device.type != "meta" or not read:
                raise  # another error
    return [call for call in counter.calls if call.part != "preprocess"]


# One prefill in the efficiency protocol


@dataclass(frozen=True)
class Computed:
    """What one batch computes and holds up to the choice of the first token.

    Attributes:
        flops: floating point operations of all matrix products that were dispatched.
        formula: the same from the closed formula (llava/reduction/modules.py) for the counted tokens.
        tokens_per_layer: visual tokens of the first question that enter each decoder layer.
        kv_bytes_per_layer: bytes of the batch's key/value cache after the prefill, read from its tensors.
        largest: number of elements of the largest tensor that an operation made.
    """

    flops: int
    formula: int
    tokens_per_layer: tuple[int, ...]
    kv_bytes_per_layer: tuple[int, ...]
    largest: int

    @property
    def kv_bytes(self) -> int:
        return sum(self.kv_bytes_per_layer)


@dataclass(frozen=True)
class Counts(Computed):
    """Computed operations, plus dispatches and synchronisations.

    Attributes:
        operations: number of ATen operations dispatched on the measured model, views included.
        kernels: number of operations that are not views.
        synchronisations: how often the host waited for the device; None if this could only be counted on a CPU, where
            nothing waits.
    """

    operations: int
    kernels: int
    synchronisations: int | None


def count_prefill(model: Llava, reducer: Reducer, samples: list[Sample], shapes: Llava | None = None) -> Counts:
    """Count one prefill of a batch.

    Operations and kernels are always counted on `model`, because a greedy choice runs as hundreds of operations on the
    meta device and on a GPU, but in numpy on a CPU (llava/reduction/ranking.py).

    Args:
        shapes: the same model on the meta device, where matrix products and bytes are counted in seconds, and also
            the synchronisations if `model` is on a CPU. Methods that read values cannot run there; their products and
            bytes are counted on `model`.
    """
    asked = calls_of(model, reducer, samples)
    waiting, held = None if model.device.type == "cpu" else asked, None
    if shapes is not None:
        try:
            held = computed(shapes, reducer, samples)
            waiting = waiting or calls_of(shapes, reducer, samples)
        except RuntimeError:  # "Cannot copy out of meta tensor": the method reads values
            held = None
    return Counts(
        **vars(held or computed(model, reducer, samples)),
        operations=sum(call.name not in READS for call in asked),
        kernels=sum(call.kernel for call in asked),
        synchronisations=None if waiting is None else sum(call.synchronisations for call in waiting),
    )


@torch.inference_mode()
def computed(model: Llava, reducer: Reducer, samples: list[Sample]) -> Computed:
    """What one prefill computes and holds, counted from the operations that are dispatched."""
    if reducer.needs_text_tower:
        _ = model.clip  # loaded at its first use, which is not part of a prefill
    counter, products = OperationCounter(), flop_counter()
    with products, counter:
        state, record = first_token(model, reducer, samples, Timer(model.device))
    layers: list[Any] = state.cache.layers
    return Computed(
        flops=products.get_total_flops(),
        formula=record.operations.total,
        tokens_per_layer=tuple(layer[0] for layer in state.visual),
        kv_bytes_per_layer=tuple(layer.keys.nbytes + layer.values.nbytes for layer in layers),
        largest=counter.largest,
    )


def flop_counter() -> FlopCounterMode:
    """A counter of the dispatched matrix products that also knows the CPU's fused attention, unlike torch's."""

    def flash(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        flops: int = sdpa_flop_count(query, key, value)  # of shapes
        return flops

    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={kernel: flash})
