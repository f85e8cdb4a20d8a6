"""Which parts of an image the model kept: the reductions of one sample drawn on it.

Kept patches are the photograph itself. Merged patches are tinted faintly, and a thin line in the group's colour follows
the border of every group; the patch at which the merged token stands has a frame. Dropped patches are dim and grey.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw, ImageFont

from eval.figures.panels import Panel
from eval.figures.patches import (
    NONE,
    PALETTE,
    Ints,
    Mask,
    PatchAssignment,
    colour_groups,
    compose,
    grid_of,
    without_cls,
)
from llava.reduction import Step

LARGEST = 1024  # pixels of the longer side at which a photograph is drawn
GREY = 0.7  # share of grey in a dropped patch
DIM = 0.42  # brightness left to a dropped patch
FADED = 0.35  # share of grey in a merged patch
TINT = 0.16  # share of the group's colour in a merged patch
LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)


def draw_overlay(
    image: Image.Image,
    trace: Sequence[Step],
    grid: int | tuple[int, int] | None = None,
    upscale: int = 1,
    padded: bool = True,
) -> Image.Image:
    """Draw what became of every patch on the image.

    Args:
        trace: the steps of one sample, in order; without steps everything was kept.
        grid: rows and columns of the vision tower's patches; a number for a square, None to take it from the trace.
        upscale: enlarge the image by this whole factor; small images are easier to read so.
        padded: the grid covers the image padded to a square, as LLaVA-1.5 sees it. False: it covers the image.

    Returns:
        RGB, the size of the image, its longer side at most LARGEST, times `upscale`.
    """
    if grid is None:
        if not trace:
            return scaled(image, upscale)
        grid = grid_of(trace[0].reduction.inputs)
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    has_cls = bool(trace) and trace[0].reduction.inputs == rows * columns + 1
    patches = compose(trace, rows * columns + has_cls)
    if has_cls:
        patches = without_cls(patches)
    panel = Panel("image", image, np.arange(rows * columns).reshape(rows, columns), padded)
    return draw_panel(panel, patches, colour_groups(patches, [panel.grid]), upscale)


def scaled(image: Image.Image, upscale: int) -> Image.Image:
    """The image in RGB, its longer side at most LARGEST, then every pixel repeated `upscale` times in each direction.

    An overlay has a few hundred patches; of a photograph with all its pixels it takes minutes and gigabytes.
    """
    shrunk = image.convert("RGB")
    shrunk.thumbnail((LARGEST, LARGEST), reducing_gap=2)
    return shrunk.resize((shrunk.width * upscale, shrunk.height * upscale), Image.Resampling.NEAREST)


def draw_panel(panel: Panel, patches: PatchAssignment, colours: Ints, upscale: int = 1) -> Image.Image:
    """The image of a panel with every patch shown as kept, merged or dropped.

    Args:
        patches: of the tokens whose indices the panel's grid holds.
        colours: [K], index into PALETTE of every token, from `colour_groups`.
    """
    image = scaled(panel.image, upscale)
    cell = cells_of_pixels(panel, image.size)  # [height, width]
    token = panel.grid.flatten()[cell]
    known = token != NONE
    dropped, merged = ~known | patches.dropped[token], known & patches.merged[token]

    pixels = np.asarray(image, dtype=np.float32)
    grey = (pixels @ LUMINANCE)[..., None]
    paint = group_colours(patches, colours)[token]
    faded = (pixels + (grey - pixels) * FADED) * (1 - TINT) + paint * TINT
    dim = (pixels + (grey - pixels) * GREY) * DIM
    drawn = np.where(dropped[..., None], dim, np.where(merged[..., None], faded, pixels))

    thin = line_width(panel, image.size)
    group = np.where(known & patches.grouped[token], patches.assignment[token], -1)
    border = (group >= 0) & differs(group, thin)
    frame = known & patches.target[token] & differs(cell, 2 * thin, outside=True)
    drawn = np.where((border | frame)[..., None], paint, drawn)
    return Image.fromarray(drawn.round().astype(np.uint8))


def save_small(image: Image.Image, path: Path) -> None:
    """Write a PNG with 256 colours, chosen so that no colour of the image changes visibly."""
    image.quantize(256, method=Image.Quantize.MAXCOVERAGE, kmeans=3).save(path, optimize=True)


def cells_of_pixels(panel: Panel, size: tuple[int, int]) -> Ints:
    """[height, width]: the cell of the panel's grid, in raster order, that each pixel of the image lies in.

    Args:
        size: width and height at which the image is drawn.
    """
    (width, height), (rows, columns) = panel.canvas(size), panel.grid.shape
    row = (np.arange(size[1]) + (height - size[1]) // 2) * rows // height
    column = (np.arange(size[0]) + (width - size[0]) // 2) * columns // width
    return row[:, None] * columns + column[None]


def line_width(panel: Panel, size: tuple[int, int]) -> int:
    """Pixels of a thin line: a twelfth of a patch, at least 1."""
    (width, height), (rows, columns) = panel.canvas(size), panel.grid.shape
    return max(1, round(min(width / columns, height / rows) / 12))


def differs(values: Ints, distance: int, outside: bool = False) -> Mask:
    """Same shape: a pixel with another value lies at most `distance` away, up, down, left or right.

    Args:
        outside: pixels beyond the image count as others.
    """
    found = np.zeros(values.shape, bool)
    padded = np.pad(values, distance, constant_values=-2) if outside else np.pad(values, distance, mode="edge")
    height, width = values.shape
    for shift in range(2 * distance + 1):
        found |= padded[shift : shift + height, distance : distance + width] != values
        found |= padded[distance : distance + height, shift : shift + width] != values
    return found


def group_colours(patches: PatchAssignment, colours: Ints) -> NDArray[np.float32]:
    """[N, 3]: the colour of every patch's group, 0 to 255; black without a group."""
    palette = np.array([*map(ImageColor.getrgb, PALETTE), (0, 0, 0)], dtype=np.float32)
    own = np.append(colours, -1)[patches.assignment]  # -1, a dropped patch, takes the last: no colour
    return palette[own]


def legend(scale: int = 1, merges: bool = True) -> Image.Image:
    """A strip that explains the overlay: kept, merged, merge target and dropped patches, black on white.

    Args:
        merges: False leaves out the entries of merging.
    """
    side, gap = 14 * scale, 8 * scale
    font = ImageFont.load_default(13 * scale)
    kept, merged, target, dropped = (_swatch(side, number) for number in range(4))
    entries = [("kept", kept)]
    if merges:
        entries += [("merged, in its group's outline", merged), ("patch at which a merged token stands", target)]
    entries.append(("dropped", dropped))
    widths = [side + gap // 2 + round(font.getlength(text)) + 2 * gap for text, _ in entries]
    strip = Image.new("RGB", (sum(widths), side + gap), "white")
    pen, left = ImageDraw.Draw(strip), 0
    for (text, swatch), width in zip(entries, widths, strict=True):
        strip.paste(swatch, (left, gap // 2))
        pen.text((left + side + gap // 2, gap // 2 + side // 2), text, fill="black", font=font, anchor="lm")
        left += width
    return strip


def _swatch(side: int, number: int) -> Image.Image:
    """One patch of a small example, drawn as `draw_panel` draws it: kept, merged, merge target, dropped."""
    # Four patches of a made-up photograph; patches 1 and 2 are one token, which stands at 2.
    photo = np.array([[(196, 120, 84), (120, 168, 92)]], dtype=np.uint8).repeat(side, 0).repeat(side // 2, 1)
    image = Image.fromarray(np.concatenate([photo] * 4, 1))
    patches = PatchAssignment(np.array([0, 1, 1, -1]), np.array([0, 2]))
    panel = Panel("", image, np.arange(4)[None])
    drawn = draw_panel(panel, patches, np.array([-1, 4]))
    if number == 1:  # a group's line runs around it, not between it and its own target
        ImageDraw.Draw(drawn).rectangle((side, 0, 2 * side - 1, side - 1), outline=PALETTE[4])
    return drawn.crop((number * side, 0, number * side + side, side))
