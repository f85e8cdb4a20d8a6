"""The one reader of all YAML files of the project, and the base of what is read from them."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from llava.errors import UserError, unknown


class Part(BaseModel):
    """A part of a YAML file: unknown keys are errors that name the nearest known one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def known_keys(cls, data: Any) -> Any:
        for key in data if isinstance(data, dict) else ():
            if key not in cls.model_fields:
                raise unknown("key", str(key), cls.model_fields)
        return data


def first_problem(error: ValidationError) -> str:
    """The place of the first problem in a file, and what is wrong there; a sentence."""
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    said = first["msg"].removeprefix("Value error, ").rstrip(".")
    return f"{place}: {said}." if place else f"{said}."


class UniqueKeys(yaml.SafeLoader):
    """A mapping that gives a key twice is an error: YAML's reader would keep the last value without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in seen:
                mark = key.start_mark
                raise UserError(f"{mark.name} line {mark.line + 1} gives {key.value!r} a second time; leave one out.")
            seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """The content of a YAML file.

    Raises:
        UserError: it cannot be read, or gives a key twice; with the file and the line.
    """
    try:
        with path.open(encoding="utf-8") as file:
            return yaml.load(file, UniqueKeys)
    except UserError:
        raise
    except RecursionError:
        raise UserError(f"{path} is nested deeper than any file of this project; write it with fewer levels.") from None
    except (yaml.YAMLError, OSError, ValueError) as error:
        raise UserError(f"{path} is no YAML file that can be read: {' '.join(str(error).split())}.") from None
