"""Preprocessing against its definition and the official classes, and against broken files.

LLaVA-NeXT's crops and token order are held against official vectors, transformers' own code, and the merge written out
slowly. Resizing is that of Pillow up to 12.3 by definition, whatever Pillow is installed.
"""

import io
import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, ExifTags, Image, ImageDraw
from transformers import LlavaNextImageProcessorPil, Qwen2VLImageProcessorPil
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

from eval.benchmarks.media import Folder
from llava.errors import UserError
from llava.processing.image import (
    CLIP_MEAN,
    CLIP_STD,
    MAX_SIDE,
    AnyresProcessor,
    ImageProcessor,
    QwenImageProcessor,
    as_rgb,
    best_resolution,
    on_canvas,
    open_image,
    pad_to_square,
    resize,
    unpadded,
)
from llava.reduction.token_layout import on_padding, single
from tests.conftest import drawn_image

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


def bicubic(x: float) -> float:
    """Keys' cubic kernel with a = -0.5."""
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def resized_rows(pixels: np.ndarray, width: int) -> np.ndarray:
    """One pass along axis 1: antialiased kernel, weights in 22-bit fixed point, result clipped to 8 bits."""
    if width == pixels.shape[1]:
        return pixels
    scale = pixels.shape[1] / width
    stretch = max(scale, 1.0)
    out = np.empty((pixels.shape[0], width, 3), np.uint8)
    for x in range(width):
        centre = (x + 0.5) * scale
        low = max(0, int(centre - 2 * stretch + 0.5))
        high = min(pixels.shape[1], int(centre + 2 * stretch + 0.5))
        weights = np.array([bicubic((place - centre + 0.5) / stretch) for place in range(low, high)])
        fixed = np.trunc(weights / weights.sum() * 2**22 + np.where(weights < 0, -0.5, 0.5)).astype(np.int64)
        total = (pixels[:, low:high].astype(np.int64) * fixed[None, :, None]).sum(1) + 2**21
        out[:, x] = np.clip(total >> 22, 0, 255)
    return out


def resized_by_the_book(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resizing of Pillow up to 12.3: the width first, then the height."""
    wide = resized_rows(np.asarray(image), size[0])
    return Image.fromarray(resized_rows(wide.transpose(1, 0, 2), size[1]).transpose(1, 0, 2).copy())


@contextmanager
def old_pillow() -> Iterator[None]:
    """Run official code with the resizing of Pillow up to 12.3, with which its results were published."""

    def resize(image, size, resample=None, box=None, reducing_gap=None):
        assert (resample, box, reducing_gap) == (Image.Resampling.BICUBIC, None, None)
        return resized_by_the_book(image, tuple(size))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "resize", resize)
        yield


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


@pytest.mark.parametrize("size", [(336, 336), (400, 300), (301, 500), (640, 9), (1, 1)])
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
    with pytest.raises(UserError, match=f"1 to 65535 pixels .* got {size[0]} x {size[1]}"):
        ImageProcessor(56, 56)(Image.new("L", size))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "1"])
def test_other_modes_are_what_pillow_makes_of_them(mode):
    image, processor = noise(30, 20).convert(mode), ImageProcessor(56, 56)
    assert processor(image).equal(processor(image.convert("RGB")))
    assert processor(image).std() > 0.1, "there is still an image"


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
    with pytest.raises(UserError, match=f"a.tif has {words}"):
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


CLIP, QWEN = (ImageProcessor, CLIP_CONFIG), (QwenImageProcessor, {})


@pytest.mark.parametrize(
    ("processor", "change", "sentence"),
    [
        (CLIP, {"size": {"height": 336, "width": 336}}, "no shortest_edge of 1 to 16384 pixels in its size"),
        (CLIP, {"crop_size": {"height": 336, "width": 224}}, "no height .* in its crop_size"),
        (CLIP, {"do_center_crop": False}, "switches off do_center_crop"),
        (QWEN, {"do_normalize": False}, "switches off do_normalize"),
        # These two were ignored.
        (CLIP, {"resample": 2}, "resample=2; "),
        (QWEN, {"rescale_factor": 1 / 127.5}, "rescale_factor=0.00784314; "),
        # They gave infinite pixels, tracebacks, or a resize that took all memory.
        (CLIP, {"image_std": [0.2, 0.0, 0.2]}, "image_std"),
        (CLIP, {"image_mean": [0.5, 0.5]}, "image_mean"),
        (CLIP, {"do_resize": "no"}, "do_resize"),
        (CLIP, {"crop_size": 10**9}, "crop_size"),
        (QWEN, {"max_pixels": 10.5}, "max_pixels"),
        (QWEN, {"size": 56}, "size"),
    ],
)
def test_a_preprocessor_that_the_tower_does_not_allow_is_refused(processor, change, sentence):
    kind, config = processor
    with pytest.raises(UserError, match=sentence):
        kind.from_config({**config, **change})
    assert kind.from_config({**config, "resample": 3, "rescale_factor": 0.00392156862745098})


def test_open_image_ignores_exif_rotation(tmp_path):
    """The official scripts do not rotate, and the published numbers include that."""
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees
    noise(9, 7).save(tmp_path / "a.jpg", exif=exif)
    assert open_image(tmp_path / "a.jpg").size == (9, 7)


# What the standard says of each orientation: where the stored image's first row and column are in the upright one.
STORED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: upright[:, ::-1].swapaxes(0, 1),
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),
    8: lambda upright: upright[::-1].swapaxes(0, 1),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", ["JPEG", "MPO", "PNG", "WEBP", "TIFF"])
def test_a_phone_image_is_turned_upright_for_people(tmp_path, orientation, kind):
    """It was read as the sensor lies: "is the red circle above the blue square?" was asked of an image on its side."""
    upright = Image.new("RGB", (96, 64), "white")
    draw = ImageDraw.Draw(upright)
    draw.ellipse((8, 4, 36, 28), fill="red")
    draw.rectangle((40, 40, 80, 60), fill="blue")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = tmp_path / "photo"
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](np.asarray(upright))))
    stored.save(path, kind, exif=exif, **({"quality": 95} if kind in ("JPEG", "MPO") else {"lossless": True}))
    seen = open_image(path, upright=True)
    assert seen.size == upright.size and np.abs(np.asarray(seen).astype(int) - np.asarray(upright)).mean() < 3
    if kind != "TIFF":  # which Pillow itself turns, for the official scripts too
        assert open_image(path).size == stored.size == Folder(tmp_path).open("photo").size


ODD = {  # other entries of the EXIF data: a resolution that is text, and a negative width
    "text": (0x011A, 2, 4, b"abc\0"),
    "negative": (0x0100, 9, 1, struct.pack("<i", -5)),
    "beyond the end": (0x010F, 2, 4000, struct.pack("<I", 90_000)),
}


@pytest.mark.parametrize("entry", ODD.values(), ids=ODD)
def test_odd_exif_data_do_not_hinder_the_turn(entry):
    """ImageOps.exif_transpose fails on the first two, since it writes all entries anew."""
    entries = [(0x0112, 3, 1, struct.pack("<HH", 6, 0)), entry]
    directory = b"".join(struct.pack("<HHI", *known[:3]) + known[3] for known in entries)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + directory + struct.pack("<I", 0)
    file = io.BytesIO()
    noise(9, 7).save(file, "JPEG", exif=exif)
    assert open_image(file, upright=True).size == (7, 9) and open_image(file).size == (9, 7)
    file = io.BytesIO()
    noise(9, 7).save(file, "JPEG", exif=b"Exif\0\0no tags at all")
    assert open_image(file, upright=True).size == (9, 7)


def kinds_of_files() -> Iterator[tuple[str, Image.Image, dict]]:
    """Files that users have: format, image, options of saving."""
    clear = noise(30, 20).quantize(16)
    yield "PNG", clear, {"transparency": 3}
    yield "PNG", noise(30, 20).convert("RGBA"), {}
    yield "PNG", noise(30, 20).convert("LA"), {}
    yield "GIF", clear, {"transparency": 3}
    yield "JPEG", noise(30, 20).convert("CMYK"), {"quality": 95}
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        yield kind, noise(30, 20), {"save_all": True, "append_images": [noise(30, 20, 1), noise(30, 20, 2)]}


@pytest.mark.parametrize(("kind", "image", "options"), list(kinds_of_files()))
@pytest.mark.parametrize("upright", [False, True])
def test_one_rule_for_all_kinds_of_files(kind, image, options, upright):
    """Colours as Pillow makes RGB of them, transparency left out, and of an animation the first frame."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    expected = np.asarray(Image.open(file).convert("RGB"))
    assert np.array_equal(np.asarray(open_image(file, upright=upright)), expected)
    if kind == "PNG":
        assert np.array_equal(expected, np.asarray(image.convert("RGB")))


def test_a_image_of_400_million_pixels_is_refused(tmp_path):
    """Its file has 50 kB."""
    Image.new("1", (20_000, 20_000)).save(tmp_path / "wall.png")
    for upright in (False, True):
        with pytest.raises(UserError, match=r"wall\.png is too large .*make it smaller"):
            open_image(tmp_path / "wall.png", upright=upright)


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "bmp", "webp"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5])
def test_open_image_names_the_truncated_file(tmp_path, suffix, share):
    path = tmp_path / f"broken.{suffix}"
    noise(64, 64).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match=rf"Cannot read .*broken\.{suffix} "):
        open_image(path)


def test_open_image_names_what_it_cannot_read(tmp_path, monkeypatch):
    """A file beyond Pillow's limit was called damaged, and to be fetched again."""
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    Image.new("RGB", (9, 7)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    for path, sentence in (
        (tmp_path / "absent.jpg", "No image at .*; check the path"),
        (tmp_path / "page.jpg", "Cannot read"),
        (tmp_path, "Cannot read"),
        (tmp_path / "a.png", "too large"),
    ):
        with pytest.raises(UserError, match=sentence) as refused:
            open_image(path)
        assert str(path) in str(refused.value)


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
def test_images_of_all_sizes_equal_the_official_class(bounds):
    images = [drawn_image(i, size) for i, size in enumerate(QWEN_SIZES)]
    patches, grids = QwenImageProcessor(**bounds)(images)
    with old_pillow():
        official = Qwen2VLImageProcessorPil(**bounds)(images=images, return_tensors="pt")
    assert [list(grid) for grid in grids] == official["image_grid_thw"].tolist()
    assert torch.equal(patches, official["pixel_values"])
    assert patches.dtype == torch.float32


def test_a_image_too_long_is_refused():
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
    with pytest.raises(UserError, match="got 5000 and 4000"):
        QwenImageProcessor(min_pixels=5000, max_pixels=4000)


# LLaVA-NeXT: a base image and tiles


VECTORS = json.loads((Path(__file__).parent / "data/llava_preproc/anyres_token_counts.json").read_text())
PINPOINTS = tuple(map(tuple, VECTORS["pinpoints_wh"]))
TOWER = ImageProcessor(336, 336)
GRID = (24, 24)
SMALL_CLIP, SMALL_GRID = ImageProcessor(28, 28), (4, 4)
SMALL = tuple((w // 12, h // 12) for w, h in PINPOINTS)
# Small, long, on ties, with odd remainders, and the extremes of the issue.
NEXT_SIZES = [(1, 1), (2, 1), (28, 28), (28, 56), (29, 27), (57, 56), (64, 48), (48, 64), (89, 84), (20, 7), (7, 20)]
NEXT_SIZES += [(31, 97), (300, 10), (10, 300), (150, 149), (2500, 400), (20_000, 10), (10, 20_000)]


def run_of(layout, patches: int) -> list[int]:
    """Per token of the run: crop * patches + place in the crop; -1 for a newline. Every place is given once."""
    given = [crop.indices for crop in layout.crops] + [layout.newlines]
    assert torch.cat(given).sort().values.equal(torch.arange(layout.tokens))
    run = torch.full((layout.tokens,), -1)
    for number, crop in enumerate(layout.crops):
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
    processor, size = AnyresProcessor(TOWER, GRID, PINPOINTS), tuple(row["image_wh"])
    assert best_resolution(size, PINPOINTS) == processor.resolution(size) == tuple(row["best_resolution_wh"])
    tiles = row["grid_rows"], row["grid_cols"]
    top, bottom, left, right = unpadded(size, tiles, GRID)
    assert (bottom - top, right - left) == (row["unpadded_rows"], row["unpadded_cols"])
    layout = processor.arrange(size)
    assert layout.tiles == tiles
    assert layout.tokens == row["tokens_total_base_plus_unpadded_plus_newlines"]
    assert len(layout.newlines) == row["unpadded_rows"]
    stitched = [number - 576 for number in run_of(layout, 576)[576:] if number >= 0]
    assert (stitched[0], sum(stitched)) == (row["first_index"], row["index_sum"])


@pytest.mark.parametrize("size", NEXT_SIZES)
@pytest.mark.parametrize("merge", ["spatial_unpad", "spatial"])
@pytest.mark.parametrize("force", [None, (28, 28), (28, 84), (84, 56)])
def test_the_run_is_the_original_merge(size, merge, force):
    processor = AnyresProcessor(SMALL_CLIP, SMALL_GRID, SMALL, merge=merge, force=force)
    width, height = force or best_resolution(size, SMALL)
    expected = merged_slowly(size, (height // 28, width // 28), SMALL_GRID, merge == "spatial_unpad")
    assert run_of(processor.arrange(size), 16) == expected


@pytest.mark.parametrize("size", NEXT_SIZES)
def test_the_run_is_that_of_transformers_in_its_reading(size):
    processor = AnyresProcessor(SMALL_CLIP, SMALL_GRID, SMALL, anyres_rule="transformers")
    width, height = processor.resolution(size)
    expected = merged_by_transformers(size, (height // 28, width // 28), SMALL_GRID, SMALL)
    assert run_of(processor.arrange(size), 16) == expected


def test_both_roundings():
    """110 * (48 / 352) is 15, but less in floats: the original takes 14 rows, transformers, which rounds first, 16."""
    size, tiles = (352, 110), (1, 2)
    assert unpadded(size, tiles, GRID) == (5, 19, 0, 48)
    assert unpadded(size, tiles, GRID, "transformers") == (4, 20, 0, 48)
    for reading, rows in [("original", 14), ("transformers", 16)]:
        processor = AnyresProcessor(TOWER, GRID, [[672, 336]] if reading == "original" else [[336, 672]], reading)
        assert processor.arrange(size).tokens == 576 + 49 * rows


@pytest.mark.parametrize(("size", "newlines"), [((300, 10), 0), ((20_000, 10), 0), ((10, 300), 8), ((10, 20_000), 8)])
def test_a_line_leaves_only_the_small_copy(size, newlines):
    """The original keeps no patch of the tiles; empty rows still end in a newline, rows that are cut off do not."""
    processor = AnyresProcessor(SMALL_CLIP, SMALL_GRID, [[28, 56]])
    pixels, layout = processor(noise(*size))
    assert run_of(layout, 16) == merged_slowly(size, (2, 1), SMALL_GRID, True) == [*range(16), *[-1] * newlines]
    assert len(pixels) == len(layout.crops) == 1
    kept_all, _ = AnyresProcessor(SMALL_CLIP, SMALL_GRID, [[28, 56]], merge="spatial")(noise(*size))
    assert kept_all[:1].equal(pixels)
    assert len(kept_all) == 3


def test_best_resolution_in_both_readings():
    """Small images fit several resolutions equally well; the first of the list is another shape in each reading."""
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


@pytest.mark.parametrize("anyres_rule", ["original", "transformers"])
@pytest.mark.parametrize("size", NEXT_SIZES)
def test_pixels_are_those_of_transformers(size, anyres_rule):
    """The crops agree to the bit; only which resolution is taken differs, so the original gets turned ones."""
    ours, layout = AnyresProcessor(SMALL_CLIP, SMALL_GRID, SMALL, anyres_rule=anyres_rule)(noise(*size))
    pinpoints = [[w, h] if anyres_rule == "transformers" else [h, w] for w, h in SMALL]
    edges = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    official = LlavaNextImageProcessorPil(**edges, image_grid_pinpoints=pinpoints)
    with old_pillow():
        theirs = official(noise(*size), return_tensors="pt")
    assert ours.dtype == torch.float32
    assert ours.shape == (len(layout.crops), 3, 28, 28)
    assert ours.equal(theirs["pixel_values"][0, : len(ours)].float())
    assert len(ours) == theirs["pixel_values"].shape[1] or layout.patches == 16


def test_a_forced_resolution_gives_every_image_five_crops():
    """2,880 tokens, as papers say, where the checkpoint's own preprocessing gives up to 2,928."""
    forced = AnyresProcessor(TOWER, GRID, [(336, 336)], force=(672, 672), merge="spatial")
    for size in ((1, 1), (640, 480), (20, 900), (5000, 4000)):
        layout = forced.arrange(size)
        assert (len(layout.crops), layout.tokens, layout.whole) == (5, 2880, True)
    assert AnyresProcessor(TOWER, GRID, PINPOINTS).arrange((1000, 1000)).tokens == 2928


@pytest.mark.parametrize("pinpoints", [[], "anyres", [[336, 600]], [[336]], [336], [[0, 336]], 5])
def test_pinpoints_that_are_none(pinpoints):
    with pytest.raises(UserError, match="must be pairs of positive multiples of the tile side 336"):
        AnyresProcessor(TOWER, GRID, pinpoints)
    with pytest.raises(UserError, match=r"forced resolution .* got \(672, 600\)"):
        AnyresProcessor(TOWER, GRID, PINPOINTS, force=(672, 600))


def empty_slowly(canvas: Image.Image, rows: int, columns: int) -> np.ndarray:
    """[rows, columns]: the patches in which no pixel of a white image is on its black canvas, pixel by pixel."""
    mask = np.asarray(canvas)[..., 0] > 0
    fine = mask.repeat(rows, 0).repeat(columns, 1)  # every patch is whole now: as many points as the canvas has pixels
    blocks = fine.reshape(rows, mask.shape[0], columns, mask.shape[1])
    return ~blocks.any((1, 3))


@pytest.mark.parametrize(
    ("size", "grid", "number"),
    [
        ((32, 32), 8, 0),
        ((32, 24), 8, 16),  # 4:3, four pixels above and below are a row of patches each
        ((24, 32), 8, 16),
        ((32, 25), 8, 8),  # three above, four below: one pixel of the image is in the first row
        ((32, 22), 8, 16),  # five: the second row has a pixel of the image
        ((33, 32), 8, 0),
        ((40, 1), 5, 20),
        ((1, 41), 5, 20),
        ((31, 10), 4, 8),
    ],
)
def test_a_patch_is_padding_if_no_pixel_of_the_image_is_in_it(size, grid, number):
    """Methods keep tokens there, and nobody counted them."""
    side, white = max(size), Image.new("RGB", size, "white")
    expected = empty_slowly(pad_to_square(white, (0, 0, 0), side), grid, grid)  # of this size, nothing is resized
    for tower in (side, 336):
        found = on_padding(single(grid, grid), ImageProcessor(tower, tower).canvas(size))
        assert (found.sum(), found.tolist()) == (number, expected.flatten().tolist())
    cropped = pad_to_square(white, (0, 0, 0), side).crop((4, 4, side - 4, side - 4))
    found = ImageProcessor(side, side - 8).canvas(size).empty((grid, grid))
    assert found.tolist() == empty_slowly(cropped, grid, grid).tolist(), "where the tower sees the middle alone"


@pytest.mark.parametrize("size", [(56, 56), (300, 90), (90, 300), (57, 21), (10, 300), (120, 50)])
def test_padding_of_tiles_is_found_and_the_base_image_has_none(size):
    """Unpadding takes most of it off; one row or column can stay."""
    for merge, force in (("spatial_unpad", None), ("spatial", None), ("spatial", (56, 56))):
        processor = AnyresProcessor(SMALL_CLIP, SMALL_GRID, SMALL, merge=merge, force=force)
        layout, canvas = processor.arrange(size), processor.canvas(size)
        found, (down, across) = on_padding(layout, canvas), layout.tiles or (1, 1)
        white = on_canvas(Image.new("RGB", size, "white"), processor.resolution(size))
        empty = empty_slowly(white, down * SMALL_GRID[0], across * SMALL_GRID[1])
        expected = []
        for crop, row, column in layout.origins().tolist():
            top, left = (max(0, crop - 1) // across * SMALL_GRID[0], max(0, crop - 1) % across * SMALL_GRID[1])
            expected.append(crop > 0 and row >= 0 and bool(empty[top + row, left + column]))
        assert found.tolist() == expected
        assert found.sum() <= max(down * SMALL_GRID[0], across * SMALL_GRID[1]) or merge == "spatial"
        assert not on_padding(layout.with_cls, canvas)[[crop.cls for crop in layout.with_cls.crops]].any()
