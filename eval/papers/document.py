"""Everything that a rendered table says, before it takes a format."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eval.config import TOY_BANNER
from eval.papers.gate import Check, sentences
from eval.papers.measured import Measured, relative
from eval.papers.own import OWN_MARK, OWN_TEXT, OwnRow
from eval.papers.plan import Where, described
from eval.papers.rows import MARK, MARK_TEXT, Block, Entry
from eval.papers.spec import Column, Table

INSTEAD = "These data do not give the paper's metric"


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
        is_toy: it is a bundled toy: every format says so, and nothing published stands beside its numbers.
        columns: heads of the wide table, the average last.
        blocks: the wide table; empty for kinds that have none.
        entries: one per cell.
        checks: the gate's; empty where it was not asked.
        own: rows that the user added.
        facts: (name, text) lines under the title.
        points: for plots, one per method and budget: tokens, ttft_ms and score, the average in percent of full.
        pictures: caption -> file, what each method keeps of one image.
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
    own: Sequence[OwnRow] = ()
    notes: Sequence[str] = field(default_factory=tuple)
    points: Sequence[Mapping[str, object]] = field(default_factory=tuple)
    pictures: Mapping[str, Path] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The table's title, and which model ran where that is not the paper's."""
        return f"{self.table.title}, run on the TOY MODEL {self.model}" if self.is_toy else self.table.title

    @property
    def banner(self) -> str:
        """What stands first where a toy ran; "" elsewhere."""
        if not self.is_toy:
            return ""
        return f"{TOY_BANNER} Published numbers, which are of {self.table.model_title}, are left out."

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


def notes_of(table: Table, found: Measured, entries: Sequence[Entry], own: Sequence[OwnRow] = ()) -> list[str]:
    """What a reader must know about the numbers."""
    has_published, cells = any(entry.published for entry in entries), list(found.cells.values())
    notes = list(table.notes)
    if any(line.by_kept and line.setting for line in found.lines):
        notes.append(f"{MARK} {MARK_TEXT}.")
    splits = [f"{column.title} ({column.published_split})" for column in found.columns if column.published_split]
    if has_published and splits:
        notes.append(f"Published values are of splits that servers grade, ours of val: {', '.join(splits)}.")
    if has_published:
        notes.append(
            "A difference is to the most trusted published number that is like ours: same split, metric, budget and "
            "convention, and of the code that the row runs. ? marks what is disputed, ≠ what is not like ours."
        )
    unlike = {
        f"{value.title}: {why}"
        for entry in entries
        for value in entry.published or ()
        if not value.disputed and (why := value.obstacle(entry.convention))
    }
    notes += [f"Not compared with {one}." for one in sorted(unlike)]
    if own:
        notes.append(f"{OWN_MARK} {OWN_TEXT}.")
    notes += [f"Cannot run: {reason}" for reason in described(found.lines)]
    notes += [f"n/a: {reason.rstrip('.')}." for reason in found.failed]
    other = {
        f"{cell.column.title}: {cell.metric}"
        for cell in cells
        if cell.column.metric and cell.metric != cell.column.metric
    }
    withheld = {f"{cell.column.title}: {cell.no_interval.partition(';')[0]}" for cell in cells if cell.no_interval}
    notes += [f"No interval, [n/a], on {one}." for one in sorted(withheld)]
    full = found.row(0)
    zero = [cell.column.title for cell in full.values() if cell.value == 0]
    if zero:
        notes.append(f"Averages are n/a: full scores 0 on {', '.join(zero)}.")
    if other:
        notes.append(f"{INSTEAD}; shown instead: " + "; ".join(sorted(other)) + ".")
    return notes
