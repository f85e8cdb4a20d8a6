"""Large pictures of many shapes: the things of `toy.data.scenes`, at the same size, on up to four times the area.

Small things are 14 to 19 pixels and digit frames 22 to 29. In a tile of 192 x 192 they look as the vision tower knows
them; in the thumbnail, where the whole picture is squeezed into 192 x 192, most of them are a patch or two.
"""

import io
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from toy.data.paint import Thing, background, paint_things
from toy.data.scenes import JPEG_QUALITY, SIDE, handwritten_digits
from toy.data.vocabulary import COLORS, SHAPES

# First seed of each split; dense scenes follow DENSE_OFFSET later. No range meets another or one of toy.data.scenes.
SEEDS = {"train": 21_000_000, "val": 27_000_000, "test": 29_000_000}
DENSE_OFFSET = 500_000
LONGEST = 3 * SIDE


@dataclass(frozen=True)
class LargeScene:
    """A picture and what is in it.

    Attributes:
        jpeg: the file as the benchmark ships it.
        image: [height, width, 3] uint8, that file decoded.
        things: with centres in pixels of the picture.
        owner: [height, width] int8, index of the thing that covers a pixel, -1 for background.
    """

    jpeg: bytes
    image: np.ndarray
    things: tuple[Thing, ...]
    owner: np.ndarray


def large_scene(split: str, index: int, dense: bool) -> LargeScene:
    """Scene number `index` of a split."""
    rng = np.random.default_rng(SEEDS[split] + (DENSE_OFFSET if dense else 0) + index)
    width, height = picture_size(rng)
    canvas = background(rng, width, height)
    room = min(4.0, width * height / SIDE**2)  # in pictures of 192 x 192, from 2 on
    painted = paint_things(rng, canvas, *_contents(rng, room, dense), handwritten_digits(split))
    canvas += rng.normal(0, rng.uniform(2, 4), (height, width, 1)).astype(np.float32)
    owner = np.full((height, width), -1, np.int8)
    for number, one in enumerate(painted):
        owner[one.area][one.mask > 0.5] = number
    file = io.BytesIO()
    Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return LargeScene(file.getvalue(), np.asarray(Image.open(file)), tuple(one.thing for one in painted), owner)


def picture_size(rng: np.random.Generator) -> tuple[int, int]:
    """Width and height: squares, halves and strips that fit their tiles, and sizes that need padding or scaling."""
    kind = int(rng.choice(5, p=(0.3, 0.2, 0.1, 0.3, 0.1)))
    if kind == 0:
        long, short = 2 * SIDE, 2 * SIDE
    elif kind == 1:
        long, short = 2 * SIDE, SIDE
    elif kind == 2:
        long, short = LONGEST, SIDE
    elif kind == 3:  # padded beside the picture
        long, short = 2 * SIDE, int(rng.integers(270, 2 * SIDE))
    else:  # scaled down a little, and padded
        long, short = int(rng.integers(400, 461)), int(rng.integers(280, 400))
    return (long, short) if rng.random() < 0.5 else (short, long)


def _contents(rng, room: float, dense: bool) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Kinds of things, and the shapes and colours they may have."""
    if dense:
        kinds = ["panel"] * int(rng.random() < 0.5) + ["big"] * int(rng.integers(1, 4))
        kinds += ["frame"] * round(1.5 * room) + ["small"] * round(4 * room)
        return kinds, np.arange(len(SHAPES)), np.arange(len(COLORS))
    kinds = ["panel"] * int(rng.integers(1, 3)) + ["big"] * int(rng.integers(1, 4))
    kinds += ["frame"] * int(rng.integers(1, 4)) + ["small"] * round(room * rng.uniform(1, 2.2))
    shapes = rng.choice(len(SHAPES), size=int(rng.integers(4, 8)), replace=False)
    colors = rng.choice(len(COLORS), size=int(rng.integers(5, 9)), replace=False)
    return kinds, shapes, colors


def centred(things: tuple[Thing, ...], width: int, height: int) -> tuple[Thing, ...]:
    """The things moved so that the picture's centre lies where the question writer expects it, at (96, 96)."""
    across, down = (SIDE - width) / 2, (SIDE - height) / 2
    return tuple(replace(thing, x=thing.x + across, y=thing.y + down) for thing in things)
