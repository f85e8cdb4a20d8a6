"""Procedural scenes, 192 x 192 pixels: loud distractor panels, big shapes, small shapes, framed handwritten digits.

A scene is a function of its seed alone. Splits use disjoint seed ranges and disjoint handwritten digits, so no
test picture and no test digit is seen in training. Natural scenes hold 6 to 11 things; dense scenes hold up to
17, more target patches than a budget of 64 can keep.
"""

import io
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from toy.data.paint import Thing, background, paint_things
from toy.data.vocabulary import COLORS, SHAPES

SIDE, PATCH = 192, 8
GRID = SIDE // PATCH

# First seed of each split; dense scenes follow DENSE_OFFSET later. Ranges never meet.
SEEDS = {"train": 1_000_000, "val": 7_000_000, "test": 9_000_000}
DENSE_OFFSET = 500_000
JPEG_QUALITY = 90


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
    covers = []
    for one in painted:
        cover = np.zeros((SIDE, SIDE), np.float32)
        cover[one.area] = one.mask
        covers.append(cover.reshape(GRID, PATCH, GRID, PATCH).mean((1, 3)))
    canvas += rng.normal(0, rng.uniform(2, 8), (SIDE, SIDE, 1)).astype(np.float32)
    cover = np.stack(covers)
    owner = np.where(cover.max(0) > 0.12, cover.argmax(0), -1).astype(np.int8)
    file = io.BytesIO()
    Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return Scene(file.getvalue(), np.asarray(Image.open(file)), tuple(one.thing for one in painted), owner)
