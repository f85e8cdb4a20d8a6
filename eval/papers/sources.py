"""The published rows that a table should be compared with, as Markdown, with their sources and what is disputed."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

from eval.config import FULL
from eval.papers.published import (
    AVERAGE,
    CONVENTIONS,
    EFFICIENCY,
    KINDS,
    POINTS,
    Published,
    Row,
    Source,
    Value,
    same_tokens,
    share,
)
from eval.papers.spec import Budget, Column, Table
from eval.tables.page import markdown

DISPUTED = "?"
SAME_SCORE = 0.5  # points; two sources that differ by no more agree
SAME_POINTS = 0.01  # of the score, for MME
COSTS = {"tflops": "TFLOP", "latency_ms": "ms", "speedup": "speed-up"}


def budget_title(budget: Budget) -> str:
    """ "192 tokens", or "1/3 of the tokens"."""
    return f"{budget:,} tokens" if isinstance(budget, int) else f"{budget} of the tokens"


def number(value: float, column: str) -> str:
    """As printed: at least one decimal, but for MME's points."""
    text = f"{value:.6g}"
    return text if "." in text or column in POINTS else f"{text}.0"


def split_text(source: Source) -> str:
    """What a source's numbers are of, in words."""
    if isinstance(source.split, dict):
        return "; ".join(f"{column}: {split}" for column, split in source.split.items())
    return "the usual splits" if source.split == "usual" else "splits not named"


class Sources:
    """The rows of a file of published scores that belong to a table.

    Attributes:
        rows: of the table's methods, in its order, at falling budgets.
    """

    def __init__(self, table: Table, columns: Sequence[Column], published: Published):
        self._published, self._table = published, table
        self._titles = {column.published: column.title for column in columns if column.published}
        self._labels = {row.published_name: row.title for row in table.rows if row.published_name}
        order = list(self._labels)
        kept = [row for row in published.rows if row.method in self._labels and self._has_column(row)]
        self.rows = sorted(kept, key=lambda row: (order.index(row.method), -row.share))
        self._full = [row for row in published.rows if row.method == FULL and self._has_column(row)]

    @property
    def full(self) -> str:
        """The unreduced model."""
        return self._markdown(self._full)

    @property
    def budgets(self) -> list[tuple[str, str]]:
        """(title, rows) of each budget of the table; empty text where there is no row."""
        return [(budget_title(budget), self._markdown(self._at(budget))) for budget in self._table.budgets]

    @property
    def others(self) -> str:
        """Rows at budgets that the table does not have."""
        inside = [row for budget in self._table.budgets for row in self._at(budget)]
        return self._markdown([row for row in self.rows if row not in inside], tokens=True)

    @property
    def sources(self) -> str:
        """One line for each source of the rows."""
        lines = []
        for key in dict.fromkeys(row.source for row in (*self._full, *self.rows)):
            source = self._published.sources[key]
            note = f" {source.note[0].upper()}{source.note[1:]}." if source.note else ""
            about = (
                f"{KINDS[source.kind]}; trust {source.trust}; {CONVENTIONS[source.convention]}; {split_text(source)}"
            )
            lines.append(f"* {source.title} ({about}): {source.where}.{note}")
        return "\n".join(lines)

    @property
    def remarks(self) -> list[tuple[str, str]]:
        """(title, lines) of what is disputed and of what contradicts; only those that there are."""
        found = {
            "Disputed numbers": self._reasons(),
            "Cells whose sources differ, and scores that fall with more tokens": self._contradictions(),
        }
        return [(f"{title} ({len(lines)})", "\n".join(lines)) for title, lines in found.items() if lines]

    def _has_column(self, row: Row) -> bool:
        return any(column in row.scores for column in (*self._titles, AVERAGE, *EFFICIENCY))

    def _at(self, budget: Budget) -> list[Row]:
        return [row for row in self.rows if same_tokens(row.share, share(budget))]

    def _markdown(self, rows: Iterable[Row], tokens: bool = False) -> str:
        """Method, source, trust, scores, costs where a row has them; `tokens` adds the budget. Empty without rows."""
        rows = list(rows)
        costs = {name: title for name, title in COSTS.items() if any(name in row.scores for row in rows)}
        columns = {**self._titles, AVERAGE: "average", **costs}
        header = ["method", *(["tokens"] if tokens else []), "source", "trust", *columns.values()]
        body = []
        for row in rows:
            about = self._published.value(row, next(iter(row.scores)))
            cells = [self._cell(row, column) for column in columns]
            body.append([self._label(row), *([str(row.tokens)] if tokens else []), about.title, about.trust, *cells])
        words = header.index("trust") + 1  # columns of words are aligned on the left
        return markdown(header, body).replace(f"|---|{'---:|' * (words - 1)}", f"|{'---|' * words}", 1) if body else ""

    def _label(self, row: Row) -> str:
        return self._labels.get(row.method, row.method)

    def _cell(self, row: Row, column: str) -> str:
        """The number, marked if disputed; empty where the source has none."""
        if column not in row.scores:
            return ""
        return f"{number(row.scores[column], column)}{DISPUTED if row.reason(column) else ''}"

    def _reasons(self) -> list[str]:
        """Why numbers of the shown rows are disputed."""
        lines = []
        for row in (*self._full, *self.rows):
            if isinstance(row.disputed, dict):
                parts = (f"{self._titles.get(column, column)}: {why}" for column, why in row.disputed.items())
                reason = "; ".join(parts)
            else:
                reason = row.disputed or ""
            if reason:
                title = self._published.sources[row.source].title
                lines.append(f"* {title}, {self._label(row)} at {row.tokens}: {reason}.")
        return lines

    def _contradictions(self) -> list[str]:
        """What the sources say against each other or themselves, for the shown methods and columns."""
        methods, columns = {FULL, *self._labels}, {*self._titles, AVERAGE}
        found = [one for one in contradictions(self._published) if one.method in methods and one.column in columns]
        return [f"* {one}" for one in found]


@dataclass(frozen=True)
class Contradiction:
    """Published numbers that cannot all be right, or need an explanation.

    Attributes:
        kind: "sources" where two sources differ about one cell, "tokens" where a score falls although more tokens are
            kept, within one source.
        values: "sources": all values of the cell, the most trusted first. "tokens": at fewer tokens, then at more.
    """

    kind: Literal["sources", "tokens"]
    method: str
    column: str
    values: tuple[Value, ...]

    def __str__(self) -> str:
        if self.kind == "tokens":
            few, many = self.values
            return (
                f"{self.method}, {self.column}: {few.value:g} at {few.tokens} tokens but {many.value:g} at "
                f"{many.tokens} ({few.title})"
            )
        found = "; ".join(f"{value.value:g} ({value.title})" for value in self.values)
        return f"{self.method} at {self.values[0].tokens} tokens, {self.column}: {found}"


def contradictions(published: Published) -> list[Contradiction]:
    """Cells whose sources differ by more than half a point (1 % for MME), then scores that fall by more than that
    when more tokens are kept, within one source. Costs and users' own rows are left out."""
    own = {key for key, source in published.sources.items() if source.kind == "ours"}
    rows = tuple(row for row in published.rows if row.kind != "ours" and row.source not in own)
    others = replace(published, rows=rows)
    return [*between_sources(others), *against_tokens(others)]


def between_sources(published: Published) -> Iterator[Contradiction]:
    """Cells whose sources differ."""
    cells = dict.fromkeys(
        (row.method, row.share, column) for row in published.rows for column in row.scores if column not in EFFICIENCY
    )
    done: set[tuple[str, str, frozenset[Value]]] = set()
    for method, tokens, column in cells:
        values = published.values(method, str(tokens), column)
        key = (method, column, frozenset(values))  # 288 and 290 tokens are one cell
        numbers_found = [value.value for value in values]
        if key not in done and differ(min(numbers_found), max(numbers_found), column):
            yield Contradiction("sources", method, column, tuple(values))
        done.add(key)


def against_tokens(published: Published) -> Iterator[Contradiction]:
    """Scores that are lower with more tokens, in one source."""
    reduced = [row for row in published.rows if row.method != FULL]
    for one, other in combinations(reduced, 2):
        if (one.method, one.source) != (other.method, other.source):
            continue
        few, many = sorted((one, other), key=lambda row: row.share)
        for column in few.scores:
            if column in EFFICIENCY or column not in many.scores:
                continue
            if few.scores[column] > many.scores[column] and differ(few.scores[column], many.scores[column], column):
                pair = (published.value(few, column), published.value(many, column))
                yield Contradiction("tokens", few.method, column, pair)


def differ(one: float, other: float, column: str) -> bool:
    """Whether two scores of a column differ by more than sources that agree do; decimals as printed."""
    allowed = SAME_POINTS * max(one, other) if column in POINTS else SAME_SCORE
    return abs(one - other) > allowed + 1e-9
