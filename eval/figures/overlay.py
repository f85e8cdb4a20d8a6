"""Which parts of an image the model kept: the reductions of one sample drawn on it.

Kept patches are clear, patches that were averaged into another one carry the colour of their group, dropped patches
are dark. The anchor of a group stays clear inside a frame of the group's colour.
"""

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from llava.errors import UserError
from llava.reduction import Reduction, Step

Ints = NDArray[np.int64]

DARK = 0.22  # brightness left to a dropped patch
TINT = 0.5  # share of the group colour in a merged patch


@dataclass(frozen=True)
class PatchAssignment:
    """Where N patches are after every step; K tokens are left.

    Attributes:
        assignment: [N], the token into which a patch was merged, -1 if it was dropped.
        kept: [K], the patch at which each token stands.
    """

    assignment: Ints
    kept: Ints


def compose(trace: Sequence[Step], patches: int) -> PatchAssignment:
    """Follow every patch through the steps of one sample; positions of a step count the previous step's outputs."""
    owner = anchor = np.arange(patches)
    for step in trace:
        if step.reduction.inputs != len(anchor):
            raise ValueError(f"step at {step.place} takes {step.reduction.inputs} tokens, {len(anchor)} are there")
        moved = step_owner(step, patches)
        owner = np.where(owner >= 0, moved[owner], -1)
        anchor = anchor[step.reduction.kept[0].cpu().numpy()]
    return PatchAssignment(owner, anchor)


def step_owner(step: Step, patches: int) -> Ints:
    """[inputs]: the output token each input of one step goes into, -1 if it goes nowhere."""
    reduction: Reduction = step.reduction
    anchor = reduction.kept[0].cpu().numpy()
    if reduction.merge_matrix is not None:
        # Groups overlap: a patch is drawn with the token it has the largest share in, a kept one with its own.
        share = reduction.merge_matrix[0].cpu().numpy()
        owner = np.where(share.max(0) > 0, share.argmax(0), -1)
        owner[anchor] = np.arange(len(anchor))
        return owner
    if reduction.assignment is not None:
        owner = reduction.assignment[0].cpu().numpy()
        share = reduction.merge_weight[0].cpu().numpy() if reduction.merge_weight is not None else np.ones(len(owner))
        owner = np.where(share != 0, owner, -1)
        owner[anchor] = np.where(owner[anchor] < 0, np.arange(len(anchor)), owner[anchor])
        return owner
    if step.place == "input":
        # A smaller image: no patch is dropped, each is part of the nearest token.
        return nearest(anchor, grid_of(reduction.inputs))
    owner = np.full(reduction.inputs, -1)
    owner[anchor] = np.arange(len(anchor))
    return owner


def nearest(anchor: Ints, grid: tuple[int, int]) -> Ints:
    """[N]: index of the anchor closest to each cell of the grid, the first of equals."""
    columns = grid[1]
    cells = np.arange(grid[0] * columns)
    rows = (cells[:, None] // columns - anchor[None] // columns) ** 2
    return (rows + (cells[:, None] % columns - anchor[None] % columns) ** 2).argmin(1)


def grid_of(tokens: int) -> tuple[int, int]:
    """The square grid of `tokens` patches, or of one less where the class token comes along."""
    for patches in (tokens, tokens - 1):
        side = math.isqrt(max(patches, 0))
        if side > 0 and side * side == patches:
            return side, side
    raise UserError(f"{tokens} tokens are no square grid of patches; an overlay needs the grid of the image.")


def without_cls(fate: PatchAssignment) -> PatchAssignment:
    """Leave out the class token at position 0; a token that stands at it has its anchor outside the image, at -1."""
    return PatchAssignment(fate.assignment[1:], fate.kept - 1)


def draw_overlay(
    image: Image.Image,
    trace: Sequence[Step],
    grid: int | tuple[int, int] | None = None,
    upscale: int = 1,
    padded: bool = True,
) -> Image.Image:
    """Draw the fate of every patch on the image.

    Args:
        trace: the steps of one sample, in order; without steps everything was kept.
        grid: rows and columns of the vision tower's patches; a number for a square, None to take it from the trace.
        upscale: enlarge the image by this whole factor, small images are easier to read so.
        padded: the grid covers the image padded to a square, as LLaVA-1.5 sees it. False: it covers the image.

    Returns:
        RGB, the size of the image times `upscale`.
    """
    image = image.convert("RGB")
    image = image.resize((image.width * upscale, image.height * upscale), Image.Resampling.NEAREST)
    if grid is None:
        if not trace:
            return image
        grid = grid_of(trace[0].reduction.inputs)
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    has_cls = bool(trace) and trace[0].reduction.inputs == rows * columns + 1
    fate = compose(trace, rows * columns + has_cls)
    if has_cls:
        fate = without_cls(fate)

    # The canvas that the grid covers, and where the image lies on it.
    width, height = (max(image.size),) * 2 if padded else image.size
    left, top = (width - image.width) // 2, (height - image.height) // 2
    row = (np.arange(image.height) + top) * rows // height
    column = (np.arange(image.width) + left) * columns // width
    patch = row[:, None] * columns + column[None]  # [height, width], the patch of each pixel

    shade, colour, tint = paints(fate)
    pixels = np.asarray(image, dtype=np.float32) * shade[patch][..., None]
    mixed = pixels * (1 - tint[patch][..., None]) + colour[patch] * tint[patch][..., None]
    picture = Image.fromarray(mixed.round().astype(np.uint8))
    frame_anchors(picture, fate, colour, (rows, columns), (width, height), (left, top))
    return picture


def paints(fate: PatchAssignment) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Per patch: brightness [N], group colour [N, 3], and how much of the colour is mixed in [N]."""
    patches = np.arange(len(fate.assignment))
    dropped = fate.assignment < 0
    is_anchor = np.isin(patches, fate.kept)
    shade = np.where(dropped, DARK, 1).astype(np.float32)
    tint = np.where(dropped | is_anchor, 0, TINT).astype(np.float32)
    palette = np.array([group_colour(index) for index in range(len(fate.kept))] or [(0, 0, 0)], dtype=np.float32)
    return shade, palette[np.maximum(fate.assignment, 0)], tint


def group_colour(index: int) -> tuple[float, float, float]:
    """A colour per group; the golden ratio keeps neighbours in the list far apart."""
    red, green, blue = colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.85, 1)
    return 255 * red, 255 * green, 255 * blue


def frame_anchors(
    picture: Image.Image,
    fate: PatchAssignment,
    colour: NDArray[np.float32],
    grid: tuple[int, int],
    canvas: tuple[int, int],
    offset: tuple[int, int],
) -> None:
    """A frame in the group's colour around each anchor that other patches were averaged into."""
    members = np.bincount(fate.assignment[fate.assignment >= 0], minlength=len(fate.kept))
    draw = ImageDraw.Draw(picture)
    for token, patch in enumerate(fate.kept):
        if members[token] < 2 or patch < 0:
            continue
        row, column = divmod(int(patch), grid[1])
        # The smallest pixel whose cell is `column`: the cell of x is x * columns // width.
        box = [
            -(-column * canvas[0] // grid[1]) - offset[0],
            -(-row * canvas[1] // grid[0]) - offset[1],
            -(-(column + 1) * canvas[0] // grid[1]) - offset[0] - 1,
            -(-(row + 1) * canvas[1] // grid[0]) - offset[1] - 1,
        ]
        if box[2] >= box[0] and box[3] >= box[1]:
            draw.rectangle(box, outline=tuple(int(channel) for channel in colour[patch]))
