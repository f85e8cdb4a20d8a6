"""Which class runs a checkpoint, by its family, and the choices that a family leaves in reading pictures."""

import inspect
from typing import Any

import torch

from llava.errors import UserError, unknown
from llava.model import Llava
from llava.next import LlavaNext
from llava.qwen import QwenVL
from llava.video_llava import VideoLlava

FAMILIES: dict[str, type[Llava]] = {
    "llava": Llava,
    "llava_next": LlavaNext,
    "video_llava": VideoLlava,
    "qwen2_5_vl": QwenVL,
    "qwen2_vl": QwenVL,
}


def runtime(checkpoint, device: torch.device, conventions: dict[str, Any]) -> Llava:
    """The running model of a checkpoint.

    Args:
        conventions: keyword arguments of the family's class, texts from the command line among them; None leaves a
            choice to the class.

    Raises:
        UserError: the family has no such choice.
    """
    cls = FAMILIES[checkpoint.family]
    known = list(inspect.signature(cls).parameters)[2:]
    chosen = {}
    for name, value in conventions.items():
        if name not in known and not known:
            raise UserError(f"{checkpoint.name} leaves no choice of {name} in reading pictures; leave it out.")
        if name not in known:
            raise unknown(f"choice of {checkpoint.family} in reading pictures", name, known)
        if value is not None:
            chosen[name] = parse(name, value)
    return cls(checkpoint, device, **chosen)


def parse(name: str, value: Any) -> Any:
    """Texts of the command line: "672x672" for a size, digits for a number, else as it is."""
    if not isinstance(value, str):
        return value
    if name == "force":
        width, _, height = value.partition("x")
        if not (width.isdigit() and height.isdigit()):
            raise UserError(f"force should be WIDTHxHEIGHT such as 672x672, got {value!r}.")
        return int(width), int(height)
    if name in ("flip", "min_pixels", "max_pixels"):
        if not value.isdigit():
            raise UserError(f"{name} should be a whole number, got {value!r}.")
        return int(value)
    return value
