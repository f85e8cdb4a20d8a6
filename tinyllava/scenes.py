"""Procedural scenes, 192 x 192 pixels: loud distractor panels, big shapes, small shapes, framed handwritten digits.

A scene is a function of its seed alone. Splits use disjoint seed ranges and disjoint handwritten digits, so no
test picture and no test digit is seen in training. Natural scenes hold 6 to 11 things; dense scenes hold up to
17, more target patches than a budget of 64 can keep.
"""

import io
import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from tinyllava.vocabulary import COLORS, SHAPES

SIDE, PATCH = 192, 8
GRID = SIDE // PATCH

# First seed of each split; dense scenes follow DENSE_OFFSET later. Ranges never meet.
SEEDS = {"train": 1_000_000, "val": 7_000_000, "test": 9_000_000}
DENSE_OFFSET = 500_000
JPEG_QUALITY = 90


@dataclass(frozen=True)
class Thing:
    """One object. Indices are -1 where they do not apply."""

    kind: str  # panel, shape or frame
    x: float  # centre, pixels
    y: float
    side: int  # pixels
    shape: int = -1
    color: int = -1
    big: int = -1
    digit: int = -1
    pattern: int = -1


@dataclass(frozen=True)
class Scene:
    """A picture and what is in it.

    Attributes:
        jpeg: the file as the benchmark ships it.
        image: [192, 192, 3] uint8, that file decoded, so that training sees what a reader of the file sees.
        owner: [24, 24] int8, index of the thing that covers a patch, -1 for background.
    """

    jpeg: bytes
    image: np.ndarray
    things: tuple[Thing, ...]
    owner: np.ndarray


def scene(split: str, index: int, dense: bool) -> Scene:
    """Scene number `index` of a split."""
    return _draw(SEEDS[split] + (DENSE_OFFSET if dense else 0) + index, split, dense)


@cache
def handwritten_digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's bundled 8 x 8 digits (UCI, 1,797 instances), 70/10/20 % for train/val/test."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.RandomState(0).permutation(len(data.target))
    train, val = int(0.7 * len(order)), int(0.8 * len(order))
    part = {"train": order[:train], "val": order[train:val], "test": order[val:]}[split]
    return data.images[part] / 16.0, data.target[part]


def _draw(seed: int, split: str, dense: bool) -> Scene:
    rng = np.random.default_rng(seed)
    canvas = _background(rng)
    if dense:
        kinds = ["panel"] * int(rng.random() < 0.5) + ["big"] * int(rng.integers(1, 3)) + ["frame"] * 4 + ["small"] * 10
        shapes, colors = np.arange(len(SHAPES)), np.arange(len(COLORS))
    else:
        kinds = ["panel"] * int(rng.integers(1, 3)) + ["big"] * int(rng.integers(1, 4))
        kinds += ["frame"] * int(rng.integers(1, 3)) + ["small"] * int(rng.integers(2, 6))
        # Few shapes and colours per scene, so that questions need more than one attribute to single a thing out.
        shapes = rng.choice(len(SHAPES), size=int(rng.integers(3, 7)), replace=False)
        colors = rng.choice(len(COLORS), size=int(rng.integers(4, 8)), replace=False)
    frame_colors = list(rng.permutation(len(COLORS)))
    boxes: list[tuple[int, int, int]] = []
    things: list[Thing] = []
    covers: list[np.ndarray] = []
    taken: set[tuple[int, int]] = set()
    for kind in kinds:
        side = int(rng.integers(*{"panel": (44, 61), "big": (34, 49), "frame": (22, 30), "small": (14, 20)}[kind]))
        place = _free_place(rng, boxes, side)
        if place is None:
            continue
        boxes.append((*place, side))
        x, y = place
        centre = {"x": x + side / 2, "y": y + side / 2, "side": side}
        if kind == "panel":
            pattern = int(rng.integers(3))
            thing, mask = Thing("panel", **centre, pattern=pattern), np.ones((side, side), np.float32)
            paint = _pattern(rng, pattern, side)
        elif kind == "frame":
            digits, labels = handwritten_digits(split)
            pick, color = int(rng.integers(len(labels))), int(frame_colors.pop())
            thing, mask = (
                Thing("frame", **centre, color=color, digit=int(labels[pick])),
                np.ones((side, side), np.float32),
            )
            paint = _framed_digit(rng, color, digits[pick], side)
        else:
            shape, color = _new_pair(rng, shapes, colors, taken)
            thing = Thing("shape", **centre, shape=shape, color=color, big=int(kind == "big"))
            mask, paint = _shape_mask(SHAPES[shape], side, int(rng.integers(-2, 3))), _shaded(rng, color, side)
        area = (slice(y, y + side), slice(x, x + side))
        canvas[area] = canvas[area] * (1 - mask[..., None]) + paint * mask[..., None]
        cover = np.zeros((SIDE, SIDE), np.float32)
        cover[area] = mask
        covers.append(cover.reshape(GRID, PATCH, GRID, PATCH).mean((1, 3)))
        things.append(thing)
    canvas += rng.normal(0, rng.uniform(2, 8), (SIDE, SIDE, 1)).astype(np.float32)
    cover = np.stack(covers)
    owner = np.where(cover.max(0) > 0.12, cover.argmax(0), -1).astype(np.int8)
    file = io.BytesIO()
    Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return Scene(file.getvalue(), np.asarray(Image.open(file)), tuple(things), owner)


def _free_place(rng, boxes, side, tries: int = 40, gap: int = 3) -> tuple[int, int] | None:
    for _ in range(tries):
        x, y = (int(value) for value in rng.integers(1, SIDE - side - 1, 2))
        if all(
            x + side + gap <= bx or bx + other + gap <= x or y + side + gap <= by or by + other + gap <= y
            for bx, by, other in boxes
        ):
            return x, y
    return None


def _new_pair(rng, shapes, colors, taken) -> tuple[int, int]:
    for _ in range(5):
        pair = int(rng.choice(shapes)), int(rng.choice(colors))
        if pair not in taken:
            break
    taken.add(pair)
    return pair


def _background(rng) -> np.ndarray:
    """Grey low-frequency noise with line clutter: nothing in it has an askable colour."""
    cells, base = int(rng.integers(3, 9)), rng.uniform(60, 190)
    noise = base + rng.normal(0, 22, (cells, cells, 1)) + rng.normal(0, 9, (cells, cells, 3))
    image = Image.fromarray(np.clip(noise, 0, 255).astype(np.uint8)).resize((SIDE, SIDE), Image.BICUBIC)
    pen = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(4, 16))):
        x, y = (int(value) for value in rng.integers(0, SIDE, 2))
        angle, length = rng.uniform(0, 2 * np.pi), rng.uniform(8, 50)
        grey = int(np.clip(base + rng.normal(0, 45), 0, 255))
        end = (x + length * np.cos(angle), y + length * np.sin(angle))
        pen.line([(x, y), end], fill=(grey, grey, grey), width=int(rng.integers(1, 3)))
    return np.asarray(image, np.float32)


def _pattern(rng, pattern: int, side: int) -> np.ndarray:
    first, second = rng.uniform(0, 255, (2, 3))
    if np.abs(first - second).sum() < 250:
        second = 255 - first
    row, column = np.mgrid[:side, :side]
    period = int(rng.integers(6, 11))
    if pattern == 0:
        along = [(1, 0), (0, 1), (1, 1), (1, -1)][int(rng.integers(4))]
        on = ((column * along[0] + row * along[1]) // (period // 2 + 1)) % 2 > 0
    elif pattern == 1:
        on = (column // period + row // period) % 2 > 0
    else:
        on = (column % period - period / 2) ** 2 + (row % period - period / 2) ** 2 < (period * 0.33) ** 2
    return np.where(on[..., None], first, second).astype(np.float32)


def _framed_digit(rng, color: int, digit: np.ndarray, side: int) -> np.ndarray:
    border = max(2, side // 9)
    inner = side - 2 * border
    paint = np.ones((side, side, 3), np.float32) * _tint(rng, color)
    ink = Image.fromarray((digit * 255).astype(np.uint8)).resize((inner, inner), Image.BICUBIC)
    ink = np.asarray(ink, np.float32)[..., None] / 255
    paint[border:-border, border:-border] = rng.uniform(200, 255) * (1 - ink) + rng.uniform(0, 50) * ink
    return paint


def _shaded(rng, color: int, side: int) -> np.ndarray:
    slope = rng.normal(0, 12, 2)
    row, column = np.mgrid[:side, :side] / side - 0.5
    return (_tint(rng, color) + (slope[0] * column + slope[1] * row)[..., None]).astype(np.float32)


def _tint(rng, color: int) -> np.ndarray:
    return np.array(list(COLORS.values())[color], np.float32) + rng.normal(0, 8, 3)


@cache
def _shape_mask(name: str, side: int, tilt: int) -> np.ndarray:
    """[side, side] coverage in 0..1, drawn four times larger and averaged; tilt in steps of 8 degrees."""
    wide = side * 4
    image = Image.new("L", (wide, wide), 0)
    pen, centre = ImageDraw.Draw(image), wide / 2
    angle = math.radians(tilt * 8)

    def turned(points):
        return [
            (centre + (x * math.cos(angle) - y * math.sin(angle)) * centre,
             centre + (x * math.sin(angle) + y * math.cos(angle)) * centre)
            for x, y in points
        ]  # fmt: skip

    if name == "circle":
        pen.ellipse([wide * 0.03, wide * 0.03, wide * 0.97, wide * 0.97], fill=255)
    elif name == "ring":
        pen.ellipse([0, 0, wide - 1, wide - 1], fill=255)
        pen.ellipse([wide * 0.28, wide * 0.28, wide * 0.72, wide * 0.72], fill=0)
    elif name == "square":
        pen.polygon(turned([(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)]), fill=255)
    elif name == "triangle":
        pen.polygon(turned([(0, -1), (0.95, 0.8), (-0.95, 0.8)]), fill=255)
    elif name == "star":
        radius = [1 if spoke % 2 == 0 else 0.42 for spoke in range(10)]
        points = [(r * math.sin(k * math.pi / 5), -r * math.cos(k * math.pi / 5)) for k, r in enumerate(radius)]
        pen.polygon(turned(points), fill=255)
    elif name == "cross":
        bar = 0.3
        quarter = [(-bar, -1), (bar, -1), (bar, -bar), (1, -bar), (1, bar), (bar, bar)]
        pen.polygon(turned(quarter + [(-x, -y) for x, y in quarter]), fill=255)
    else:
        turn = np.linspace(0, 2 * np.pi, 40)
        x = 16 * np.sin(turn) ** 3 / 17
        y = -(13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)) / 17
        pen.polygon(turned(list(zip(x, y, strict=True))), fill=255)
    return np.asarray(image.resize((side, side), Image.BOX), np.float32) / 255
