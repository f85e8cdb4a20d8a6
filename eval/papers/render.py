r"""A table as Markdown, CSV, LaTeX and HTML.

LaTeX is a float over the whole width of the page, with \usepackage{booktabs,graphicx}: best bold, second underlined,
the average last; a table that is too wide or too high is made smaller, and one of many rows is divided between budgets.
Tables without a wide one have their first section in it. Rows as reported are grey where colours are loaded;
their sources are in a .bib file. HTML is one file that needs no network.
"""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from eval.pages import asset, environment
from eval.papers.document import (
    INSTEAD,
    MARK_TEXTS,
    SPREAD,
    Block,
    Document,
    Entry,
    difference_to,
    ours_text,
    published_text,
)
from eval.papers.reported import MARKS, bibliography
from eval.papers.runs import IMAGE, KEPT
from eval.results.statistics import rounded
from eval.tables import csv_numbers, csv_text, markdown

# -- Markdown -------------------------------------------------------------------------------------------------------

LEGEND = (
    "Bold: best of a budget; underlined: second best. "
    "Average: mean over the benchmarks of the score in percent of full."
)


REPORTED = "Rows as reported were not measured here: they are what their sources print, neither ranked nor tested"


def legend_of(document: Document) -> str:
    """The line below the wide table."""
    parts = [] if document.only_reported else [LEGEND]
    if document.reported:
        parts.append(f"{REPORTED}.")
    return " ".join(parts)


def filled(template: str, values: Mapping[str, Any], left: str = "{", right: str = "}") -> str:
    """Fill a template of this folder; `left` and `right` are the brackets of its tags."""
    environment = jinja2.Environment(
        block_start_string=f"{left}%",
        block_end_string=f"%{right}",
        variable_start_string=left * 2,
        variable_end_string=right * 2,
        comment_start_string=f"{left}#",
        comment_end_string=f"#{right}",
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    text = (Path(__file__).parent / template).read_text(encoding="utf-8")
    return environment.from_string(text).render(values).rstrip("\n") + "\n"


def markdown_page(document: Document, image: str = "") -> str:
    """The whole page; `image` is the file of its figure, if there is one."""
    wide = wide_markdown(document.columns, document.blocks)
    values = {"document": document, "image": image, "wide": wide, "markdown": markdown}
    values["legend"] = legend_of(document)
    return filled("table.md.j2", values)


def wide_markdown(columns: Sequence[str], blocks: Sequence[Block]) -> str:
    """Methods by benchmarks, a row with the budget above each group; best bold, second underlined."""
    styles = {"best": "**{}**", "second": "<u>{}</u>", "": "{}"}
    rows: list[Sequence[str]] = []
    for block in blocks:
        if block.title:
            rows.append([f"***{block.title}***", *[""] * len(columns)])
        for row, (name, values) in enumerate(block.rows):
            cells = (styles[block.style(row, column)].format(block.text(row, column)) for column in range(len(values)))
            rows.append([name, *cells])
        rows += [[row.name, *block.reported_texts(row)] for row in block.reported]
    return markdown(["method", *columns], rows)


# -- CSV ------------------------------------------------------------------------------------------------------------

HEADER = (
    "method", "budget", "counts_kept_tokens", "benchmark", "metric", "score", "low", "high", "published",
    "source", "disputed", "difference", "compared_with", "gate", "tokens_per_layer", "merged_tokens", "kv_bytes",
    "flops", "questions", "available", "command", "run", "commit", "finished", "answers_sha256", "model", "warning",
    "tokens_on_padding", "reported", "cite", "note", "fewest_tokens", "most_tokens",
)  # fmt: skip


def csv_file(document: Document) -> str:
    """One row per cell, every number, and a hash of the answers.

    Published sources of a cell are joined by ";", the most trusted first. `gate` is the verdict on the benchmark's
    baseline. `fewest_tokens` and `most_tokens` are of an image, where that decides the number. `warning` says in every
    row that a toy model ran. Rows as reported follow, a line for each value, which is under `published` and not under
    `score`; `metric` says what their `average` is in percent of.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(HEADER)
    gate = {one.cell.column.benchmark: one.verdict for one in document.checks}
    warning = "TOY MODEL" if document.is_toy else ""
    for entry in document.entries:
        cell, values = entry.cell, entry.published or []
        benchmark, flops = cell.column.benchmark, "" if cell.flops is None else f"{cell.flops:.0f}"
        row = [cell.line.title, str(cell.line.budget or ""), str(cell.line.by_kept).lower(), benchmark, cell.metric]
        row += [*csv_numbers(cell.value, cell.low, cell.high), ";".join(f"{value.value:g}" for value in values)]
        row += [";".join(value.source for value in values)]
        row += [";".join(value.disputed or "" for value in values).strip(";"), *csv_numbers(entry.difference)]
        row += [entry.compared.source if entry.compared else "", gate.get(benchmark, "")]
        row += [*csv_numbers(cell.tokens, cell.merged), f"{cell.kv_bytes:.0f}", flops]
        row += [str(cell.questions), str(cell.available), cell.command, cell.run, cell.commit, cell.finished]
        row += [
            cell.answers_sha256,
            document.model,
            warning,
            *csv_numbers(cell.padding),
            "",
            "",
            "",
            *csv_numbers(*(cell.ends or (None, None))),
        ]
        writer.writerow(map(csv_text, row))
    for told in document.reported:
        about = {"method": told.label, "budget": str(told.budget or ""), "source": told.source, "cite": told.cite}
        about |= {"reported": "as reported", "note": told.note, "model": document.table.model_title}
        lines = [
            {"benchmark": name, "published": f"{value:g}", "disputed": told.disputed.get(name, "")}
            for name, value in told.scores.items()
        ]
        if told.average is not None:
            average = {"metric": f"percent {told.base}", "published": f"{told.average:.2f}"}
            lines.append({"benchmark": "average"} | average)
        for line in lines:
            writer.writerow(csv_text((about | line).get(name, "")) for name in HEADER)
    return out.getvalue()


# -- HTML -----------------------------------------------------------------------------------------------------------


def html_page(document: Document) -> str:
    """The wide table, further sections, and every cell: a sortable table for each benchmark, with details on demand."""
    template = environment(Path(__file__).parent).get_template("table.html.j2")
    by_benchmark: dict[str, list[Entry]] = {}
    for entry in document.entries:
        by_benchmark.setdefault(entry.cell.column.title, []).append(entry)
    return template.render(
        document=document,
        table=document.table,
        legend=legend_of(document),
        by_benchmark=by_benchmark,
        difference_to=difference_to,
        ours_text=ours_text,
        details_of=details_of,
        style=asset("style.css"),
        script=asset("sort.js"),
    )


def details_of(entry: Entry) -> dict[str, str]:
    """Name -> text of what a cell shows on demand, besides its score."""
    cell = entry.cell
    found = {} if entry.published is None else {"published": published_text(entry.published, entry.convention)}
    found |= {"metric": cell.metric, "merged tokens": rounded(cell.merged)}
    if cell.spread:
        found["tokens per layer"] = cell.spread
    if cell.padding is not None:
        found["tokens on padding"] = rounded(cell.padding)
    return found | {"command": cell.command, "run": cell.run, "commit": cell.commit[:10] or "n/a"}


# -- LaTeX ----------------------------------------------------------------------------------------------------------

ROWS = 60  # of a float; more are made too small to be read
CLEAR = "∗"  # a score that differs significantly from the paper's method
ESCAPES = {
    "\\": r"\textbackslash{}", "%": r"\%", "&": r"\&", "_": r"\_", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$", "|": "$|$", "≥": r"$\geq$",
    "≠": r"$\neq$", "−": "$-$", "×": r"$\times$", "²": "$^2$", "–": "--", "±": r"$\pm$",
    KEPT: r"$^\ddagger$", IMAGE: r"\textsuperscript{\S}", CLEAR: r"$^\ast$",
}  # fmt: skip


def escaped(text: str) -> str:
    """Text with LaTeX's special characters escaped, each once."""
    return "".join(ESCAPES.get(letter, letter) for letter in text)


def latex_file(document: Document, intervals: bool = False) -> str:
    r"""The file; needs \usepackage{booktabs,graphicx}.

    Args:
        intervals: print the 95 % interval beside each score of the wide table, and mark significant differences.
    """
    if document.blocks:
        head = ["Method", *map(escaped, document.columns)]
        # A page takes about `ROWS` rows that can be read, and a budget is not divided.
        bodies: list[list[str]] = []
        for block in document.blocks:
            rows = block_latex(block, len(head), intervals)
            if bodies and len(bodies[-1]) + len(rows) <= ROWS:
                bodies[-1] += rows
            else:
                bodies.append(rows)
    else:
        section = document.sections[0]
        head = [escaped(column) for column in section.columns]
        bodies = [[r"\midrule", *(latex_row(list(map(latex_text, row))) for row in section.rows)]]
    identity = re.sub(r"[^\w/-]", "-", document.table.identity).replace("_", "-")
    comments = [f"{document.title}. Made by: {dict(document.facts)['Command'].strip('`')}"]
    comments += [document.banner] if document.banner else []
    comments += [f"MARKED, the unreduced model is not the published one: {line}" for line in document.marked]
    caption = [rf"\textbf{{{escaped(document.banner)}}}"] if document.banner else []
    caption.append(escaped(caption_of(document, intervals)))
    comments = [" ".join(line.split()) for line in (*comments, *document.baseline)]
    if cited := dict.fromkeys(row.cite for row in document.reported if row.cite):
        comments.append(f"Cites {', '.join(cited)}. {document.table.name}.bib has the published sources among them.")
    values = {"comments": comments, "caption": " ".join(caption), "label": identity, "head": head, "bodies": bodies}
    return filled("table.tex.j2", values | {"reported": bool(document.reported)}, "<", ">")


def caption_of(document: Document, intervals: bool) -> str:
    """What a reader of the paper must know: model, questions, commit, and what the marks mean."""
    facts = dict(document.facts)
    parts = [document.title, f"Model: {document.model}"]
    parts += [f"{name}: {facts[name]}" for name in ("Questions", "Commit") if name in facts]
    if document.reported:
        parts.append(REPORTED)
    if document.blocks and not document.only_reported:
        parts.append("Bold: best of a budget; underlined: second best; average: mean of the scores in percent of full")
    if intervals:
        parts.append("In brackets: 95 % intervals of scores, where there are enough images")
    if intervals and any(block.clear for block in document.blocks):
        parts.append(
            f"{CLEAR} differs significantly from {document.ours} at the same budget (paired permutation test by image "
            "at 5 %, corrected by Holm over the benchmarks of a row)"
        )
    if document.marked:
        parts.append("The unreduced model is not the published one")
    starts = (*MARK_TEXTS, SPREAD, INSTEAD, MARKS, "Averages as reported")
    parts += [note.rstrip(".") for note in document.notes if note.startswith(starts)]
    return ". ".join(parts) + "."


def block_latex(block: Block, width: int, intervals: bool) -> list[str]:
    """The rows of a budget: methods by benchmarks, the reported rows below the measured ones."""
    body = [r"\midrule"]
    if block.title:
        body += [rf"\multicolumn{{{width}}}{{c}}{{\textit{{{escaped(block.title)}}}}} \\", r"\midrule"]
    for row, (name, values) in enumerate(block.rows):
        cells = (latex_cell(block, row, column, intervals) for column in range(len(values)))
        body.append(latex_row([escaped(name), *cells]))
    style = r"\reported{%s}" if block.rows else "%s"
    if block.reported:
        heading = style % r"\textit{as reported}"
        body.append(rf"\multicolumn{{{width}}}{{l}}{{{heading}}} \\")
    for one in block.reported:
        # With its source: "FastV \cite[{Table 1}]{restore}".
        row_texts = [escaped(one.label)]
        if one.cite:
            place = escaped(one.source.partition(", ")[2]) if one.where else ""
            row_texts[0] += rf"~\cite{f'[{{{place}}}]' if place else ''}{{{one.cite}}}"
        elif one.source:
            row_texts[0] += f" ({escaped(one.source)})"
        *texts, average = block.reported_texts(one)
        for text in (*texts, average + "%" * (one.average is not None)):
            marks = "".join(rf"\textsuperscript{{{escaped(mark)}}}" for mark in text if mark in "?≠")
            row_texts.append("--" if text == "n/a" else escaped(text.rstrip("?≠")) + marks)
        body.append(latex_row([style % text for text in row_texts]))
    return body


def bib_file(document: Document) -> str:
    """BibTeX entries of the published sources that the LaTeX file cites; "" if there are none."""
    entries = []
    for key, about in bibliography(document.reported).items():
        fields = [f"  {name} = {{{text}}}" for name, text in (
            ("key", f"{{{escaped(about['title'])}}}"), ("title", f"{{{escaped(about['title'])}}}"),
            ("howpublished", escaped(about["howpublished"])), ("url", about["url"]),
        ) if text]  # fmt: skip
        entries.append(f"@misc{{{key},\n" + ",\n".join(fields) + "\n}\n")
    head = "% Where the published values of the table were read; better entries of the papers may replace them.\n"
    return head + "\n".join(entries) if entries else ""


def latex_cell(block: Block, row: int, column: int, intervals: bool) -> str:
    r"""A value of the wide table, best bold, second underlined.

    With `intervals` it has its mark of significance and " [60.1, 63.6]" in small print; the average and a score
    without an interval have none.
    """
    values = block.rows[row][1]
    text = "--" if values[column] is None else block.text(row, column)
    text += r"\%" if values[column] is not None and column == len(values) - 1 else ""
    styles = {"best": rf"\textbf{{{text}}}", "second": rf"\underline{{{text}}}", "": text}
    text = styles[block.style(row, column)]
    if not intervals:
        return text
    interval = block.intervals[row][column] if column < len(block.intervals[row]) else ""
    text += escaped(CLEAR) * ((row, column) in block.clear)
    return text + (rf" {{\scriptsize {interval}}}" if interval else "")


def latex_row(cells: Sequence[str]) -> str:
    r"""A row of the table. A [ or * at its start would be an argument of the \\ before it."""
    text = " & ".join(cells) + r" \\"
    return f"{{}}{text}" if text.startswith(("[", "*")) else text


def latex_text(text: str) -> str:
    """A cell of a section: **bold** of Markdown, and 2.5x as a factor."""
    if text.startswith("**") and text.endswith("**"):
        return rf"\textbf{{{escaped(text.strip('*'))}}}"
    return escaped(text[:-1]) + r"$\times$" if re.fullmatch(r"[\d.]+x", text) else escaped(text)
