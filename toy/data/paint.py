"""Drawing of pictures: backgrounds, free places, bright panels, coloured shapes, framed digits.

The order in which random numbers are drawn is part of every picture: changing it changes all of them.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from toy.data.vocabulary import COLORS, SHAPES

# Sides in pixels, from (inclusive) and to (exclusive).
SIDES = {"panel": (44, 61), "big": (34, 49), "frame": (22, 30), "small": (14, 20)}


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
class Painted:
    """A thing and the pixels it covers.

    Attributes:
        area: rows and columns of the canvas.
        mask: [side, side] coverage in 0..1.
    """

    thing: Thing
    area: tuple[slice, slice]
    mask: np.ndarray


def paint_things(
    rng, canvas: np.ndarray, kinds, shapes, colors, digits: tuple[np.ndarray, np.ndarray]
) -> list[Painted]:
    """Paint things of the given kinds where there is room, in that order; what finds no place is left out.

    Args:
        canvas: [height, width, 3] float32, painted on.
        kinds: keys of SIDES.
        shapes, colors: indices to choose from.
        digits: handwritten digits and their labels.
    """
    frame_colors = list(rng.permutation(len(COLORS)))
    boxes: list[tuple[int, int, int]] = []
    painted: list[Painted] = []
    taken: set[tuple[int, int]] = set()
    for kind in kinds:
        side = int(rng.integers(*SIDES[kind]))
        place = free_place(rng, boxes, side, canvas.shape[1], canvas.shape[0])
        if place is None:
            continue
        boxes.append((*place, side))
        x, y = place
        centre = {"x": x + side / 2, "y": y + side / 2, "side": side}
        if kind == "panel":
            pattern = int(rng.integers(3))
            thing, mask = Thing("panel", **centre, pattern=pattern), np.ones((side, side), np.float32)
            paint = patterned(rng, pattern, side)
        elif kind == "frame":
            pick, color = int(rng.integers(len(digits[1]))), int(frame_colors.pop())
            thing = Thing("frame", **centre, color=color, digit=int(digits[1][pick]))
            mask = np.ones((side, side), np.float32)
            paint = framed_digit(rng, color, digits[0][pick], side)
        else:
            shape, color = new_pair(rng, shapes, colors, taken)
            thing = Thing("shape", **centre, shape=shape, color=color, big=int(kind == "big"))
            mask, paint = shape_mask(SHAPES[shape], side, int(rng.integers(-2, 3))), shaded(rng, color, side)
        area = (slice(y, y + side), slice(x, x + side))
        canvas[area] = canvas[area] * (1 - mask[..., None]) + paint * mask[..., None]
        painted.append(Painted(thing, area, mask))
    return painted


def free_place(rng, boxes, side: int, width: int, height: int, tries: int = 40, gap: int = 3) -> tuple[int, int] | None:
    """Upper left corner of a square that touches none of the boxes (x, y, side), or None."""
    for _ in range(tries):
        x, y = int(rng.integers(1, width - side - 1)), int(rng.integers(1, height - side - 1))
        if all(
            x + side + gap <= bx or bx + other + gap <= x or y + side + gap <= by or by + other + gap <= y
            for bx, by, other in boxes
        ):
            return x, y
    return None


def new_pair(rng, shapes, colors, taken) -> tuple[int, int]:
    """A shape and a colour that are not yet in `taken`, or, after five tries, any."""
    for _ in range(5):
        pair = int(rng.choice(shapes)), int(rng.choice(colors))
        if pair not in taken:
            break
    taken.add(pair)
    return pair


def background(rng, width: int, height: int) -> np.ndarray:
    """Grey low-frequency noise with line clutter: nothing in it has an askable colour."""
    cells, base = int(rng.integers(3, 9)), rng.uniform(60, 190)
    noise = base + rng.normal(0, 22, (cells, cells, 1)) + rng.normal(0, 9, (cells, cells, 3))
    image = Image.fromarray(np.clip(noise, 0, 255).astype(np.uint8)).resize((width, height), Image.BICUBIC)
    pen = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(4, 16))):
        x, y = int(rng.integers(0, width)), int(rng.integers(0, height))
        angle, length = rng.uniform(0, 2 * np.pi), rng.uniform(8, 50)
        grey = int(np.clip(base + rng.normal(0, 45), 0, 255))
        end = (x + length * np.cos(angle), y + length * np.sin(angle))
        pen.line([(x, y), end], fill=(grey, grey, grey), width=int(rng.integers(1, 3)))
    return np.asarray(image, np.float32)


def patterned(rng, pattern: int, side: int) -> np.ndarray:
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


def framed_digit(rng, color: int, digit: np.ndarray, side: int) -> np.ndarray:
    border = max(2, side // 9)
    inner = side - 2 * border
    paint = np.ones((side, side, 3), np.float32) * tint(rng, color)
    ink = Image.fromarray((digit * 255).astype(np.uint8)).resize((inner, inner), Image.BICUBIC)
    ink = np.asarray(ink, np.float32)[..., None] / 255
    paint[border:-border, border:-border] = rng.uniform(200, 255) * (1 - ink) + rng.uniform(0, 50) * ink
    return paint


def shaded(rng, color: int, side: int) -> np.ndarray:
    slope = rng.normal(0, 12, 2)
    row, column = np.mgrid[:side, :side] / side - 0.5
    return (tint(rng, color) + (slope[0] * column + slope[1] * row)[..., None]).astype(np.float32)


def tint(rng, color: int) -> np.ndarray:
    return np.array(list(COLORS.values())[color], np.float32) + rng.normal(0, 8, 3)


@cache
def shape_mask(name: str, side: int, tilt: int) -> np.ndarray:
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
