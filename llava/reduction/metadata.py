"""Metadata of a method: its row in docs/methods.md."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MethodMetadata:
    """One row of the table of methods.

    Attributes:
        acts: where tokens are reduced ("after the tower", "before decoder layer 2", ...).
        score: what tokens are ranked by.
        rest: what is done with the tokens that are not kept.
        order: order of the kept tokens.
        needs: what it needs besides pixels and prompt ("CLS token", "CLIP text tower", ...), "" for nothing.
        paper: title and identifier, "" for a control.
        url: address of the paper.
        code: owner/name@commit of the official code that was read, "" where there is none.
    """

    acts: str
    score: str = ""
    rest: str = "dropped"
    order: str = "raster"
    needs: str = ""
    paper: str = ""
    url: str = ""
    code: str = ""
