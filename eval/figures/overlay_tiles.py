"""Overlays of whole samples: one panel per image, base image and tiles side by side, or all frames of a video."""

from collections.abc import Sequence

from PIL import Image

from eval.figures.overlay import draw_overlay, draw_panel, scaled
from eval.figures.panels import grids, panels_of
from eval.figures.patches import PatchAssignment, colour_groups, compose
from llava.pipeline.answer import Answer
from llava.processing.sample import Sample
from llava.processing.video import Video
from llava.reduction import Step
from llava.reduction.token_layout import TokenLayout

GAP = 4  # pixels between panels


def draw_answer(sample: Sample, answer: Answer) -> list[Image.Image]:
    """One overlay for every image of a sample."""
    drawn = []
    for number, picture in enumerate(sample.images):
        trace = trace_of(answer.trace, number)
        upscale = upscale_of(picture)
        if answer.runs:
            drawn.append(draw_crops(picture, trace, answer.runs[number], upscale))
        else:
            assert isinstance(picture, Image.Image)  # an answer about a video has its layout
            drawn.append(draw_overlay(picture, trace, upscale=upscale))
    return drawn


def trace_of(trace: Sequence[Step], number: int) -> list[Step]:
    """The steps of one image of a sample, in order; `number` counts its images from 0."""
    mark = str(number + 1) if number else ""  # the places of a second image end in " #2"
    return [step for step in trace if step.place.partition(" #")[2] == mark]


def draw_original(picture: Image.Image | Video) -> Image.Image:
    """The image without an overlay, as large as `draw_answer` draws it; of a video its frames in two rows."""
    frames = picture.frames if isinstance(picture, Video) else [picture]
    return frame_sheet([scaled(frame, upscale_of(picture)) for frame in frames])


def upscale_of(picture: Image.Image | Video) -> int:
    """Small images are drawn twice as large."""
    first = picture.frames[0] if isinstance(picture, Video) else picture
    return 2 if max(first.size) < 400 else 1


def frame_sheet(panels: Sequence[Image.Image]) -> Image.Image:
    """Panels in two rows; one panel stays as it is."""
    half = -(-len(panels) // 2)
    return panels[0] if len(panels) == 1 else _stacked([beside(panels[:half]), beside(panels[half:])])


def draw_crops(
    picture: Image.Image | Video, trace: Sequence[Step], layout: TokenLayout, upscale: int = 1
) -> Image.Image:
    """Draw which patches were kept, merged and dropped, one panel per view of the image.

    Args:
        trace: the steps of this image, in order.
        layout: of the tokens that the model takes without reduction.

    Returns:
        RGB. Of a tiled image: one panel for the base image and one for the tiles, which is dim where unpadding left no
        tile patch. Of a video: its frames in two rows.
    """
    patches, layout = patches_of(trace, layout)
    panels = panels_of(picture, layout)
    colours = colour_groups(patches, grids(panels))
    drawn = [draw_panel(panel, patches, colours, upscale) for panel in panels]
    return frame_sheet(drawn) if isinstance(picture, Video) else beside(drawn)


def patches_of(trace: Sequence[Step], layout: TokenLayout) -> tuple[PatchAssignment, TokenLayout]:
    """Where all visual tokens of an image are after `trace`, and the layout that numbers them.

    The layout has class tokens where the first step takes them.
    """
    if trace and trace[0].reduction.inputs != layout.tokens:
        layout = layout.with_cls()
    return compose(trace, layout.tokens), layout


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
