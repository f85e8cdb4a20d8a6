"""Preprocessing against the definition, written out once with numpy, and against broken files."""

import numpy as np
import pytest
import torch
from PIL import Image

from llava.errors import UserError
from llava.image import CLIP_MEAN, CLIP_STD, ImageProcessor, open_image, pad_to_square

CLIP_CONFIG = {
    "size": {"shortest_edge": 336},
    "crop_size": {"height": 336, "width": 336},
    "image_mean": list(CLIP_MEAN),
    "image_std": list(CLIP_STD),
}


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def preprocess_by_the_book(image: Image.Image, size: int, crop: int, pad: bool) -> np.ndarray:
    """LLaVA-1.5 preprocessing in plain steps: square canvas, shorter edge, centre, scale, normalise."""
    if pad and image.width != image.height:
        side = max(image.size)
        canvas = np.empty((side, side, 3), np.uint8)
        canvas[:] = (122, 116, 104)
        top, left = (side - image.height) // 2, (side - image.width) // 2
        canvas[top : top + image.height, left : left + image.width] = np.asarray(image)
        image = Image.fromarray(canvas)
    short = min(image.size)
    width, height = (int(size * edge / short) for edge in image.size)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)).astype(np.float64)
    top, left = (height - crop) // 2, (width - crop) // 2
    pixels = pixels[top : top + crop, left : left + crop] / 255
    return ((pixels - CLIP_MEAN) / CLIP_STD).transpose(2, 0, 1)


@pytest.mark.parametrize("size", [(336, 336), (50, 50), (400, 300), (301, 500), (37, 36), (640, 9)])
@pytest.mark.parametrize("aspect", ["pad", "crop"])
def test_pixels_follow_the_definition(size, aspect):
    image = noise(*size)
    pixels = ImageProcessor.from_config(CLIP_CONFIG, aspect=aspect)(image)
    assert pixels.shape == (3, 336, 336)
    assert pixels.dtype == torch.float32
    expected = preprocess_by_the_book(image, 336, 336, pad=aspect == "pad")
    assert np.abs(pixels.numpy() - expected).max() < 1e-5


def test_a_crop_smaller_than_the_resized_image():
    pixels = ImageProcessor(size=64, crop=56)(noise(90, 70))
    assert np.abs(pixels.numpy() - preprocess_by_the_book(noise(90, 70), 64, 56, pad=True)).max() < 1e-5


@pytest.mark.parametrize("config", [{}, {"aspect": "pad"}])
def test_padding_is_the_default(config):
    """The transformers processor crops by default; benchmark numbers need padding (LLaVA issue 591)."""
    image = Image.new("RGB", (100, 50), "white")
    image.paste((255, 0, 0), (0, 0, 10, 50))
    pixels = ImageProcessor.from_config(CLIP_CONFIG, **config)(image)
    assert pixels[0, 168, 5] > pixels[1, 168, 5] + 2, "the red left edge is still there"
    assert pixels[:, 10, 168].abs().max() < 0.02, "the padding is about zero after normalisation"


@pytest.mark.parametrize(
    ("size", "box"), [((5, 2), (0, 1, 5, 3)), ((2, 5), (1, 0, 3, 5)), ((4, 1), (0, 1, 4, 2)), ((3, 3), (0, 0, 3, 3))]
)
def test_pad_to_square_centres_with_the_odd_pixel_below_or_right(size, box):
    image = noise(*size)
    square = pad_to_square(image, (1, 2, 3))
    assert square.size == (max(size), max(size))
    assert np.array_equal(np.asarray(square.crop(box)), np.asarray(image))
    outside = np.ones((max(size), max(size)), bool)
    outside[box[1] : box[3], box[0] : box[2]] = False
    assert (np.asarray(square)[outside] == (1, 2, 3)).all()


def test_padding_colour_is_the_official_one():
    assert ImageProcessor(336, 336).padding_colour == (122, 116, 104)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_other_modes_become_rgb(mode):
    assert ImageProcessor(56, 56)(noise(20, 30).convert(mode)).shape == (3, 56, 56)


def test_config_with_plain_numbers_and_own_statistics():
    """Old preprocessor files write sizes as numbers."""
    processor = ImageProcessor.from_config(
        {"size": 64, "crop_size": 56, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    )
    assert processor == ImageProcessor(64, 56, (0.5,) * 3, (0.25,) * 3)
    assert processor.padding_colour == (127, 127, 127)
    assert processor(Image.new("RGB", (8, 8), "white")).allclose(torch.tensor(2.0))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"size": {"height": 336, "width": 336}}, "no shortest_edge in its size"),
        ({"crop_size": {"height": 336, "width": 224}}, "no height in its crop_size"),
        ({"do_center_crop": False}, "switches off do_center_crop"),
    ],
)
def test_a_processor_that_is_not_clip_is_refused(change, sentence):
    with pytest.raises(UserError, match=sentence):
        ImageProcessor.from_config({**CLIP_CONFIG, **change})


def test_unknown_aspect():
    with pytest.raises(UserError, match=r"Unknown image aspect 'padd'\. Did you mean 'pad'"):
        ImageProcessor(56, 56, aspect="padd")


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_open_image_gives_rgb_that_outlives_the_file(tmp_path, mode):
    path = tmp_path / "a.png"
    noise(9, 7).convert(mode).save(path)
    image = open_image(path)
    path.unlink()
    assert (image.mode, image.size) == ("RGB", (9, 7))
    image.getpixel((8, 6))


def test_open_image_ignores_exif_rotation(tmp_path):
    """The official scripts do not rotate, and the published numbers include that."""
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees
    noise(9, 7).save(tmp_path / "a.jpg", exif=exif)
    assert open_image(tmp_path / "a.jpg").size == (9, 7)


def test_open_image_names_the_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"No image at .*absent\.jpg; check the path"):
        open_image(tmp_path / "absent.jpg")


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "bmp", "webp"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5])
def test_open_image_names_the_truncated_file(tmp_path, suffix, share):
    path = tmp_path / f"broken.{suffix}"
    noise(64, 64).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match=rf"Cannot read the image .*broken\.{suffix} "):
        open_image(path)


def test_open_image_refuses_text_and_folders(tmp_path):
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    for path in (tmp_path / "page.jpg", tmp_path):
        with pytest.raises(UserError, match="Cannot read the image"):
            open_image(path)
