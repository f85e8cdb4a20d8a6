"""Rows that a user adds to a table: `vtr tables paper TABLE --add rows.csv`.

A CSV file with a header; columns are `method`, `budget` (one of the table's; empty or "all" for the unreduced model),
`source` (who says so), `kind` (optional: "published" or "measured") and any of the table's benchmarks by their names
in scripts/eval/. An empty cell is a number that the source does not have. docs/paper_tables.md has an example.
"""

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.papers.published import BENCHMARKS
from eval.papers.spec import Budget, Column, Table
from llava.errors import UserError, unknown

ABOUT = ("method", "budget", "source")
KIND = "kind"
KINDS = ("published", "measured")
# MME's perception has ten parts of 200 points, the total fourteen. Fewer points than 100 are a number in percent.
POINTS = {"mme": (100, 2000), "mme_sum": (100, 2800)}
OWN_MARK = "§"
OWN_TEXT = (
    "added by the user from the source in brackets: not run here, and left out of the gate, the averages, the tests "
    "and best and second best"
)


@dataclass(frozen=True)
class OwnRow:
    """A row of the file; `budget` is None for the unreduced model, `scores` holds numbers by benchmark."""

    method: str
    budget: Budget | None
    source: str
    kind: str
    scores: Mapping[str, float]


def read_own(path: Path, table: Table) -> list[OwnRow]:
    """The rows of a file, checked.

    Raises:
        UserError: the table has no scores, or something in the file is wrong; the sentence names the line.
    """
    if table.kind != "scores":
        raise UserError(f"--add puts rows into tables of scores; {table.identity} is a table of kind {table.kind}.")
    found: list[OwnRow] = []
    for number, record in records(path, [column.benchmark for column in table.columns]):
        place = f"{path}, line {number}"
        row = own_row(place, record, table)
        if any((row.method, row.budget, row.source) == (one.method, one.budget, one.source) for one in found):
            raise UserError(f"{place}: {row.method} at {row.budget or 'all'} from {row.source} is there twice.")
        found.append(row)
    if not found:
        raise UserError(f"{path} has a header and no row.")
    return found


def records(path: Path, benchmarks: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, cells by column) of the file."""
    expected = f"a header such as {','.join((*ABOUT, *benchmarks[:2]))}"
    try:
        reader = csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig")), strict=True)
        lines = [(reader.line_num, [" ".join(cell.split()) for cell in cells]) for cells in reader]
    except OSError as error:
        raise UserError(f"--add {path}: {error.strerror}.") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is no CSV file in UTF-8: {error}.") from None
    lines = [(number, cells) for number, cells in lines if any(cells)]
    header = lines[0][1] if lines else []
    if lost := [name for name in ABOUT if name not in header]:
        found = ",".join(header) or "an empty file"
        raise UserError(f"{path} has no column {lost[0]}; expected {expected}, got {found}.")
    for name in header:
        if name not in (*ABOUT, KIND, *benchmarks):
            raise unknown(f"column in {path}", name, (KIND, *benchmarks))
    if len(set(header)) < len(header):
        raise UserError(f"{path} names a column twice in its header: {','.join(header)}.")
    for number, cells in lines[1:]:
        if len(cells) != len(header):
            raise UserError(f"{path}, line {number} has {len(cells)} cells, the header has {len(header)}.")
        yield number, dict(zip(header, cells, strict=True))


def own_row(place: str, record: Mapping[str, str], table: Table) -> OwnRow:
    """One line of the file."""
    for name in ("method", "source"):
        if not record[name]:
            raise UserError(f"{place}: {name} is empty.")
    budgets = {str(budget): budget for budget in table.budgets}
    budget = record["budget"]
    if budget not in ("", "all", *budgets):
        raise UserError(f"{place}: the table has no budget {budget!r}; it has all, {', '.join(budgets)}.")
    if (kind := record.get(KIND) or KINDS[0]) not in KINDS:
        raise UserError(f"{place}: kind should be {' or '.join(KINDS)}, got {kind!r}.")
    columns = {column.benchmark: column for column in table.columns}
    scores = {name: score(place, columns[name], text) for name, text in record.items() if name in columns and text}
    if not scores:
        raise UserError(f"{place}: {record['method']} has no number.")
    return OwnRow(record["method"], budgets.get(budget), record["source"], kind, scores)


def score(place: str, column: Column, text: str) -> float:
    """A number of a benchmark's column."""
    least, most = POINTS.get(column.published, (0, 100 if column.published in BENCHMARKS else math.inf))
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least <= value <= most or math.isinf(value):
        span = f"{least} or more" if math.isinf(most) else f"{least} to {most}"
        raise UserError(f"{place}: {column.benchmark} ({column.title}) should be a number, {span}, got {text!r}.")
    return value
