"""Put generated tables between their markers in a hand-written page."""

import re
from collections.abc import Sequence
from pathlib import Path

from llava.errors import UserError


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; first column left, the others right."""
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join(["---"] + ["---:"] * (len(header) - 1)) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def insert(page: Path, name: str, content: str) -> None:
    """Replace what stands between `<!-- begin NAME -->` and `<!-- end NAME -->`."""
    text = page.read_text()
    pattern = re.compile(rf"(<!-- begin {re.escape(name)} -->\n).*?(<!-- end {re.escape(name)} -->)", re.DOTALL)
    if not pattern.search(text):
        raise UserError(f"{page} has no markers for {name!r}; add <!-- begin {name} --> and <!-- end {name} --> lines.")
    page.write_text(pattern.sub(lambda match: f"{match[1]}{content}\n{match[2]}", text))
