"""A table as LaTeX for a paper: booktabs, best bold, second underlined, the relative average last.

Tables of costs and ablations have no wide table; their first section is written.
"""

import re
from collections.abc import Sequence

from eval.papers.document import Document, Section
from eval.papers.rows import MARK, Block, number

ESCAPES = {
    "\\": r"\textbackslash{}", "%": r"\%", "&": r"\&", "_": r"\_", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", MARK: r"$^\ddagger$",
}  # fmt: skip


def escaped(text: str) -> str:
    """Text with LaTeX's special characters escaped, each once."""
    return "".join(ESCAPES.get(letter, letter) for letter in text)


def text(document: Document, is_toy: bool) -> str:
    r"""The file; needs \usepackage{booktabs}."""
    head, body = wide(document) if document.blocks else plain(document.sections[0])
    lines = [
        f"% {document.table.title}. Made by: {dict(document.facts)['Command'].strip('`')}",
        *(["% Toy model: not numbers of the paper's model."] if is_toy else []),
        *(f"% MARKED, the unreduced model is not the published one: {line}" for line in document.marked),
        rf"\begin{{tabular}}{{l{'c' * (len(head) - 1)}}}",
        r"\toprule",
        " & ".join(head) + r" \\",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join([*lines, ""])


def wide(document: Document) -> tuple[list[str], list[str]]:
    """Head and body of methods by benchmarks."""
    head = ["Method", *map(escaped, document.columns)]
    body = []
    for block in document.blocks:
        body.append(r"\midrule")
        if block.title:
            body += [rf"\multicolumn{{{len(head)}}}{{c}}{{\textit{{{escaped(block.title)}}}}} \\", r"\midrule"]
        body += [
            " & ".join([escaped(name), *cells(values, index, block)]) + r" \\"
            for index, (name, values) in enumerate(block.rows)
        ]
    return head, body


def plain(section: Section) -> tuple[list[str], list[str]]:
    """Head and body of a section, whose cells are text."""
    rows = [" & ".join(map(styled, row)) + r" \\" for row in section.rows]
    return [escaped(column) for column in section.columns], [r"\midrule", *rows]


def styled(text: str) -> str:
    """A cell of a section: **bold** of Markdown, and 2.5x as a factor."""
    if text.startswith("**") and text.endswith("**"):
        return rf"\textbf{{{escaped(text.strip('*'))}}}"
    return escaped(text[:-1]) + r"$\times$" if re.fullmatch(r"[\d.]+x", text) else escaped(text)


def cells(values: Sequence[float | None], row: int, block: Block) -> list[str]:
    found = []
    for column, value in enumerate(values):
        text = "--" if value is None else number(value, points=value >= 200)
        if value is not None and column == len(values) - 1:
            text += r"\%"
        if row in block.best[column]:
            text = rf"\textbf{{{text}}}"
        elif row in block.second[column]:
            text = rf"\underline{{{text}}}"
        found.append(text)
    return found
