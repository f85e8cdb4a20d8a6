"""Notes of the operations that a device is given: which attention kernels, and the largest tensor."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ATTENTION = "attention"
# In inference mode this arrives whole; which kernel it becomes is seen only in its parts.
COMPOSITE = torch.ops.aten.scaled_dot_product_attention.default


class Noted(TorchDispatchMode):
    """While active, notes attention kernels, and the largest tensor that an operation makes; views make none.

    Attributes:
        attention: names of the fused kernels that ran; "math" where the products were made one by one.
        largest: elements.
    """

    def __init__(self) -> None:
        super().__init__()
        self.attention: set[str] = set()
        self.largest = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is COMPOSITE:
            with self:
                return function.decompose(*args, **(kwargs or {}))
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__.strip("_")
        if ATTENTION in name and not name.startswith("fused_sdp_choice"):
            self.attention.add("math" if name.endswith("math") else name)
        if not function.is_view:
            made = out if isinstance(out, tuple | list) else (out,)
            self.largest = max([self.largest, *(one.numel() for one in made if isinstance(one, Tensor))])
        return out
