"""A table's cells in two shapes: methods by benchmarks as papers print them, and one row per cell."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from eval.papers.measured import Cell, Measured
from eval.papers.own import OWN_MARK, OwnRow
from eval.papers.plan import Line
from eval.papers.published import Published, Value
from eval.papers.spec import Budget, Column, Place
from eval.tables.page import interval_text


@dataclass(frozen=True)
class Entry:
    """One cell with what is published about it.

    Attributes:
        published: the sources, the most trusted first; None where published values are left out (toy model).
        convention: how our images become tokens, see eval.papers.published.CONVENTIONS.
    """

    cell: Cell
    published: Sequence[Value] | None
    convention: str = "unknown"

    @property
    def compared(self) -> Value | None:
        """The most trusted published value that is like ours; None if there is none."""
        values, _ = comparable(self.cell, self.published or (), self.convention)
        return values[0] if values else None

    @property
    def difference(self) -> float | None:
        """Ours minus `compared`."""
        return None if self.compared is None else self.cell.value - self.compared.value


def comparable(cell: Cell, values: Sequence[Value], convention: str) -> tuple[list[Value], str]:
    """The published values that are like ours: same split, metric, judge, budget, variant and convention, not disputed.

    Returns:
        (values, "") or ([], why none is).
    """
    line, column = cell.line, cell.column
    ours = {
        "no source": not values,
        "ours is of another split": bool(column.published_split),
        "not all questions were asked": cell.questions < cell.available,
        f"ours is {cell.metric}": cell.metric.endswith("_match") or column.metric not in ("", cell.metric),
        "another budget": line.by_kept,
        cell.other_judge: bool(cell.other_judge),
        "the row is not the release": line.row is not None and not line.row.runs_release,
    }
    if why := next((reason for reason, is_so in ours.items() if is_so), ""):
        return [], why
    obstacles = {value: value.obstacle(convention) for value in values}
    found = [value for value in values if not obstacles[value]]
    return found, "" if found else "; ".join(dict.fromkeys(obstacles.values()))


def entries(found: Measured, published: Published | None, place: Place) -> list[Entry]:
    """Every cell, line by line."""
    return [
        Entry(cell, values_of(cell.line, cell.column.published, published, place), place.convention)
        for index in range(len(found.lines))
        for cell in found.row(index).values()
    ]


def values_of(line: Line, column: str, published: Published | None, place: Place) -> Sequence[Value] | None:
    """The published values of a row in a column; none for a variant of our own or a column that no source has."""
    if published is None:
        return None
    name = "full" if line.row is None else line.row.published_name
    budget = place.tokens if line.budget is None else line.budget
    return published.values(name, budget, column) if name and column else []


def published_text(values: Sequence[Value] | None, convention: str) -> str:
    """Every source of a cell: "76.9 [1], 76.8 [2]?"; "?" marks what is disputed, "≠" what is not like ours."""
    if values is None:
        return ""

    def mark(value: Value) -> str:
        return "?" if value.disputed else "≠" if value.obstacle(convention) else ""

    return ", ".join(f"{value.value:g} [{value.title}]{mark(value)}" for value in values) or "n/a"


def difference_to(entry: Entry) -> str:
    """The difference and what it is to: "+0.3 to 61.9 [RESTORE, Table 1]"."""
    if entry.compared is None or entry.difference is None:
        return "n/a"
    return f"{entry.difference:+.1f} to {entry.compared.value:g} [{entry.compared.title}]"


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
        points: per column, whether its values are points and not percent.
        intervals: per row and column, the 95 % interval as text; "" where there is none.
        clear: (row, column) of the scores that differ significantly from the paper's method at the same budget.
    """

    title: str
    rows: Sequence[tuple[str, Sequence[float | None]]]
    best: Sequence[frozenset[int]]
    second: Sequence[frozenset[int]]
    points: Sequence[bool]
    intervals: Sequence[Sequence[str]] = ()
    clear: frozenset[tuple[int, int]] = frozenset()

    def text(self, value: float, column: int) -> str:
        """A value as every format prints it."""
        return number(value, self.points[column])


MARK = "‡"
MARK_TEXT = (
    "the budget counts the tokens kept after the pruning layer, because the mean over layers cannot be that small; the "
    "mean is in parentheses, and the row is compared with no other row and no published number"
)


def label(found: Measured, index: int) -> str:
    """The name of a row, marked and with its mean number of tokens where it counts its budget otherwise."""
    line, cells = found.lines[index], found.row(index)
    return f"{line.title} {MARK} ({mean_tokens(cells):.0f})" if line.by_kept and cells else line.title


def blocks(
    found: Measured, own: Sequence[OwnRow] = (), clear: Mapping[int, Collection[str]] | None = None
) -> list[Block]:
    """The unreduced model, then one block per budget, with the best and second-best score of each column.

    Rows that a user added stand at the end of their block and are ranked with none.

    Args:
        clear: line -> benchmarks on which it differs significantly from the paper's method.
    """
    groups: dict[Budget | None, list[int]] = {}
    for index, line in enumerate(found.lines):
        groups.setdefault(line.budget, []).append(index)
    return [
        block(budget, group, found, [row for row in own if row.budget == budget], clear or {})
        for budget, group in groups.items()
    ]


def block(
    budget: Budget | None,
    indices: Sequence[int],
    found: Measured,
    own: Sequence[OwnRow],
    clear: Mapping[int, Collection[str]],
) -> Block:
    rows: list[tuple[str, Sequence[float | None]]] = []
    ranked: list[Sequence[float | None]] = []
    nothing = [None] * (len(found.columns) + 1)
    for index in indices:
        cells = found.row(index)
        values = [cells[c.benchmark].value if c.benchmark in cells else None for c in found.columns]
        rows.append((label(found, index), [*values, found.of_full(index)]))
        ranked.append(nothing if found.lines[index].by_kept else rows[-1][1])
    for row in own:
        values = [row.scores.get(column.benchmark) for column in found.columns]
        rows.append((f"{row.method} {OWN_MARK} [{row.source}]", [*values, None]))
        ranked.append(nothing)
    title = "" if budget is None else f"{budget} tokens" if isinstance(budget, int) else f"{budget} of the tokens"
    ranks = [places([values[column] for values in ranked]) for column in range(len(nothing))]
    compared = len(indices) > 1
    none: frozenset[int] = frozenset()
    return Block(
        title,
        rows,
        [first if compared else none for first, _ in ranks],
        [second if compared else none for _, second in ranks],
        [*(has_points(found, column) for column in found.columns), False],
        [[interval_of(found, index, column) for column in found.columns] for index in indices],
        frozenset(
            (row, place)
            for row, index in enumerate(indices)
            for place, column in enumerate(found.columns)
            if column.benchmark in clear.get(index, ())
        ),
    )


def interval_of(found: Measured, index: int, column: Column) -> str:
    """The interval of a score; "" where there is none."""
    cell = found.cells.get((index, column.benchmark))
    return "" if cell is None or cell.low is None else interval_text(cell.low, cell.high)


def has_points(found: Measured, column: Column) -> bool:
    """Whether a column's values are points."""
    return found.cells[0, column.benchmark].points


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
