"""Rows that a table shows without having measured them: published rows, and an author's own from a file (`--add`).

Each row comes from one source and is shown "as reported" below the measured rows of its budget. It is neither ranked
nor tested.
"""

import csv
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from eval.config import FULL
from eval.papers import published
from eval.papers.published import OTHER_METHODS, RANGES, SAME_TOKENS, TRUST, Published, share
from eval.papers.spec import Budget, Column, Table
from eval.yaml_files import read_yaml
from llava.budget import count_or_ratio
from llava.errors import UserError, suggestion
from llava.reduction import registry

FIELDS = ("label", "budget", "cite", "source", "note")
KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9:._/+-]*")  # of BibTeX, as it stands in \cite
OWN_BASE, MEASURED_BASE, OTHER_BASE = (
    "of full in the same source or file", "of full as measured here", "of full as another source reports it",
)  # fmt: skip


@dataclass(frozen=True)
class Reported:
    """A row that was not measured here.

    Attributes:
        budget: as the table has it; None for the unreduced model.
        scores: benchmark -> value as its source prints it.
        source: title of the source; the author's words in an added row, may be "".
        cite: BibTeX key; "" if none is known.
        where: where the source was read; "" for an added row.
        marks: benchmark -> "?" for a disputed value, "≠" for one that is not like the table's.
        disputed: benchmark -> why.
        full: benchmark -> score of the unreduced model in the same source, the base of the average; may be empty.
        average: mean over the table's benchmarks of the score in percent of the unreduced model's; None if a benchmark
            or the unreduced model is missing.
        base: which unreduced model the average is in percent of.
    """

    label: str
    budget: Budget | None
    scores: Mapping[str, float]
    source: str
    cite: str = ""
    where: str = ""
    note: str = ""
    marks: Mapping[str, str] = field(default_factory=dict)
    disputed: Mapping[str, str] = field(default_factory=dict)
    full: Mapping[str, float] = field(default_factory=dict)
    average: float | None = None
    base: str = ""

    @property
    def name(self) -> str:
        """The row as Markdown and HTML name it: "FastV, as reported [RESTORE, Table 1]"."""
        source = self.source or self.cite
        return f"{self.label}, as reported" + (f" [{source}]" if source else "")


# -- an author's own rows ---------------------------------------------------------------------------------------------


def read_added(path: Path, table: Table) -> list[Reported]:
    """The rows of a .csv or .yaml file, checked against a table.

    Columns of the CSV, and keys of each row of the YAML list: `FIELDS` and the table's benchmarks, by the heads of its
    columns or by their names in this project. An empty cell is a missing value. The row called full has no budget.

    Raises:
        UserError: something in the file is wrong; the sentence names the file and the line.
    """
    rows: list[Reported] = []
    seen: dict[tuple[object, ...], str] = {}
    for head, place, cells in csv_rows(path) if path.suffix == ".csv" else yaml_rows(path):
        row = row_of(place, by_benchmark(head, cells, table), table)
        key = (row.label, row.budget, row.cite, row.source)
        if key in seen:
            raise UserError(
                f"{place} gives {row.label} at this budget a second time, after {seen[key]}; leave one out."
            )
        seen[key] = place
        rows.append(row)
    if not rows:
        raise UserError(f"{path} has no rows; write a header and a row for each method and budget.")
    full = {(row.cite, row.source): row.scores for row in rows if row.budget is None}
    alone = next(iter(full.values())) if len(full) == 1 else {}
    return [replace(row, full=full.get((row.cite, row.source), alone)) for row in rows]


def csv_rows(path: Path) -> Iterable[tuple[str, str, Mapping[str, str]]]:
    """(place of the header, place, cells by the heads of their columns) of each row; empty lines are skipped."""
    try:
        reader = csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""), strict=True)
        lines = [(f"{path} line {reader.line_num}", [cell.strip() for cell in cells]) for cells in reader]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} is no CSV file that can be read: {' '.join(str(error).split())}.") from None
    (top, head), *rest = [(place, cells) for place, cells in lines if any(cells)] or [("", [])]
    if len(head) == 1 and ";" in head[0]:
        raise UserError(f"{top} separates its columns by semicolons; write commas.")
    if twice := [name for number, name in enumerate(head) if name in head[:number]]:
        raise UserError(f"{top} has the column {twice[0]!r} twice; leave one out.")
    for place, cells in rest:
        if len(cells) != len(head):
            raise UserError(
                f"{place} has {len(cells)} cells and the header {len(head)}; leave a cell empty where a value is "
                "missing, and put a text with commas in quotes."
            )
        yield top, place, dict(zip(head, cells, strict=True))


def yaml_rows(path: Path) -> Iterable[tuple[str, str, Mapping[str, str]]]:
    """(place of the keys, place, values by their keys) of each entry of the file's list."""
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"Rows to add are a .csv or .yaml file, got {path}.")
    content = read_yaml(path)
    if content is None:
        return
    if not isinstance(content, list):
        raise UserError(f"{path} should hold a list of rows (- label: ...), got {type(content).__name__}.")
    root = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
    assert root is not None
    for entry, node in zip(content, root.value, strict=True):
        place = f"{path} line {node.start_mark.line + 1}"
        if not isinstance(entry, dict):
            raise UserError(f"{place} should be a row of keys and values, got {entry!r:.40}.")
        yield place, place, {str(key): "" if value is None else str(value).strip() for key, value in entry.items()}


def by_benchmark(place: str, cells: Mapping[str, str], table: Table) -> dict[str, str]:
    """Field or benchmark -> cell. The file may call a benchmark by its column's head or by its name here."""
    names = {column.benchmark: column.benchmark for column in table.columns}
    names |= {column.title: column.benchmark for column in table.columns} | {name: name for name in FIELDS}
    found: dict[str, str] = {}
    for name, text in cells.items():
        if name not in names:
            allowed = ", ".join([*FIELDS, *(column.title for column in table.columns)])
            raise UserError(f"{place} has an unknown column {name!r}.{suggestion(name, names)} Allowed: {allowed}.")
        if names[name] in found:
            raise UserError(f"{place} has the column {name!r} twice, once by another name; leave one out.")
        found[names[name]] = text
    return found


def row_of(place: str, cells: Mapping[str, str], table: Table) -> Reported:
    """One row of a file."""
    label, cite, source, note = (" ".join(cells.get(name, "").split()) for name in ("label", "cite", "source", "note"))
    if not label:
        raise UserError(f"{place} has no label; write the method's name.")
    if cite and not KEY.fullmatch(cite):
        raise UserError(f"{place}: cite should be one BibTeX key, such as ye2025fitprune, got {cite!r}.")
    columns = {column.benchmark: column for column in table.columns}
    scores = {name: score_of(place, columns[name], text) for name, text in cells.items() if name in columns and text}
    if not scores:
        raise UserError(f"{place} has no score for {label}; fill one of {', '.join(c.title for c in table.columns)}.")
    budget = budget_of(place, label, cells.get("budget", ""), table)
    return Reported(label, budget, scores, source, cite, note=note)


def score_of(place: str, column: Column, text: str) -> float:
    """A score within the range of its column."""
    least, most = RANGES.get(column.published or column.benchmark, (0, 100))
    try:
        value = float(text)
    except ValueError:
        raise UserError(f"{place}: {column.title} should be a number such as 61.9, got {text!r:.40}.") from None
    if not (math.isfinite(value) and least <= value <= most):
        raise UserError(f"{place}: {column.title} should be {least} to {most}, got {text}.")
    return value


def budget_of(place: str, label: str, text: str, table: Table) -> Budget | None:
    """The budget of the table that a text stands for; None for the unreduced model."""
    allowed = f"one of {', '.join(map(str, table.budgets))}"
    if not text:
        if label == FULL:
            return None
        raise UserError(f"{place} has no budget for {label}; write {allowed}, or call the unreduced model {FULL}.")
    if label == FULL:
        raise UserError(f"{place} gives {FULL}, the unreduced model, the budget {text}; leave it empty.")
    known = {count_or_ratio(budget): budget for budget in table.budgets}
    try:
        return known[count_or_ratio(text)]
    except (ValueError, KeyError):
        raise UserError(f"{place} has the budget {text!r:.40}, which the table lacks; write {allowed}.") from None


# -- published rows ---------------------------------------------------------------------------------------------------


def published_rows(table: Table, source: Published) -> list[Reported]:
    """One published row for each method at each budget of the table, also for methods that have no row in it.

    Undisputed rows come before disputed ones, then the more trusted, then those with more columns.
    """
    titles = {FULL: FULL} | {row.published_name: row.title for row in table.rows if row.published_name}
    others = [row.method for row in source.rows] if table.others is None else table.others
    methods = list(dict.fromkeys([*titles, *others]))
    rows = []
    for budget in (None, *table.budgets):
        for method in methods if budget is not None else [FULL]:
            if (budget is None or method != FULL) and (found := best_row(table, source, method, budget)):
                title = titles.get(method) or OTHER_METHODS.get(method) or title_of(method)
                rows.append(as_reported(table, source, found, title, budget))
    return rows


def title_of(method: str) -> str:
    """The name that the paper of a method gives it; of a composition, both names."""
    if "+" in method:
        return "+".join(map(title_of, method.split("+")))
    return registry.method(method).metadata.paper.partition(",")[0] or method


def best_row(table: Table, source: Published, method: str, budget: Budget | None) -> published.PublishedRow | None:
    """The row of a method to show at a budget."""
    names = {column.published for column in table.columns if column.published}

    def fits(row: published.PublishedRow) -> bool:
        if row.method != method or names.isdisjoint(row.scores):
            return False
        wanted = row.share if budget is None else share(budget)
        return abs(row.share - wanted) <= SAME_TOKENS * max(row.share, wanted)

    def order(row: published.PublishedRow) -> tuple[bool, bool, int, int]:
        about = source.sources[row.source]
        trust = TRUST.index(row.trust or about.trust)
        return (row.kind or about.kind) == "ours", isinstance(row.disputed, str), trust, -len(names & set(row.scores))

    return min(filter(fits, source.rows), key=order, default=None)


def as_reported(
    table: Table, source: Published, row: published.PublishedRow, label: str, budget: Budget | None
) -> Reported:
    """A published row with the columns that the table has."""
    values = {c.benchmark: source.value(row, c.published) for c in table.columns if c.published in row.scores}
    unlike = {column.benchmark for column in table.columns if column.published_split}
    unlike |= {name for name, value in values.items() if value.obstacle(table.real.convention)}
    disputed = {name: value.disputed for name, value in values.items() if value.disputed}
    about = source.sources[row.source]
    full = next((one.scores for one in source.rows if (one.method, one.source) == (FULL, row.source)), {})
    return Reported(
        label,
        budget,
        {name: value.value for name, value in values.items()},
        about.title,
        row.source,
        about.where,
        row.note or "",
        {name: "?" if name in disputed else "≠" for name in values if name in unlike},
        disputed,
        {column.benchmark: full[column.published] for column in table.columns if column.published in full},
    )


# -- averages ---------------------------------------------------------------------------------------------------------


def with_averages(
    rows: Sequence[Reported], columns: Sequence[str], measured: Mapping[str, float] | None
) -> list[Reported]:
    """The rows, with an average if a row has all benchmarks of the table and there is an unreduced model to divide by.

    A row with values that are not like the table's is divided only by the unreduced model of its own source.

    Args:
        columns: benchmarks of the table.
        measured: benchmark -> score of the unreduced model as measured here; None if a toy model was measured.
    """
    others = [row.scores for row in rows if row.budget is None and not row.marks]

    def averaged(row: Reported) -> Reported:
        bases: list[tuple[Mapping[str, float], str]] = [(row.full, OWN_BASE)]
        if not row.marks:
            bases += [(measured or {}, MEASURED_BASE), *((full, OTHER_BASE) for full in others)]
        for full, base in bases:
            if all(row.scores.get(name) is not None and full.get(name) for name in columns):
                return replace(
                    row, base=base, average=sum(100 * row.scores[name] / full[name] for name in columns) / len(columns)
                )
        return row

    return [averaged(row) for row in rows]


def notes(rows: Sequence[Reported]) -> list[str]:
    """What a reader must know about reported rows: sources, bases of the averages, marks and the authors' notes."""
    found = []
    for base in (OWN_BASE, MEASURED_BASE, OTHER_BASE):
        if names := dict.fromkeys(row.label for row in rows if row.base == base and row.label != FULL):
            found.append(f"Averages as reported of {', '.join(names)} are in percent {base}.")
    if any(row.marks for row in rows):
        found.append(MARKS)
    sources = {row.source: row for row in rows if row.where}
    found += [f"As reported [{title}]: {row.where}; cited as {row.cite}." for title, row in sources.items()]
    budgets: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.note:
            budgets.setdefault((row.label, row.note), []).append(str(row.budget or "all"))
    return found + [
        f"{label} at {', '.join(dict.fromkeys(at))}, as reported: {note.rstrip('.')}."
        for (label, note), at in budgets.items()
    ]


MARKS = "As reported: ? marks what is disputed, ≠ what is of another split or convention than the table's."


def bibliography(rows: Sequence[Reported]) -> dict[str, dict[str, Any]]:
    """Key -> title, where and address of the published sources, for the file of BibTeX entries.

    An entry says where the numbers were read. Papers that have several tables here share one.
    """
    entries: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row.where and row.cite:
            arxiv = re.search(r"arXiv (\d{4}\.\d{4,5})", row.where)
            github = re.search(r"github\.com/[\w.-]+/[\w.-]+", row.where)
            url = f"https://arxiv.org/abs/{arxiv[1]}" if arxiv else f"https://{github[0]}" if github else ""
            entries[row.cite] = {"title": row.source.partition(", ")[0], "howpublished": row.where, "url": url}
    return entries
