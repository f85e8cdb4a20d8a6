"""Exchanges for the embedded benchmarks: no text twice about a picture, the right letters at every place equally often,
and ten people who answer.
"""

import zlib
from collections.abc import Iterator, Sequence

import numpy as np

from tinyllava.formats import LETTERS, Exchange, compose
from tinyllava.minis.pictures import Picture
from tinyllava.vocabulary import COLOR_NAMES, DIGITS, SHAPES

# Families of tinyllava.questions by what their answers are.
MANY = ("color", "shape", "relate", "count", "digit")  # four different answers or more
PAIRS = ("exist", "verify", "choose", "side")  # one of two
ALL = MANY + PAIRS

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DRAWS = 400  # until the right answer stands where it should


def generator(*parts: str | int) -> np.random.Generator:
    """Random numbers that belong to a set, or to a part of it."""
    return np.random.default_rng([zlib.crc32(str(part).encode()) for part in ("minis", *parts)])


def about(picture: Picture, name: str, rng: np.random.Generator, families: Sequence[str]) -> Iterator[Exchange]:
    """At most one exchange of format `name` for each of the families, no question twice."""
    seen = set()
    for family in families:
        exchange = compose(picture.things, name, rng, family=family)
        if exchange is not None and asked(exchange) not in seen:
            seen.add(asked(exchange))
            yield exchange


def asked(exchange: Exchange) -> str:
    """The question without options and reference tokens, which may follow on further lines."""
    return exchange.question.split("\n")[0]


def rotation(row: int, count: int, among: Sequence[str] = ALL) -> list[str]:
    """`count` of the families, different ones for the picture of each row."""
    return [among[(row * count + place) % len(among)] for place in range(count)]


def lettered(
    picture: Picture, name: str, rng: np.random.Generator, place: int, family: str, options: int = 4
) -> Exchange | None:
    """An exchange with that many options whose answer stands at `place`; None if the scene has none."""
    for _ in range(DRAWS):
        exchange = compose(picture.things, name, rng, family=family)
        if exchange is None:
            return None
        if len(exchange.options) == options and exchange.answer == LETTERS[place % options]:
            return exchange
    return None


def lettered_set(
    pictures: Sequence[Picture], name: str, rng: np.random.Generator, count: int, each: int, among: Sequence[str] = MANY
) -> Iterator[tuple[Picture, Exchange]]:
    """`count` exchanges with four options, up to `each` about a picture; A, B, C and D are right equally often."""
    made = 0
    for row, picture in enumerate(pictures):
        seen = set()
        for family in rotation(row, each, among):
            exchange = lettered(picture, name, rng, made, family)
            if made == count or exchange is None or asked(exchange) in seen:
                continue
            seen.add(asked(exchange))
            made += 1
            yield picture, exchange
    if made < count:
        raise ValueError(f"{len(pictures)} pictures gave {made} exchanges of {name}, not {count}.")


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
