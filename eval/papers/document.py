"""Everything that a rendered table says, before it takes a format.

Cells have two shapes: methods by benchmarks as papers print them (`Block`), and one row per cell (`Entry`).
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from eval import benchmarks
from eval.config import TOY_BANNER
from eval.papers.cells import Cell, MeasuredTable, relative
from eval.papers.gate import Check, comparable, sentences
from eval.papers.published import Published, Value
from eval.papers.reported import Reported, with_averages
from eval.papers.reported import notes as reported_notes
from eval.papers.runs import IMAGE, KEPT, RowAtBudget, RunTarget, described
from eval.papers.spec import Budget, Column, Place, Table
from eval.results.report import circumstances
from eval.results.statistics import rounded
from eval.tables import interval_text

INSTEAD = "These data do not give the paper's metric"
SPREAD = "Tokens per layer of"
ALONE = "the mean is in parentheses, and the row is compared with no other row and no published number"
MARK_TEXTS = {
    KEPT: "the budget counts the tokens kept after the pruning layer, because the mean over layers cannot be that "
    f"small; {ALONE}",
    IMAGE: f"the image decides how many tokens are kept, and their mean over the images is not the budget; {ALONE}",
}


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


def entries(found: MeasuredTable, published: Published | None, place: Place) -> list[Entry]:
    """Every cell, line by line.

    Args:
        published: None to leave published values out. Variants of our own and columns without a source have none.
    """
    made = []
    for index, line in enumerate(found.lines):
        name, budget = line.row.published_name, place.tokens if line.budget is None else line.budget
        for cell in found.row(index).values():
            column, values = cell.column.published, None
            if published is not None:
                values = published.values(name, budget, column) if name and column else []
            made.append(Entry(cell, values, place.convention))
    return made


def published_text(values: Sequence[Value] | None, convention: str) -> str:
    """Every source of a cell: "76.9 [1], 76.8 [2]?"; "?" marks what is disputed, "≠" what else is not compared."""
    if values is None:
        return ""

    def mark(value: Value) -> str:
        return "?" if value.disputed else "≠" if value.obstacle(convention) else ""

    return ", ".join(f"{value.value:g} [{value.title}]{mark(value)}" for value in values) or "n/a"


def difference_to(entry: Entry) -> str:
    """The difference and what it is to: "+0.3 to 61.9 [RESTORE, Table 1]"."""
    if entry.compared is None or entry.difference is None:
        return "n/a"
    return f"{rounded(entry.difference, sign='+')} to {entry.compared.value:g} [{entry.compared.title}]"


def ours_text(cell: Cell) -> str:
    """The score with its interval: "76.9 [75.2, 78.6]"."""
    return f"{number(cell.value, cell.whole)} {interval_text(cell.low, cell.high)}"


def number(value: float, whole: bool = False) -> str:
    """One decimal, or none where the column has whole numbers."""
    return rounded(value, 0 if whole else 1)


@dataclass(frozen=True)
class Block:
    """The rows of one budget.

    Attributes:
        title: "192 tokens"; "" for the unreduced model.
        rows: (name of the method, a value per column and the average last; None where there is none).
        best, second: per column, the rows to print bold and underlined.
        whole: per column, whether its values are printed as whole numbers (`Cell.whole`).
        intervals: per row and column, the 95 % interval as text; "" where there is none.
        clear: (row, column) of the scores that differ significantly from the paper's method at the same budget.
        reported: rows that were not measured here, below the others; in no ranking and no test.
        benchmarks: of the columns, without the average.
    """

    title: str
    rows: Sequence[tuple[str, Sequence[float | None]]]
    best: Sequence[frozenset[int]]
    second: Sequence[frozenset[int]]
    whole: Sequence[bool]
    intervals: Sequence[Sequence[str]] = ()
    clear: frozenset[tuple[int, int]] = frozenset()
    reported: Sequence[Reported] = ()
    benchmarks: Sequence[str] = ()

    def text(self, row: int, column: int) -> str:
        """A value as every format prints it."""
        value = self.rows[row][1][column]
        return "n/a" if value is None else number(value, self.whole[column])

    def style(self, row: int, column: int) -> str:
        """ "best", "second" or ""."""
        return "best" if row in self.best[column] else "second" if row in self.second[column] else ""

    def reported_texts(self, row: Reported) -> list[str]:
        """The values of a reported row, marked, and its average."""
        texts = [
            number(row.scores[name], whole) + row.marks.get(name, "") if name in row.scores else "n/a"
            for name, whole in zip(self.benchmarks, self.whole, strict=False)
        ]
        return [*texts, "n/a" if row.average is None else number(row.average)]


def marked(text: str, line: RowAtBudget) -> str:
    """A text with the mark of its row, if there is one."""
    return f"{text} {line.mark}".rstrip()


def marks_of(found: MeasuredTable) -> list[str]:
    """The marks that rows of the table have, in the order of `MARK_TEXTS`."""
    return [mark for mark in MARK_TEXTS if any(line.mark == mark for line in found.lines)]


def label(found: MeasuredTable, index: int) -> str:
    """The name of a row. One that has other tokens than its budget is marked, with its mean number of tokens."""
    line, cells = found.lines[index], found.row(index)
    if not line.mark or not cells:
        return line.title
    return f"{marked(line.title, line)} ({sum(cell.tokens for cell in cells.values()) / len(cells):.0f})"


def blocks(found: MeasuredTable, clear: Mapping[int, Collection[str]]) -> list[Block]:
    """The unreduced model, then one block per budget, with the best and second-best score of each column.

    Args:
        clear: line -> benchmarks on which it differs significantly from the paper's method.
    """
    names = [column.benchmark for column in found.columns]
    whole = [*(found.cells[0, name].whole for name in names), False]
    groups: dict[Budget | None, list[int]] = {}
    for index, line in enumerate(found.lines):
        groups.setdefault(line.budget, []).append(index)
    made = []
    for budget, indices in groups.items():
        rows: list[tuple[str, Sequence[float | None]]] = []
        ranked, intervals, marked = [], [], set()
        for place, index in enumerate(indices):
            cells = found.row(index)
            values = [*(cells[name].value if name in cells else None for name in names), found.of_full(index)]
            rows.append((label(found, index), values))
            # A row that has other tokens than its budget has no rank, nor has the only row of a block.
            has_rank = budget is not None and len(indices) > 1 and not found.lines[index].mark
            ranked.append(values if has_rank else [None] * len(values))
            intervals.append([cells[name].interval if name in cells else "" for name in names])
            marked |= {(place, column) for column, name in enumerate(names) if name in clear.get(index, ())}
        ranks = [places([values[column] for values in ranked], whole[column]) for column in range(len(whole))]
        best, second = [first for first, _ in ranks], [second for _, second in ranks]
        made.append(Block(budget_title(budget), rows, best, second, whole, intervals, frozenset(marked)))
    return made


def with_reported(
    measured: Sequence[Block],
    rows: Sequence[Reported],
    table: Table,
    columns: Sequence[Column],
    full: Mapping[str, float] | None,
) -> list[Block]:
    """The blocks with the reported rows of their budgets, or blocks of reported rows alone if nothing was measured.

    Args:
        columns: as they are shown. A reported value of another metric is left out.
        full: benchmark -> score of the unreduced model, if averages may be in percent of it; else None.
    """
    names = [column.benchmark for column in columns]
    shown = as_in_the_paper(table, columns)
    kept = [
        replace(row, scores={name: row.scores[name] for name in names if name in row.scores and name in shown})
        for row in rows
    ]
    kept = with_averages([row for row in kept if row.scores], names, full)
    points = [*(any(row.scores.get(name, 0) > 100 for row in kept) for name in names), False]
    whole = measured[0].whole if measured else points
    nothing = [frozenset[int]()] * (len(names) + 1)
    found = []
    for title in map(budget_title, (None, *table.budgets)):
        group = [row for row in kept if budget_title(row.budget) == title]
        block = next((one for one in measured if one.title == title), Block(title, (), nothing, nothing, whole))
        if block.rows or group:
            found.append(replace(block, reported=group, benchmarks=names))
    return found


def as_in_the_paper(table: Table, columns: Sequence[Column]) -> set[str]:
    """The benchmarks whose columns show the same metric as the paper's columns."""
    heads = {column.benchmark: column.title for column in table.columns}
    return {column.benchmark for column in columns if heads[column.benchmark] == column.title}


def lost_values(rows: Sequence[Reported], table: Table, columns: Sequence[Column]) -> list[str]:
    """A note that names the columns whose reported values are left out, because they show another metric."""
    shown = as_in_the_paper(table, columns)
    lost = [
        c.title for c in table.columns if c.benchmark not in shown and any(c.benchmark in row.scores for row in rows)
    ]
    return [f"Values as reported on {', '.join(lost)} are left out: no column here shows that metric."] if lost else []


def budget_title(budget: Budget | None) -> str:
    """ "192 tokens", or "1/3 of the tokens"; "" for the unreduced model."""
    if budget is None:
        return ""
    return f"{budget} tokens" if isinstance(budget, int) else f"{budget} of the tokens"


def places(values: Sequence[float | None], whole: bool = False) -> tuple[frozenset[int], frozenset[int]]:
    """The rows with the best value, and those with the second-best. Values that print alike share a place."""
    printed = [None if value is None else float(number(value, whole)) for value in values]
    order = [*sorted({value for value in printed if value is not None}, reverse=True), math.nan, math.nan]
    best, second = (frozenset(i for i, value in enumerate(printed) if value == wanted) for wanted in order[:2])
    return best, second


# -- the document ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Section:
    """A further table of the page: a heading, what it means, columns and rows of text."""

    title: str
    about: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Document:
    """A table of a paper, measured.

    Attributes:
        model: name of the model that ran.
        is_toy: a bundled toy model ran. Every format says so, and shows no published value beside its numbers.
        columns: heads of the wide table, the average last.
        blocks: the wide table; empty for kinds that have none.
        entries: one per cell.
        checks: of the gate; empty if there was nothing to compare with.
        facts: (name, text) lines under the title.
        points: for plots, one per method and budget: tokens, ttft_ms and score. The score is the average in percent of
            full; in an overview it is the score itself, with the bars of its interval.
        images: caption -> file that shows what a method keeps of one image.
        pairs: the rows of the file of pairs; only an overview has them.
        only_reported: nothing was measured.
    """

    table: Table
    model: str
    is_toy: bool
    facts: Sequence[tuple[str, str]]
    columns: Sequence[str]
    blocks: Sequence[Block]
    entries: Sequence[Entry]
    sections: Sequence[Section]
    checks: Sequence[Check] = ()
    notes: Sequence[str] = field(default_factory=tuple)
    points: Sequence[Mapping[str, object]] = field(default_factory=tuple)
    images: Mapping[str, Path] = field(default_factory=dict)
    pairs: Sequence[Sequence[str]] = ()
    only_reported: bool = False

    @property
    def title(self) -> str:
        """The table's title, with the model that ran if it is not the paper's."""
        if self.only_reported:
            return f"{self.table.title}, published values"
        return f"{self.table.title}, run on the TOY MODEL {self.model}" if self.is_toy else self.table.title

    @property
    def banner(self) -> str:
        """The first sentence of the page if a toy model ran or nothing was measured; "" otherwise."""
        if self.only_reported:
            return "NOTHING WAS MEASURED: every value of this table is as its source reports it."
        if not self.is_toy:
            return ""
        about = f"{TOY_BANNER} Published numbers, which are of {self.table.model_title}, are left out."
        return about + " The rows as reported were added by hand; compare none of them with the toy's." * bool(
            self.reported
        )

    @property
    def marked(self) -> list[str]:
        """What the gate found wrong."""
        return sentences(self.checks)

    @property
    def baseline(self) -> list[str]:
        """The gate's verdict on each benchmark."""
        return [f"{one.cell.column.title} {one.verdict}" for one in self.checks]

    @property
    def ours(self) -> str:
        """Label of the paper's method."""
        rows = self.table.rows
        return next((row.title for row in rows if row.method == self.table.ours), self.table.ours)

    @property
    def reported(self) -> list[Reported]:
        """The rows that were not measured here."""
        return [row for block in self.blocks for row in block.reported]

    @property
    def has_published(self) -> bool:
        return any(entry.published is not None for entry in self.entries)


def reported_document(table: Table, rows: Sequence[Reported], command: str) -> Document:
    """The table of what sources report; no model and no data are needed."""
    blocks = with_reported((), rows, table, table.columns, None)
    return Document(
        table,
        table.model_title,
        False,
        [("Paper's model", table.model_title), ("Command", f"`{command}`")],
        [*(column.title for column in table.columns), "average"],
        blocks,
        (),
        (),
        notes=[*reported_notes([row for block in blocks for row in block.reported]), *table.notes],
        only_reported=True,
    )


def facts_of(table: Table, where: RunTarget, found: MeasuredTable, command: str) -> list[tuple[str, str]]:
    """Model, data, questions of each benchmark, command and commits of the page."""
    run, parts = where.run, []
    for cell in found.row(0).values():
        of = f" of {cell.available:,}" if cell.questions < cell.available else ""
        parts.append(f"{cell.column.title} {cell.questions:,}{of}")
    questions = ", ".join(parts) + (f" (the first {run.limit:,} of each)" if run.limit else "")
    commits = sorted({cell.commit[:10] for cell in found.cells.values()})
    options = ", ".join(f"{key}={value}" for key, value in run.image_options.items())
    return [
        ("Paper's model", table.model_title),
        ("Measured on", relative(run.model) + (" (toy model)" if where.is_toy else "")),
        ("Data", relative(run.data)),
        *([("Image options", options)] if options else []),
        ("Questions", questions),
        ("Command", f"`{command}`"),
        ("Commit", ", ".join(commits) or "n/a"),
    ]


def notes_of(
    table: Table, found: MeasuredTable, entries: Sequence[Entry], reported: Sequence[Reported] = ()
) -> list[str]:
    """What a reader must know about the numbers."""
    has_published, cells = any(entry.published for entry in entries), list(found.cells.values())
    notes = [*reported_notes(reported), *table.notes]
    notes += [f"{mark} {MARK_TEXTS[mark]}." for mark in marks_of(found)]
    for column in found.columns:
        if known := benchmarks.get(column.benchmark).blind:
            notes.append(f"{column.title} is mostly answerable without its images: {known}.")
    for index, line in enumerate(found.lines):
        spreads = [f"{cell.column.title} {cell.spread}" for cell in found.row(index).values() if cell.spread]
        if spreads:
            notes.append(
                f"{SPREAD} {line.title} at {line.budget}, where the image decides: {'; '.join(spreads)} "
                "(fewest to most of an image)."
            )
    splits = [f"{column.title} ({column.published_split})" for column in found.columns if column.published_split]
    if has_published and splits:
        notes.append(f"Published values are of splits that servers grade, ours of val: {', '.join(splits)}.")
    if has_published:
        notes.append(
            "A difference is to the most trusted published number that is like ours: same split, metric, budget and "
            "convention, and of the code that the row runs. ? marks what is disputed, ≠ what is not like ours or of "
            "low trust."
        )
    unlike = {
        f"{value.title}: {why}"
        for entry in entries
        for value in entry.published or ()
        if not value.disputed and (why := value.obstacle(entry.convention))
    }
    notes += [f"Not compared with {one}." for one in sorted(unlike)]
    notes += [f"Cannot run: {reason}" for reason in described(found.lines)]
    notes += [f"n/a: {reason.rstrip('.')}." for reason in found.failed]
    other = {
        f"{cell.column.title} (not {cell.column.metric})"
        for cell in cells
        if cell.column.metric and cell.metric != cell.column.metric
    }
    notes += [
        f"n/a: operations of {cell.line.title} at {budget_title(cell.line.budget or cell.line.size)} on "
        f"{cell.column.title}, counted for {cell.no_flops}."
        for cell in cells
        if cell.no_flops
    ]
    withheld = {f"{cell.column.title}: {cell.no_interval.partition(';')[0]}" for cell in cells if cell.no_interval}
    notes += [f"No interval, [n/a], on {one}." for one in sorted(withheld)]
    full = found.row(0)
    zero = [cell.column.title for cell in full.values() if cell.value == 0]
    if zero:
        notes.append(f"Averages are n/a: full scores 0 on {', '.join(zero)}.")
    runs = {f"{cell.line.title} at {cell.line.size}, {cell.column.title}": cell.stored for cell in cells}
    # A cell that is off its budget has a mark and a note already.
    made = circumstances({name: {**one.result, "off_budget": None} for name, one in runs.items() if one is not None})
    notes += [f"{note[0].upper()}{note[1:]}." for note in made]
    if other:
        notes.append(f"{INSTEAD}; shown instead: " + "; ".join(sorted(other)) + ".")
    return notes
