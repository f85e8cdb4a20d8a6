"""A loop of many small operations as one CUDA graph: one launch in place of hundreds, with the same kernels.

Not run on a GPU yet: the tests replace the recording by one that works on the CPU.
"""

from collections import OrderedDict
from collections.abc import Callable
from threading import Lock
from typing import Any, Protocol

import torch
from torch import Tensor

Loop = Callable[..., Tensor]
# Graphs kept at the most. Each holds its inputs and temporaries; the images of a run have one or a few shapes.
GRAPHS = 8


class Recorded(Protocol):
    """A loop that was recorded for inputs of one shape."""

    def replay(self, *inputs: Tensor) -> Tensor: ...


class CudaGraph:
    """A loop in a CUDA graph, whose inputs and output stay at fixed addresses."""

    def __init__(self, loop: Loop, inputs: tuple[Tensor, ...], sizes: dict[str, int]):
        self.inputs = [given.clone(memory_format=torch.contiguous_format) for given in inputs]
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = loop(*self.inputs, **sizes)

    def replay(self, *inputs: Tensor) -> Tensor:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.output.clone()


def can_record(device: torch.device) -> bool:
    """Whether a graph can be recorded now: on a GPU, outside of any other recording."""
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


class Graphs:
    """Runs loops, and records those that come again with the same shapes.

    The first run of a shape is a plain one, which also warms up. Where a loop cannot be recorded, all runs are plain.

    Attributes:
        record: makes a recorded loop, and raises RuntimeError where that is impossible.
        possible: whether to try it on a device.
    """

    def __init__(
        self,
        record: Callable[[Loop, tuple[Tensor, ...], dict[str, int]], Recorded] = CudaGraph,
        possible: Callable[[torch.device], bool] = can_record,
    ):
        self.record, self.possible = record, possible
        self.known: OrderedDict[Any, Recorded | None] = OrderedDict()
        self.impossible: set[Loop] = set()
        self._lock = Lock()  # inputs are copied and the graph is launched by one thread at a time

    def run(self, loop: Loop, *inputs: Tensor, **sizes: int) -> Tensor:
        """loop(*inputs, **sizes).

        Args:
            loop: a function of this package that keeps no state and never waits for the device.
        """
        device = inputs[0].device
        if not self.possible(device) or loop in self.impossible:
            return loop(*inputs, **sizes)
        shapes = tuple((given.shape, given.dtype) for given in inputs)
        key = (loop, device, stream_of(device), shapes, tuple(sizes.items()))
        # Tensors of inference mode could not be written to outside of it, where the graph may be replayed next.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if key not in self.known:
                self.known[key] = None
                if len(self.known) > GRAPHS:
                    self.known.popitem(last=False)
                return loop(*inputs, **sizes)
            self.known.move_to_end(key)
            graph = self.known[key]
            if graph is None:
                try:
                    graph = self.known[key] = self.record(loop, inputs, sizes)
                except RuntimeError:
                    self.impossible.add(loop)
                    return loop(*inputs, **sizes)
            return graph.replay(*inputs)


def stream_of(device: torch.device) -> int:
    """The stream that the caller's kernels go to: a graph's tensors must not be used by two at once."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


run = Graphs().run
