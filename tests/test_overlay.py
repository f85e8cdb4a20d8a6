"""Overlays: where every patch is after the steps of an answer, and how that is drawn on images, tiles and frames."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from eval.figures.overlay import (
    DIM,
    GAP,
    HATCHED,
    PALETTE,
    TINT,
    PatchAssignment,
    colour_groups,
    draw_overlay,
    panels_of,
    patches_of,
    save_small,
)
from llava.processing.image import AnyresProcessor, ImageProcessor, centred
from llava.processing.video import Video
from llava.reduction import Reduction, Step
from llava.reduction.token_layout import TokenLayout, frames, single, stitched


def assigned(trace: list[Step], layout: TokenLayout) -> PatchAssignment:
    return patches_of(trace, layout)[0]


def prune(keep: list[int], inputs: int, place: str = "encoder") -> Step:
    return Step(place, Reduction(torch.tensor([keep]), inputs))


def merge(anchor: list[int], owner: list[int], place: str = "encoder", weight: list[float] | None = None) -> Step:
    weights = torch.tensor([weight or [float(o >= 0) for o in owner]])
    return Step(place, Reduction(torch.tensor([anchor]), len(owner), torch.tensor([owner]), weights))


def middles(image: Image.Image, grid: int) -> np.ndarray:
    """[grid, grid, 3]: the middle pixel of every patch."""
    pixels = np.asarray(image).astype(int)
    side = pixels.shape[0] // grid
    return pixels[side // 2 :: side, side // 2 :: side]


GREY = Image.new("RGB", (32, 32), (200, 200, 200))
GRID = single(4, 4)


def test_kept_patches_are_the_photograph_and_dropped_ones_dim_grey():
    photo = Image.fromarray(np.random.default_rng(0).integers(60, 256, (48, 48, 3), dtype=np.uint8))
    drawn = np.asarray(draw_overlay(photo, [prune([0, 5], 16)], GRID)).astype(int)
    original = np.asarray(photo).astype(int)
    kept = np.zeros((48, 48), bool)
    kept[:12, :12] = kept[12:24, 12:24] = True
    assert (drawn[kept] == original[kept]).all()
    dropped, before = drawn[~kept], original[~kept]
    assert np.abs(dropped.mean(1) - DIM * before.mean(1)).max() < 25
    assert np.ptp(dropped, 1).max() < 0.4 * np.ptp(before, 1).max(), "colours are muted, not gone"
    assert np.corrcoef(dropped.mean(1), before.mean(1))[0, 1] > 0.9, "what was there can be recognised"


def test_merged_patches_are_tinted_faintly_inside_the_outline_of_their_group():
    """Two groups: patches 0, 1 stand at 0; 4, 5, 8 stand at 5. All others are dropped."""
    step = merge([0, 5], [0, 0, -1, -1, 1, 1, -1, -1, 1, *[-1] * 7])
    drawn = np.asarray(draw_overlay(GREY.resize((96, 96)), [step], GRID)).astype(int)
    cells = middles(Image.fromarray(drawn.astype(np.uint8)), 4)
    assert cells[0, 0].tolist() == cells[1, 1].tolist() == [200, 200, 200]
    assert cells[0, 2].tolist() == cells[3, 3].tolist() == [84, 84, 84]
    colours = [np.array(ImageColor.getrgb(PALETTE[number])) for number in (0, 1)]
    for cell, group in ((cells[0, 1], 0), (cells[1, 0], 1), (cells[2, 0], 1)):
        assert cell.tolist() == pytest.approx((1 - TINT) * 200 + TINT * colours[group], abs=1)
    # Lines are 2 of a patch's 24 pixels and run inside their own group: between groups and towards dropped patches.
    assert (drawn[22:24, 24:48] == colours[0]).all() and (drawn[24:26, :24] == colours[1]).all()
    assert (drawn[:24, 46:48] == colours[0]).all() and (drawn[:24, 48:50] == 84).all()
    # Inside a group there is no line, but a frame of double width around the patch at which its token stands.
    assert (drawn[28:44, 20:22] != colours[1]).any(-1).all()
    assert (drawn[28:44, 24:28] == colours[1]).all() and (drawn[28:44, 28:44] == 200).all()
    assert (drawn[:4, :24] == colours[0]).all(), "a frame is whole at the image's edge too"


def test_groups_that_touch_have_different_colours():
    """16 x 16 patches in 64 squares of 2 x 2, each a group, and every second row of squares shifted by one patch."""
    row, column = np.divmod(np.arange(256), 16)
    assignment = row // 2 * 8 + (column + row // 2 % 2) // 2 % 8
    patches = PatchAssignment(assignment, np.array([np.flatnonzero(assignment == group)[0] for group in range(64)]))
    grid = np.arange(256).reshape(16, 16)
    colours = colour_groups(patches, [grid])
    assert set(colours) <= set(range(len(PALETTE))) and len(set(colours)) > 3
    drawn, groups = colours[assignment[grid]], assignment[grid]
    for one, other in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        touching = groups[one] != groups[other]
        assert (drawn[one] != drawn[other])[touching].all()


def test_a_token_of_one_patch_has_no_colour():
    patches = assigned([merge([0, 2], [0, 0, 1, -1])], single(1, 4))
    assert colour_groups(patches, [np.arange(4)[None]]).tolist() == [0, -1]
    assert patches.merged.tolist() == [False, True, False, False] and patches.target.tolist() == [True, *[False] * 3]
    assert patches.dropped.tolist() == [False, False, False, True]


def test_a_small_file_keeps_its_colours(tmp_path):
    """Two colours of a few pixels in a noisy image: a palette of frequent colours painted a purple square pink."""
    noise = np.random.default_rng(0).integers(100, 160, (200, 200, 3), dtype=np.uint8)
    noise[10:18, 10:18], noise[30:34, 30:34] = (138, 51, 166), (214, 40, 40)
    save_small(Image.fromarray(noise), tmp_path / "a.png")
    saved = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(int)
    assert np.abs(saved[14, 14] - (138, 51, 166)).max() < 30 and np.abs(saved[32, 32] - (214, 40, 40)).max() < 30


@pytest.mark.parametrize(
    ("trace", "patches", "assignment", "kept"),
    [
        # Keep 1, 3, 6, 8 of nine patches, then the outputs 0 and 2 of those: patches 1 and 6.
        ([prune([1, 3, 6, 8], 9), prune([0, 2], 4, "layer 2")], 9, [-1, 0, -1, -1, -1, -1, 1, -1, -1], [1, 6]),
        # Pruning a merged token drops all that went into it.
        ([merge([0, 2], [0, 0, 1, 1]), prune([1], 2, "layer 1")], 4, [-1, -1, 0, 0], [2]),
        # A share of zero is no share.
        ([merge([0], [0, 0, 0, -1], weight=[0.5, 0.0, 0.5, 0.0])], 4, [0, -1, 0, -1], [0]),
    ],
    ids=["positions are those of the step before", "pruning a merged token", "a share of zero"],
)
def test_steps_compose(trace, patches, assignment, kept):
    found = assigned(trace, single(1, patches))
    assert (found.assignment.tolist(), found.kept.tolist()) == (assignment, kept)


def test_padding_is_drawn_with_the_tokens_on_it():
    """32 x 16 on a 4 x 4 grid: the image lies on rows 1 and 2. Tokens kept beside it were cropped away unseen."""
    wide = Image.new("RGB", (32, 16), (200, 200, 200))
    square = draw_overlay(wide, [prune([0, 4, 11], 16)], GRID, canvas=centred((32, 16), (32, 32)))
    padded = np.asarray(square).astype(int)
    assert padded.shape == (32, 32, 3)
    assert padded[12, 4].tolist() == [200] * 3 and padded[20, 28].tolist() == [200] * 3
    assert padded[20, 4].tolist() == [84] * 3
    kept, dropped = padded[:8, :8, 0], padded[:8, 8:, 0]
    assert set(kept.flatten()) == {line[0] for line in HATCHED} and kept.min() > dropped.max()
    assert set(padded[24:, :, 0].flatten()) == set(dropped.flatten()) == {round(line[0] * DIM) for line in HATCHED}
    stretched = np.asarray(draw_overlay(wide, [prune([2, 5], 8)], single(2, 4)))
    assert stretched[12, 12].tolist() == [200] * 3 and stretched[2, 4].tolist() == [84] * 3


@pytest.mark.parametrize(("size", "drawn"), [((6000, 3000), (1024, 512)), ((20_000, 5), (1024, 1)), ((40, 8), (40, 8))])
def test_a_large_photograph_is_drawn_small(size, drawn):
    """It was drawn with all its pixels: 12 megapixels took 14 s, 48 held 6 GB and never ended."""
    image = Image.new("L", size, 200)
    assert draw_overlay(image, [prune([0], 16)], GRID).size == draw_overlay(image, [], GRID).size == drawn
    square = draw_overlay(image, [], GRID, canvas=centred(size, (size[0], size[0])))
    assert square.size == (drawn[0], drawn[0])
    assert draw_overlay(GREY, [], GRID, upscale=3).size == (96, 96)


# Tiles and frames, pixel by pixel.

WHITE = Image.new("RGB", (64, 32), "white")


def test_kept_patches_of_both_views_are_clear_and_all_others_dim():
    """Tiles of 4 x 4 patches side by side, 2 rows left by unpadding: the run is 16, then 2 rows of 8 and a newline."""
    run = stitched((1, 2), (4, 4), (1, 3, 0, 8))
    kept_copy, kept_tile = 5, 16 + 9 + 6  # row 1, column 1 of the copy; second stitched row, seventh column
    drawn = np.asarray(draw_overlay(WHITE, [prune([kept_copy, kept_tile], run.tokens)], run))
    assert drawn.shape == (32, 2 * 64 + GAP, 3)
    copy, tiles = drawn[:, :64, 0], drawn[:, 64 + GAP :, 0]
    clear = np.zeros((32, 64), bool)
    clear[8:16, 16:32] = True
    assert ((copy == 255) == clear).all() and (copy[~clear] == round(255 * DIM)).all()
    clear = np.zeros((32, 64), bool)
    clear[16:, 48:56] = True
    assert ((tiles == 255) == clear).all()


def test_tiles_are_drawn_on_the_image_where_they_lie():
    """With merge=spatial no padding is taken off the tiles, and the image was drawn over it, stretched."""
    image = Image.new("RGB", (56, 14), "white")
    for merge, sides in (("spatial", (56, 56)), ("spatial_unpad", (56, 14))):
        processor = AnyresProcessor(ImageProcessor(28, 28), (4, 4), [(56, 56)], merge=merge)
        layout, canvas = processor.arrange(image.size), processor.canvas(image.size)
        base, tiles = panels_of(image, layout, canvas)
        assert (base.image.size, tiles.image.size) == (image.size, sides)
        assert tiles.grid.shape == (sides[1] // 7, 8)
        white = np.asarray(tiles.image).min((1, 2)) == 255
        assert np.flatnonzero(white).tolist() == list(range(21, 35) if merge == "spatial" else range(14))


def test_frames_of_a_video_stand_in_two_rows():
    run = frames(4, 2, 2).with_cls
    video = Video(tuple(Image.new("RGB", (20, 20), "white") for _ in range(4)))
    drawn = np.asarray(draw_overlay(video, [prune([16], run.tokens)], run))[..., 0]
    assert drawn.shape == (2 * 20 + GAP, 2 * 20 + GAP)
    # Token 16 is the first patch of the fourth frame: 3 frames of 5 tokens and its class token are in front.
    assert (drawn[20 + GAP : 30 + GAP, 20 + GAP : 30 + GAP] == 255).all() and (drawn[:20, :20] < 255).all()
