"""Tile, row and column of each visual token."""

from dataclasses import dataclass

import torch
from torch import Tensor

CLS = -1  # row and column of a class token


@dataclass(frozen=True)
class PatchGrid:
    """Origin of the N visual tokens of one image, in the order of the sequence.

    Attributes:
        crops: number of tiles (1 for LLaVA-1.5).
        rows, columns: patch grid of one tile.
        has_cls: token 0 of each tile is its class token, before rows * columns patches.
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

    def coordinates(self, device: torch.device | str = "cpu") -> Tensor:
        """[N, 2] float32: row and column of each token in its own tile, from -1 (first) to 1 (last), 0 in the middle.

        Class tokens are in the middle.
        """
        axes = [
            torch.linspace(-1, 1, count, device=device) if count > 1 else torch.zeros(1, device=device)
            for count in (self.rows, self.columns)
        ]
        tile = torch.cartesian_prod(*axes)
        if self.has_cls:
            tile = torch.cat([tile.new_zeros(1, 2), tile])
        return tile.repeat(self.crops, 1)

    def place(self, token: int) -> tuple[int, int, int]:
        """(tile, row, column) of a token; row and column are CLS for a class token."""
        crop, inside = divmod(token, self.tokens_per_crop)
        inside -= self.has_cls
        return (crop, CLS, CLS) if inside < 0 else (crop, inside // self.columns, inside % self.columns)
