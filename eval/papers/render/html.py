"""A table as one HTML file that needs no network: the wide table, further sections, and every cell, sortable."""

from pathlib import Path

from eval.pages import asset, environment
from eval.papers.document import Document
from eval.papers.rows import difference_to, ours_text, published_text


def text(document: Document) -> str:
    """The file."""
    template = environment(Path(__file__).parent).get_template("table.html.j2")
    return template.render(
        document=document,
        table=document.table,
        difference_to=difference_to,
        ours_text=ours_text,
        published_text=published_text,
        style=asset("style.css"),
        script=asset("sort.js"),
    )
