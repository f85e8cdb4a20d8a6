"""The panels that show an image's patches: one per whole image or frame; base image and tiles of a tiled one."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from eval.figures.patches import NONE, Ints
from llava.processing.video import Video
from llava.reduction.token_layout import TokenLayout


@dataclass(frozen=True, eq=False)
class Panel:
    """An image, and the grid of patches that lies on it.

    Attributes:
        name: what the panel shows, for a caption.
        grid: [rows, columns], the visual token of every cell, NONE where there is none.
        square: the grid covers the image padded to a square. False: it covers the image.
    """

    name: str
    image: Image.Image
    grid: Ints
    square: bool = False

    def canvas(self, size: tuple[int, int]) -> tuple[int, int]:
        """Width and height that the grid covers, of the image drawn at `size`; the image is in the middle."""
        return (max(size), max(size)) if self.square else size


def panels_of(picture: Image.Image | Video, layout: TokenLayout) -> list[Panel]:
    """The panels of an image or video.

    Args:
        layout: of the visual tokens whose indices the grids hold.
    """
    if isinstance(picture, Video):
        return [
            Panel(f"frame {number + 1}", frame, view_grid(layout, number))
            for number, frame in enumerate(picture.frames)
        ]
    if layout.tiles is not None:
        return [
            Panel("base image", picture, view_grid(layout, 0)),
            Panel("tiles", picture, stitched_grid(layout, layout.tiles)),
        ]
    # A square grid is that of a padded image; another one follows the image's own shape.
    return [Panel("image", picture, view_grid(layout, 0), square=layout.grid[0] == layout.grid[1])]


def view_grid(layout: TokenLayout, number: int) -> Ints:
    """[rows, columns]: the visual token of every patch of a tile or frame."""
    table = np.full(layout.grid[0] * layout.grid[1], NONE)
    crop = layout.crops[number]
    table[crop.patches.numpy()] = crop.indices.numpy()
    return table.reshape(layout.grid)


def stitched_grid(layout: TokenLayout, tiles: tuple[int, int]) -> Ints:
    """The same of all tiles together, without the rows and columns that unpadding took off."""
    down, across = tiles
    rows = [np.concatenate([view_grid(layout, 1 + row * across + i) for i in range(across)], 1) for row in range(down)]
    table = np.concatenate(rows)
    used = table != NONE
    return table[used.any(1)][:, used.any(0)] if used.any() else table


def grids(panels: Sequence[Panel]) -> list[Ints]:
    """The grids of several panels."""
    return [panel.grid for panel in panels]
