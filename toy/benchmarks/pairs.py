"""The pictures of the toy benchmarks, and question-answer pairs about them.

Pictures are those of the toy GQA, linked, and small copies of further test scenes. No text occurs twice about a
picture, every option letter is right equally often, and ten people answer.
"""

import io
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from toy.data.formats import LETTERS, Pair, compose
from toy.data.scenes import Thing, scene
from toy.data.vocabulary import COLOR_NAMES, DIGITS, SHAPES

# Test scenes of each kind in assets/eval/gqa; the copies are drawn from later scenes.
LINKED = 150
# Further scenes of each kind, of which the smoothest are taken: sensor noise is what fills a JPEG file.
DRAWN = 100
QUALITY = 60
PALETTE = 128


@dataclass(frozen=True)
class Picture:
    """A drawn scene.

    Attributes:
        name: file stem, "test00000n" for the first natural scene.
    """

    name: str
    index: int
    dense: bool

    @property
    def things(self) -> tuple[Thing, ...]:
        return _drawn(self.index, self.dense)[1]

    @property
    def file(self) -> str:
        """File name in assets/eval/gqa/data/images."""
        return f"{self.name}.jpg"

    @property
    def original(self) -> bytes:
        """The JPEG file as assets/eval/gqa ships it."""
        return _drawn(self.index, self.dense)[0]

    @property
    def jpeg(self) -> bytes:
        """A smaller JPEG file."""
        return self.compressed(QUALITY)

    def compressed(self, quality: int) -> bytes:
        """A JPEG file of that quality."""
        return _compressed(self.index, self.dense, quality)

    @property
    def png(self) -> bytes:
        """A PNG file with few colours."""
        return _quantised(self.index, self.dense)

    @property
    def cell(self) -> dict[str, object]:
        """The smaller JPEG file as a cell of a table."""
        return {"bytes": self.jpeg, "path": self.file}


@cache
def _drawn(index: int, dense: bool) -> tuple[bytes, tuple[Thing, ...]]:
    drawn = scene("test", index, dense)
    return drawn.jpeg, drawn.things


@cache
def _compressed(index: int, dense: bool, quality: int) -> bytes:
    file = io.BytesIO()
    _opened(index, dense).save(file, "JPEG", quality=quality, optimize=True)
    return file.getvalue()


@cache
def _quantised(index: int, dense: bool) -> bytes:
    file = io.BytesIO()
    # Noise does not compress. Median cut, the default, would leave small things no colour of their own.
    smooth = _opened(index, dense).filter(ImageFilter.MedianFilter(3))
    smooth.quantize(PALETTE, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return file.getvalue()


def _opened(index: int, dense: bool) -> Image.Image:
    return Image.open(io.BytesIO(_drawn(index, dense)[0]))


def _picture(index: int, dense: bool) -> Picture:
    return Picture(f"test{index:05d}{'d' if dense else 'n'}", index, dense)


def linked(count: int, first: int = 0) -> list[Picture]:
    """`count` pictures that assets/eval/gqa/data/images holds, natural and dense in turn, from scene `first` on."""
    return [_picture((first + row // 2) % LINKED, row % 2 == 1) for row in range(count)]


def small(pictures: Iterable[Picture], count: int) -> list[Picture]:
    """The `count` pictures with the smallest files, in the order given."""
    pictures = list(pictures)
    chosen = sorted(pictures, key=lambda picture: (len(picture.original), picture.name))[:count]
    return [picture for picture in pictures if picture in chosen]


@cache
def _smooth() -> tuple[Picture, ...]:
    """Pictures of the scenes after those of GQA, natural and dense in turn, the smallest files first."""
    kinds = []
    for dense in (False, True):
        some = [_picture(LINKED + row, dense) for row in range(DRAWN)]
        kinds.append(sorted(some, key=lambda picture: (len(picture.original), picture.name)))
    return tuple(picture for pair in zip(*kinds, strict=True) for picture in pair)


def copied(count: int, first: int = 0) -> list[Picture]:
    """`count` pictures for sets that hold their own small copies, the smoothest from place `first` on."""
    return list(_smooth()[first : first + count])


def objects(picture: Picture) -> set[str]:
    """Colour and shape of everything in a picture, "red star"."""
    return {f"{COLOR_NAMES[t.color]} {SHAPES[t.shape]}" for t in picture.things if t.kind == "shape"}


def images(root: Path) -> Path:
    """The folder that sets link to, ROOT being assets/eval."""
    return root / "gqa" / "data" / "images"


# Families of toy.data.questions by what their answers are.
MANY = ("color", "shape", "relate", "count", "digit")  # four different answers or more
PAIRS = ("exist", "verify", "choose", "side")  # one of two
ALL = MANY + PAIRS

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DRAWS = 400  # until the right answer stands where it should


def generator(*parts: str | int) -> np.random.Generator:
    """A random generator for a set, or for a part of it. "minis" is part of the seed: the sets depend on it."""
    return np.random.default_rng([zlib.crc32(str(part).encode()) for part in ("minis", *parts)])


def about(picture: Picture, name: str, rng: np.random.Generator, families: Sequence[str]) -> Iterator[Pair]:
    """At most one pair of format `name` for each of the families, no question twice."""
    seen = set()
    for family in families:
        pair = compose(picture.things, name, rng, family=family)
        if pair is not None and asked(pair) not in seen:
            seen.add(asked(pair))
            yield pair


def asked(pair: Pair) -> str:
    """The question without options and reference tokens, which may follow on further lines."""
    return pair.question.split("\n")[0]


def rotation(row: int, count: int, among: Sequence[str] = ALL) -> list[str]:
    """`count` of the families, different ones for the picture of each row."""
    return [among[(row * count + place) % len(among)] for place in range(count)]


def lettered(
    picture: Picture, name: str, rng: np.random.Generator, place: int, family: str, options: int = 4
) -> Pair | None:
    """A pair with that many options whose answer stands at `place`; None if the scene has none."""
    for _ in range(DRAWS):
        pair = compose(picture.things, name, rng, family=family)
        if pair is None:
            return None
        if len(pair.options) == options and pair.answer == LETTERS[place % options]:
            return pair
    return None


def lettered_set(
    pictures: Sequence[Picture], name: str, rng: np.random.Generator, count: int, each: int, among: Sequence[str] = MANY
) -> Iterator[tuple[Picture, Pair]]:
    """`count` pairs with four options, up to `each` about a picture; A, B, C and D are right equally often."""
    made = 0
    for row, picture in enumerate(pictures):
        seen = set()
        for family in rotation(row, each, among):
            pair = lettered(picture, name, rng, made, family)
            if made == count or pair is None or asked(pair) in seen:
                continue
            seen.add(asked(pair))
            made += 1
            yield picture, pair
    if made < count:
        raise ValueError(f"{len(pictures)} pictures gave {made} pairs of {name}, not {count}.")


def spelled(answer: str) -> str:
    """A digit as a word, everything else as it is."""
    return NUMBER_WORDS[int(answer)] if answer in DIGITS else answer


def ten_answers(answer: str, rng: np.random.Generator) -> list[str]:
    """Seven to ten people give the answer, some of them spell a number out; the others are wrong, each in a way."""
    kinds = (COLOR_NAMES, SHAPES, DIGITS, ("yes", "no"), ("left", "right"), ("above", "below"), ("top", "bottom"))
    kind = next((kind for kind in kinds if answer in kind), ())
    wrong = [word for word in (*kind, "unanswerable") if word != answer] or ["unsuitable"]
    right = int(rng.integers(7, 11))
    given = [spelled(answer) if rng.random() < 0.1 else answer for _ in range(right)]
    given += [wrong[int(rng.integers(len(wrong)))] for _ in range(10 - right)]
    return [given[place] for place in rng.permutation(10)]


def answer_type(answer: str) -> str:
    """VQA's type of an answer."""
    return "yes/no" if answer in ("yes", "no") else "number" if answer in DIGITS else "other"
