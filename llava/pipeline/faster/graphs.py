"""Graphs of torch.compile, one for each shape and bounded in number.

A graph is a chain of equal layers. Each layer is a region that is compiled once for the whole graph, so that compiling
takes about as long for 32 layers as for one. On a GPU the whole graph is captured as a CUDA graph and replayed: its
launches are one call.
"""

import logging
import time
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from llava.errors import UserError

GRAPHS = 64  # of each part; each belongs to a batch size and a length

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
        self._run = torch.compile(
            function,
            fullgraph=True,
            dynamic=False,
            backend=backend,
            mode="reduce-overhead" if self.captured else None,
            recompile_limit=8 * self.most,  # the rooms of a decoded batch grow, and each size has a graph
            isolate_recompiles=True,
        )
        self.shapes: set[Hashable] = set()
        self.seconds = 0.0
        self._largest = 0
        self._said: set[str] = set()

    def take(self, shape: Hashable, rows: int = 0) -> bool:
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

    def __call__(self, *arguments: Any) -> Any:
        """The function's outputs.

        Raises:
            UserError: it could not be compiled.
        """
        compiled, began = graphs_so_far(), time.monotonic()
        try:
            found = self._run(*arguments)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = " ".join(str(error).split("\n")[:2])
            raise UserError(
                f"torch.compile could not compile the {self.part} ({reason}); see that there is a C++ compiler, or "
                "leave --compile out."
            ) from error
        if graphs_so_far() > compiled:
            self.seconds += time.monotonic() - began
            # Run again, so that what is left of the time is that of the graph; it writes the same to the same places.
            found = self._run(*arguments)
        return tree_map(copied, found) if self.captured else found


def graphs_so_far() -> int:
    """Graphs that torch has compiled in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def copied(value: Any) -> Any:
    """A copy of a tensor; anything else as it is."""
    return value.clone() if isinstance(value, Tensor) else value
