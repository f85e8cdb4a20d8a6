"""HTML pages that need no network: the gallery, the report and the demo. This file holds what they share.

A page is one self-contained file that contains its style and script.
"""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

ASSETS = Path(__file__).parent / "assets"


def environment(*folders: Path) -> Environment:
    """The templates in `folders` and the shared ones. Values are escaped unless marked safe."""
    return Environment(
        loader=FileSystemLoader([*folders, ASSETS]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def asset(name: str) -> str:
    """The text of a style or script file."""
    return (ASSETS / name).read_text()


def inline_json(text: str) -> str:
    """JSON that is safe between <script> tags, because it contains neither "</script>" nor "<!--"."""
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
