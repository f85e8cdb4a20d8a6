"""Draw on an image which of its patches the reductions of one answer kept, merged and dropped.

Kept patches show the photograph as it is. Merged patches are tinted faintly; a thin line in the colour of their group
follows its border, and a frame marks the patch at which the merged token stands. Dropped patches are dim and grey.
Padding of the model's input is hatched.

A sample has one panel per image, base image and tiles side by side for a tiled image, or all frames of a video.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw, ImageFont

from llava.pipeline.accounting import Answer
from llava.processing.prompt import Sample
from llava.processing.video import Video
from llava.reduction import Step
from llava.reduction.token_layout import WITHOUT_PADDING, Canvas, TokenLayout

Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]

NONE = -1  # a cell of the patch grid that has no visual token
# Okabe and Ito's colours without black, which readers with any colour blindness can tell apart.
PALETTE = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")


@dataclass(frozen=True)
class PatchAssignment:
    """Where N patches are after some steps that leave K tokens.

    Attributes:
        assignment: [N], the token that a patch is part of, -1 if it was dropped.
        kept: [K], the patch at which each token stands; -1 for a token without a place (a class token).
        members: [K], number of patches of each token.
    """

    assignment: Ints
    kept: Ints
    members: Ints = field(init=False)

    def __post_init__(self) -> None:
        present = self.assignment[self.assignment >= 0]
        object.__setattr__(self, "members", np.bincount(present, minlength=len(self.kept)))

    @property
    def stands(self) -> Mask:
        """[N]: a token stands at this patch."""
        return np.isin(np.arange(len(self.assignment)), self.kept)

    @property
    def grouped(self) -> Mask:
        """[N]: the patch is part of a token of two or more patches."""
        if not len(self.kept):
            return np.zeros(len(self.assignment), bool)
        return (self.assignment >= 0) & (self.members[np.maximum(self.assignment, 0)] > 1)

    @property
    def target(self) -> Mask:
        """[N]: a token of two or more patches stands at this patch."""
        return self.stands & self.grouped

    @property
    def merged(self) -> Mask:
        """[N]: the patch was merged into a token that stands at another patch."""
        return (self.assignment >= 0) & ~self.stands

    @property
    def dropped(self) -> Mask:
        """[N]: the patch is part of no token."""
        return self.assignment < 0


def patches_of(trace: Sequence[Step], layout: TokenLayout) -> tuple[PatchAssignment, TokenLayout]:
    """Follow all visual tokens of an image through its steps. Each step indexes the outputs of the previous one.

    Args:
        layout: of the tokens that the model takes without reduction.

    Returns:
        Where the tokens are, and the layout that numbers them. It includes class tokens if the first step takes them.

    Raises:
        ValueError: a step takes another number of tokens than the previous one left.
    """
    if trace and trace[0].reduction.inputs != layout.tokens:
        layout = layout.with_cls
    assignment = kept = np.arange(layout.tokens)
    for step in trace:
        if step.reduction.inputs != len(kept):
            raise ValueError(f"step at {step.place} takes {step.reduction.inputs} tokens, {len(kept)} are there")
        moved = step_assignment(step)
        assignment = np.where(assignment >= 0, moved[assignment], -1)
        kept = kept[step.reduction.kept[0].cpu().numpy()]
    return PatchAssignment(assignment, kept), layout


def step_assignment(step: Step) -> Ints:
    """[inputs]: the output token that each input of one step is part of, -1 if it is part of none."""
    reduction = step.reduction
    kept = reduction.kept[0].cpu().numpy()
    own = np.arange(len(kept))
    if reduction.merge_matrix is not None:
        # Groups overlap. A patch is drawn with the token in which it has the largest weight, a kept patch with its own.
        weight = reduction.merge_matrix[0].cpu().numpy()
        assignment = np.where(weight.max(0) > 0, weight.argmax(0), -1)
    elif reduction.assignment is not None:
        assignment = reduction.assignment[0].cpu().numpy()
        if reduction.merge_weight is not None:
            assignment = np.where(reduction.merge_weight[0].cpu().numpy() != 0, assignment, -1)
        own = np.where(assignment[kept] < 0, own, assignment[kept])
    else:
        assignment = np.full(reduction.inputs, -1)
    assignment = assignment.copy()
    assignment[kept] = own
    return assignment


def colour_groups(patches: PatchAssignment, grids: Sequence[Ints]) -> Ints:
    """Choose colours for the merge groups. Groups that touch get different ones as long as the palette has enough.

    Args:
        grids: for every panel [rows, columns], the visual token of each cell, NONE if there is none.

    Returns:
        [K]: index into PALETTE, -1 for a token of one patch.
    """
    neighbours: dict[int, set[int]] = {int(token): set() for token in np.flatnonzero(patches.members > 1)}
    for grid in grids:
        groups = np.where(grid == NONE, -1, patches.assignment[grid])
        for line in (*groups, *groups.T):
            for one, other in pairwise(line.tolist()):
                if one != other and one in neighbours and other in neighbours:
                    neighbours[one].add(other)
                    neighbours[other].add(one)
    colours = np.full(len(patches.kept), -1)
    for order, token in enumerate(neighbours):
        taken = [int(colours[other]) for other in neighbours[token]]
        # The colour least used by neighbours; among equals the next in turn, so that no colour dominates the image.
        turn = [(order + shift) % len(PALETTE) for shift in range(len(PALETTE))]
        colours[token] = min(turn, key=taken.count)
    return colours


@dataclass(frozen=True, eq=False)
class Panel:
    """An image, and the grid of patches that covers it.

    Attributes:
        name: what the panel shows, for a caption.
        image: the photograph, its longer side at most LARGEST, with hatched padding if patches cover padding.
        grid: [rows, columns], the visual token of every cell, NONE if there is none.
    """

    name: str
    image: Image.Image
    grid: Ints


def panels_of(image: Image.Image | Video, layout: TokenLayout, canvas: Canvas | None = None) -> list[Panel]:
    """The panels of an image or video.

    Args:
        layout: of the visual tokens whose indices the grids hold.
        canvas: where the image lies on the canvas that its patches cover; None assumes that they cover the image.
    """
    grids = grids_of(layout)
    if isinstance(image, Video):
        together = -(-len(image.frames) // len(grids))  # Qwen-VL: a token shows two frames; draw the first
        return [
            Panel(f"frame {number * together + 1}", shrunk(frame), grid)
            for number, (frame, grid) in enumerate(zip(image.frames[::together], grids, strict=True))
        ]
    photo = shrunk(image)
    if layout.tiles is None:
        return [Panel("image", with_padding(photo, canvas), grids[0])]
    table = stitched_grid(layout, layout.tiles)
    (rows, columns), (down, across) = used(table), table.shape
    window = columns.start / across, rows.start / down, columns.stop / across, rows.stop / down
    return [Panel("base image", photo, grids[0]), Panel("tiles", with_padding(photo, canvas, window), grids[1])]


def grids_of(layout: TokenLayout) -> list[Ints]:
    """The grid of every panel: of an image, of all frames, or of the base image and the stitched tiles.

    Rows and columns that unpadding removed from the tiles as a whole are left out.
    """
    if layout.tiles is None:
        return [view_grid(layout, number) for number in range(len(layout.crops))]
    table = stitched_grid(layout, layout.tiles)
    return [view_grid(layout, 0), table[used(table)]]


def view_grid(layout: TokenLayout, number: int) -> Ints:
    """[rows, columns]: the visual token of every patch of a tile or frame."""
    table = np.full(layout.grid[0] * layout.grid[1], NONE)
    crop = layout.crops[number]
    table[crop.patches.numpy()] = crop.indices.numpy()
    return table.reshape(layout.grid)


def stitched_grid(layout: TokenLayout, tiles: tuple[int, int]) -> Ints:
    """[rows, columns]: the visual token of every patch of all tiles, put together."""
    down, across = tiles
    rows = [np.concatenate([view_grid(layout, 1 + row * across + i) for i in range(across)], 1) for row in range(down)]
    return np.concatenate(rows)


def used(table: Ints) -> tuple[slice, slice]:
    """The range of rows and of columns of a grid that have tokens; the whole grid if it has none."""
    tokens = table != NONE
    rows, columns = (np.flatnonzero(tokens.any(axis) | ~tokens.any()) for axis in (1, 0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


LARGEST = 1024  # pixels of the longer side at which a photograph is drawn
HATCHED = (165, 165, 165), (228, 228, 228)  # stripes of padding, and the colour between them
GREY = 0.7  # share of grey in a dropped patch
DIM = 0.42  # share of brightness that a dropped patch keeps
FADED = 0.35  # share of grey in a merged patch
TINT = 0.16  # share of the group's colour in a merged patch
LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)


def shrunk(image: Image.Image) -> Image.Image:
    """The image in RGB, its longer side at most LARGEST.

    Drawing on a photograph of full size would take minutes and gigabytes.
    """
    small = image.convert("RGB")
    small.thumbnail((LARGEST, LARGEST), reducing_gap=2)
    return small


def scaled(image: Image.Image, upscale: int) -> Image.Image:
    """The image with every pixel repeated `upscale` times in each direction."""
    return image.resize((image.width * upscale, image.height * upscale), Image.Resampling.NEAREST)


def with_padding(
    photo: Image.Image, canvas: Canvas | None, window: tuple[float, float, float, float] = (0, 0, 1, 1)
) -> Image.Image:
    """What the patches cover: the photograph, cropped or with hatched padding around it.

    Args:
        canvas: where the photograph lies on what the patches cover; None assumes that they cover the photograph.
        window: left, top, right and bottom of the shown part of the canvas, from 0 to 1.
    """
    if canvas is None or canvas == WITHOUT_PADDING:
        return photo
    (width, height), (left, top, right, bottom) = canvas.size, canvas.box
    scale = max(photo.size) / max(right - left, bottom - top)
    photo = photo.resize((max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale))))
    # Edges of the window in pixels of the photograph.
    x, end_x = (round((edge * width - left) * scale) for edge in window[::2])
    y, end_y = (round((edge * height - top) * scale) for edge in window[1::2])
    if (x, y, end_x, end_y) == (0, 0, *photo.size):
        return photo
    down, across = np.ogrid[: max(1, end_y - y), : max(1, end_x - x)]
    period = max(4, max(down.size, across.size) // 48)
    stripes = (down + across) % period < period / 4
    line, between = np.array(HATCHED, dtype=np.uint8)
    drawn = Image.fromarray(np.where(stripes[..., None], line, between))
    drawn.paste(photo, (-x, -y))
    return drawn


def draw_panel(panel: Panel, patches: PatchAssignment, colours: Ints, upscale: int = 1) -> Image.Image:
    """The image of a panel with every patch shown as kept, merged or dropped.

    Args:
        patches: of the tokens whose indices the panel's grid holds.
        colours: [K], index into PALETTE of every token, from `colour_groups`.
    """
    image, (rows, columns) = scaled(panel.image, upscale), panel.grid.shape
    down, across = np.ogrid[: image.height, : image.width]
    cell = down * rows // image.height * columns + across * columns // image.width  # [height, width]
    token = panel.grid.flatten()[cell]
    known = token != NONE
    dropped, merged = ~known | patches.dropped[token], known & patches.merged[token]

    pixels = np.asarray(image, dtype=np.float32)
    grey = (pixels @ LUMINANCE)[..., None]
    palette = np.array([*map(ImageColor.getrgb, PALETTE), (0, 0, 0)], dtype=np.float32)  # ends in black: no group
    paint = palette[np.append(colours, -1)[patches.assignment]][token]  # a dropped patch (-1) has no group either
    faded = (pixels + (grey - pixels) * FADED) * (1 - TINT) + paint * TINT
    dim = (pixels + (grey - pixels) * GREY) * DIM
    drawn = np.where(dropped[..., None], dim, np.where(merged[..., None], faded, pixels))

    thin = max(1, round(min(image.width / columns, image.height / rows) / 12))  # a twelfth of a patch
    group = np.where(known & patches.grouped[token], patches.assignment[token], -1)
    border = (group >= 0) & differs(group, thin)
    frame = known & patches.target[token] & differs(cell, 2 * thin, outside=True)
    drawn = np.where((border | frame)[..., None], paint, drawn)
    return Image.fromarray(drawn.round().astype(np.uint8))


def save_small(image: Image.Image, path: Path) -> None:
    """Write a PNG with 256 colours, chosen so that the image does not change visibly."""
    image.quantize(256, method=Image.Quantize.MAXCOVERAGE, kmeans=3).save(path, optimize=True)


def differs(values: Ints, distance: int, outside: bool = False) -> Mask:
    """For each pixel, whether another value lies at most `distance` pixels up, down, left or right of it.

    Args:
        values: [height, width].
        outside: whether the border of the image counts as another value.
    """
    near = np.zeros(values.shape, bool)
    padded = np.pad(values, distance, constant_values=-2) if outside else np.pad(values, distance, mode="edge")
    height, width = values.shape
    for shift in range(2 * distance + 1):
        near |= padded[shift : shift + height, distance : distance + width] != values
        near |= padded[distance : distance + height, shift : shift + width] != values
    return near


def legend() -> Image.Image:
    """A strip that explains the overlay: kept, merged, merge target and dropped patches, black on white."""
    side, gap, font = 14, 8, ImageFont.load_default(13)
    # Four patches of a made-up photograph; patches 1 and 2 are one token, which stands at 2.
    photo = np.array([[(196, 120, 84), (120, 168, 92)]], dtype=np.uint8).repeat(side, 0).repeat(side // 2, 1)
    panel = Panel("", Image.fromarray(np.concatenate([photo] * 4, 1)), np.arange(4)[None])
    drawn = draw_panel(panel, PatchAssignment(np.array([0, 1, 1, -1]), np.array([0, 2])), np.array([-1, 4]))
    # A group's line runs around the whole group, but this swatch shows one patch, so it is outlined on all sides.
    ImageDraw.Draw(drawn).rectangle((side, 0, 2 * side - 1, side - 1), outline=PALETTE[4])
    swatches = [drawn.crop((left, 0, left + side, side)) for left in range(0, 4 * side, side)]
    texts = ("kept", "merged, in its group's outline", "patch at which a merged token stands", "dropped")
    widths = [side + gap // 2 + round(font.getlength(text)) + 2 * gap for text in texts]
    strip = Image.new("RGB", (sum(widths), side + gap), "white")
    pen, left = ImageDraw.Draw(strip), 0
    for text, swatch, width in zip(texts, swatches, widths, strict=True):
        strip.paste(swatch, (left, gap // 2))
        pen.text((left + side + gap // 2, gap // 2 + side // 2), text, fill="black", font=font, anchor="lm")
        left += width
    return strip


GAP = 4  # pixels between panels


def draw_answer(sample: Sample, answer: Answer) -> list[Image.Image]:
    """One overlay for every image of a sample."""
    overlays = []
    images = zip(sample.images, answer.runs, answer.canvases, strict=True)
    for number, (image, layout, canvas) in enumerate(images, start=1):
        mark = str(number) if number > 1 else ""  # the places of a second image's steps end in " #2"
        steps = [step for step in answer.trace if step.place.partition(" #")[2] == mark]
        overlays.append(draw_overlay(image, steps, layout, upscale_of(image), canvas))
    return overlays


def draw_original(image: Image.Image | Video) -> Image.Image:
    """The image without overlay and padding, as large as in `draw_answer`; a video's frames stand in two rows."""
    frames = image.frames if isinstance(image, Video) else [image]
    return frame_sheet([scaled(shrunk(frame), upscale_of(image)) for frame in frames])


def upscale_of(image: Image.Image | Video) -> int:
    """The factor by which an image is enlarged: 2 if it is small, else 1."""
    first = image.frames[0] if isinstance(image, Video) else image
    return 2 if max(first.size) < 400 else 1


def frame_sheet(panels: Sequence[Image.Image]) -> Image.Image:
    """Panels in two rows; one panel stays as it is."""
    half = -(-len(panels) // 2)
    return sheet([row for row in (panels[:half], panels[half:]) if row])


def draw_overlay(
    image: Image.Image | Video,
    trace: Sequence[Step],
    layout: TokenLayout,
    upscale: int = 1,
    canvas: Canvas | None = None,
) -> Image.Image:
    """Draw which patches were kept, merged and dropped, one panel per view of the image.

    Args:
        trace: the steps of this image, in order; without steps everything was kept.
        layout: of the tokens that the model takes without reduction.
        upscale: whole factor by which the image is enlarged; small images are easier to read enlarged.
        canvas: see `panels_of`.

    Returns:
        RGB, as large as the image with its padding times `upscale`, where the image's longer side is at most LARGEST. A
        tiled image has a panel for the base image and one for the tiles, which is dim where unpadding left no patch.
        A video's frames stand in two rows.
    """
    patches, layout = patches_of(trace, layout)
    panels = panels_of(image, layout, canvas)
    colours = colour_groups(patches, [panel.grid for panel in panels])
    drawn = [draw_panel(panel, patches, colours, upscale) for panel in panels]
    return frame_sheet(drawn) if isinstance(image, Video) else beside(drawn)


def beside(panels: Sequence[Image.Image]) -> Image.Image:
    """Panels from left to right on white."""
    return sheet([panels])


def sheet(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Rows of panels on white."""
    widths = [sum(panel.width for panel in row) + GAP * (len(row) - 1) for row in rows]
    heights = [max(panel.height for panel in row) for row in rows]
    drawn = Image.new("RGB", (max(widths), sum(heights) + GAP * (len(rows) - 1)), "white")
    top = 0
    for row, height in zip(rows, heights, strict=True):
        left = 0
        for panel in row:
            drawn.paste(panel, (left, top))
            left += panel.width + GAP
        top += height + GAP
    return drawn
