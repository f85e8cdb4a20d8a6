"""Preprocessing against its definition and the official classes, and against broken files."""

import io

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image
from transformers import Qwen2VLImageProcessorPil

from llava.errors import UserError
from llava.processing.image import (
    CLIP_MEAN,
    CLIP_STD,
    MAX_SIDE,
    ImageProcessor,
    QwenImageProcessor,
    as_rgb,
    open_image,
    pad_to_square,
    resize,
)
from tests.conftest import picture
from tests.resizing import old_pillow, resized_by_the_book

CLIP_CONFIG = {
    "size": {"shortest_edge": 336},
    "crop_size": {"height": 336, "width": 336},
    "image_mean": list(CLIP_MEAN),
    "image_std": list(CLIP_STD),
}


QWEN_SIZES = [(60, 44), (1, 1), (3, 400), (300, 90), (84, 56), (500, 499)]  # width, height


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


@pytest.mark.parametrize("size", [(336, 336), (50, 50), (400, 300), (301, 500), (37, 36), (640, 9), (1, 1)])
@pytest.mark.parametrize("pad", [True, False])
def test_pixels_follow_the_definition(size, pad):
    image, processor = noise(*size), ImageProcessor.from_config(CLIP_CONFIG)
    pixels = processor(image) if pad else processor.crops([image])[0]
    assert pixels.shape == (3, 336, 336)
    assert pixels.dtype == torch.float32
    assert np.abs(pixels.numpy() - preprocess_by_the_book(image, 336, 336, pad)).max() < 1e-5


@pytest.mark.parametrize("size", [(3000, 7), (7, 3000), (901, 1), (1, 901), (150, 233), (233, 150), (64, 64), (1, 1)])
def test_the_square_canvas_need_not_exist_as_a_whole(size):
    image, side = noise(*size), max(size)
    canvas = Image.new("RGB", (side, side), (122, 116, 104))
    canvas.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
    expected = canvas.resize((64, 64), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(pad_to_square(image, (122, 116, 104), 64)), np.asarray(expected))


@pytest.mark.parametrize("size", [(MAX_SIDE + 1, 1), (1, MAX_SIDE + 1), (0, 5), (5, 0)])
def test_too_long_and_empty_images_are_refused(size):
    with pytest.raises(UserError, match=rf"1 to 65535 pixels on each side, got {size[0]} x {size[1]}; resize it"):
        ImageProcessor(56, 56)(Image.new("L", size))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "1"])
def test_other_modes_are_what_pillow_makes_of_them(mode):
    image, processor = noise(30, 20).convert(mode), ImageProcessor(56, 56)
    assert processor(image).equal(processor(image.convert("RGB")))
    assert processor(image).std() > 0.1, "there is still a picture"


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_grey_of_16_bits_is_scaled(kind):
    """A 16-bit PNG became white: Pillow clips its values at 255. Colour of 16 bits loses its lower 8 in Pillow."""
    values = np.arange(16 * 16, dtype=np.uint16).reshape(16, 16) * 257
    file = io.BytesIO()
    Image.fromarray(values).save(file, kind)
    assert (np.asarray(open_image(file)) == (values >> 8)[:, :, None]).all()
    file.seek(0)
    assert as_rgb(Image.open(file)).tobytes() == open_image(file).tobytes()


@pytest.mark.parametrize(("kind", "words"), [(np.float32, "floating-point numbers"), (np.int32, "32-bit integers")])
def test_values_without_a_known_range_are_refused(kind, words):
    """A TIFF of floats from 0 to 1 became black, one of 32-bit integers white."""
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4), 0.5 if kind == np.float32 else 70_000, kind)).save(file, "TIFF")
    with pytest.raises(UserError, match=f"The image a.tif has {words} for pixels, .* convert it to 8 or 16"):
        open_image(file, "a.tif")
    with pytest.raises(UserError, match=words):
        as_rgb(Image.open(file))


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
        ({"size": {"height": 336, "width": 336}}, "no shortest_edge of 1 to 16384 pixels in its size"),
        ({"crop_size": {"height": 336, "width": 224}}, "no height of 1 to 16384 pixels in its crop_size"),
        ({"do_center_crop": False}, "switches off do_center_crop"),
        # These two were ignored.
        ({"resample": 2}, "asks for resample=2; images are resized with 3, bicubic"),
        ({"rescale_factor": 1 / 127.5}, "asks for rescale_factor=0.00784314; pixels are divided by 255 here"),
    ],
)
def test_a_processor_that_is_not_clip_is_refused(change, sentence):
    with pytest.raises(UserError, match=sentence):
        ImageProcessor.from_config({**CLIP_CONFIG, **change})
    if "resample" in change or "rescale_factor" in change:
        with pytest.raises(UserError, match=sentence):
            QwenImageProcessor.from_config(change)
    assert ImageProcessor.from_config({**CLIP_CONFIG, "resample": 3, "rescale_factor": 0.00392156862745098})


def test_open_image_ignores_exif_rotation(tmp_path):
    """The official scripts do not rotate, and the published numbers include that."""
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees
    noise(9, 7).save(tmp_path / "a.jpg", exif=exif)
    assert open_image(tmp_path / "a.jpg").size == (9, 7)


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "bmp", "webp"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5])
def test_open_image_names_the_truncated_file(tmp_path, suffix, share):
    path = tmp_path / f"broken.{suffix}"
    noise(64, 64).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match=rf"Cannot read the image .*broken\.{suffix} "):
        open_image(path)


def test_open_image_names_what_it_cannot_read(tmp_path, monkeypatch):
    """A file beyond Pillow's limit was called damaged, and to be fetched again."""
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    Image.new("RGB", (9, 7)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    for path, sentence in (
        (tmp_path / "absent.jpg", r"No image at .*absent\.jpg; check the path"),
        (tmp_path / "page.jpg", "Cannot read the image"),
        (tmp_path, "Cannot read the image"),
        (tmp_path / "a.png", r"a\.png is too large .* make it smaller"),
    ):
        with pytest.raises(UserError, match=sentence):
            open_image(path)


# Resizing does not depend on Pillow's version


SHAPES = [  # from, to: portraits and landscapes, larger, smaller, both at once
    ((48, 64), (33, 44)),
    ((44, 95), (56, 56)),
    ((64, 48), (84, 56)),
    ((30, 90), (61, 20)),
    ((90, 30), (20, 61)),
    ((1, 3), (5, 7)),
    ((7, 5), (7, 9)),
    ((7, 5), (9, 5)),
    ((120, 160), (112, 140)),
]


@pytest.mark.parametrize(("given", "wanted"), SHAPES)
def test_resizing_is_the_definition_width_first(given, wanted):
    """Pillow 13 resizes some portraits vertically first: 5 to 26 % of the values moved against published results."""
    image = noise(*given)
    assert np.array_equal(np.asarray(resize(image, wanted)), np.asarray(resized_by_the_book(image, wanted)))


def test_an_eps_file_is_not_given_to_ghostscript(tmp_path, monkeypatch):
    """An EPS file named .jpg made Pillow run the program gs."""
    path = tmp_path / "a.jpg"
    noise(9, 7).save(path, format="EPS")
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_args, **_more: pytest.fail("Ghostscript was called"))
    with pytest.raises(UserError, match=r"Cannot read the image .*a\.jpg \(expected one of JPEG, PNG"):
        open_image(path)


# Qwen's patches


@pytest.mark.parametrize("bounds", [{}, {"min_pixels": 90000, "max_pixels": 120000}])
def test_pictures_of_all_sizes_equal_the_official_class(bounds):
    images = [picture(i, size) for i, size in enumerate(QWEN_SIZES)]
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
    old = {"min_pixels": 3136, "max_pixels": 12845056}
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


CLIP, QWEN = (ImageProcessor, CLIP_CONFIG), (QwenImageProcessor, {})


@pytest.mark.parametrize(
    ("processor", "change"),
    [
        (CLIP, {"image_std": [0.2, 0.0, 0.2]}),
        (CLIP, {"image_mean": [0.5, 0.5]}),
        (CLIP, {"do_resize": "no"}),
        (CLIP, {"size": 0}),
        (CLIP, {"crop_size": 10**9}),
        (QWEN, {"min_pixels": -1}),
        (QWEN, {"max_pixels": 10.5}),
        (QWEN, {"size": 56}),
    ],
)
def test_impossible_values_of_a_preprocessor(processor, change):
    """They gave infinite pixels, tracebacks, or a resize that took all memory."""
    kind, config = processor
    with pytest.raises(UserError, match=next(iter(change))):
        kind.from_config({**config, **change})
