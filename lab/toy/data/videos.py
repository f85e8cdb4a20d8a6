"""Drawn videos, 128 x 128 pixels, 16 to 24 frames, and questions about them.

Shapes stay, move, appear, disappear, change colour or blink. What happens is planned for the eight frames that a
Video-LLaVA looks at, so that every event can be seen in them; the frames between continue the last of the eight. A plan
is a function of its seed alone and costs no drawing. Of the ten families of questions two can be answered from a single
frame, the others ask for change. Every question has exactly one right answer: shapes and colours are unique in a video,
so that one word names a thing.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lab.toy.data.questions import PlainQuestion, Retry, attempt, pick
from lab.toy.data.scenes import background, shaded, shape_mask
from lab.toy.data.vocabulary import COLOR_NAMES, COLORS, SHAPES
from llava.processing.video import FRAMES, frame_indices, pyav

VIDEO_SIDE, SEEN = 128, FRAMES
# First seed of each split. No range meets another or one of the pictures'.
SEEDS = {"train": 41_000_000, "val": 47_000_000, "test": 49_000_000}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
DISTANCE = (40, 72)  # pixels that a moving thing covers
SIDES = {False: (14, 20), True: (26, 37)}
GAP = 3
RATE = 8  # frames per second: a video of 16 to 24 frames takes two to three seconds
QUALITY = "12"  # x264's constant rate factor, 0 is lossless


@dataclass(frozen=True)
class Actor:
    """A shape and what it does. No two in a video have the same shape or colour.

    Attributes:
        action: still, move, appear, disappear, change or blink.
        direction: a key of DIRECTIONS for a moving one, else "".
        start, end: centre in the first and the last frame, pixels.
        visible: in each of the eight frames.
        colors: colour index in each of the eight frames.
        tilt: in steps of 8 degrees.
    """

    shape: int
    big: bool
    side: int
    action: str
    direction: str
    start: tuple[float, float]
    end: tuple[float, float]
    visible: tuple[bool, ...]
    colors: tuple[int, ...]
    tilt: int

    @property
    def color(self) -> int:
        """The colour in the first frame."""
        return self.colors[0]


@dataclass(frozen=True)
class Plan:
    """What happens in a video. `frames`: how many there are; `seed` also decides background and shading."""

    seed: int
    frames: int
    actors: tuple[Actor, ...]


def plan_video(split: str, index: int) -> Plan:
    """Video number `index` of a split."""
    seed = SEEDS[split] + index
    rng = np.random.default_rng(seed)
    frames = int(rng.integers(16, 25))
    # Two things must appear before one can be asked which is first, and a blinking one rules such questions out.
    actions = ["move"] * int(rng.integers(0, 3)) + ["appear"] * int(rng.choice(3, p=(0.25, 0.3, 0.45)))
    actions += ["disappear"] * int(rng.random() < 0.5) + ["change"] * int(rng.random() < 0.5)
    actions += ["blink"] * int(rng.random() < 0.35) + ["still"] * int(rng.integers(1, 3))
    shapes = [int(shape) for shape in rng.permutation(len(SHAPES))]
    palette = [int(color) for color in rng.permutation(len(COLORS))]
    onsets = [int(slot) for slot in rng.permutation(np.arange(1, SEEN - 1))]  # no two things appear together
    boxes: list[tuple[float, float, float, float]] = []
    actors = []
    for action in actions[: len(shapes)]:
        big = bool(rng.random() < 0.4)
        side = int(rng.integers(*SIDES[big]))
        direction = str(rng.choice(list(DIRECTIONS))) if action == "move" else ""
        way = _free_way(rng, boxes, side, direction)
        needed = 2 if action == "change" else 1
        if way is None or len(palette) < needed:
            continue
        colors = [palette.pop() for _ in range(needed)]
        switch = int(rng.integers(2, SEEN - 1))
        actors.append(
            Actor(
                shapes.pop(), big, side, action, direction, *way,
                _visible(rng, action, onsets.pop() if action == "appear" else switch),
                tuple(colors[-1 if action == "change" and slot >= switch else 0] for slot in range(SEEN)),
                int(rng.integers(-2, 3)),
            )
        )  # fmt: skip
    return Plan(seed, frames, tuple(actors))


def _visible(rng, action: str, switch: int) -> tuple[bool, ...]:
    if action == "appear":
        return tuple(slot >= switch for slot in range(SEEN))
    if action == "disappear":
        return tuple(slot < switch for slot in range(SEEN))
    if action == "blink":
        # One to three spells: hidden and shown take turns, hidden first and last.
        spells = int(rng.integers(1, 4))
        cuts = np.sort(rng.choice(np.arange(1, SEEN), 2 * spells, replace=False))
        return tuple(bool((cuts <= slot).sum() % 2) for slot in range(SEEN))
    return (True,) * SEEN


def _free_way(rng, boxes, side: int, direction: str, tries: int = 40):
    """Centres at the start and at the end such that the thing touches no other one's way, or None."""
    across, down = DIRECTIONS.get(direction, (0, 0))
    for _ in range(tries):
        length = float(rng.uniform(*DISTANCE)) if direction else 0.0
        x, y = (float(value) for value in rng.uniform(side / 2 + 1, VIDEO_SIDE - side / 2 - 1, 2))
        end = x + across * length, y + down * length
        if not all(side / 2 + 1 <= value <= VIDEO_SIDE - side / 2 - 1 for value in end):
            continue
        half = side / 2 + GAP / 2
        box = (min(x, end[0]) - half, min(y, end[1]) - half, max(x, end[0]) + half, max(y, end[1]) + half)
        if all(box[2] <= o[0] or o[2] <= box[0] or box[3] <= o[1] or o[3] <= box[1] for o in boxes):
            boxes.append(box)
            return (x, y), end
    return None


def draw_video(plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """Frames [n, 128, 128, 3] uint8 and owners [n, 128, 128] int8, the actor that covers a pixel or -1."""
    rng = np.random.default_rng([plan.seed, 1])
    scenery = background(rng, VIDEO_SIDE, VIDEO_SIDE)
    # The same noise in every frame: a camera on a stand, and a file that compresses.
    scenery += rng.normal(0, rng.uniform(2, 5), (VIDEO_SIDE, VIDEO_SIDE, 1)).astype(np.float32)
    masks = [shape_mask(SHAPES[actor.shape], actor.side, actor.tilt) for actor in plan.actors]
    paints = [{color: shaded(rng, color, actor.side) for color in sorted(set(actor.colors))} for actor in plan.actors]
    video = np.empty((plan.frames, VIDEO_SIDE, VIDEO_SIDE, 3), np.uint8)
    owners = np.full((plan.frames, VIDEO_SIDE, VIDEO_SIDE), -1, np.int8)
    starts = frame_indices(plan.frames, SEEN)
    for frame in range(plan.frames):
        canvas, slot = scenery.copy(), int(np.searchsorted(starts, frame, "right")) - 1
        for number, (actor, mask, paint) in enumerate(zip(plan.actors, masks, paints, strict=True)):
            if not actor.visible[slot]:
                continue
            passed = frame / (plan.frames - 1)
            x, y = (round(a + passed * (b - a) - actor.side / 2) for a, b in zip(actor.start, actor.end, strict=True))
            area = (slice(y, y + actor.side), slice(x, x + actor.side))
            canvas[area] = canvas[area] * (1 - mask[..., None]) + paint[actor.colors[slot]] * mask[..., None]
            owners[frame][area][mask > 0.5] = number
        video[frame] = np.clip(canvas, 0, 255).astype(np.uint8)
    return video, owners


def encode_video(frames: np.ndarray) -> bytes:
    """[n, height, width, 3] uint8 -> an MP4 file (H.264)."""
    av, file = pyav(), io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"crf": QUALITY, "preset": "medium"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.thread_count = "yuv420p", 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def ask_video(plan: Plan, family: str, rng: np.random.Generator, tries: int = 30) -> PlainQuestion | None:
    """One question of a family, or None if `tries` draws found no unambiguous one."""
    return attempt(lambda: PlainQuestion(family, *FAMILIES[family](plan.actors, rng)), tries)


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
    return pick((shape, f"{color} {shape}", f"{color} object"), rng)


def _attribute(rng, actor: Actor, clause: str) -> tuple[str, str]:
    """Colour or shape of the object that does something."""
    if actor.action != "change" and rng.random() < 0.5:
        return f"What color is the object that {clause}?", COLOR_NAMES[actor.color]
    return f"What shape is the object that {clause}?", SHAPES[actor.shape]


def _color(actors, rng) -> tuple[str, str]:
    target = pick(_doing(actors, "still", "move"), rng)
    return f"What color is the {SHAPES[target.shape]}?", COLOR_NAMES[target.color]


def _exist(actors, rng) -> tuple[str, str]:
    there = _doing(actors, "still", "move")
    if rng.random() < 0.5:
        name, answer = _name(pick(there, rng), rng), "yes"
    elif rng.random() < 0.5:
        # Both words are true of something, but not of one thing.
        shape, color = pick(actors, rng), pick(actors, rng)
        if shape is color or any(actor.action == "change" for actor in (shape, color)):
            raise Retry
        name, answer = f"{COLOR_NAMES[color.color]} {SHAPES[shape.shape]}", "no"
    else:
        absent = [s for s in range(len(SHAPES)) if all(actor.shape != s for actor in actors)]
        name, answer = SHAPES[pick(absent, rng)], "no"
    return f"Is there a {name} in the video?", answer


def _move(actors, rng) -> tuple[str, str]:
    moves = rng.random() < 0.5
    target = pick(_doing(actors, "move") if moves else _doing(actors, "still", "change"), rng)
    if not _doing(actors, "move"):
        raise Retry  # with nothing moving, "no" would follow without finding the thing
    return f"Does the {_name(target, rng)} move?", "yes" if moves else "no"


def _direction(actors, rng) -> tuple[str, str]:
    target = pick(_doing(actors, "move"), rng)
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
    action = pick(("appear", "disappear"), rng)
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
    action = pick(("move", "appear", "disappear"), rng)
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
