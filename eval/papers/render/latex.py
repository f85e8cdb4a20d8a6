"""The wide table as LaTeX for a paper: booktabs, best bold, second underlined, the relative average last."""

from collections.abc import Sequence

from eval.papers.document import Document
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
    width = len(document.columns) + 1
    lines = [
        f"% {document.table.title}. Made by: {dict(document.facts)['Command'].strip('`')}",
        *(["% Toy model: not numbers of the paper's model."] if is_toy else []),
        *(f"% MARKED, the unreduced model is not the published one: {line}" for line in document.marked),
        rf"\begin{{tabular}}{{l{'c' * (width - 1)}}}",
        r"\toprule",
        " & ".join(["Method", *map(escaped, document.columns)]) + r" \\",
    ]
    for block in document.blocks:
        lines.append(r"\midrule")
        if block.title:
            lines += [rf"\multicolumn{{{width}}}{{c}}{{\textit{{{escaped(block.title)}}}}} \\", r"\midrule"]
        lines += [
            " & ".join([escaped(name), *cells(values, index, block)]) + r" \\"
            for index, (name, values) in enumerate(block.rows)
        ]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


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
