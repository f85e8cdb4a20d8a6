"""Questions about a scene, in nine families, with the types and programs that GQA files carry; and the same in Chinese.

Every question has exactly one right answer in its scene: things are named by attributes that single them out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from lab.toy.data.scenes import SIDE, Thing
from lab.toy.data.vocabulary import COLOR_NAMES, PATTERNS, PLURALS, SHAPES, SIZES, WORDS

Drawn = TypeVar("Drawn")
MARGIN = 10  # pixels between centres before "left of" or "above" is said


@dataclass(frozen=True)
class PlainQuestion:
    family: str
    text: str
    answer: str


@dataclass(frozen=True)
class Question(PlainQuestion):
    """With the GQA fields: structural and semantic type, program as (operation, argument)."""

    structural: str
    semantic: str
    program: tuple[tuple[str, str], ...]


class Retry(Exception):
    """The draw was ambiguous in this scene; draw again."""


def attempt(draw: Callable[[], Drawn], tries: int) -> Drawn | None:
    """What a draw gives, or None if `tries` of them were ambiguous."""
    for _ in range(tries):
        try:
            return draw()
        except Retry:
            continue
    return None


def ask(things: tuple[Thing, ...], family: str, rng: np.random.Generator, tries: int = 40) -> Question | None:
    """One question of a family, or None if `tries` draws found no unambiguous one."""
    return attempt(lambda: FAMILIES[family](things, rng), tries)


def shapes_of(things) -> list[Thing]:
    return [thing for thing in things if thing.kind == "shape"]


def pick(items: Sequence, rng: np.random.Generator):
    """One of the items, all alike; Retry where there is none."""
    if not len(items):
        raise Retry
    return items[int(rng.integers(len(items)))]


def require(claim: bool) -> None:
    if not claim:
        raise Retry


def name_of(thing: Thing, size=False, color=False, shape=True) -> str:
    parts = [SIZES[thing.big]] * size + [COLOR_NAMES[thing.color]] * color
    return " ".join([*parts, SHAPES[thing.shape] if shape else "object"])


def matches(things, like: Thing, size=False, color=False, shape=True) -> list[Thing]:
    compared = [field for field, wanted in (("big", size), ("color", color), ("shape", shape)) if wanted]
    return [other for other in shapes_of(things) if all(getattr(other, f) == getattr(like, f) for f in compared)]


def phrasings(family: str, name: str) -> list[str]:
    """The ways to ask for the colour or the shape of a thing, or for the number in a frame."""
    if family == "digit":
        asked = ("What number is in the {}?", "Which digit is written in the {}?", "What does the {} say?")
        return [text.format(name) for text in asked]
    return [f"What {family} is the {name}?", f"What is the {family} of the {name}?", f"The {name} has which {family}?"]


def _attribute(family: str, names: Sequence[str], **named_by: bool) -> "Family":
    """A question for the colour or the shape of a thing; `named_by`: the attributes that single it out."""

    def ask_for(things, rng) -> Question:
        target, size = pick(shapes_of(things), rng), rng.random() < 0.5
        require(len(matches(things, target, size=size, **named_by)) == 1)
        name = name_of(target, size=size, **named_by)
        text = pick(phrasings(family, name), rng)
        program = (("select", name), ("query", family))
        return Question(family, text, names[getattr(target, family)], "query", "attr", program)

    return ask_for


def offset(a: Thing, b: Thing, relation: str) -> float:
    """Pixels by which `a` is left of (right of, above, below) `b`."""
    return {"left of": b.x - a.x, "right of": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}[relation]


RELATIONS = ("left of", "right of", "above", "below")
POSITIONS = ("left", "right", "above", "below", "top", "bottom")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def _relate(things, rng) -> Question:
    target, anchor = pick(shapes_of(things), rng), pick(shapes_of(things), rng)
    require(target is not anchor and target.shape != anchor.shape)
    color = rng.random() < 0.5
    require(len(matches(things, anchor, color=color)) == 1)
    relation = pick(RELATIONS, rng)
    require(offset(target, anchor, relation) > MARGIN)
    same = matches(things, target)
    # Nothing of the same shape may be even nearly on that side.
    require([thing for thing in same if offset(thing, anchor, relation) > -MARGIN / 2] == [target])
    require(len(same) > 1 or rng.random() < 0.25)  # mostly questions in which the relation decides
    require(all(thing.color != target.color for thing in same if thing is not target))
    name, other = SHAPES[target.shape], name_of(anchor, color=color)
    text = f"What color is the {name} {relation} the {other}?"
    program = (("select", other), ("relate", f"{name},{relation}"), ("query", "color"))
    return Question("relate", text, COLOR_NAMES[target.color], "query", "rel", program)


def _exist(things, rng) -> Question:
    wanted, answer = rng.random() < 0.5, "no"
    if rng.random() < 0.12:
        pattern = int(rng.integers(3))
        require(any(thing.pattern == pattern for thing in things) == wanted)
        name = f"{PATTERNS[pattern]} panel"
    else:
        like, size = pick(shapes_of(things), rng), rng.random() < 0.3
        if not wanted:
            # 60 % of the absent things are made of attributes that the scene does hold.
            if rng.random() < 0.6:
                shape = pick(shapes_of(things), rng).shape
                flip = size and rng.random() < 0.4
                like = Thing(
                    "shape", 0, 0, 0, like.shape if flip else shape, like.color, 1 - like.big if flip else like.big
                )
            else:
                shape, color, big = int(rng.integers(len(SHAPES))), int(rng.integers(8)), int(rng.integers(2))
                like = Thing("shape", 0, 0, 0, shape, color, big)
        require(bool(matches(things, like, size=size, color=True)) == wanted)
        name = name_of(like, size=size, color=True)
    answer = "yes" if wanted else "no"
    text = pick([f"Is there a {name} in the image?", f"Is there a {name}?", f"Does the image contain a {name}?"], rng)
    return Question("exist", text, answer, "verify", "obj", (("select", name), ("exist", "?")))


def _count(things, rng) -> Question:
    kind, wanted = int(rng.integers(3)), int(rng.choice([0, 1, 1, 2, 2, 3]))
    like = Thing("shape", 0, 0, 0, int(rng.integers(len(SHAPES))), int(rng.integers(8)), int(rng.integers(2)))
    counted = matches(things, like, size=kind == 2, color=kind == 1, shape=kind != 1)
    require(len(counted) == wanted or (wanted == 3 and len(counted) == 4))
    plural = PLURALS[SHAPES[like.shape]]
    name = (plural, f"{COLOR_NAMES[like.color]} objects", f"{SIZES[like.big]} {plural}")[kind]
    text = pick([f"How many {name} are there?", f"How many {name} are in the image?"], rng)
    return Question("count", text, str(len(counted)), "query", "obj", (("select", name), ("count", "")))


def _digit(things, rng) -> Question:
    frame = pick([thing for thing in things if thing.kind == "frame"], rng)
    name = f"{COLOR_NAMES[frame.color]} frame"
    text = pick(phrasings("digit", name), rng)
    return Question("digit", text, str(frame.digit), "query", "attr", (("select", name), ("query", "number")))


def _two_named(things, rng) -> tuple[Thing, Thing, str]:
    """Two things that shape and colour single out, and a relation that clearly holds between them."""
    a, b = pick(shapes_of(things), rng), pick(shapes_of(things), rng)
    require(a is not b and len(matches(things, a, color=True)) == 1 and len(matches(things, b, color=True)) == 1)
    relation = pick(RELATIONS, rng)
    require(offset(a, b, relation) > MARGIN)
    return a, b, relation


def _verify(things, rng) -> Question:
    a, b, relation = _two_named(things, rng)
    yes = rng.random() < 0.5
    said = relation if yes else OPPOSITE[relation]
    text = f"Is the {name_of(a, color=True)} {said} the {name_of(b, color=True)}?"
    program = (("select", name_of(b, color=True)), ("verify rel", f"{name_of(a, color=True)},{said}"))
    return Question("verify", text, "yes" if yes else "no", "verify", "rel", program)


def _choose(things, rng) -> Question:
    a, b, relation = _two_named(things, rng)
    pair = "left or right of" if relation in RELATIONS[:2] else "above or below"
    text = f"Is the {name_of(a, color=True)} {pair} the {name_of(b, color=True)}?"
    program = (("select", name_of(b, color=True)), ("choose rel", f"{name_of(a, color=True)},{pair}"))
    return Question("choose", text, relation.split()[0], "choose", "rel", program)


def _side(things, rng) -> Question:
    target = pick(shapes_of(things), rng)
    require(len(matches(things, target, color=True)) == 1)
    across = rng.random() < 0.5
    offset = (target.x if across else target.y) - SIDE / 2
    require(abs(offset) > MARGIN)
    first, second = ("left", "right") if across else ("top", "bottom")
    name = name_of(target, color=True)
    text = f"Is the {name} on the {first} or {second} side?"
    program = (("select", name), ("choose position", f"{first}|{second}"))
    return Question("side", text, first if offset < 0 else second, "choose", "attr", program)


Family = Callable[[tuple[Thing, ...], np.random.Generator], Question]
FAMILIES: dict[str, Family] = {
    "color": _attribute("color", COLOR_NAMES),
    "shape": _attribute("shape", SHAPES, color=True, shape=False),
    "relate": _relate,
    "exist": _exist,
    "count": _count,
    "digit": _digit,
    "verify": _verify,
    "choose": _choose,
    "side": _side,
}


CHINESE_WORDS: dict[str, str] = WORDS["chinese"]  # by English word
# Words without an English one of their own.
CHINESE_PARTICLES = {"吗": "?", "几": "number"}
SINGULAR = {plural: shape for shape, plural in PLURALS.items()} | {"objects": "object"}


def translate(name: str) -> str:
    """ "small red stars" -> 小红色星形; digits stay."""
    return "".join(CHINESE_WORDS.get(SINGULAR.get(word, word), word) for word in name.split())


# Family -> its question; `thing`, `relation` and `other` are from the second step of its program.
CHINESE_TEXTS = {
    "color": "{name}是什么颜色",
    "shape": "{name}是什么形状",
    "relate": "{name}的{relation}的{thing}是什么颜色",
    "exist": "图中有{name}吗",
    "count": "图中有几个{name}",
    "digit": "{name}里的数字是几",
    "verify": "{thing}在{name}的{relation}吗",
    "choose": "{thing}在{name}的{relation}还是{other}",
    "side": "{name}在{relation}还是{other}",
}


def in_chinese(question: Question, options: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Text and options of a question, from its program: a step may be "star,left of", "star,left or right of"."""
    (_, name), (_, argument) = question.program[:2]
    thing, _, relation = argument.rpartition(",")
    words = [CHINESE_WORDS[word] for word in relation.replace("|", " ").split() if word in POSITIONS]
    first, second = (*words, "", "")[:2]
    text = CHINESE_TEXTS[question.family].format(
        name=translate(name), thing=translate(thing), relation=first, other=second
    )
    return f"{text}？", tuple(map(translate, options))
