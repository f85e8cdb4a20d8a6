"""The gallery as one HTML file that needs no network."""

from pathlib import Path

from eval.config import TOY_BANNER, is_toy
from eval.pages import skeleton
from eval.pages.gallery.collect import Gallery
from eval.pages.gallery.encode import page_data

HERE = Path(__file__).parent
MANY = 7  # of more methods only those of SHOWN are shown at first
SHOWN = ("consensusdrop", "visiondrop", "attnmix")


def render(gallery: Gallery, command: str) -> str:
    """The page.

    Args:
        command: that made the page, for the reader.
    """
    few = len(gallery.methods) <= MANY
    shown = [name for name in gallery.methods if few or name in SHOWN] or list(gallery.methods[:MANY])
    return (
        skeleton.environment(HERE)
        .get_template("gallery.html.j2")
        .render(
            style=skeleton.asset("style.css") + (HERE / "gallery.css").read_text(),
            script=(HERE / "gallery.js").read_text(),
            gallery=gallery,
            banner=TOY_BANNER if is_toy(gallery.model) else "",
            shown=shown,
            data=skeleton.inline_json(page_data(gallery)),
            command=command,
        )
    )
