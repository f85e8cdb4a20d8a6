"""Single measurements, kept in a file while they are made, so that an interrupted benchmark goes on."""

import json
from pathlib import Path
from typing import Any

from llava.errors import UserError

Key = tuple[int, str, int]  # turn, method, questions in the batch; turn 0 is the warm-up


class Measurements:
    """Measurements by turn, method and batch size; kept in a JSONL file when there is one.

    Raises:
        UserError: the file holds measurements under other settings.
    """

    def __init__(self, path: Path | None = None, settings: dict[str, Any] | None = None):
        self.path = path
        self.found: dict[Key, dict[str, Any]] = {}
        if path is None:
            return
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(settings) + "\n")
        first, *lines = path.read_text().splitlines()
        if json.loads(first) != json.loads(json.dumps(settings)):
            raise UserError(
                f"{path} holds measurements under other settings ({first}), not {json.dumps(settings)}; "
                "name another file."
            )
        for row in map(json.loads, lines):
            self.found[row.pop("turn"), row.pop("method"), row.pop("batch", 1)] = row

    def add(self, turn: int, name: str, batch: int, row: dict[str, Any]) -> None:
        self.found[turn, name, batch] = row
        if self.path:
            with self.path.open("a") as file:
                file.write(json.dumps({"turn": turn, "method": name, "batch": batch} | row) + "\n")
