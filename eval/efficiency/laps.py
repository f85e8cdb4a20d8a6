"""Where `eval.efficiency.latency` keeps single measurements, so that an interrupted run goes on from there."""

import json
from pathlib import Path
from typing import Any

from llava.errors import UserError


class Laps:
    """Measurements by (turn, method), turn 0 being the warm-up; kept in a JSONL file when there is one.

    Raises:
        UserError: the file holds laps of other settings.
    """

    def __init__(self, path: Path | None = None, settings: dict[str, Any] | None = None):
        self.path = path
        self.found: dict[tuple[int, str], dict[str, Any]] = {}
        if path is None:
            return
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(settings) + "\n")
        first, *lines = path.read_text().splitlines()
        if json.loads(first) != settings:
            raise UserError(
                f"{path} holds laps of other settings ({first}), not {json.dumps(settings)}; name another file."
            )
        for row in map(json.loads, lines):
            self.found[row.pop("turn"), row.pop("method")] = row

    def add(self, turn: int, name: str, row: dict[str, Any]) -> None:
        self.found[turn, name] = row
        if self.path:
            with self.path.open("a") as file:
                file.write(json.dumps({"turn": turn, "method": name} | row) + "\n")
