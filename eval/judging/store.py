"""Verdicts on disk: judgements-<judge>.jsonl, one line per judged answer, written as replies come in."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from eval.answers.durable import DurableLines
from eval.answers.jsonl import read_jsonl
from eval.judging import Request, Verdict
from llava.errors import UserError

Line = dict[str, Any]

FIELDS = ("question_id", "asked", "verdict", "judge")


def verdict_file(folder: Path, judge: str) -> Path:
    """Where the verdicts of a judge are kept."""
    return folder / f"judgements-{re.sub(r'[^A-Za-z0-9_.-]+', '-', judge).strip('-.') or 'judge'}.jsonl"


def verdict_files(folder: Path) -> list[Path]:
    """All there are in a folder, sorted."""
    return sorted(folder.glob("judgements-*.jsonl"))


def is_ours(path: Path) -> bool:
    """Whether a file is one of these rather than in a benchmark's official format."""
    if not path.is_file() or path.suffix != ".jsonl":
        return False
    first = next((row for _, row in read_jsonl(path)), {})
    return all(name in first for name in FIELDS)


def line(request: Request, verdict: Verdict | None, reply: str, judge: str, tries: int, failed: bool) -> Line:
    """A verdict as it is stored."""
    return {
        "question_id": request.id,
        "asked": request.fingerprint,
        "verdict": verdict,
        "failed": failed,
        "judge": judge,
        "tries": tries,
        "reply": reply,
    }


class Verdicts:
    """Verdicts by question and by what was asked, so that several answer files can share a folder."""

    def __init__(self, lines: Iterable[Line]):
        self._found: dict[tuple[str, str], Line] = {}
        for entry in lines:
            self.add(entry)

    def add(self, entry: Line) -> None:
        self._found[str(entry["question_id"]), str(entry["asked"])] = entry

    def find(self, request: Request) -> Line | None:
        """The line about exactly this request."""
        return self._found.get((request.id, request.fingerprint))

    def of(self, requests: Iterable[Request]) -> dict[str, Line]:
        """Lines by question id, of those requests that have one."""
        return {request.id: entry for request in requests if (entry := self.find(request)) is not None}


def read_verdicts(path: Path) -> Verdicts:
    """Verdicts of a file that nobody is writing to."""
    return Verdicts(_checked(path, (row for _, row in read_jsonl(path))))


def _checked(path: Path, rows: Iterable[Line]) -> Iterator[Line]:
    for row in rows:
        if lost := [name for name in FIELDS if name not in row]:
            raise UserError(f"{path} should hold verdicts; a line has no {', '.join(lost)}.")
        yield row


class Store(Verdicts):
    """A file of verdicts that grows; every line that was added survives a crash."""

    def __init__(self, path: Path):
        self.path = path
        self._lines = DurableLines(path)
        try:
            super().__init__(_checked(path, self._lines.rows))
        except BaseException:
            self.close()
            raise

    def append(self, entry: Line) -> None:
        """Write one verdict and return when it is on the disk."""
        self._lines.append([entry])
        self.add(entry)

    def close(self) -> None:
        self._lines.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
