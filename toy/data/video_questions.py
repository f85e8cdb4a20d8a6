"""Questions about a drawn video, in ten families. Two of them a single frame can answer, the others ask for change.

Every question has exactly one right answer. Shapes and colours are unique in a video, so that one word names a thing.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from toy.data.video_scenes import DIRECTIONS, Actor, Plan
from toy.data.vocabulary import COLOR_NAMES, SHAPES


@dataclass(frozen=True)
class VideoQuestion:
    family: str
    text: str
    answer: str


class Retry(Exception):
    """The draw was ambiguous in this video; draw again."""


def ask_video(plan: Plan, family: str, rng: np.random.Generator, tries: int = 30) -> VideoQuestion | None:
    """One question of a family, or None if `tries` draws found no unambiguous one."""
    for _ in range(tries):
        try:
            return VideoQuestion(family, *FAMILIES[family](plan.actors, rng))
        except Retry:
            continue
    return None


def _pick(items, rng):
    if not len(items):
        raise Retry
    return items[int(rng.integers(len(items)))]


def _only(items):
    if len(items) != 1:
        raise Retry
    return items[0]


def _doing(actors, *actions: str) -> list[Actor]:
    return [actor for actor in actors if actor.action in actions]


def _name(actor: Actor, rng) -> str:
    """One that singles it out. A thing that changes its colour is named by its shape."""
    shape, color = SHAPES[actor.shape], COLOR_NAMES[actor.color]
    if actor.action == "change":
        return shape
    return _pick((shape, f"{color} {shape}", f"{color} object"), rng)


def _attribute(rng, actor: Actor, clause: str) -> tuple[str, str]:
    """Colour or shape of the object that does something."""
    if actor.action != "change" and rng.random() < 0.5:
        return f"What color is the object that {clause}?", COLOR_NAMES[actor.color]
    return f"What shape is the object that {clause}?", SHAPES[actor.shape]


def _color(actors, rng) -> tuple[str, str]:
    target = _pick(_doing(actors, "still", "move"), rng)
    return f"What color is the {SHAPES[target.shape]}?", COLOR_NAMES[target.color]


def _exist(actors, rng) -> tuple[str, str]:
    there = _doing(actors, "still", "move")
    if rng.random() < 0.5:
        name, answer = _name(_pick(there, rng), rng), "yes"
    elif rng.random() < 0.5:
        # Both words are true of something, but not of one thing.
        shape, color = _pick(actors, rng), _pick(actors, rng)
        if shape is color or any(actor.action == "change" for actor in (shape, color)):
            raise Retry
        name, answer = f"{COLOR_NAMES[color.color]} {SHAPES[shape.shape]}", "no"
    else:
        absent = [s for s in range(len(SHAPES)) if all(actor.shape != s for actor in actors)]
        name, answer = SHAPES[_pick(absent, rng)], "no"
    return f"Is there a {name} in the video?", answer


def _move(actors, rng) -> tuple[str, str]:
    moves = rng.random() < 0.5
    target = _pick(_doing(actors, "move") if moves else _doing(actors, "still", "change"), rng)
    if not _doing(actors, "move"):
        raise Retry  # with nothing moving, "no" would follow without finding the thing
    return f"Does the {_name(target, rng)} move?", "yes" if moves else "no"


def _direction(actors, rng) -> tuple[str, str]:
    target = _pick(_doing(actors, "move"), rng)
    return f"Where does the {_name(target, rng)} move?", target.direction


def _mover(actors, rng) -> tuple[str, str]:
    movers = _doing(actors, "move")
    direction = str(rng.choice(list(DIRECTIONS)))
    if rng.random() < 0.5:
        return _attribute(rng, _only(movers), "moves")
    return _attribute(rng, _only([m for m in movers if m.direction == direction]), f"moves {direction}")


def _appear(actors, rng) -> tuple[str, str]:
    if _doing(actors, "blink"):
        raise Retry  # it appears and disappears too
    action = _pick(("appear", "disappear"), rng)
    return _attribute(rng, _only(_doing(actors, action)), f"{action}s")


def _order(actors, rng) -> tuple[str, str]:
    if _doing(actors, "blink"):
        raise Retry
    late = sorted(_doing(actors, "appear"), key=lambda actor: actor.visible.index(True))
    if len(late) < 2:
        raise Retry
    first = rng.random() < 0.5
    return _attribute(rng, late[0 if first else -1], f"appears {'first' if first else 'last'}")


def _change(actors, rng) -> tuple[str, str]:
    target = _only(_doing(actors, "change"))
    at = int(rng.integers(2))
    text = f"What color is the {SHAPES[target.shape]} at the {('start', 'end')[at]}?"
    return text, COLOR_NAMES[target.colors[-at]]


def _times(actors, rng) -> tuple[str, str]:
    target = _only(_doing(actors, "blink"))
    spells = sum(now and not before for before, now in zip((False, *target.visible), target.visible, strict=False))
    return f"How many times does the {_name(target, rng)} appear?", str(spells)


def _count(actors, rng) -> tuple[str, str]:
    action = _pick(("move", "appear", "disappear"), rng)
    if action != "move" and _doing(actors, "blink"):
        raise Retry
    return f"How many objects {action}?", str(len(_doing(actors, action)))


FAMILIES: dict[str, Callable[[tuple[Actor, ...], np.random.Generator], tuple[str, str]]] = {
    "color": _color,
    "exist": _exist,
    "move": _move,
    "direction": _direction,
    "mover": _mover,
    "appear": _appear,
    "order": _order,
    "change": _change,
    "times": _times,
    "count": _count,
}
STATIC = ("color", "exist")  # what one frame can tell
