"""Where visual tokens come from: the sizes of a model, and the tile, row and column of each token of an image.

An image of LLaVA-1.5 is one tile. LLaVA-NeXT puts the base image (thumbnail) before tiles that are stitched row by row.
A video has one tile per frame. A method receives one tile at a time, or all together; the pipeline restores the order
of the tokens that are kept. `ModelSpec` is what a method knows about the model before any image is processed.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

CLS = -1  # row and column of a class token
NEWLINE = -2  # tile, row and column of a newline token


@dataclass(frozen=True)
class Canvas:
    """The area that the patches of an image cover, and where the image lies on it; the rest is padding.

    Attributes:
        size: width and height, in a unit of its own.
        box: left, top, right and bottom of the image; outside of the canvas if parts of the image are cut off.
    """

    size: tuple[int, int]
    box: tuple[int, int, int, int]

    def empty(self, grid: tuple[int, int]) -> Tensor:
        """[rows, columns] bool: the patches of a grid that show no part of the image."""
        (width, height), (left, top, right, bottom), (rows, columns) = self.size, self.box, grid
        down, across = height * torch.arange(rows + 1), width * torch.arange(columns + 1)  # edges of patches
        no_row = (down[1:] <= top * rows) | (down[:-1] >= bottom * rows)
        no_column = (across[1:] <= left * columns) | (across[:-1] >= right * columns)
        return no_row[:, None] | no_column


WITHOUT_PADDING = Canvas((1, 1), (0, 0, 1, 1))


@dataclass(frozen=True)
class PatchGrid:
    """The patch grid of the N visual tokens of one image, in the order of the sequence.

    Attributes:
        rows, columns: patch grid of one tile.
        crops: number of tiles (1 for LLaVA-1.5).
        has_cls: token 0 of each tile is its class token, before rows * columns patches.
    """

    rows: int
    columns: int
    crops: int = 1
    has_cls: bool = False

    @property
    def tokens(self) -> int:
        return self.crops * (self.rows * self.columns + self.has_cls)

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
        crop, inside = divmod(token, self.rows * self.columns + self.has_cls)
        inside -= self.has_cls
        return (crop, CLS, CLS) if inside < 0 else (crop, inside // self.columns, inside % self.columns)


def even_grid(layout: PatchGrid, budget: int) -> Tensor:
    """[budget] int64 indices, ascending, spaced as evenly as the budget allows.

    The budget is split over evenly spaced rows, and each row's share is spaced evenly along it. A square budget gives a
    square grid.
    """
    used = max(1, min(layout.rows, round(math.sqrt(budget * layout.rows / layout.columns))))
    used = max(used, math.ceil(budget / layout.columns))
    picked = []
    for index in range(used):
        row = (2 * index + 1) * layout.rows // (2 * used)
        share = budget * (index + 1) // used - budget * index // used
        picked += [row * layout.columns + (2 * i + 1) * layout.columns // (2 * share) for i in range(share)]
    return torch.tensor(picked)


@dataclass(frozen=True, eq=False)
class Tile:
    """The visual tokens of one tile.

    Attributes:
        rows, columns: the rectangle of patches that is left after unpadding.
        patches: [rows * columns] int64, raster indices in the whole tile, ascending.
        indices: [rows * columns] int64, indices of the same patches among the image's visual tokens.
        cls: index of the tile's class token among the image's visual tokens, or None.
    """

    rows: int
    columns: int
    patches: Tensor
    indices: Tensor
    cls: int | None = None

    @property
    def all_indices(self) -> Tensor:
        """Indices of all tokens of the tile, CLS first."""
        return self.indices if self.cls is None else torch.cat([torch.tensor([self.cls]), self.indices])

    @property
    def patch_grid(self) -> PatchGrid:
        return PatchGrid(self.rows, self.columns, has_cls=self.cls is not None)


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """The visual tokens of one image or video; `single`, `frames` and `stitched` make one object for equal arguments.

    Attributes:
        crops: the base image and its tiles, or the frames of a video, in the order of the tower's batch.
        newlines: [r] int64, indices of newline tokens, ascending.
        grid: rows and columns of patches of a whole tile.
        tiles: rows and columns of the tiles that follow the base image; None without them.
        temporal: `crops` are the frames of a video.
    """

    crops: tuple[Tile, ...]
    newlines: Tensor
    grid: tuple[int, int]
    tiles: tuple[int, int] | None = None
    temporal: bool = False

    @cached_property
    def tokens(self) -> int:
        """N, all visual tokens of the image."""
        return self.patches + len(self.newlines) + sum(crop.cls is not None for crop in self.crops)

    @cached_property
    def patches(self) -> int:
        """The number of patches, among which a method before the decoder chooses."""
        return sum(len(crop.patches) for crop in self.crops)

    @cached_property
    def is_one_tile(self) -> bool:
        """Whether there is one tile, whose tokens are all the visual tokens."""
        return len(self.crops) == 1 and not len(self.newlines)

    @cached_property
    def whole(self) -> bool:
        """Whether every tile keeps all its patches and there are no newline tokens."""
        full = self.grid[0] * self.grid[1]
        return not len(self.newlines) and all(len(crop.patches) == full for crop in self.crops)

    def tile_sides(self) -> tuple[list[int], list[int]]:
        """Patches along the height of every row of tiles, and along the width of every column, without padding."""
        assert self.tiles is not None  # only for images with tiles
        (down, across), tiles = self.tiles, self.crops[1:]
        heights = [max(tile.rows for tile in tiles[row * across : (row + 1) * across]) for row in range(down)]
        widths = [max(tile.columns for tile in tiles[column::across]) for column in range(across)]
        return heights, widths

    @cached_property
    def patch_grid(self) -> PatchGrid:
        """Patch grid of all tokens, tile after tile; one row if the tiles have different shapes."""
        has_cls = self.crops[0].cls is not None
        shapes = {(crop.rows, crop.columns) for crop in self.crops}
        if len(shapes) == 1:
            return PatchGrid(*shapes.pop(), crops=len(self.crops), has_cls=has_cls)
        return PatchGrid(1, self.patches + has_cls * len(self.crops))

    def origins(self) -> Tensor:
        """[N, 3] int64: tile, row and column in the tile's own grid of every token.

        Row and column are CLS for a class token; all three are NEWLINE for a newline token.
        """
        table = torch.full((self.tokens, 3), NEWLINE)
        for number, crop in enumerate(self.crops):
            table[crop.indices, 0] = number
            table[crop.indices, 1] = crop.patches // self.grid[1]
            table[crop.indices, 2] = crop.patches % self.grid[1]
            if crop.cls is not None:
                table[crop.cls] = torch.tensor([number, CLS, CLS])
        return table

    def shrunk(self, grid: tuple[int, int]) -> "TokenLayout":
        """The same image with another patch grid per tile; only for images whose tiles keep all their patches."""
        if self.temporal:
            return frames(len(self.crops), *grid)
        return single(*grid) if self.tiles is None else stitched(self.tiles, grid, newline=False)

    def left(self, count: int, order: Tensor) -> "TokenLayout":
        """The layout after merging inside the tower.

        Args:
            count: number of tokens of each tile.
            order: [tiles * count] int64, the tokens in their new order, by their numbers tile after tile.
        """
        places = order.argsort()
        crops = tuple(Tile(1, count, torch.arange(count), part) for part in places.split(count))
        return replace(self, crops=crops, newlines=self.newlines[:0], grid=(1, count))

    @cached_property
    def with_cls(self) -> "TokenLayout":
        """The layout with a class token for every tile.

        The base image's comes first, and the other tiles' come after all patches; a frame's comes before the frame.
        """
        if self.crops[0].cls is not None:
            return self
        crops, tail = [], self.tokens + 1
        for number, crop in enumerate(self.crops):
            if self.temporal:
                crops.append(replace(crop, indices=crop.indices + number + 1, cls=int(crop.indices[0]) + number))
            else:
                place = 0 if number == 0 else tail + number - 1
                crops.append(replace(crop, indices=crop.indices + 1, cls=place))
        return replace(self, crops=tuple(crops), newlines=self.newlines + 1)


@lru_cache(maxsize=1024)
def on_padding(layout: TokenLayout, canvas: Canvas) -> Tensor:
    """[N] bool: the visual tokens whose whole patch is padding; False for class and newline tokens.

    Args:
        canvas: what the tiles cover together. A base image before them is the image itself, stretched.
    """
    found = torch.zeros(layout.tokens, dtype=torch.bool)
    if canvas == WITHOUT_PADDING:
        return found
    (rows, columns), (down, across) = layout.grid, layout.tiles or (1, 1)
    empty = canvas.empty((down * rows, across * columns))
    for number, tile in enumerate(layout.crops[1:] if layout.tiles else layout.crops):
        top, left = number // across * rows, number % across * columns
        found[tile.indices] = empty[top : top + rows, left : left + columns].flatten()[tile.patches]
    return found


def _crop(rows: int, columns: int, start: int) -> Tile:
    patches = torch.arange(rows * columns)
    return Tile(rows, columns, patches, patches + start)


@lru_cache(maxsize=256)
def single(rows: int, columns: int) -> TokenLayout:
    """One tile with all its patches."""
    return TokenLayout((_crop(rows, columns, 0),), torch.tensor([], dtype=torch.long), (rows, columns))


@lru_cache(maxsize=64)
def frames(count: int, rows: int, columns: int) -> TokenLayout:
    """`count` frames one after another, without class tokens."""
    crops = tuple(_crop(rows, columns, number * rows * columns) for number in range(count))
    return TokenLayout(crops, torch.tensor([], dtype=torch.long), (rows, columns), temporal=True)


@lru_cache(maxsize=4096)
def stitched(
    tiles: tuple[int, int], grid: tuple[int, int], kept: tuple[int, int, int, int] | None = None, newline: bool = True
) -> TokenLayout:
    """LLaVA-NeXT: the base image, then tiles that are stitched and read row by row.

    Args:
        tiles: rows and columns of tiles.
        grid: rows and columns of patches of a tile.
        kept: first row, end row, first column and end column of the stitched patches that unpadding leaves; None for
            all.
        newline: whether a newline token ends every stitched row.
    """
    rows, columns = tiles[0] * grid[0], tiles[1] * grid[1]
    top, bottom, left, right = kept or (0, rows, 0, columns)
    base = grid[0] * grid[1]
    width = right - left + newline
    crops = [_crop(*grid, 0)]
    for tile_row in range(tiles[0]):
        for tile_column in range(tiles[1]):
            row = _part(tile_row * grid[0], grid[0], top, bottom)
            column = _part(tile_column * grid[1], grid[1], left, right)
            patches = (row[:, None] - tile_row * grid[0]) * grid[1] + column - tile_column * grid[1]
            places = base + (row[:, None] - top) * width + column - left
            crops.append(Tile(len(row), len(column), patches.flatten(), places.flatten()))
    ends = base + torch.arange(1, bottom - top + 1) * width - 1 if newline else torch.tensor([], dtype=torch.long)
    return TokenLayout(tuple(crops), ends, grid, tiles)


def _part(start: int, length: int, low: int, high: int) -> Tensor:
    """The integers of [start, start + length) that lie in [low, high)."""
    return torch.arange(max(start, low), max(max(start, low), min(start + length, high)))


@dataclass(frozen=True)
class ModelSpec:
    """Sizes of the model, for its reference image size or, by `spec_of`, for one image.

    Attributes:
        visual_tokens: number of visual tokens of one image before any reduction.
        layers: number of decoder layers.
        layout: patch grid of the visual tokens.
        tower_blocks: number of blocks of the vision tower.
        has_cls: whether the tower's class token can be read; if not, received attention replaces its attention.
        has_text_tower: whether the CLIP text tower that belongs to the vision tower is available.
        crops: patch grid of each tile of an image with several tiles, without class tokens.
        newlines: number of newline tokens among the visual tokens.
        most_newlines: the most newline tokens that an image can have in this model.
        frames: number of frames of a video, whose tokens follow one another; 1 for an image, whatever its tiles.
    """

    visual_tokens: int
    layers: int
    layout: PatchGrid
    tower_blocks: int
    has_cls: bool = True
    has_text_tower: bool = False
    crops: tuple[PatchGrid, ...] = ()
    newlines: int = 0
    most_newlines: int = 0
    frames: int = 1

    @property
    def patches(self) -> int:
        """The number of tokens that a method before the decoder chooses among: no class tokens, no newline tokens."""
        return sum(crop.tokens for crop in self.crops) if self.crops else self.visual_tokens - self.newlines

    def crop(self, number: int) -> "ModelSpec":
        """The model as if one tile were the whole image."""
        layout = self.crops[number]
        return replace(self, visual_tokens=layout.tokens, layout=layout, crops=(), newlines=0, frames=1)


@lru_cache(maxsize=1024)
def spec_of(spec: ModelSpec, layout: TokenLayout) -> ModelSpec:
    """The model's spec with the tokens and tiles of one image."""
    several = len(layout.crops) > 1
    return replace(
        spec,
        visual_tokens=layout.tokens,
        layout=replace(layout.patch_grid, has_cls=False),
        crops=tuple(PatchGrid(crop.rows, crop.columns) for crop in layout.crops) if several else (),
        newlines=len(layout.newlines),
        frames=len(layout.crops) if layout.temporal else 1,
    )
