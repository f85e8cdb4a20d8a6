"""Means with intervals over pictures, and the tables that the page and the CSV files share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.config import ROOT
from eval.findings.collect import Collected
from eval.metrics import SufficientStatistics, ratio_terms
from eval.results.statistics import Comparison, Interval, compare, interval
from eval.tables.common import write_csv
from eval.tables.page import insert, markdown

DOCS = ROOT / "docs"
RESAMPLES = 2000  # enough for two digits of an interval's ends

Cell = Interval | Comparison
Values = Mapping[str, float]  # question (or picture and word) -> number


def terms(values: Values, groups: Mapping[str, str], scale: float) -> SufficientStatistics:
    """A mean whose units are drawn by picture."""
    return ratio_terms({name: values[name] for name in sorted(values)}, groups, "picture", scale)


def mean(values: Values, groups: Mapping[str, str], scale: float = 1) -> Interval:
    """The mean with its 95 % interval over pictures.

    Args:
        groups: name -> picture, for all names at least.
        scale: 100 for percent.
    """
    return interval(terms(values, groups, scale))


def difference(a: Values, b: Values, groups: Mapping[str, str], scale: float = 1) -> Comparison:
    """Mean of a minus mean of b over the names that both have, paired, with its 95 % interval."""
    both = a.keys() & b.keys()
    pick = lambda values: terms({name: values[name] for name in both}, groups, scale)  # noqa: E731
    return compare(pick(a), pick(b), RESAMPLES)


def late_preference(drawn: Collected, counterpart: Collected, score: str, measure: str = "late") -> dict[str, float]:
    """Question id -> how much more than half of a score lies in the second half of the sequence, for no content's sake.

    Both contents of a picture, its upper and its lower half, stand once in the first and once in the second half of the
    sequence; the mean of both arrangements minus one half is 0 for a score that looks at content alone, 0.5 for one
    that looks at the second half alone and -0.5 for the first.
    """
    a, b = drawn.of(score, measure), counterpart.of(score, measure)
    return {name: (a[name] + b[name]) / 2 - 0.5 for name in b if name in a}


def cell_text(column: str, cell: Cell | None) -> str:
    """ "0.91 [0.90, 0.93]", with a sign for points and differences."""
    if cell is None:
        return "–"
    digits = 1 if "points" in column or "%" in column else 2
    sign = "+" if "points" in column or isinstance(cell, Comparison) else ""
    value = cell.difference if isinstance(cell, Comparison) else cell.mean
    if cell.low is None or cell.high is None:
        return f"{value:{sign}.{digits}f} [n/a]"
    return f"{value:{sign}.{digits}f} [{cell.low:{sign}.{digits}f}, {cell.high:{sign}.{digits}f}]"


@dataclass
class Table:
    """A table for the page, and the same numbers for a CSV file.

    Attributes:
        name: of the marker in the page; `findings_NAME.csv` is the file.
        header: first column's title and the others'.
    """

    name: str
    header: Sequence[str]

    def __post_init__(self) -> None:
        self.rows: list[list[str]] = []
        self.numbers: list[list[str]] = []

    def add(self, label: str, cells: Mapping[str, Cell | None], shown: bool = True) -> None:
        """A row; cells of the header's columns are shown, all are written to the file.

        Columns whose title says "points" get a sign; these and those with "%" get one digit, others two.

        Args:
            shown: also in the page.
        """
        if shown:
            self.rows.append([label, *(cell_text(column, cells.get(column)) for column in self.header[1:])])
        for column, cell in cells.items():
            if cell is not None:
                value = cell.difference if isinstance(cell, Comparison) else cell.mean
                ends = ["" if end is None else f"{end:.4f}" for end in (cell.low, cell.high)]
                self.numbers.append([label, column, f"{value:.4f}", *ends])

    def write(self, out: Path) -> None:
        """The CSV file, and the table: between its markers in `findings.md` of DOCS, elsewhere as a file of its own."""
        tables = out / "tables"
        tables.mkdir(parents=True, exist_ok=True)
        if self.rows and out == DOCS:
            insert(out / "findings.md", self.name, markdown(self.header, self.rows))
        elif self.rows:
            (tables / f"findings_{self.name}.md").write_text(markdown(self.header, self.rows) + "\n")
        write_csv(tables / f"findings_{self.name}.csv", ["row", "measure", "value", "low", "high"], self.numbers)
