"""Everything that a rendered table says, before it takes a format."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eval.papers.measured import Measured, relative
from eval.papers.plan import Where, described
from eval.papers.rows import MARK, MARK_TEXT, Block, Entry
from eval.papers.spec import Column, Table

TOY = (
    "Toy model: the numbers are of a small LLaVA trained in this repository on drawn scenes. They show what each "
    "method costs and keeps there, not the order of methods on a 7B model; the published columns, which are of the "
    "paper's model, are left out."
)


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
        columns: heads of the wide table, the average last.
        blocks: the wide table; empty for kinds that have none.
        entries: one per cell.
        marked: the gate's findings; empty if it passed or was not asked.
        unchecked: why the gate says nothing; "" if it checked.
        facts: (name, text) lines under the title.
        points: for plots, one per method and budget: tokens, ttft_ms and score, the mean of full in percent.
        pictures: caption -> file, what each method keeps of one image.
    """

    table: Table
    facts: Sequence[tuple[str, str]]
    columns: Sequence[str]
    blocks: Sequence[Block]
    entries: Sequence[Entry]
    sections: Sequence[Section]
    marked: Sequence[str] = ()
    unchecked: str = ""
    notes: Sequence[str] = field(default_factory=tuple)
    points: Sequence[Mapping[str, object]] = field(default_factory=tuple)
    pictures: Mapping[str, Path] = field(default_factory=dict)

    @property
    def ours(self) -> str:
        """Label of the paper's method."""
        rows = self.table.rows
        return next((row.title for row in rows if row.method == self.table.ours), self.table.ours)

    @property
    def has_published(self) -> bool:
        return any(entry.published is not None for entry in self.entries)


def facts_of(table: Table, where: Where, found: Measured, command: str) -> list[tuple[str, str]]:
    """Model, data, command and commits of the page."""
    cells = list(found.cells.values())
    commits = sorted({cell.commit[:10] for cell in cells})
    place = where.place
    facts = [
        ("Paper's model", table.model_title),
        ("Measured on", relative(place.model) + (" (toy model)" if where.is_toy else "")),
        ("Data", relative(where.data)),
        ("Questions", questions_text(found.columns, found, where.limit)),
        ("Command", f"`{command}`"),
        ("Commit", ", ".join(commits) or "n/a"),
    ]
    if place.picture:
        facts.insert(3, ("Image options", ", ".join(f"{key}={value}" for key, value in place.picture.items())))
    return facts


def questions_text(columns: Sequence[Column], found: Measured, limit: int | None) -> str:
    """How many questions of each benchmark were asked."""
    full = found.row(0)
    parts = []
    for column in columns:
        if column.benchmark in full:
            cell = full[column.benchmark]
            of = f" of {cell.available:,}" if cell.questions < cell.available else ""
            parts.append(f"{column.title} {cell.questions:,}{of}")
    return ", ".join(parts) + (f" (the first {limit:,} of each)" if limit else "")


def notes_of(table: Table, found: Measured, has_published: bool) -> list[str]:
    """What a reader must know about the numbers."""
    notes = list(table.notes)
    if any(line.by_kept and line.setting for line in found.lines):
        notes.append(f"{MARK} {MARK_TEXT}.")
    splits = [f"{column.title} ({column.published_split})" for column in found.columns if column.published_split]
    if has_published and splits:
        notes.append(f"Published values are of splits that servers grade, ours of val: {', '.join(splits)}.")
    notes += [f"Cannot run: {reason}" for reason in described(found.lines)]
    notes += [f"n/a: {reason.rstrip('.')}." for reason in found.failed]
    other = {
        f"{cell.column.title}: {cell.metric}"
        for cell in found.cells.values()
        if cell.column.metric and cell.metric != cell.column.metric
    }
    if other:
        notes.append("These data do not give the paper's metric; shown instead: " + "; ".join(sorted(other)) + ".")
    return notes
