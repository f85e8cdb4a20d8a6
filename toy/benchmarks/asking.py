"""Question-answer pairs for the toy benchmarks.

No text occurs twice about a picture, every option letter is right equally often, and ten people answer.
"""

import zlib
from collections.abc import Iterator, Sequence

import numpy as np

from toy.benchmarks.pictures import Picture
from toy.data.formats import LETTERS, Pair, compose
from toy.data.vocabulary import COLOR_NAMES, DIGITS, SHAPES

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
    """An pair with that many options whose answer stands at `place`; None if the scene has none."""
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
