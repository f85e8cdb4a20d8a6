"""Tables as Markdown and LaTeX, and generated ones between their markers in a hand-written page."""

import re
from collections.abc import Sequence
from pathlib import Path

from llava.errors import UserError


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; first column left, the others right."""
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join(["---"] + ["---:"] * (len(header) - 1)) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def latex(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A booktabs table; first column left, the others right. Needs \\usepackage{booktabs}."""
    escapes = {"%": r"\%", "&": r"\&", "_": r"\_", "#": r"\#", "‡": r"$^\ddagger$", "n/a": "--"}

    def cell(text: str) -> str:
        for plain, escaped in escapes.items():
            text = text.replace(plain, escaped)
        return text

    lines = [" & ".join(map(cell, row)) + r" \\" for row in [header, *rows]]
    body = [lines[0], r"\midrule", lines[1], r"\midrule", *lines[2:]]
    columns = "l" + "r" * (len(header) - 1)
    return "\n".join([rf"\begin{{tabular}}{{{columns}}}", r"\toprule", *body, r"\bottomrule", r"\end{tabular}", ""])


def insert(page: Path, name: str, content: str) -> None:
    """Replace what stands between `<!-- begin NAME -->` and `<!-- end NAME -->`."""
    text = page.read_text()
    pattern = re.compile(rf"(<!-- begin {re.escape(name)} -->\n).*?(<!-- end {re.escape(name)} -->)", re.DOTALL)
    if not pattern.search(text):
        raise UserError(f"{page} has no markers for {name!r}; add <!-- begin {name} --> and <!-- end {name} --> lines.")
    page.write_text(pattern.sub(lambda match: f"{match[1]}{content}\n{match[2]}", text))
