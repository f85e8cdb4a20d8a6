"""A table as a page of Markdown."""

from collections.abc import Sequence

from eval.papers.document import Document
from eval.papers.rows import Block, Entry, difference_to, ours_text, published_text
from eval.tables.page import markdown

LEGEND = (
    "Bold: best of a budget; underlined: second best. "
    "Average: mean over the benchmarks of the score in percent of full."
)


def page(document: Document, picture: str = "") -> str:
    """The whole page; `picture` is the file of its figure, if there is one."""
    parts = [f"# {document.title}"]
    if document.banner:
        parts.append(f"**{document.banner}**")
    parts.append(document.table.about)
    parts.append("\n".join(f"* {name}: {text}" for name, text in document.facts))
    if document.marked:
        lines = "\n".join(f"> * {line}" for line in document.marked)
        parts.append(
            "> **Marked: the unreduced model is not the published one.** Reduced numbers below cannot be compared with "
            f"the paper's before this is explained.\n>\n{lines}"
        )
    if document.baseline:
        parts.append(
            "Baseline, full beside published numbers:\n\n" + "\n".join(f"* {line}" for line in document.baseline)
        )
    if document.blocks:
        parts.append(wide(document.columns, document.blocks))
        parts.append(LEGEND)
    if picture:
        parts.append(f"![Average against tokens]({picture})")
    for section in document.sections:
        parts += [f"## {section.title}", section.about, markdown(section.columns, section.rows)]
    if document.notes:
        parts.append("## Notes\n\n" + "\n".join(f"* {note}" for note in document.notes))
    if document.entries:
        parts += ["## Every cell", cells(document.entries, document.has_published)]
    return "\n\n".join(parts) + "\n"


def wide(columns: Sequence[str], blocks: Sequence[Block]) -> str:
    """Methods by benchmarks, a row with the budget above each group."""
    rows: list[Sequence[str]] = []
    for block in blocks:
        if block.title:
            rows.append([f"***{block.title}***", *[""] * len(columns)])
        rows += [
            [name, *(styled(value, index, column, block) for column, value in enumerate(values))]
            for index, (name, values) in enumerate(block.rows)
        ]
    return markdown(["method", *columns], rows)


def styled(value: float | None, row: int, column: int, block: Block) -> str:
    """A value: bold if it is the best of its column, underlined if the second."""
    if value is None:
        return "n/a"
    text = block.text(value, column)
    return f"**{text}**" if row in block.best[column] else f"<u>{text}</u>" if row in block.second[column] else text


def cells(entries: Sequence[Entry], has_published: bool) -> str:
    """One row per cell: published, ours, difference, tokens, command, run, commit."""
    header = ["method", "budget", "benchmark", *(["published"] if has_published else []), "ours [95 % interval]"]
    header += [*(["difference"] if has_published else []), "tokens", "merged", "command", "run", "commit"]
    rows = []
    for entry in entries:
        cell = entry.cell
        rows.append(
            [
                cell.line.title,
                str(cell.line.budget or "all"),
                cell.column.title,
                *([published_text(entry.published, entry.convention)] if has_published else []),
                ours_text(cell),
                *([difference_to(entry)] if has_published else []),
                f"{cell.tokens:.1f}",
                f"{cell.merged:.1f}",
                f"`{cell.command}`",
                f"`{cell.run}`",
                cell.commit[:10],
            ]
        )
    summary = f"<summary>{len(rows):,} cells: score, tokens as counted in every layer, command, run, commit</summary>"
    return f"<details>{summary}\n\n{markdown(header, rows)}\n\n</details>"
