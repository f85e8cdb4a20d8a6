"""The drawn pictures of the toy GQA benchmark with what stands where: which patches a question and a word speak of.

The files hold no masks. A picture is a function of its name, so it is drawn again, compared with the stored file byte
for byte, and the patches of its things are taken from the new drawing.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eval.answers.jsonl import read_bytes, read_json
from eval.config import DEFAULT_DATA
from llava.errors import UserError

# The drawing code needs scikit-learn (its handwritten digits), so it is imported where a picture is drawn.
from toy.data.scenes import Thing
from toy.data.vocabulary import COLOR_NAMES, PATTERNS, PLURALS, SHAPES, SIZES

Mask = NDArray[np.bool_]
GRID = 24  # patches along each side
PATCHES = GRID * GRID
NAME = re.compile(r"(test|val)(\d{5})([nd])")
SINGULAR = {plural: shape for shape, plural in PLURALS.items()}
WORDS = (*COLOR_NAMES, *SHAPES)  # the content words whose things are known


@dataclass(frozen=True)
class Picture:
    """A picture and its things.

    Attributes:
        name: without ".jpg"; ends in "n" for a natural and "d" for a dense scene.
        things: what was painted, in the order in which `owner` numbers it.
        owner: [576] int8 in raster order, the thing that covers a patch, -1 for background.
    """

    name: str
    things: tuple[Thing, ...]
    owner: NDArray[np.int8]

    @property
    def dense(self) -> bool:
        return self.name.endswith("d")

    def patches(self, numbers: Iterable[int]) -> Mask:
        """[576] bool, the patches of the things with these numbers."""
        return np.isin(self.owner, list(numbers))


@dataclass(frozen=True)
class Asked:
    """A question with what it speaks of.

    Attributes:
        family: one of the nine of toy/data/questions.py.
        targets: numbers of the things that it names, () where the picture has none of them.
    """

    id: str
    family: str
    text: str
    answer: str
    picture: str
    targets: tuple[int, ...]


@cache
def redraw(name: str, data: Path = DEFAULT_DATA) -> Picture:
    """The picture of a name such as "test00012d", drawn again.

    Raises:
        UserError: no such picture, scikit-learn is missing, or the drawing differs from the stored file, whose masks
            would then be wrong.
    """
    parts = NAME.fullmatch(name)
    if parts is None:
        raise UserError(f"A picture of the toy benchmark is named like test00012d, got {name!r}.")
    stored = read_bytes(data / "gqa" / "data" / "images" / f"{name}.jpg")
    try:
        from toy.data.scenes import scene

        drawn = scene(parts[1], int(parts[2]), parts[3] == "d")
    except ImportError as error:
        raise UserError("Drawing the scenes again needs scikit-learn; install the extra: pip install -e .[toy]") from (
            error
        )
    if drawn.jpeg != stored:
        raise UserError(
            f"{name}.jpg is not what toy/data/scenes.py draws here, so the masks of its objects are unknown; restore "
            "the file, or use the versions of numpy and pillow in requirements.txt."
        )
    return Picture(name, drawn.things, drawn.owner.reshape(-1))


def matching(things: Sequence[Thing], phrase: str) -> tuple[int, ...]:
    """Numbers of the things that a noun phrase of the questions fits: "small red star", "blue objects", "green frame".

    Raises:
        UserError: a word that no phrase of the toy benchmark has.
    """
    *attributes, noun = phrase.split()
    shape = SINGULAR.get(noun, noun)
    if noun in ("frame", "panel"):
        kind = noun
    elif shape in SHAPES or noun in ("object", "objects"):
        kind = "shape"
    else:
        raise UserError(f"{phrase!r} names no thing of the toy benchmark.")
    wanted: dict[str, int] = {"shape": SHAPES.index(shape)} if shape in SHAPES else {}
    for word in attributes:
        for field, known in (("color", COLOR_NAMES), ("big", SIZES), ("pattern", PATTERNS)):
            if word in known:
                wanted[field] = known.index(word)
                break
        else:
            raise UserError(f"{word!r} in {phrase!r} is no attribute of the toy benchmark.")
    return tuple(
        number
        for number, thing in enumerate(things)
        if thing.kind == kind and all(getattr(thing, field) == value for field, value in wanted.items())
    )


def ahead(a: Thing, b: Thing, relation: str) -> float:
    """Pixels by which the centre of `a` is left of (right of, above, below) that of `b`."""
    across = a.x - b.x if relation in ("left of", "right of") else a.y - b.y
    return -across if relation in ("left of", "above") else across


def targets_of(things: Sequence[Thing], family: str, program: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
    """Numbers of the things that a question is about, from the program in GQA's annotation.

    The one that is asked for and the one that it is related to; all that fit where the question counts them.
    """
    first = matching(things, program[0]["argument"])
    if family not in ("relate", "verify", "choose"):
        return first
    name, relation = program[1]["argument"].rsplit(",", 1)
    second = matching(things, name)
    if family == "relate":  # several things have this name; one stands on that side
        second = tuple(n for n in second if n not in first and ahead(things[n], things[first[0]], relation) > 0)
    return tuple(sorted({*first, *second}))


@cache
def questions(split: str = "testdev", data: Path = DEFAULT_DATA) -> tuple[Asked, ...]:
    """All questions of a split in the order of the benchmark, with the things that they name."""
    records = read_json(data / "gqa" / "data" / f"{split}_balanced_questions.json")
    asked = []
    for identity, record in records.items():
        family, picture = record["types"]["detailed"], redraw(record["imageId"], data)
        targets = targets_of(picture.things, family, record["semantic"])
        asked.append(Asked(identity, family, record["question"], record["answer"], picture.name, targets))
    return tuple(asked)


def word_mask(picture: Picture, word: str) -> Mask:
    """[576] bool, patches of the things that a colour or a shape word is true of; a frame has its colour."""
    field = "color" if word in COLOR_NAMES else "shape"
    known = COLOR_NAMES if field == "color" else SHAPES
    value = known.index(word)
    return picture.patches(n for n, thing in enumerate(picture.things) if getattr(thing, field) == value)


def content_words(text: str) -> list[bool]:
    """For each token of a question, whether it names a thing or an attribute of one ("red", "circles", "frame")."""
    known = {*COLOR_NAMES, *SHAPES, *SINGULAR, *PATTERNS, *SIZES, "frame", "panel"}
    return [word in known for word in text.lower().replace("?", " ?").split()]
