"""Pictures of the toy benchmarks: those of the toy GQA, linked, and small copies of further test scenes."""

import io
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image, ImageFilter

from toy.data.scenes import Thing, scene

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


def images(root: Path) -> Path:
    """The folder that sets link to, ROOT being assets/eval."""
    return root / "gqa" / "data" / "images"
