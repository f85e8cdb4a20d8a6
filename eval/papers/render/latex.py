"""A table as LaTeX for a paper: booktabs, best bold, second underlined, the relative average last.

A float over the whole width of the page; a table that is too wide or too high is made smaller. Tables of costs and
ablations have no wide table; their first section is written.
"""

import re
from collections.abc import Sequence

from eval.papers.document import Document, Section
from eval.papers.own import OWN_MARK
from eval.papers.rows import MARK, Block

ESCAPES = {
    "\\": r"\textbackslash{}", "%": r"\%", "&": r"\&", "_": r"\_", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$", "|": "$|$", "≥": r"$\geq$",
    "≠": r"$\neq$", "−": "$-$", "×": r"$\times$", "²": "$^2$", "–": "--", "±": r"$\pm$",
    MARK: r"$^\ddagger$", OWN_MARK: r"$^\S$",
}  # fmt: skip
# The box is measured, so that narrow tables keep their size; \resizebox* counts the depth of a box too.
BEGIN = r"""\begin{table*}[t]
\centering
\setlength{\tabcolsep}{3pt}
\caption{%s}
\label{tab:%s}
\sbox0{%%
\begin{tabular}{%s}
\toprule"""
END = r"""\bottomrule
\end{tabular}}
\ifdim\wd0>\textwidth\sbox0{\resizebox{\textwidth}{!}{\usebox0}}\fi
\ifdim\dimexpr\ht0+\dp0\relax>.8\textheight\sbox0{\resizebox*{!}{.8\textheight}{\usebox0}}\fi
\usebox0
\end{table*}
"""


def escaped(text: str) -> str:
    """Text with LaTeX's special characters escaped, each once."""
    return "".join(ESCAPES.get(letter, letter) for letter in text)


def text(document: Document) -> str:
    r"""The file; needs \usepackage{booktabs,graphicx}."""
    head, body = wide(document) if document.blocks else plain(document.sections[0])
    facts = dict(document.facts)
    identity = re.sub(r"[^\w/-]", "-", document.table.identity)
    lines = [
        r"% \usepackage{booktabs,graphicx}",
        f"% {document.title}. Made by: {facts['Command'].strip('`')}",
        *([f"% {document.banner}"] if document.banner else []),
        *(f"% MARKED, the unreduced model is not the published one: {line}" for line in document.marked),
        *(f"% {line}" for line in document.baseline),
    ]
    caption = [*([rf"\textbf{{{escaped(document.banner)}}}"] if document.banner else []), escaped(caption_of(document))]
    return "\n".join(
        [
            *(" ".join(line.split()) for line in lines),
            BEGIN % (" ".join(caption), identity.replace("_", "-"), "l" + "c" * (len(head) - 1)),
            " & ".join(head) + r" \\",
            *body,
            END,
        ]
    )


def caption_of(document: Document) -> str:
    """What a reader of the paper must know: model, questions, commit, and what the marks mean."""
    facts = dict(document.facts)
    parts = [
        document.title,
        f"Model: {document.model}",
        f"Questions: {facts['Questions']}",
        f"Commit {facts['Commit']}",
    ]
    if document.blocks:
        parts.append("Bold: best of a budget; underlined: second best; average: mean of the scores in percent of full")
    if document.marked:
        parts.append("The unreduced model is not the published one")
    parts += [note.rstrip(".") for note in document.notes if note[:1] in (MARK, OWN_MARK)]
    return ". ".join(parts) + "."


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
        text = "--" if value is None else block.text(value, column)
        if value is not None and column == len(values) - 1:
            text += r"\%"
        if row in block.best[column]:
            text = rf"\textbf{{{text}}}"
        elif row in block.second[column]:
            text = rf"\underline{{{text}}}"
        found.append(text)
    return found
