"""The pictures of the toy models: drawn scenes, and the large pictures of the toy LLaVA-NeXT.

Backgrounds, loud distractor panels, big shapes, small shapes, framed handwritten digits. A picture is a function of its
seed alone; the order in which random numbers are drawn is part of every picture: changing it changes all of them.
Splits use disjoint seed ranges and disjoint handwritten digits, so no test picture and no test digit is seen in
training.

Scenes have 192 x 192 pixels. Natural scenes hold 6 to 11 things; dense scenes hold up to 17, more target patches than a
budget of 64 can keep. Large pictures have many shapes and the same things, at the same size, on up to four times the
area: small things are 14 to 19 pixels and digit frames 22 to 29. In a tile of 192 x 192 they look as the vision tower
knows them; in the thumbnail, where the whole picture is squeezed into 192 x 192, most of them are a patch or two.
"""

import io
import math
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from lab.toy.data.vocabulary import COLORS, SHAPES

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

    @property
    def box(self) -> tuple[int, int, int, int]:
        """The smallest box around what is seen of it: left, top, right and bottom edge in pixels of the canvas."""
        rows, columns = (np.flatnonzero((self.mask > 0.5).any(axis)) for axis in (1, 0))
        top, left = self.area[0].start, self.area[1].start
        return left + int(columns[0]), top + int(rows[0]), left + int(columns[-1]) + 1, top + int(rows[-1]) + 1


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


def polygons() -> dict[str, list[tuple[float, float]]]:
    """Corners of the shapes without round edges, from -1 to 1."""
    radius = [1 if spoke % 2 == 0 else 0.42 for spoke in range(10)]
    quarter = [(-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3)]  # of the cross
    turn = np.linspace(0, 2 * np.pi, 40)
    x = 16 * np.sin(turn) ** 3 / 17
    y = -(13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)) / 17
    return {
        "square": [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)],
        "triangle": [(0, -1), (0.95, 0.8), (-0.95, 0.8)],
        "star": [(r * math.sin(k * math.pi / 5), -r * math.cos(k * math.pi / 5)) for k, r in enumerate(radius)],
        "cross": quarter + [(-x, -y) for x, y in quarter],
        "heart": list(zip(x, y, strict=True)),
    }


@cache
def shape_mask(name: str, side: int, tilt: int) -> np.ndarray:
    """[side, side] coverage in 0..1, drawn four times larger and averaged; tilt in steps of 8 degrees."""
    wide = side * 4
    image = Image.new("L", (wide, wide), 0)
    pen, centre = ImageDraw.Draw(image), wide / 2
    if name == "circle":
        pen.ellipse([wide * 0.03, wide * 0.03, wide * 0.97, wide * 0.97], fill=255)
    elif name == "ring":
        pen.ellipse([0, 0, wide - 1, wide - 1], fill=255)
        pen.ellipse([wide * 0.28, wide * 0.28, wide * 0.72, wide * 0.72], fill=0)
    else:
        cos, sin = math.cos(math.radians(tilt * 8)), math.sin(math.radians(tilt * 8))
        turned = [(x * cos - y * sin, x * sin + y * cos) for x, y in polygons()[name]]
        pen.polygon([(centre + x * centre, centre + y * centre) for x, y in turned], fill=255)
    return np.asarray(image.resize((side, side), Image.BOX), np.float32) / 255


SIDE, PATCH = 192, 8
GRID = SIDE // PATCH
PATCHES = GRID * GRID

# First seed of each split; dense scenes follow DENSE_OFFSET later. Ranges never meet.
SEEDS = {"train": 1_000_000, "val": 7_000_000, "test": 9_000_000}
DENSE_OFFSET = 500_000
JPEG_QUALITY = 90


@dataclass(frozen=True)
class Scene:
    """A picture and what is in it.

    Attributes:
        jpeg: the file as the benchmark ships it.
        image: [height, width, 3] uint8, that file decoded, so that training sees what a reader of the file sees.
        things: with centres in pixels of the picture.
        boxes: left, top, right and bottom edge of each thing in pixels of the picture.
        owner: int8, index of the thing that covers a patch of a scene, [24, 24], or a pixel of a large picture,
            [height, width]; -1 for background.
    """

    jpeg: bytes
    image: np.ndarray
    things: tuple[Thing, ...]
    boxes: tuple[tuple[int, int, int, int], ...]
    owner: np.ndarray


def finished(canvas: np.ndarray, painted: list[Painted], owner: np.ndarray) -> Scene:
    """The picture of a canvas [height, width, 3] float32, written as a file and read back."""
    file = io.BytesIO()
    Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    things, boxes = tuple(one.thing for one in painted), tuple(one.box for one in painted)
    return Scene(file.getvalue(), np.asarray(Image.open(file)), things, boxes, owner)


@cache
def handwritten_digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's bundled 8 x 8 digits (UCI, 1,797 instances), 70/10/20 % for train/val/test."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.RandomState(0).permutation(len(data.target))
    train, val = int(0.7 * len(order)), int(0.8 * len(order))
    part = {"train": order[:train], "val": order[train:val], "test": order[val:]}[split]
    return data.images[part] / 16.0, data.target[part]


def scene(split: str, index: int, dense: bool) -> Scene:
    """Scene number `index` of a split."""
    rng = np.random.default_rng(SEEDS[split] + (DENSE_OFFSET if dense else 0) + index)
    canvas = background(rng, SIDE, SIDE)
    if dense:
        kinds = ["panel"] * int(rng.random() < 0.5) + ["big"] * int(rng.integers(1, 3)) + ["frame"] * 4 + ["small"] * 10
        shapes, colors = np.arange(len(SHAPES)), np.arange(len(COLORS))
    else:
        kinds = ["panel"] * int(rng.integers(1, 3)) + ["big"] * int(rng.integers(1, 4))
        kinds += ["frame"] * int(rng.integers(1, 3)) + ["small"] * int(rng.integers(2, 6))
        # Few shapes and colours per scene, so that questions need more than one attribute to single a thing out.
        shapes = rng.choice(len(SHAPES), size=int(rng.integers(3, 7)), replace=False)
        colors = rng.choice(len(COLORS), size=int(rng.integers(4, 8)), replace=False)
    painted = paint_things(rng, canvas, kinds, shapes, colors, handwritten_digits(split))
    covers = np.zeros((len(painted), SIDE, SIDE), np.float32)
    for cover, one in zip(covers, painted, strict=True):
        cover[one.area] = one.mask
    canvas += rng.normal(0, rng.uniform(2, 8), (SIDE, SIDE, 1)).astype(np.float32)
    cover = covers.reshape(-1, GRID, PATCH, GRID, PATCH).mean((2, 4))
    return finished(canvas, painted, np.where(cover.max(0) > 0.12, cover.argmax(0), -1).astype(np.int8))


FIELDS = ("kind", "x", "y", "side", "shape", "color", "big", "digit", "pattern")


KINDS = ("", "panel", "shape", "frame")  # 0 marks an unused row


def thing_table(things: tuple[Thing, ...], rows: int) -> np.ndarray:
    """[rows, 9] float32: one thing per row, zeros after them."""
    table = np.zeros((rows, len(FIELDS)), np.float32)
    for row, thing in enumerate(things):
        table[row] = (KINDS.index(thing.kind), *(getattr(thing, field) for field in FIELDS[1:]))
    return table


def list_things(table: np.ndarray) -> tuple[Thing, ...]:
    """The things of a table as `thing_table` makes it."""
    return tuple(
        Thing(KINDS[int(kind)], float(x), float(y), int(side), *(int(value) for value in rest))
        for kind, x, y, side, *rest in table[table[:, 0] > 0]
    )


# Of the large pictures. No range meets another or one of SEEDS.
LARGE_SEEDS = {"train": 21_000_000, "val": 27_000_000, "test": 29_000_000}


def large_scene(split: str, index: int, dense: bool) -> Scene:
    """Scene number `index` of a split."""
    rng = np.random.default_rng(LARGE_SEEDS[split] + (DENSE_OFFSET if dense else 0) + index)
    width, height = picture_size(rng)
    canvas = background(rng, width, height)
    room = min(4.0, width * height / SIDE**2)  # in pictures of 192 x 192, from 2 on
    painted = paint_things(rng, canvas, *_contents(rng, room, dense), handwritten_digits(split))
    canvas += rng.normal(0, rng.uniform(2, 4), (height, width, 1)).astype(np.float32)
    owner = np.full((height, width), -1, np.int8)
    for number, one in enumerate(painted):
        owner[one.area][one.mask > 0.5] = number
    return finished(canvas, painted, owner)


def picture_size(rng: np.random.Generator) -> tuple[int, int]:
    """Width and height: squares, halves and strips that fit their tiles, and sizes that need padding or scaling."""
    kind = int(rng.choice(5, p=(0.3, 0.2, 0.1, 0.3, 0.1)))
    fixed = ((2 * SIDE, 2 * SIDE), (2 * SIDE, SIDE), (3 * SIDE, SIDE))
    if kind < len(fixed):
        long, short = fixed[kind]
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
