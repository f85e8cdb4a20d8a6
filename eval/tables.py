"""Tables as Markdown and CSV, generated ones between their markers in a hand-written page, and the colours of plots."""

import csv
import re
from collections.abc import Sequence
from pathlib import Path

from eval.results.statistics import Comparison, Interval, rounded
from llava.errors import UserError

# Okabe-Ito colours, readable with every kind of colour vision.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#999999", "#E69F00", "#56B4E9", "#000000")
BRIGHT = [colour for colour in COLOURS if colour != "#999999"]  # where that one would be taken for a grey line
MARKERS = "osD^vP*X"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; first column left, the others right. A | inside a cell is escaped."""
    lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in (header, *rows)]
    return "\n".join([lines[0], "|" + "|".join(["---"] + ["---:"] * (len(header) - 1)) + "|", *lines[1:]])


def left_aligned(table: str) -> str:
    """The same table for columns of words."""
    head, rule, *rows = table.split("\n")
    return "\n".join([head, rule.replace("---:", "---"), *rows])


def interval_text(low: float | None, high: float | None, signed: bool = False) -> str:
    """The ends of an interval for a table cell: "[80.1, 83.2]", or "[n/a]"."""
    if low is None or high is None:
        return "[n/a]"
    return f"[{', '.join(rounded(end, sign='+' * signed) for end in (low, high))}]"


def score_text(found: Interval) -> str:
    """A score with its interval: "81.6 [80.1, 83.2]"."""
    return f"{rounded(found.mean)} {interval_text(found.low, found.high)}"


def difference_text(found: Comparison) -> str:
    """A difference with its interval: "+1.2 [-0.3, +2.7]"."""
    return f"{rounded(found.difference, sign='+')} {interval_text(found.low, found.high, signed=True)}"


def csv_numbers(*values: float | None) -> list[str]:
    """Two decimals; empty for what does not exist."""
    return ["" if value is None else rounded(value, 2) for value in values]


def csv_text(text: str) -> str:
    """Text that no spreadsheet takes for a formula: = + - @ at its start follow an apostrophe, but for numbers."""
    try:
        float(text)
    except ValueError:
        return f"'{text}" if text[:1] in tuple("=+-@\t\r") else text
    return text


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A CSV file; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def insert(page: Path, name: str, content: str) -> None:
    """Replace what stands between `<!-- begin NAME -->` and `<!-- end NAME -->`."""
    text = page.read_text()
    pattern = re.compile(rf"(<!-- begin {re.escape(name)} -->\n).*?(<!-- end {re.escape(name)} -->)", re.DOTALL)
    if not pattern.search(text):
        raise UserError(f"{page} has no markers for {name!r}; add <!-- begin {name} --> and <!-- end {name} --> lines.")
    page.write_text(pattern.sub(lambda match: f"{match[1]}{content}\n{match[2]}", text))
