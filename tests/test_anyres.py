"""LLaVA-NeXT's crops and token order: official vectors, transformers' own code, and the merge written out slowly."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaNextImageProcessorPil
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

from llava.errors import UserError
from llava.processing.image import AnyresProcessor, ImageProcessor, best_resolution, unpadded
from tests.resizing import old_pillow

VECTORS = json.loads((Path(__file__).parent / "data/llava_preproc/anyres_token_counts.json").read_text())
PINPOINTS = tuple(map(tuple, VECTORS["pinpoints_wh"]))
CLIP = ImageProcessor(336, 336)
GRID = (24, 24)
SMALL_CLIP, SMALL_GRID = ImageProcessor(28, 28), (4, 4)
SMALL = tuple((w // 12, h // 12) for w, h in PINPOINTS)
# Small, long, on ties, with odd remainders, and the extremes of the issue.
SIZES = [(1, 1), (2, 1), (28, 28), (28, 56), (29, 27), (57, 56), (64, 48), (48, 64), (89, 84), (20, 7), (7, 20)]
SIZES += [(31, 97), (300, 10), (10, 300), (150, 149), (2500, 400), (20_000, 10), (10, 20_000)]


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def run_of(arrangement, patches: int) -> list[int]:
    """Per token of the run: crop * patches + place in the crop; -1 for a newline. Every place is given once."""
    given = [crop.indices for crop in arrangement.crops] + [arrangement.newlines]
    assert torch.cat(given).sort().values.equal(torch.arange(arrangement.tokens))
    run = torch.full((arrangement.tokens,), -1)
    for number, crop in enumerate(arrangement.crops):
        assert len(crop.patches) == crop.rows * crop.columns
        run[crop.indices] = number * patches + crop.patches
    return run.tolist()


def merged_slowly(size, tiles, grid, unpad: bool) -> list[int]:
    """The original merge on a feature map of numbered patches, token by token."""
    patches = grid[0] * grid[1]
    number = torch.arange(patches, (1 + tiles[0] * tiles[1]) * patches)
    stitched = number.view(*tiles, *grid).permute(0, 2, 1, 3).flatten(2, 3).flatten(0, 1).tolist()
    rows, columns = len(stitched), len(stitched[0])
    if unpad and size[0] / size[1] > columns / rows:
        high = int(size[1] * (columns / size[0]))
        for _ in range((rows - high) // 2):
            stitched = stitched[1:-1]
    elif unpad:
        wide = int(size[0] * (rows / size[1]))
        for _ in range((columns - wide) // 2):
            stitched = [row[1:-1] for row in stitched]
    run = list(range(patches))
    for row in stitched:
        run += [*row, -1] if unpad else row
    return run


def merged_by_transformers(size, tiles, grid, pinpoints) -> list[int]:
    """`pack_image_features` of transformers on features of one number each."""
    patches = grid[0] * grid[1]
    features = torch.arange((1 + tiles[0] * tiles[1]) * patches).view(-1, patches, 1).double()
    vision = SimpleNamespace(image_size=28, patch_size=28 // grid[0])
    stub = SimpleNamespace(config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=[*map(list, pinpoints)]))
    newline = torch.tensor([-1.0], dtype=torch.double)
    packed, _ = LlavaNextModel.pack_image_features(stub, [features], [(size[1], size[0])], "default", newline)
    return packed[0][:, 0].long().tolist()


@pytest.mark.parametrize("row", VECTORS["rows"], ids=lambda row: "x".join(map(str, row["image_wh"])))
def test_official_token_counts(row):
    processor, size = AnyresProcessor(CLIP, GRID, PINPOINTS), tuple(row["image_wh"])
    assert best_resolution(size, PINPOINTS) == processor.resolution(size) == tuple(row["best_resolution_wh"])
    tiles = row["grid_rows"], row["grid_cols"]
    top, bottom, left, right = unpadded(size, tiles, GRID)
    assert (bottom - top, right - left) == (row["unpadded_rows"], row["unpadded_cols"])
    arrangement = processor.arrange(size)
    assert arrangement.tiles == tiles
    assert arrangement.tokens == row["tokens_total_base_plus_unpadded_plus_newlines"]
    assert len(arrangement.newlines) == row["unpadded_rows"]
    stitched = [number - 576 for number in run_of(arrangement, 576)[576:] if number >= 0]
    assert (stitched[0], sum(stitched)) == (row["first_index"], row["index_sum"])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("merge", ["spatial_unpad", "spatial"])
@pytest.mark.parametrize("force", [None, (28, 28), (28, 84), (84, 56)])
def test_the_run_is_the_original_merge(size, merge, force):
    processor = AnyresProcessor(SMALL_CLIP, SMALL_GRID, SMALL, merge=merge, force=force)
    width, height = force or best_resolution(size, SMALL)
    expected = merged_slowly(size, (height // 28, width // 28), SMALL_GRID, merge == "spatial_unpad")
    assert run_of(processor.arrange(size), 16) == expected


@pytest.mark.parametrize("size", SIZES)
def test_the_run_is_that_of_transformers_in_its_reading(size):
    processor = AnyresProcessor(SMALL_CLIP, SMALL_GRID, SMALL, reading="transformers")
    width, height = processor.resolution(size)
    expected = merged_by_transformers(size, (height // 28, width // 28), SMALL_GRID, SMALL)
    assert run_of(processor.arrange(size), 16) == expected


def test_both_roundings():
    """110 * (48 / 352) is 15, but less in floats: the original takes 14 rows, transformers, which rounds first, 16."""
    size, tiles = (352, 110), (1, 2)
    assert unpadded(size, tiles, GRID) == (5, 19, 0, 48)
    assert unpadded(size, tiles, GRID, "transformers") == (4, 20, 0, 48)
    for reading, rows in [("original", 14), ("transformers", 16)]:
        processor = AnyresProcessor(CLIP, GRID, [[672, 336]] if reading == "original" else [[336, 672]], reading)
        assert processor.arrange(size).tokens == 576 + 49 * rows


@pytest.mark.parametrize(("size", "newlines"), [((300, 10), 0), ((20_000, 10), 0), ((10, 300), 8), ((10, 20_000), 8)])
def test_a_line_leaves_only_the_small_copy(size, newlines):
    """The original keeps no patch of the tiles; empty rows still end in a newline, rows that are cut off do not."""
    processor = AnyresProcessor(SMALL_CLIP, SMALL_GRID, [[28, 56]])
    pixels, arrangement = processor(noise(*size))
    assert run_of(arrangement, 16) == merged_slowly(size, (2, 1), SMALL_GRID, True) == [*range(16), *[-1] * newlines]
    assert len(pixels) == len(arrangement.crops) == 1
    kept_all, _ = AnyresProcessor(SMALL_CLIP, SMALL_GRID, [[28, 56]], merge="spatial")(noise(*size))
    assert kept_all[:1].equal(pixels)
    assert len(kept_all) == 3


def test_best_resolution_in_both_readings():
    """Small pictures fit several resolutions equally well; the first of the list is another shape in each reading."""
    assert best_resolution((300, 300), PINPOINTS, "original") == (336, 672)
    assert best_resolution((300, 300), PINPOINTS, "transformers") == (672, 336)
    draw, differ = np.random.default_rng(0), 0
    for width, height in np.exp(draw.uniform(0, 8, (2000, 2))).astype(int).tolist():
        high, wide = select_best_resolution((height, width), [list(pair) for pair in PINPOINTS])
        assert best_resolution((width, height), PINPOINTS, "transformers") == (wide, high)
        # transformers on turned resolutions is the original
        high, wide = select_best_resolution((height, width), [[h, w] for w, h in PINPOINTS])
        assert best_resolution((width, height), PINPOINTS) == (wide, high)
        differ += best_resolution((width, height), PINPOINTS, "transformers") != (wide, high)
    assert differ > 100


@pytest.mark.parametrize("reading", ["original", "transformers"])
@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_those_of_transformers(size, reading):
    """The crops agree to the bit; only which resolution is taken differs, so the original gets turned ones."""
    ours, arrangement = AnyresProcessor(SMALL_CLIP, SMALL_GRID, SMALL, reading=reading)(noise(*size))
    pinpoints = [[w, h] if reading == "transformers" else [h, w] for w, h in SMALL]
    edges = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    official = LlavaNextImageProcessorPil(**edges, image_grid_pinpoints=pinpoints)
    with old_pillow():
        theirs = official(noise(*size), return_tensors="pt")
    assert ours.dtype == torch.float32
    assert ours.shape == (len(arrangement.crops), 3, 28, 28)
    assert ours.equal(theirs["pixel_values"][0, : len(ours)].float())
    assert len(ours) == theirs["pixel_values"].shape[1] or arrangement.patches == 16


@pytest.mark.parametrize("crop", [336, 192])
def test_a_forced_resolution_gives_every_picture_five_crops(crop):
    """2,880 tokens, as papers say, where the checkpoint's own preprocessing gives up to 2,928."""
    clip, side = ImageProcessor(crop, crop), 2 * crop
    for size in ((1, 1), (640, 480), (20, 900), (5000, 4000)):
        arrangement = AnyresProcessor(clip, GRID, [(crop, crop)], force=(side, side), merge="spatial").arrange(size)
        assert (len(arrangement.crops), arrangement.tokens, arrangement.whole) == (5, 2880, True)
    assert AnyresProcessor(CLIP, GRID, PINPOINTS).arrange((1000, 1000)).tokens == 2928


@pytest.mark.parametrize("pinpoints", [[], "anyres", [[336, 600]], [[336]], [336], [[0, 336]], 5])
def test_pinpoints_that_are_none(pinpoints):
    with pytest.raises(UserError, match="must be pairs of positive multiples of the tile side 336"):
        AnyresProcessor(CLIP, GRID, pinpoints)


def test_a_forced_resolution_that_is_none():
    with pytest.raises(UserError, match=r"forced resolution .* multiples of the tile side 336, got \(672, 600\)"):
        AnyresProcessor(CLIP, GRID, PINPOINTS, force=(672, 600))
