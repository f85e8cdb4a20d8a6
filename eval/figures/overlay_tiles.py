"""Overlays of whole samples: one panel per image, base image and tiles side by side, or all frames of a video."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from eval.figures.overlay import DARK, PatchAssignment, compose, draw_overlay, paints
from llava.pipeline.answer import Answer
from llava.processing.sample import Sample
from llava.processing.video import Video
from llava.reduction import Step
from llava.reduction.token_layout import TokenLayout

GAP = 4  # pixels between panels
NONE = -1  # no visual token shows this pixel


def draw_answer(sample: Sample, answer: Answer) -> list[Image.Image]:
    """One overlay for every image of a sample."""
    drawn = []
    for number, picture in enumerate(sample.images):
        mark = "" if number == 0 else f" #{number + 1}"
        trace = [step for step in answer.trace if mark == step.place[step.place.find(" #") :] * (" #" in step.place)]
        upscale = upscale_of(picture)
        run = answer.runs[number] if answer.runs else None
        if run is not None and (len(run.crops) > 1 or len(run.newlines) or run.grid[0] != run.grid[1]):
            drawn.append(draw_crops(picture, trace, run, upscale))
        else:
            assert isinstance(picture, Image.Image)  # the layout of a video has several frames
            drawn.append(draw_overlay(picture, trace, upscale=upscale))
    return drawn


def draw_original(picture: Image.Image | Video) -> Image.Image:
    """The image without an overlay, enlarged as `draw_answer` does it; of a video its frames in two rows."""
    frames = [frame.convert("RGB") for frame in (picture.frames if isinstance(picture, Video) else [picture])]
    upscale = upscale_of(picture)
    return frame_sheet(
        [frame.resize((frame.width * upscale, frame.height * upscale), Image.Resampling.NEAREST) for frame in frames]
    )


def upscale_of(picture: Image.Image | Video) -> int:
    """Small images are drawn twice as large."""
    first = picture.frames[0] if isinstance(picture, Video) else picture
    return 2 if max(first.size) < 400 else 1


def frame_sheet(panels: Sequence[Image.Image]) -> Image.Image:
    """Panels in two rows; one panel stays as it is."""
    half = -(-len(panels) // 2)
    return panels[0] if len(panels) == 1 else _stacked([beside(panels[:half]), beside(panels[half:])])


def draw_crops(
    picture: Image.Image | Video, trace: Sequence[Step], arrangement: TokenLayout, upscale: int = 1
) -> Image.Image:
    """Draw which patches were kept, merged and dropped, one panel per view of the image.

    Args:
        trace: the steps of this image, in order.
        arrangement: layout of the tokens that the model takes without reduction.

    Returns:
        RGB. Of a tiled image: one panel for the base image and one for the tiles, which is dark where unpadding left no
        tile patch. Of a video: its frames in two rows.
    """
    run = arrangement
    if trace and trace[0].reduction.inputs != run.tokens:
        run = run.with_cls()
    fate = compose(trace, run.tokens)
    if isinstance(picture, Video):
        panels = [_panel(frame, _grid_of(run, number), fate, upscale) for number, frame in enumerate(picture.frames)]
        return frame_sheet(panels)
    panels = [_panel(picture, _grid_of(run, 0), fate, upscale)]
    if run.tiles is not None:
        panels.append(_panel(picture, _stitched_grid(run, run.tiles), fate, upscale))
    return beside(panels)


def _grid_of(run: TokenLayout, number: int) -> NDArray[np.int64]:
    """[rows, columns]: index of the token of every patch of a tile."""
    table = np.full(run.grid[0] * run.grid[1], NONE)
    crop = run.crops[number]
    table[crop.patches.numpy()] = crop.indices.numpy()
    return table.reshape(run.grid)


def _stitched_grid(run: TokenLayout, tiles: tuple[int, int]) -> NDArray[np.int64]:
    """The same of all tiles together, without the rows and columns that unpadding took off."""
    down, across = tiles
    rows = [np.concatenate([_grid_of(run, 1 + row * across + i) for i in range(across)], 1) for row in range(down)]
    table = np.concatenate(rows)
    used = table != NONE
    return table[used.any(1)][:, used.any(0)] if used.any() else table


def _panel(image: Image.Image, grid: NDArray[np.int64], fate: PatchAssignment, upscale: int) -> Image.Image:
    """The image under the grid; each cell is painted by what became of its token."""
    image = image.convert("RGB")
    image = image.resize((image.width * upscale, image.height * upscale), Image.Resampling.NEAREST)
    row = np.arange(image.height) * grid.shape[0] // image.height
    column = np.arange(image.width) * grid.shape[1] // image.width
    token = grid[row[:, None], column[None]]
    shade, colour, tint = paints(fate)
    known = token != NONE
    shade, tint = np.where(known, shade[token], DARK)[..., None], np.where(known, tint[token], 0)[..., None]
    pixels = np.asarray(image, dtype=np.float32) * shade
    return Image.fromarray((pixels * (1 - tint) + colour[token] * tint).round().astype(np.uint8))


def beside(panels: Sequence[Image.Image]) -> Image.Image:
    """Panels from left to right on white."""
    width = sum(panel.width for panel in panels) + GAP * (len(panels) - 1)
    sheet, left = Image.new("RGB", (width, max(panel.height for panel in panels)), "white"), 0
    for panel in panels:
        sheet.paste(panel, (left, 0))
        left += panel.width + GAP
    return sheet


def _stacked(panels: Sequence[Image.Image]) -> Image.Image:
    height = sum(panel.height for panel in panels) + GAP * (len(panels) - 1)
    sheet, top = Image.new("RGB", (max(panel.width for panel in panels), height), "white"), 0
    for panel in panels:
        sheet.paste(panel, (0, top))
        top += panel.height + GAP
    return sheet
