"""Referring expressions: a sentence that fits one thing of a scene, asked for in LLaVA's words for boxes.

The answer is "[0.61, 0.36, 0.92, 0.83]": left, top, right and bottom edge as shares of the side of the padded square.
A coordinate is one token, so a box is nine. The words are those of the model of all formats and these tokens.
"""

from collections.abc import Sequence

from eval.benchmarks.refcoco import ASK, FORMAT
from lab.toy.data.formats import CAPTION, INSTRUCT_WORDS, LETTERS, Pair, Rng, Things
from lab.toy.data.questions import MARGIN, RELATIONS, attempt, matches, name_of, offset, pick, require, shapes_of
from lab.toy.data.scenes import SIDE, Thing
from lab.toy.data.vocabulary import COLOR_NAMES, PATTERNS, SHAPES, Vocabulary, grown

BOX, BOX_FORMAT = ASK.strip(), FORMAT.strip()  # the second stands before the first in profile lmms
COORDINATES = tuple(f"{hundredths / 100:.2f}" for hundredths in range(101))
# New word -> the old one that its embedding starts from.
BOX_ALIKE = {BOX: CAPTION, BOX_FORMAT: CAPTION, "[": "(", "]": ")"}
BOX_WORDS = Vocabulary(
    grown(INSTRUCT_WORDS.words, (*BOX_ALIKE, *COORDINATES)),
    phrases=(*INSTRUCT_WORDS.phrases, BOX, BOX_FORMAT, *COORDINATES),
    letters=LETTERS,
    glued=(("[ ", "["), (" ]", "]"), (" ,", ",")),
)

Box = Sequence[float]
KINDS = ("big", "small", "frame", "panel")


def kind_of(thing: Thing) -> str:
    """One of KINDS."""
    return ("small", "big")[thing.big] if thing.kind == "shape" else thing.kind


def refer(things: Things, kind: str, rng: Rng, tries: int = 40) -> tuple[int, str] | None:
    """The number of a thing of the kind and a sentence that fits no other; None if `tries` draws found none."""
    there = [number for number, thing in enumerate(things) if kind_of(thing) == kind]

    def draw() -> tuple[int, str]:
        number = pick(there, rng)
        return number, "the " * int(rng.random() < 0.5) + sentence(things, things[number], rng)

    return attempt(draw, tries)


def sentence(things: Things, thing: Thing, rng: Rng) -> str:
    """ "small red star", "star left of the blue ring", "frame with the number 7", "striped panel"."""
    if thing.kind == "panel":
        require(sum(other.pattern == thing.pattern for other in things) == 1)
        return f"{PATTERNS[thing.pattern]} panel"
    if thing.kind == "frame":
        if rng.random() < 0.7:
            return f"{COLOR_NAMES[thing.color]} frame"  # no scene has two of a colour
        require(sum(other.digit == thing.digit for other in things) == 1)
        return f"frame with the number {thing.digit}"
    if rng.random() < 0.3:
        return beside(things, thing, rng)
    said = {"size": rng.random() < 0.4, "color": rng.random() < 0.7, "shape": rng.random() < 0.85}
    require(said["color"] or said["shape"])
    require(len(matches(things, thing, **said)) == 1)
    return name_of(thing, **said)


def beside(things: Things, thing: Thing, rng: Rng) -> str:
    """Its shape and what it is left of, right of, above or below; nothing of its shape is even nearly there."""
    anchor, color, relation = pick(shapes_of(things), rng), rng.random() < 0.5, pick(RELATIONS, rng)
    require(anchor.shape != thing.shape and len(matches(things, anchor, color=color)) == 1)
    require(offset(thing, anchor, relation) > MARGIN)
    same = matches(things, thing)
    require(len(same) > 1 or rng.random() < 0.25)  # mostly sentences in which the relation decides
    require([other for other in same if offset(other, anchor, relation) > -MARGIN / 2] == [thing])
    return f"{SHAPES[thing.shape]} {relation} the {name_of(anchor, color=color)}"


def box_text(box: Box) -> str:
    """A box in pixels of the padded square of 192 x 192 as the answer says it."""
    return f"[{', '.join(f'{edge / SIDE:.2f}' for edge in box)}]"


def box_pair(things: Things, boxes: Sequence[Box], kind: str, rng: Rng, lmms: float = 0.0) -> Pair | None:
    """A sentence about a thing of the kind and its box, or None if none was found.

    Args:
        boxes: of the things, in pixels of the padded square; four zeros where a part of it is not in the picture.
        lmms: how often the words are those of lmms-eval.
    """
    found = refer(things, kind, rng, tries=12)
    if found is None or not any(boxes[found[0]]):
        return None
    asked = f"{BOX} {found[1]}"
    return Pair(f"{BOX_FORMAT} {asked}" if rng.random() < lmms else asked, "", box_text(boxes[found[0]]), kind)
