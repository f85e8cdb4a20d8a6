"""A table as LaTeX for a paper: booktabs, best bold, second underlined, the relative average last.

A float over the whole width of the page; a table that is too wide or too high is made smaller. Tables of costs and
ablations have no wide table; their first section is written.
"""

import re
from collections.abc import Sequence

from eval.papers.document import INSTEAD, Document, Section
from eval.papers.own import OWN_MARK
from eval.papers.rows import MARK, Block

CLEAR = "∗"  # a score that differs significantly from the paper's method
ESCAPES = {
    "\\": r"\textbackslash{}", "%": r"\%", "&": r"\&", "_": r"\_", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$", "|": "$|$", "≥": r"$\geq$",
    "≠": r"$\neq$", "−": "$-$", "×": r"$\times$", "²": "$^2$", "–": "--", "±": r"$\pm$",
    MARK: r"$^\ddagger$", OWN_MARK: r"$^\S$", CLEAR: r"$^\ast$",
}  # fmt: skip
# The box is measured, so that narrow tables keep their size; \resizebox* counts the depth of a box too. Captions are
# long: in small print, the longest takes less than a third of a page.
BEGIN = r"""\begin{table*}[t]
\centering
\setlength{\tabcolsep}{3pt}
\caption{\footnotesize %s}
\label{tab:%s}
\smallskip
\sbox0{%%
\begin{tabular}{%s}
\toprule"""
END = r"""\bottomrule
\end{tabular}}
\ifdim\wd0>\textwidth\sbox0{\resizebox{\textwidth}{!}{\usebox0}}\fi
\ifdim\dimexpr\ht0+\dp0\relax>.7\textheight\sbox0{\resizebox*{!}{.7\textheight}{\usebox0}}\fi
\usebox0
\end{table*}
"""


def escaped(text: str) -> str:
    """Text with LaTeX's special characters escaped, each once."""
    return "".join(ESCAPES.get(letter, letter) for letter in text)


def text(document: Document, intervals: bool = False) -> str:
    r"""The file; needs \usepackage{booktabs,graphicx}.

    Args:
        intervals: print the 95 % interval beside each score of the wide table, and mark significant differences.
    """
    head, body = wide(document, intervals) if document.blocks else plain(document.sections[0])
    facts = dict(document.facts)
    identity = re.sub(r"[^\w/-]", "-", document.table.identity)
    lines = [
        r"% \usepackage{booktabs,graphicx}",
        f"% {document.title}. Made by: {facts['Command'].strip('`')}",
        *([f"% {document.banner}"] if document.banner else []),
        *(f"% MARKED, the unreduced model is not the published one: {line}" for line in document.marked),
        *(f"% {line}" for line in document.baseline),
    ]
    caption = [
        *([rf"\textbf{{{escaped(document.banner)}}}"] if document.banner else []),
        escaped(caption_of(document, intervals)),
    ]
    return "\n".join(
        [
            *(" ".join(line.split()) for line in lines),
            BEGIN % (" ".join(caption), identity.replace("_", "-"), "l" + "c" * (len(head) - 1)),
            " & ".join(head) + r" \\",
            *body,
            END,
        ]
    )


def caption_of(document: Document, intervals: bool) -> str:
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
    if intervals:
        parts.append("In brackets: 95 % intervals of scores, where there are enough images")
    if intervals and any(block.clear for block in document.blocks):
        parts.append(
            f"{CLEAR} differs significantly from {document.ours} at the same budget (paired permutation test by image "
            "at 5 %, corrected by Holm over the benchmarks of a row)"
        )
    if document.marked:
        parts.append("The unreduced model is not the published one")
    parts += [note.rstrip(".") for note in document.notes if note.startswith((MARK, OWN_MARK, INSTEAD))]
    return ". ".join(parts) + "."


def wide(document: Document, intervals: bool) -> tuple[list[str], list[str]]:
    """Head and body of methods by benchmarks."""
    head = ["Method", *map(escaped, document.columns)]
    body = []
    for block in document.blocks:
        body.append(r"\midrule")
        if block.title:
            body += [rf"\multicolumn{{{len(head)}}}{{c}}{{\textit{{{escaped(block.title)}}}}} \\", r"\midrule"]
        body += [
            line([escaped(name), *cells(values, index, block, intervals)])
            for index, (name, values) in enumerate(block.rows)
        ]
    return head, body


def line(cells: Sequence[str]) -> str:
    r"""A row of the table. A [ or * at its start would be an argument of the \\ before it."""
    text = " & ".join(cells) + r" \\"
    return f"{{}}{text}" if text.startswith(("[", "*")) else text


def plain(section: Section) -> tuple[list[str], list[str]]:
    """Head and body of a section, whose cells are text."""
    rows = [line(list(map(styled, row))) for row in section.rows]
    return [escaped(column) for column in section.columns], [r"\midrule", *rows]


def styled(text: str) -> str:
    """A cell of a section: **bold** of Markdown, and 2.5x as a factor."""
    if text.startswith("**") and text.endswith("**"):
        return rf"\textbf{{{escaped(text.strip('*'))}}}"
    return escaped(text[:-1]) + r"$\times$" if re.fullmatch(r"[\d.]+x", text) else escaped(text)


def cells(values: Sequence[float | None], row: int, block: Block, intervals: bool) -> list[str]:
    found = []
    for column, value in enumerate(values):
        text = "--" if value is None else block.text(value, column)
        if value is not None and column == len(values) - 1:
            text += r"\%"
        if row in block.best[column]:
            text = rf"\textbf{{{text}}}"
        elif row in block.second[column]:
            text = rf"\underline{{{text}}}"
        if intervals:
            text += escaped(CLEAR) * ((row, column) in block.clear) + interval(block, row, column)
        found.append(text)
    return found


def interval(block: Block, row: int, column: int) -> str:
    r"""The text " [60.1, 63.6]" in small print; "" for the average, a user's own row and where there is none."""
    known = block.intervals[row] if row < len(block.intervals) else ()
    text = known[column] if column < len(known) else ""
    return rf" {{\scriptsize {text}}}" if text else ""
