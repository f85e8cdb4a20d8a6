"""A table as CSV: one row per cell, every number, and a hash of the answers."""

import csv
import io

from eval.papers.document import Document
from eval.tables.page import csv_numbers

HEADER = (
    "method", "budget", "counts_kept_tokens", "benchmark", "metric", "score", "low", "high", "published", "source",
    "disputed", "difference", "tokens_per_layer", "merged_tokens", "kv_bytes", "flops", "questions", "available",
    "command", "run", "commit", "finished", "answers_sha256",
)  # fmt: skip


def text(document: Document) -> str:
    """The file; published sources of a cell are joined by ";", the most trusted first."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(HEADER)
    for entry in document.entries:
        cell, values = entry.cell, entry.published or []
        writer.writerow(
            [
                cell.line.title,
                cell.line.budget or "",
                str(cell.line.by_kept).lower(),
                cell.column.benchmark,
                cell.metric,
                *csv_numbers(cell.value, cell.low, cell.high),
                ";".join(f"{value.value:g}" for value in values),
                ";".join(value.source for value in values),
                ";".join(value.disputed or "" for value in values).strip(";"),
                *csv_numbers(entry.difference, cell.tokens, cell.merged),
                f"{cell.kv_bytes:.0f}",
                "" if cell.flops is None else f"{cell.flops:.0f}",
                cell.questions,
                cell.available,
                cell.command,
                cell.run,
                cell.commit,
                cell.finished,
                cell.answers_sha256,
            ]
        )
    return out.getvalue()
