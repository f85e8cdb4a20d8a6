"""A table's cells in two shapes: methods by benchmarks as papers print them, and one row per cell."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eval.papers.measured import Cell, Measured
from eval.papers.plan import Line
from eval.papers.published import Published, Value
from eval.papers.spec import Column, Place, Table
from eval.tables.page import interval_text


@dataclass(frozen=True)
class Entry:
    """One cell with what is published about it.

    Attributes:
        published: the sources, the most trusted first; None where published values are left out (toy model).
    """

    cell: Cell
    published: Sequence[Value] | None

    @property
    def difference(self) -> float | None:
        """Ours minus the most trusted published value; None for another split."""
        if not self.published or self.cell.column.published_split:
            return None
        return self.cell.value - self.published[0].value


def entries(found: Measured, published: Published | None, place: Place) -> list[Entry]:
    """Every cell, line by line."""
    return [
        Entry(cell, values_of(cell.line, cell.column, published, place))
        for index in range(len(found.lines))
        for cell in found.row(index).values()
    ]


def values_of(line: Line, column: Column, published: Published | None, place: Place) -> Sequence[Value] | None:
    """The published values of a cell; none for a variant of our own or a column that no source has."""
    if published is None:
        return None
    name = "full" if line.row is None else line.row.published_name
    budget = place.tokens if line.budget is None else line.budget
    return published.values(name, budget, column.published) if name and column.published else []


def published_text(values: Sequence[Value] | None) -> str:
    """Every source of a cell: "76.9 [1], 76.8 [2]?"; "?" marks what is disputed."""
    if values is None:
        return ""
    return ", ".join(f"{value.value:g} [{value.title}]{'?' if value.disputed else ''}" for value in values) or "n/a"


def ours_text(cell: Cell) -> str:
    """The score with its interval: "76.9 [75.2, 78.6]"."""
    return f"{number(cell.value, cell.points)} {interval_text(cell.low, cell.high)}"


def number(value: float, points: bool = False) -> str:
    """One decimal for percent; points are whole from 100 on, as MME's are printed."""
    return f"{value:.0f}" if points and abs(value) >= 100 else f"{value:.1f}"


@dataclass(frozen=True)
class Block:
    """The rows of one budget.

    Attributes:
        title: "192 tokens"; "" for the unreduced model.
        rows: (name of the method, a value per column and the average last; None where there is none).
        best, second: per column, the rows to print bold and underlined.
    """

    title: str
    rows: Sequence[tuple[str, Sequence[float | None]]]
    best: Sequence[frozenset[int]]
    second: Sequence[frozenset[int]]


MARK = "‡"
MARK_TEXT = (
    "the budget counts the tokens kept after the pruning layer, because the mean over layers cannot be that small; the "
    "mean is in parentheses, and the row is not compared with the others of its budget"
)


def blocks(table: Table, found: Measured) -> list[Block]:
    """The unreduced model, then one block per budget, with the best and second-best score of each column."""
    groups: dict[object, list[int]] = {}
    for index, line in enumerate(found.lines):
        groups.setdefault(line.budget, []).append(index)
    return [block(budget, indices, found) for budget, indices in groups.items()]


def block(budget: object, indices: Sequence[int], found: Measured) -> Block:
    rows: list[tuple[str, Sequence[float | None]]] = []
    unequal: list[bool] = []  # more tokens than the others of the block: not compared with them
    for index in indices:
        cells = found.row(index)
        values = [cells[c.benchmark].value if c.benchmark in cells else None for c in found.columns]
        line = found.lines[index]
        mark = f" {MARK} ({mean_tokens(cells):.0f})" if line.by_kept and cells else ""
        rows.append((line.title + mark, [*values, found.of_full(index)]))
        unequal.append(line.by_kept)
    title = "" if budget is None else f"{budget} tokens" if isinstance(budget, int) else f"{budget} of the tokens"
    ranks = [
        places([None if more else values[column] for (_, values), more in zip(rows, unequal, strict=True)])
        for column in range(len(found.columns) + 1)
    ]
    compared = len(rows) > 1
    none: frozenset[int] = frozenset()
    return Block(
        title,
        rows,
        [first if compared else none for first, _ in ranks],
        [second if compared else none for _, second in ranks],
    )


def mean_tokens(cells: Mapping[str, Cell]) -> float:
    """Visual tokens per layer, mean over the benchmarks."""
    return sum(cell.tokens for cell in cells.values()) / len(cells)


def places(values: Sequence[float | None]) -> tuple[frozenset[int], frozenset[int]]:
    """Rows with the best value and with the second-best; values that print alike share a place."""
    printed = [None if value is None else round(value, 1) for value in values]
    order = sorted({value for value in printed if value is not None}, reverse=True)
    return tuple(  # type: ignore[return-value]
        frozenset(i for i, value in enumerate(printed) if value is not None and value == wanted)
        for wanted in (*order[:2], *[None] * (2 - len(order[:2])))
    )
