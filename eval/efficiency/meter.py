"""Bytes of tensors that are alive while something runs, on any device: the "meta" device allocates nothing and counts.

Seen are the tensors that operations make, until their memory is given back. What a kernel needs inside of itself, the
CUDA context and the fragments of an allocator are not counted, and neither is memory of numpy.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Meter(TorchDispatchMode):
    """Notes while it is active when the memory of a tensor comes and goes; what was there before is not counted.

    Neither are tensors that later questions share (llava/cached_tensors.py), which are made outside of inference mode:
    else the first question of its lengths would need more than the second.

    Args:
        device: the tensors that are counted; None counts those of all devices.

    Attributes:
        events: (number of the memory, bytes: negative where it was given back), in the order in which they came.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()
        self.device, self._inference = device, torch.is_inference_mode_enabled()
        self.events: list[tuple[int, int]] = []
        self._live: dict[int, tuple[StorageWeakRef, int, int]] = {}
        self._count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        self.update()
        given = {_address(one) for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        for one in tree_leaves(out):
            if not isinstance(one, Tensor) or self.device not in (None, one.device):
                continue
            if torch.is_inference_mode_enabled() != self._inference:
                continue
            storage = one.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self._live:
                self._count += 1
                self._live[storage._cdata] = StorageWeakRef(storage), self._count, storage.nbytes()
                self.events.append((self._count, storage.nbytes()))
        return out

    def update(self) -> None:
        """Note what was given back since the last operation."""
        for address, (known, number, size) in list(self._live.items()):
            if known.expired():
                del self._live[address]
                self.events.append((number, -size))

    def numbers(self, tensors: Iterable[Tensor]) -> set[int]:
        """Of the memory of some tensors, as `events` has them."""
        return {self._live[_address(one)][1] for one in tensors if _address(one) in self._live}

    def peak(self, start: int = 0, stop: int | None = None, without: Iterable[int] = ()) -> int:
        """Most bytes alive at once during `events[start:stop]`.

        Args:
            without: numbers of memory that is left out.
        """
        left_out, held, most = set(without), 0, 0
        for place, (number, size) in enumerate(self.events[:stop]):
            held += 0 if number in left_out else size
            most = max(most, held) if place >= start else 0
        return most


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def peak_bytes(call: Any) -> int:
    """Most bytes alive at once while a function runs, above what was there before."""
    with torch.inference_mode(), Meter() as meter:
        call()
    return meter.peak()
