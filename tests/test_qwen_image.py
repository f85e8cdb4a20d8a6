"""Qwen's preprocessing against the official class, and against its definition written with loops."""

import pytest
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from llava.errors import UserError
from llava.processing.image import CLIP_MEAN, QwenImageProcessor
from tests.conftest import picture
from tests.resizing import old_pillow

SIZES = [(60, 44), (1, 1), (3, 400), (300, 90), (84, 56), (500, 499)]  # width, height


@pytest.mark.parametrize("bounds", [{}, {"min_pixels": 90000, "max_pixels": 120000}])
def test_pictures_of_all_sizes_equal_the_official_class(bounds):
    images = [picture(i, size) for i, size in enumerate(SIZES)]
    patches, grids = QwenImageProcessor(**bounds)(images)
    with old_pillow():
        official = Qwen2VLImageProcessorPil(**bounds)(images=images, return_tensors="pt")
    assert [list(grid) for grid in grids] == official["image_grid_thw"].tolist()
    assert torch.equal(patches, official["pixel_values"])
    assert patches.dtype == torch.float32


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
