"""Options of methods: dataclass fields with a description and choices, and their values from the command line."""

from collections.abc import Mapping
from dataclasses import Field, field, fields
from typing import Any

from llava.errors import UserError, unknown


def option(
    default: Any,
    doc: str,
    choices: tuple[str, ...] | None = None,
    least: float | None = None,
    most: float | None = None,
) -> Any:
    """A configuration field with a description for `--list`; for strings the allowed values, for numbers the ends."""
    return field(default=default, metadata={"doc": doc, "choices": choices, "least": least, "most": most})


def options_of(cls: type[Any]) -> dict[str, Field]:
    """The configuration fields of a method (a Reducer) by name, without the budget."""
    return {known.name: known for known in fields(cls) if known.name != "budget"}


def parse_options(cls: type[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Turn `--set` texts into values of the fields' types; unknown keys are errors with a suggestion."""
    known = options_of(cls)
    values: dict[str, Any] = {}
    for key, text in options.items():
        if key not in known:
            raise unknown(f"option of {cls.name}", key, known)
        values[key] = _parse(f"{cls.name}.{key}", text, type(known[key].default))
    return values


def _parse(name: str, text: Any, kind: type) -> Any:
    if not isinstance(text, str):
        return text
    if kind is bool:
        table = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if text.lower() not in table:
            raise UserError(f"{name} must be true or false, got {text!r}.")
        return table[text.lower()]
    try:
        if kind is tuple:
            return tuple(int(part) for part in text.split(",") if part)
        return kind(text)
    except ValueError:
        word = {int: "a whole number", float: "a number", tuple: "whole numbers separated by commas"}[kind]
        raise UserError(f"{name} must be {word}, got {text!r}.") from None
