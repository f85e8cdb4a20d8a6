"""JSON files of checkpoints and image processors, checked where they are read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from llava.errors import UserError


class Schema(BaseModel):
    """Base of all schemas: types are checked strictly, numbers must be finite, unknown fields are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


S = TypeVar("S", bound=Schema)


def checked(schema: type[S], content: Mapping[str, Any], where: str | Path) -> S:
    """Validate a configuration against its schema.

    Args:
        where: what the error calls the configuration, such as the path of its file.

    Raises:
        UserError: a field has the wrong type or an impossible value; up to three are named.
    """
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, one['loc'])) or 'it'} is {shortened(one['input'], 60)} ({one['msg'].lower()})"
            for one in error.errors()
        ]
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(
            f"{where} has impossible values: {'; '.join(problems[:3])}{more}. Correct them or fetch the file again."
        ) from error


def shortened(value: object, length: int) -> str:
    """A value as text for an error, cut at `length` characters."""
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        UserError: there is no such file, it cannot be read, or it is no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path.parent} has no {path.name}; is it the folder of a checkpoint?") from error
    except OSError as error:
        raise UserError(f"Cannot read {path} ({error.strerror}); check its permissions or fetch it again.") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); fetch it again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; fetch it again.")
    return content
