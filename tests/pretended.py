"""A pretended accelerator: tensors whose values are real and on the host, but which say `cuda:N` and are as strict.

Inside `with pretended("cuda:1") as device:` torch believes in two CUDA devices. Everything is computed by the host, so
results can be compared with those of the CPU bit for bit, but

* an operation on tensors of two devices is an error, as it is on a GPU (0-d tensors of the host may mix),
* a device without a number is the current one, number 0,
* whatever makes the host wait for the device is noted with the project's line: reading a value, a shape that depends
  on values, a copy from ordinary memory that is not `non_blocking`, an index that is a list or a tensor of the host.

What it cannot show: memory, speed, the order of additions in a kernel, and kernels that take other types or shapes.
"""

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

ROOT = Path(__file__).resolve().parents[1]
CURRENT = 0  # number of the current device
# Operations whose result has a size that only its values tell.
SIZED = {"nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount"}
READS = {"_local_scalar_dense", "is_nonzero", "equal", "multinomial"}
INDEXED = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"}
COPIES = {"_to_copy", "copy_"}
# Operations that add floating numbers in no fixed order on CUDA, or choose one of equal numbers by chance: from
# torch.use_deterministic_algorithms, forward passes alone. An integer sum has one value.
UNORDERED = {
    "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_", "index_add", "index_add_", "index_reduce",
    "index_reduce_", "cumsum", "cumsum_", "put", "put_", "bincount", "histc", "kthvalue", "median", "nanmedian", "mode",
    "index_put", "index_put_", "_index_put_impl_",
}  # fmt: skip


class MixedDevicesError(RuntimeError):
    """Tensors of two devices met in one operation."""


class OnDevice(Tensor):
    """A tensor of the pretended device. For torch's C++ code it is on `meta`, which every build has.

    Attributes:
        value: the same numbers on the host.
        place: the device that it says to be on.
    """

    value: Tensor
    place: torch.device
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, value: Tensor, place: torch.device) -> "OnDevice":
        made = Tensor._make_wrapper_subclass(
            cls, value.shape, strides=value.stride(), storage_offset=value.storage_offset(), dtype=value.dtype,
            device="meta",
        )  # fmt: skip
        made.value, made.place = value, place
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert ACTIVE, "a tensor of the pretended device is used outside `with pretended(...)`"
        return ACTIVE[-1].compute(func, args, kwargs or {})

    device = property(lambda self: self.place)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    is_meta = property(lambda self: False)

    def get_device(self) -> int:
        return self.place.index

    def data_ptr(self) -> int:
        return self.value.data_ptr()

    def tolist(self) -> Any:
        ACTIVE[-1].wait("tolist")
        return self.value.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {self.place} device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    def __repr__(self) -> str:
        return f"OnDevice({tuple(self.shape)}, {self.dtype}, {self.place})"


def value_of(tree: Any) -> Any:
    """The host's tensors in place of the device's."""
    return tree_map(lambda leaf: leaf.value if isinstance(leaf, OnDevice) else leaf, tree)


def where() -> str:
    """The nearest line of the project, and its function."""
    frame = sys._getframe(1)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file != Path(__file__) and file.is_relative_to(ROOT) and "site-packages" not in file.parts:
            return f"{file.relative_to(ROOT)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "no line of the project"


class Device(TorchDispatchMode):
    """What happens on the pretended devices.

    Attributes:
        waits: what made the host wait, each with its line.
        unordered: operations whose floating result depends on the order of additions, each with its line.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.unordered: list[str] = []
        self.meant: list[torch.device | None] = []  # by C++ code that asks for `meta`, the device of its arguments

    def wait(self, what: str) -> None:
        self.waits.append(f"{what} at {where()}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.compute(func, args, kwargs or {})

    def compute(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an operation on the host's values, and put its results where a device would."""
        if func._can_decompose():  # a composite one arrives whole in inference mode
            with self:
                return func.decompose(*args, **kwargs)
        name = func.overloadpacket.__name__
        given = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        asked = None if kwargs.get("device") is None else on(kwargs["device"])
        if asked is not None and asked.type == "meta" and self.meant and self.meant[-1] is not None:
            asked = self.meant[-1]
        if name in COPIES:
            place = self._copied(name, args, kwargs, asked)
        else:
            place = self._place(func, given)
            self._note_waits(func, args, kwargs, place)
            if name in UNORDERED and place is not None and place.type == "cuda" and args[0].is_floating_point():
                kept = name.startswith(("index_put", "_index_put")) and not any(arg is True for arg in args[3:4])
                if not kept and not {"amin", "amax"} & {arg for arg in args if isinstance(arg, str)}:
                    self.unordered.append(f"{name} at {where()}")
            place = asked or place
        if asked is not None and asked.type == "cuda":
            kwargs = {**kwargs, "device": torch.device("cpu")}
        kwargs.pop("pin_memory", None)
        with _disable_current_modes():
            result = func(*value_of(args), **value_of(kwargs))
        known = {id(one.value): one for one in given if isinstance(one, OnDevice)}  # written in place

        def placed(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or place is None or place.type != "cuda":
                return leaf
            return known[id(leaf)] if id(leaf) in known else OnDevice(leaf, place)

        return tree_map(placed, result)

    def _copied(self, name: str, args: Any, kwargs: dict[str, Any], asked: torch.device | None) -> torch.device | None:
        """The place of a copy's result; copies between the host and the device may wait."""
        source = args[1] if name == "copy_" else args[0]
        before = source.device
        after = args[0].device if name == "copy_" else asked or before
        blocks = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
        if before.type == "cuda" and after.type == "cpu":
            self.wait(f"copy to the host of {tuple(source.shape)}")
        elif before.type == "cpu" and after.type == "cuda" and blocks and source.numel():
            self.wait(f"blocking copy to the device of {tuple(source.shape)} {source.dtype}")
        return after

    def _place(self, func: Any, given: list[Tensor]) -> torch.device | None:
        """The one device of the tensors; 0-d tensors follow the others."""
        places = {one.device for one in given if one.dim()} or {one.device for one in given}
        name = func.overloadpacket.__name__
        if name in INDEXED:  # indices of the host are copied, and waited for
            places -= {torch.device("cpu")} if any(place.type == "cuda" for place in places) else set()
        if len(places) > 1:
            raise MixedDevicesError(f"{func} got tensors on {', '.join(sorted(map(str, places)))} at {where()}")
        return next(iter(places), None)

    def _note_waits(self, func: Any, args: Any, kwargs: dict[str, Any], place: torch.device | None) -> None:
        name = func.overloadpacket.__name__
        if place is None or place.type != "cuda":
            return
        if name in SIZED | READS:
            self.wait(name)
        if name == "repeat_interleave" and kwargs.get("output_size") is None and func._overloadname == "Tensor":
            self.wait("repeat_interleave without output_size")
        if name in INDEXED:
            indices = [one for one in args[1] if isinstance(one, Tensor)]
            if any(one.device.type == "cpu" for one in indices):
                self.wait(f"{name} by a tensor of the host")
            # A mask with one value to write needs no count of its places; everything else does.
            counted = "put" not in name or args[2].dim() > 0
            if counted and any(one.dtype in (torch.bool, torch.uint8) for one in indices):
                self.wait(f"{name} by a mask")


class Calls(TorchFunctionMode):
    """What torch decides in Python or C++ before an operation reaches `Device`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name, device = dict(kwargs or {}), getattr(func, "__name__", ""), ACTIVE[-1]
        if kwargs.get("device") is not None:
            kwargs["device"] = on(kwargs["device"])
        tensors = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, Tensor)]
        if name in ("arange", "tensor") and any(isinstance(one, OnDevice) for one in tensors):
            device.wait(f"{name} of values of the device")
            args = value_of(args)
        if name in ("tensor", "as_tensor", "new_tensor", "from_numpy") and "cuda" in str(kwargs.get("device", "")):
            made = torch.tensor(args[-1], dtype=kwargs.get("dtype"))
            return made.to(kwargs["device"])
        if name in ("to", "cuda", "type_as") and args[1:] and isinstance(args[1], Tensor):
            return args[0].to(args[1].device, args[1].dtype)
        if name == "to" and args[1:] and isinstance(args[1], str | torch.device):
            args = (args[0], on(args[1]), *args[2:])
        if name in ("__getitem__", "__setitem__") and isinstance(args[0], OnDevice):
            parts = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(part, list) for part in parts):
                device.wait(f"{name} by a list")
                lists = (torch.tensor(one) if isinstance(one, list) else one for one in parts)
                args = (args[0], tuple(lists), *args[2:])
        if name == "scaled_dot_product_attention" and any(isinstance(one, OnDevice) for one in tensors):
            place = device._place(torch.ops.aten.scaled_dot_product_attention.default, tensors)
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                result = func(*value_of(args), **value_of(kwargs))
            assert place is not None
            return OnDevice(result, place)
        device.meant.append(next((one.place for one in tensors if isinstance(one, OnDevice)), None))
        try:
            return func(*args, **kwargs)
        finally:
            device.meant.pop()


def on(device: Any) -> torch.device:
    """The device that torch would take: without a number, the current one."""
    found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return torch.device("cuda", CURRENT) if found.type == "cuda" and found.index is None else found


def no_grad(self: Any) -> None:
    """Inference mode as `no_grad`: torch refuses views of wrapped tensors in it."""
    self.before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)


def grad_again(self: Any, *_: Any) -> None:
    torch.set_grad_enabled(self.before)


ACTIVE: list[Device] = []


class Event:
    """A mark in the work of a stream; reading the time between two waits for them."""

    def __init__(self, **_: Any):
        self.at = 0.0

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        ACTIVE[-1].wait("event.synchronize")

    def elapsed_time(self, other: "Event") -> float:
        return 1000 * (other.at - self.at)


@contextlib.contextmanager
def pretended() -> Iterator[Device]:
    """Two CUDA devices, of which number 0 is the current one."""
    device = Device()
    stream = SimpleNamespace(synchronize=lambda: device.wait("stream.synchronize"))
    fakes = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 2,
        "current_device": lambda: CURRENT,
        "current_stream": lambda place=None: stream,
        "synchronize": lambda place=None: ACTIVE[-1].wait("cuda.synchronize"),
        "empty_cache": lambda: None,
        "mem_get_info": lambda place=None: (78 << 30, 80 << 30),
        "memory_allocated": lambda place=None: 0,
        "max_memory_allocated": lambda place=None: 0,
        "reset_peak_memory_stats": lambda place=None: None,
        "get_device_name": lambda place=None: "Pretended GPU",
        "get_device_capability": lambda place=None: (9, 0),
        "Event": Event,
        "_lazy_init": lambda: None,
    }
    ACTIVE.append(device)
    try:
        with (
            patch.multiple(torch.cuda, **fakes),
            patch.object(torch.inference_mode, "__enter__", no_grad),
            patch.object(torch.inference_mode, "__exit__", grad_again),
            Calls(),
            device,
        ):
            yield device
    finally:
        ACTIVE.pop()
