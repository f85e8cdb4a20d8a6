"""Questions about a scene, in nine families, with the types and programs that GQA files carry.

Every question has exactly one right answer in its scene: things are named by attributes that single them out.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from toy.data.scenes import SIDE, Thing
from toy.data.vocabulary import COLOR_NAMES, PATTERNS, PLURALS, SHAPES, SIZES

MARGIN = 10  # pixels between centres before "left of" or "above" is said


@dataclass(frozen=True)
class Question:
    """text, answer, and the GQA fields: structural and semantic type, program as (operation, argument)."""

    family: str
    text: str
    answer: str
    structural: str
    semantic: str
    program: tuple[tuple[str, str], ...]


class Retry(Exception):
    """The draw was ambiguous in this scene; draw again."""


def ask(things: tuple[Thing, ...], family: str, rng: np.random.Generator, tries: int = 40) -> Question | None:
    """One question of a family, or None if `tries` draws found no unambiguous one."""
    for _ in range(tries):
        try:
            return FAMILIES[family](things, rng)
        except Retry:
            continue
    return None


def _shapes(things) -> list[Thing]:
    return [thing for thing in things if thing.kind == "shape"]


def _pick(items, rng):
    if not len(items):
        raise Retry
    return items[int(rng.integers(len(items)))]


def _require(claim: bool) -> None:
    if not claim:
        raise Retry


def _name(thing: Thing, size=False, color=False, shape=True) -> str:
    parts = [SIZES[thing.big]] * size + [COLOR_NAMES[thing.color]] * color
    return " ".join([*parts, SHAPES[thing.shape] if shape else "object"])


def _matches(things, like: Thing, size=False, color=False, shape=True) -> list[Thing]:
    return [
        other
        for other in _shapes(things)
        if (not size or other.big == like.big)
        and (not color or other.color == like.color)
        and (not shape or other.shape == like.shape)
    ]


def _color(things, rng) -> Question:
    target, size = _pick(_shapes(things), rng), rng.random() < 0.5
    _require(len(_matches(things, target, size=size)) == 1)
    name = _name(target, size=size)
    text = _pick(
        [f"What color is the {name}?", f"What is the color of the {name}?", f"The {name} has which color?"], rng
    )
    return Question("color", text, COLOR_NAMES[target.color], "query", "attr", (("select", name), ("query", "color")))


def _shape(things, rng) -> Question:
    target, size = _pick(_shapes(things), rng), rng.random() < 0.5
    _require(len(_matches(things, target, size=size, color=True, shape=False)) == 1)
    name = _name(target, size=size, color=True, shape=False)
    text = _pick(
        [f"What shape is the {name}?", f"What is the shape of the {name}?", f"The {name} has which shape?"], rng
    )
    return Question("shape", text, SHAPES[target.shape], "query", "attr", (("select", name), ("query", "shape")))


def _offset(a: Thing, b: Thing, relation: str) -> float:
    """Pixels by which `a` is left of (right of, above, below) `b`."""
    return {"left of": b.x - a.x, "right of": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}[relation]


RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def _relate(things, rng) -> Question:
    target, anchor = _pick(_shapes(things), rng), _pick(_shapes(things), rng)
    _require(target is not anchor and target.shape != anchor.shape)
    color = rng.random() < 0.5
    _require(len(_matches(things, anchor, color=color)) == 1)
    relation = _pick(RELATIONS, rng)
    _require(_offset(target, anchor, relation) > MARGIN)
    same = _matches(things, target)
    # Nothing of the same shape may be even nearly on that side.
    _require([thing for thing in same if _offset(thing, anchor, relation) > -MARGIN / 2] == [target])
    _require(len(same) > 1 or rng.random() < 0.25)  # mostly questions in which the relation decides
    _require(all(thing.color != target.color for thing in same if thing is not target))
    name, other = SHAPES[target.shape], _name(anchor, color=color)
    text = f"What color is the {name} {relation} the {other}?"
    program = (("select", other), ("relate", f"{name},{relation}"), ("query", "color"))
    return Question("relate", text, COLOR_NAMES[target.color], "query", "rel", program)


def _exist(things, rng) -> Question:
    wanted, answer = rng.random() < 0.5, "no"
    if rng.random() < 0.12:
        pattern = int(rng.integers(3))
        _require(any(thing.pattern == pattern for thing in things) == wanted)
        name = f"{PATTERNS[pattern]} panel"
    else:
        like, size = _pick(_shapes(things), rng), rng.random() < 0.3
        if not wanted:
            # 60 % of the absent things are made of attributes that the scene does hold.
            if rng.random() < 0.6:
                shape = _pick(_shapes(things), rng).shape
                flip = size and rng.random() < 0.4
                like = Thing(
                    "shape", 0, 0, 0, like.shape if flip else shape, like.color, 1 - like.big if flip else like.big
                )
            else:
                shape, color, big = int(rng.integers(len(SHAPES))), int(rng.integers(8)), int(rng.integers(2))
                like = Thing("shape", 0, 0, 0, shape, color, big)
        _require(bool(_matches(things, like, size=size, color=True)) == wanted)
        name = _name(like, size=size, color=True)
    answer = "yes" if wanted else "no"
    text = _pick([f"Is there a {name} in the image?", f"Is there a {name}?", f"Does the image contain a {name}?"], rng)
    return Question("exist", text, answer, "verify", "obj", (("select", name), ("exist", "?")))


def _count(things, rng) -> Question:
    kind, wanted = int(rng.integers(3)), int(rng.choice([0, 1, 1, 2, 2, 3]))
    like = Thing("shape", 0, 0, 0, int(rng.integers(len(SHAPES))), int(rng.integers(8)), int(rng.integers(2)))
    found = _matches(things, like, size=kind == 2, color=kind == 1, shape=kind != 1)
    _require(len(found) == wanted or (wanted == 3 and len(found) == 4))
    plural = PLURALS[SHAPES[like.shape]]
    name = (plural, f"{COLOR_NAMES[like.color]} objects", f"{SIZES[like.big]} {plural}")[kind]
    text = _pick([f"How many {name} are there?", f"How many {name} are in the image?"], rng)
    return Question("count", text, str(len(found)), "query", "obj", (("select", name), ("count", "")))


def _digit(things, rng) -> Question:
    frame = _pick([thing for thing in things if thing.kind == "frame"], rng)
    color = COLOR_NAMES[frame.color]
    texts = (
        f"What number is in the {color} frame?",
        f"Which digit is written in the {color} frame?",
        f"What does the {color} frame say?",
    )
    program = (("select", f"{color} frame"), ("query", "number"))
    return Question("digit", _pick(texts, rng), str(frame.digit), "query", "attr", program)


def _two_named(things, rng) -> tuple[Thing, Thing, str]:
    """Two things that shape and colour single out, and a relation that clearly holds between them."""
    a, b = _pick(_shapes(things), rng), _pick(_shapes(things), rng)
    _require(a is not b and len(_matches(things, a, color=True)) == 1 and len(_matches(things, b, color=True)) == 1)
    relation = _pick(RELATIONS, rng)
    _require(_offset(a, b, relation) > MARGIN)
    return a, b, relation


def _verify(things, rng) -> Question:
    a, b, relation = _two_named(things, rng)
    yes = rng.random() < 0.5
    said = relation if yes else OPPOSITE[relation]
    text = f"Is the {_name(a, color=True)} {said} the {_name(b, color=True)}?"
    program = (("select", _name(b, color=True)), ("verify rel", f"{_name(a, color=True)},{said}"))
    return Question("verify", text, "yes" if yes else "no", "verify", "rel", program)


def _choose(things, rng) -> Question:
    a, b, relation = _two_named(things, rng)
    pair = "left or right of" if relation in RELATIONS[:2] else "above or below"
    text = f"Is the {_name(a, color=True)} {pair} the {_name(b, color=True)}?"
    program = (("select", _name(b, color=True)), ("choose rel", f"{_name(a, color=True)},{pair}"))
    return Question("choose", text, relation.split()[0], "choose", "rel", program)


def _side(things, rng) -> Question:
    target = _pick(_shapes(things), rng)
    _require(len(_matches(things, target, color=True)) == 1)
    across = rng.random() < 0.5
    offset = (target.x if across else target.y) - SIDE / 2
    _require(abs(offset) > MARGIN)
    first, second = ("left", "right") if across else ("top", "bottom")
    name = _name(target, color=True)
    text = f"Is the {name} on the {first} or {second} side?"
    program = (("select", name), ("choose position", f"{first}|{second}"))
    return Question("side", text, first if offset < 0 else second, "choose", "attr", program)


FAMILIES: dict[str, Callable[[tuple[Thing, ...], np.random.Generator], Question]] = {
    "color": _color,
    "shape": _shape,
    "relate": _relate,
    "exist": _exist,
    "count": _count,
    "digit": _digit,
    "verify": _verify,
    "choose": _choose,
    "side": _side,
}
