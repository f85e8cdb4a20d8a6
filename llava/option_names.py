"""Former names of method options, so that old command lines, settings and answer stores stay readable."""

from collections.abc import Mapping
from typing import TypeVar

from llava.errors import UserError

Value = TypeVar("Value")

RETENTION_RATIO = "retention_ratio"
FORMER_NAMES = {"share": RETENTION_RATIO}


def with_current_names(options: Mapping[str, Value]) -> dict[str, Value]:
    """The options under their present names; UserError if one is given under both."""
    renamed: dict[str, Value] = {}
    for key, value in options.items():
        name = FORMER_NAMES.get(key, key)
        if name in renamed:
            former = next(old for old, new in FORMER_NAMES.items() if new == name)
            raise UserError(f"{name} is given twice: {former} is its former name; leave one out.")
        renamed[name] = value
    return renamed


def with_former_names(options: Mapping[str, Value]) -> dict[str, Value]:
    """The options under the names that hashes of configurations were first made with."""
    former = {new: old for old, new in FORMER_NAMES.items()}
    return {former.get(key, key): value for key, value in options.items()}
