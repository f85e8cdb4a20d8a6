"""Qwen's preprocessing against the official class, and against its definition written with loops."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from llava.errors import UserError
from llava.processing.clip_image import CLIP_MEAN, CLIP_STD
from llava.processing.qwen_image import QwenImageProcessor
from tests.conftest import picture
from tests.resizing import old_pillow

SIZES = [(60, 44), (1, 1), (3, 400), (300, 90), (84, 56), (500, 499)]  # width, height


def grid_by_the_book(width: int, height: int, low: int, high: int) -> tuple[int, int, int]:
    """Whole groups of 28 pixels; where their area leaves the bounds, scale first and round to the inside."""
    rows, columns = round(height / 28), round(width / 28)
    if rows * columns * 784 > high:
        shrink = math.sqrt(width * height / high)
        rows, columns = max(1, int(height / shrink // 28)), max(1, int(width / shrink // 28))
    elif rows * columns * 784 < low:
        stretch = math.sqrt(low / (width * height))
        rows, columns = math.ceil(height * stretch / 28), math.ceil(width * stretch / 28)
    return 1, 2 * rows, 2 * columns


@pytest.mark.parametrize("bounds", [{}, {"min_pixels": 90000, "max_pixels": 120000}])
def test_pictures_of_all_sizes_equal_the_official_class(bounds):
    images = [picture(i, size) for i, size in enumerate(SIZES)]
    patches, grids = QwenImageProcessor(**bounds)(images)
    with old_pillow():
        official = Qwen2VLImageProcessorPil(**bounds)(images=images, return_tensors="pt")
    assert [list(grid) for grid in grids] == official["image_grid_thw"].tolist()
    assert torch.equal(patches, official["pixel_values"])
    assert patches.dtype == torch.float32


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_other_colour_modes_are_taken_as_the_official_class_takes_them(mode):
    image = picture(1).convert(mode)
    with old_pillow():
        official = Qwen2VLImageProcessorPil()(images=[image], return_tensors="pt")["pixel_values"]
    assert torch.equal(QwenImageProcessor()([image])[0], official)


def test_patches_are_cut_group_after_group():
    """The picture is read with loops: groups, patches of a group, channels, two equal frames, pixels."""
    image = picture(3, (84, 56))  # already whole groups: 2 x 3
    patches, grids = QwenImageProcessor()([image])
    assert grids == ((1, 4, 6),)
    pixels = (np.asarray(image, dtype=np.float64) / 255 - CLIP_MEAN) / CLIP_STD
    expected = []
    for top in range(0, 56, 28):
        for left in range(0, 84, 28):
            for y in (top, top + 14):
                for x in (left, left + 14):
                    patch = pixels[y : y + 14, x : x + 14]
                    expected.append([patch[:, :, channel] for channel in range(3) for _frame in range(2)])
    torch.testing.assert_close(patches.double(), torch.tensor(np.array(expected)).flatten(1), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("low", "high"), [(3136, 1003520), (3136, 12845056), (50176, 100352), (100000, 100000)])
def test_grids_equal_the_definition(low, high):
    processor = QwenImageProcessor(min_pixels=low, max_pixels=high)
    for width in (1, 13, 14, 27, 42, 70, 333, 640, 1999, 4000):
        for height in (1, 14, 41, 55, 98, 480, 1000, 3001):
            if max(width, height) > 200 * min(width, height):
                continue
            assert processor.grid((width, height)) == grid_by_the_book(width, height, low, high), (width, height)


def test_a_tiny_picture_is_enlarged():
    """A single pixel becomes 2 x 2 groups, the smallest area allowed."""
    patches, grids = QwenImageProcessor()([Image.new("RGB", (1, 1), (255, 0, 0))])
    assert grids == ((1, 4, 4),)
    red = (1 - CLIP_MEAN[0]) / CLIP_STD[0]
    torch.testing.assert_close(patches[:, :392], torch.full((16, 392), red))


def test_a_picture_too_long_is_refused():
    processor = QwenImageProcessor()
    assert processor.grid((1400, 7))[0] == 1
    for size in ((1401, 7), (2, 401)):
        with pytest.raises(UserError, match=f"{size[0]} x {size[1]} pixels"):
            processor([Image.new("RGB", (28, 28)), Image.new("RGB", size)])


def test_bounds_are_read_from_both_ways_of_writing_them():
    old = {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    new = {"size": {"shortest_edge": 3136, "longest_edge": 12845056}, "image_mean": list(CLIP_MEAN)}
    assert QwenImageProcessor.from_config(old) == QwenImageProcessor.from_config(new)
    assert QwenImageProcessor.from_config(old).max_pixels == 12845056
    assert QwenImageProcessor.from_config({}) == QwenImageProcessor()
    half = QwenImageProcessor.from_config({"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]})
    assert half([Image.new("RGB", (56, 56), (255, 255, 255))])[0].unique().tolist() == [1.0]


def test_incomplete_preprocessing_and_crossed_bounds_are_refused():
    with pytest.raises(UserError, match="do_normalize"):
        QwenImageProcessor.from_config({"do_normalize": False})
    with pytest.raises(UserError, match="got 5000 and 4000"):
        QwenImageProcessor(min_pixels=5000, max_pixels=4000)


@pytest.mark.parametrize(
    "change",
    [
        {"image_std": [0.2, 0, 0.2]},
        {"image_mean": [float("nan"), 0.5, 0.5]},
        {"patch_size": 0},
        {"merge_size": "2"},
        {"min_pixels": -1},
        {"max_pixels": 10.5},
        {"size": {"shortest_edge": "56"}},
        {"size": 56},
    ],
)
def test_impossible_values_of_a_preprocessor(change):
    """They ended in tracebacks or in infinite pixels."""
    with pytest.raises(UserError, match=next(iter(change))):
        QwenImageProcessor.from_config(change)
