"""Count what one prefill asks of the device: dispatched operations and waits of the host, beside the oracle's.

    python -m eval.efficiency.dispatched consensusdrop 64
    python -m eval.efficiency.dispatched all 64

On a GPU a short prefill is bound by the host: every dispatched operation costs it microseconds, and at every wait it
stands still until the device has caught up. Counted is one question about one image of the bundled toy model, from
prepared pixels to the first token, after one warm-up.

* An operation is one call of an ATen function (`aten::...`), as in inference; a kernel is one that is no view.
* Both are also given as what is over the oracle with the budget in every layer (flat), and over the one with the same
  tokens in every layer as the method (same).
* A wait is a value that the host reads (`item`, `tolist`, `bool`, `cpu`, `numpy`), a shape that depends on values
  (`nonzero`, a boolean mask as index), or a copy from the host that blocks. Waits are seen only where the host and the
  device are two: on a GPU, or on the "meta" device, which computes shapes alone and needs no hardware.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from eval.command import exit_on_user_error, make_parser, value
from eval.config import ROOT, count
from eval.efficiency.latency.methods import reducers_of
from eval.efficiency.oracle import flat_oracle, oracle_of
from llava.model.builder import load
from llava.model.llava_arch import Llava
from llava.pipeline.accounting import Timer
from llava.pipeline.prefill import prefill
from llava.processing.sample import Sample
from llava.reduction.crop_budget import planned
from llava.reduction.reducer import Reducer

PARTS = ("vision", "selection", "prefill")
# The host reads values. (`cpu` and `tolist` are dispatched as a copy to the host.)
READS = {"item", "numpy", "__bool__", "__int__", "__float__", "__index__", "__contains__", "__array__"}
# The size of the result depends on values.
SIZES = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount"}


@dataclass(frozen=True)
class Call:
    """One dispatched operation, or one wait.

    Attributes:
        part: "vision", "selection" or "prefill".
        line: the innermost line of the project that called it, as "folder/file.py:12 function".
        name: of the ATen operation, or of the Python function that waits.
        kernel: it is no view, so it launches a kernel.
        waits: the host waits for the device here.
    """

    part: str
    line: str
    name: str
    kernel: bool = False
    waits: bool = False


@dataclass
class Calls(TorchDispatchMode):
    """Collects the operations that are dispatched while it is active; `mark` ends a part, as that of a Timer."""

    found: list[Call] = field(default_factory=list)
    _open: list[tuple[str, str, bool, bool]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def mark(self, part: str) -> None:
        self.found += [Call(part, *call) for call in self._open]
        self._open.clear()

    def note(self, name: str, kernel: bool = False, waits: bool = False) -> None:
        self._open.append((source_line(sys._getframe(2)), name, kernel, waits))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kernel = function.overloadpacket.__name__, not function.is_view
        if _sized_by_values(name, args) or _copied_to_host(args, kwargs or {}):
            self.note(name, kernel, waits=True)  # before the call, which fails where there are no values
            return function(*args, **(kwargs or {}))
        out = function(*args, **(kwargs or {}))
        self.note(name, kernel, _copies(args, out) and not (kwargs or {}).get("non_blocking"))
        return out


class Reads(TorchFunctionMode):
    """Notes the Python calls by which the host reads values of a tensor, or sends a list to the device."""

    def __init__(self, calls: Calls):
        super().__init__()
        self.calls = calls

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if _reads(name, args) or _sends_list(name, args, kwargs or {}):
            self.calls.note(name, waits=True)
        return function(*args, **(kwargs or {}))


def _reads(name: str, args: Sequence[Any]) -> bool:
    """Whether the host reads values of a tensor on the device."""
    return name in READS and bool(args) and _on_device(args[0])


def _on_device(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type != "cpu"


def _sends_list(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a list of the host is copied to the device: as new tensor there, or as index. Such a copy blocks."""
    if name in ("tensor", "as_tensor"):
        return torch.device(kwargs.get("device") or "cpu").type != "cpu" and bool(args) and args[0] != []
    if name not in ("__getitem__", "__setitem__"):
        return False
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    return _on_device(args[0]) and any(isinstance(one, list) for one in index)


def _copied_to_host(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    device = kwargs.get("device")
    return device is not None and torch.device(device).type == "cpu" and bool(args) and _on_device(args[0])


def _copies(args: Iterable[Any], out: Any) -> bool:
    """Whether a tensor of the host goes into an operation with a result on the device; scalars are passed free."""
    if not _on_device(out):
        return False
    listed = [one for arg in args for one in (arg if isinstance(arg, list | tuple) else [arg])]
    return any(isinstance(one, Tensor) and one.device.type == "cpu" and one.dim() for one in listed)


def _sized_by_values(name: str, args: Sequence[Any]) -> bool:
    """Whether the shape of the result depends on values on the device, such as the number of true ones in a mask."""
    if not args or not _on_device(args[0]):
        return False
    masked = name == "index" and any(isinstance(one, Tensor) and one.dtype == torch.bool for one in args[1])
    return masked or name in SIZES


def source_line(frame: FrameType | None) -> str:
    """The innermost line of the project above `frame`, without the files of this counter and of its commands."""
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(f"{ROOT}/") and "/site-packages/" not in file and file != __file__:
            return f"{file.removeprefix(f'{ROOT}/')}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return ""


@torch.inference_mode()
def calls_of(model: Llava, reducer: Reducer, samples: list[Sample]) -> list[Call]:
    """Operations and waits of one prefill of a batch up to the choice of the first token.

    Preprocessing, which no device takes part in, is left out. Tensors that depend on sizes alone are there after a
    first prefill (llava/cached_tensors.py).
    """
    first_token(model, reducer, samples, Timer(model.device))
    calls = Calls()
    with Reads(calls), calls:
        first_token(model, reducer, samples, MarkedTimer(model.device, calls))
    return [call for call in calls.found if call.part in PARTS]


def first_token(model: Llava, reducer: Reducer, samples: list[Sample], timer: Timer) -> None:
    state, _ = prefill(model, samples, reducer, timer)
    model.logits(state.hidden).argmax(-1)
    timer.mark("prefill")


class MarkedTimer(Timer):
    """A timer whose marks also say to which part the operations belong."""

    def __init__(self, device: torch.device, calls: Calls):
        super().__init__(device)
        self.calls = calls

    def mark(self, stage: str) -> None:
        super().mark(stage)
        self.calls.mark(stage)


def waits_of(model: Llava, reducer: Reducer, samples: list[Sample]) -> list[Call]:
    """Waits of one prefill between the copy of the pixels to the device and the choice of the first token.

    Args:
        model: on a GPU, or without weights on the "meta" device (`on_meta`), where the first value that the host reads
            ends the prefill: then the waits up to that one are returned.
    """
    _waits(model, reducer, samples)  # a text tower is read from its files at the first time
    waits = [call for call in _waits(model, reducer, samples) if call.part != "preprocess"]
    pixels = bool(waits) and waits[0].line.endswith(" encode_images")
    return waits[pixels:]


def _waits(model: Llava, reducer: Reducer, samples: list[Sample]) -> list[Call]:
    calls = Calls()
    try:
        with torch.inference_mode(), Reads(calls), calls:
            first_token(model, reducer, samples, MarkedTimer(model.device, calls))
    except (NotImplementedError, RuntimeError, TypeError):
        calls.mark("unfinished")
        if not any(call.waits for call in calls.found if call.part == "unfinished"):
            raise  # another error
    return [call for call in calls.found if call.waits]


def on_meta(model: Llava) -> Llava:
    """The model without its weights, on the device that computes shapes alone; the given one is gone."""
    model.hf_model.to("meta")
    model.device = torch.device("meta")
    return model


def question() -> list[Sample]:
    """One question about one image of noise.

    In a picture of one colour patches differ by rounding alone, and SCOPE's loop dispatches operations per near tie: 41
    or 47 in all, depending on the processor.
    """
    noise = np.random.default_rng(0).integers(0, 256, (336, 336, 3), dtype=np.uint8)
    return [Sample("q", "What color is the square?", "Answer with one word.", Image.fromarray(noise))]


@dataclass(frozen=True)
class Beside:
    """Operations of a method, and of its oracles.

    Attributes:
        calls: of the method.
        flat: of the oracle with the budget in every layer.
        same: of the oracle with the method's own tokens per layer; None where these depend on the image.
        waits: of the host.
    """

    calls: list[Call]
    flat: list[Call]
    same: list[Call] | None
    waits: list[Call]

    def cells(self) -> list[int | str]:
        """One line of the table, in the order of HEAD."""
        parts = Counter(call.part for call in self.calls)
        cells: list[int | str] = [len(self.calls), kernels(self.calls), *(parts[part] for part in PARTS)]
        for oracle in (self.flat, self.same):
            if oracle is None:
                cells += ["-", "-"]
            else:
                cells += [f"{len(self.calls) - len(oracle):+d}", f"{kernels(self.calls) - kernels(oracle):+d}"]
        return [*cells, len(self.waits)]


HEAD = (
    *("operations", "kernels", *PARTS),
    *("over flat", "kernels over flat", "over same", "kernels over same", "waits"),
)


def kernels(calls: Iterable[Call]) -> int:
    """How many of the operations launch a kernel."""
    return sum(call.kernel for call in calls)


def line_of(name: str, cells: Iterable[object]) -> str:
    """A name and its cells, each below its title in HEAD."""
    return f"{name:16}" + "".join(f"{cell:>{max(11, len(title) + 2)}}" for title, cell in zip(HEAD, cells, strict=True))


def beside_oracles(model: Llava, shapes: Llava, reducer: Reducer, samples: list[Sample]) -> Beside:
    """Count one prefill of a method and of its oracles.

    Args:
        shapes: the same model on the "meta" device.
    """
    flat, same = calls_of(model, flat_oracle(reducer.budget), samples), None
    if planned(reducer, model.spec) is not None:
        same = calls_of(model, oracle_of(reducer, model.spec), samples)
    return Beside(calls_of(model, reducer, samples), flat, same, waits_of(shapes, reducer, samples))


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = make_parser("eval.efficiency.dispatched", __doc__)
    parser.add_argument("method", help="a name, several separated by commas, or all")
    parser.add_argument("budget", type=value(count), help="visual tokens to keep")
    parser.add_argument("--list", action="store_true", help="also list the operations by part and line, and the waits")
    args = parser.parse_args(arguments)
    model, shapes = load(device="cpu"), on_meta(load(device="cpu"))
    print(line_of("", HEAD))
    for name, reducer in reducers_of(args.method.split(","), args.budget, {}, model).items():
        found = beside_oracles(model, shapes, reducer, question())
        print(line_of(name, found.cells()))
        if args.list:
            for (part, line), number in Counter((call.part, call.line) for call in found.calls).items():
                print(f"  {number:4} {part:10} {line}")
            for call in found.waits:
                print(f"  wait {call.part:10} {call.line} ({call.name})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
