"""Where each visual token comes from."""

from dataclasses import dataclass

CLS = -1  # row and column of a class token


@dataclass(frozen=True)
class PatchGrid:
    """Origin of the N visual tokens of one image, in the order of the sequence.

    Attributes:
        crops: number of crops the tower saw (1 for LLaVA-1.5).
        rows, columns: patch grid of one crop.
        has_cls: token 0 of each crop is its class token, in front of rows * columns patches.
    """

    rows: int
    columns: int
    crops: int = 1
    has_cls: bool = False

    @property
    def tokens_per_crop(self) -> int:
        return self.rows * self.columns + self.has_cls

    @property
    def tokens(self) -> int:
        return self.crops * self.tokens_per_crop

    def place(self, token: int) -> tuple[int, int, int]:
        """(crop, row, column) of a token; row and column are CLS for a class token."""
        crop, inside = divmod(token, self.tokens_per_crop)
        inside -= self.has_cls
        return (crop, CLS, CLS) if inside < 0 else (crop, inside // self.columns, inside % self.columns)
