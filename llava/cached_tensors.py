"""Tensors that depend on sizes alone, made once and kept on the device.

A short prefill is bound by the host, which issues one operation after the other. Indices such as 0, 1, 2, ... of a
given length need not be issued again for every question.
"""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import TypeVar

import torch

Made = TypeVar("Made")
KEPT = 64  # results of each function


def made_once(function: Callable[..., Made]) -> Callable[..., Made]:
    """Decorator: remember what a function returns for the same arguments, which are whole numbers and the device.

    The tensors are shared: a caller must not write into them. They are ordinary tensors, also where they are first
    asked for in inference mode.
    """

    @lru_cache(maxsize=KEPT)
    @wraps(function)
    def remembered(*arguments):
        with torch.inference_mode(False):
            return function(*arguments)

    return remembered
