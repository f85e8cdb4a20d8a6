"""A table as one HTML file that needs no network: the wide table, further sections, and every cell, sortable."""

from pathlib import Path

from eval.pages.skeleton import asset, environment
from eval.papers.document import TOY, Document
from eval.papers.rows import number, ours_text, published_text


def text(document: Document, is_toy: bool) -> str:
    """The file."""
    template = environment(Path(__file__).parent).get_template("table.html.j2")
    return template.render(
        document=document,
        table=document.table,
        toy=TOY if is_toy else "",
        number=number,
        ours_text=ours_text,
        published_text=published_text,
        style=asset("style.css"),
        script=asset("sort.js"),
    )
