"""A table as CSV: one row per cell, every number, and a hash of the answers; then the user's own rows."""

import csv
import io

from eval.papers.document import Document
from eval.papers.own import OwnRow
from eval.tables.page import csv_numbers, csv_text

HEADER = (
    "method", "budget", "counts_kept_tokens", "benchmark", "metric", "score", "low", "high", "kind", "published",
    "source", "disputed", "difference", "compared_with", "gate", "tokens_per_layer", "merged_tokens", "kv_bytes",
    "flops", "questions", "available", "command", "run", "commit", "finished", "answers_sha256", "model", "warning",
)  # fmt: skip


def text(document: Document) -> str:
    """The file; published sources of a cell are joined by ";", the most trusted first.

    `kind` is "run" for what ran here, else what the user says of an own row. `gate` is the verdict on the benchmark's
    baseline. `warning` says in every row that a toy model ran.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(HEADER)
    gate = {one.cell.column.benchmark: one.verdict for one in document.checks}
    warning = "TOY MODEL" if document.is_toy else ""
    for entry in document.entries:
        cell, values = entry.cell, entry.published or []
        row = [
            cell.line.title,
            str(cell.line.budget or ""),
            str(cell.line.by_kept).lower(),
            cell.column.benchmark,
            cell.metric,
            *csv_numbers(cell.value, cell.low, cell.high),
            "run",
            ";".join(f"{value.value:g}" for value in values),
            ";".join(value.source for value in values),
            ";".join(value.disputed or "" for value in values).strip(";"),
            *csv_numbers(entry.difference),
            entry.compared.source if entry.compared else "",
            gate.get(cell.column.benchmark, ""),
            *csv_numbers(cell.tokens, cell.merged),
            f"{cell.kv_bytes:.0f}",
            "" if cell.flops is None else f"{cell.flops:.0f}",
            str(cell.questions),
            str(cell.available),
            cell.command,
            cell.run,
            cell.commit,
            cell.finished,
            cell.answers_sha256,
            document.model,
            warning,
        ]
        writer.writerow(map(csv_text, row))
    for own in document.own:
        writer.writerows(map(csv_text, row) for row in own_rows(own))
    return out.getvalue()


def own_rows(own: OwnRow) -> list[list[str]]:
    """The cells of an own row, one line each; what is not known of it stays empty."""
    rows = []
    for benchmark, score in own.scores.items():
        known = {"method": own.method, "budget": str(own.budget or ""), "benchmark": benchmark, "kind": own.kind}
        known |= {"score": f"{score:g}", "source": own.source}
        rows.append([known.get(name, "") for name in HEADER])
    return rows
