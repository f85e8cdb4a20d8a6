"""RefCOCO, RefCOCO+ and RefCOCOg: where in the picture is the thing that a sentence describes.

Read from DATA, in Qwen-VL's layout:

    refcoco/refcoco_val.jsonl      one sentence a line: image, sent, bbox (x1 y1 x2 y2 in pixels), width, height;
                                   RefCOCO+ in refcoco+/ or refcoco/, RefCOCOg in refcocog/ or refcoco/
    coco/train2014/                the images of COCO that the lines name

Mirrors: question_id, image, bbox (x, y, width and height in pixels) and answer, a list of sentences about the box,
which are questions of their own. In RefCOCO's mirror, val holds 8,811 boxes, UNC's 3,811 and 5,000 others; the official
files have no test.

LLaVA-1.5 answers "[x1, y1, x2, y2]" between 0 and 1. **Of what, is in dispute.** lmms-eval takes parts of the picture's
width and height (frame "image", the official number). By LLaVA's authors, boxes in its training are parts of the square
that the picture is padded to (frame "square"; haotian-liu/LLaVA#606). At 640 x 480 the two differ by up to 0.125. Every
number here is in one frame for all answers: the better frame of each answer would be no metric.

Profile llava asks with the sentence of LLaVA's training; lmms as the tasks bbox_rec of lmms-eval (utils_rec.py at
60e0ba9f). Differs from lmms-eval in the centre: an answer without a box, or with its corners exchanged, has none here.
"""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from eval.benchmarks.base import Contents, Dataset, Question, fingerprint, listed, no_submission
from eval.benchmarks.hub import image_names, official_file, open_table, unique_ids
from eval.benchmarks.media import Folder, Inline, image_name
from eval.benchmarks.records import Filled, Id, Number, Texts, TypedDict, check_lines
from eval.metrics import Score, ratio_terms
from eval.metrics.accuracy import check_coverage, percent
from llava.errors import UserError

ORIGIN = "eval_mm/EVALUATION.md of https://github.com/QwenLM/Qwen-VL"
ASK = "Please provide the bounding box coordinate of the region this sentence describes: "
FORMAT = (
    "Bounding box coordinates are specified in the format (top-left x, top-left y, bottom-right x, bottom-right y). "
    "All values are floating point numbers bounded between 0 and 1. "
)
PROMPTS = {"llava": ASK, "lmms": FORMAT + ASK}
TOKENS = 32

NUMBER = r"(-?\d{1,30}(?:\.\d+)?)"  # with more digits a float may be infinite
BOX = re.compile(rf"\[\s*{NUMBER},\s*{NUMBER},\s*{NUMBER},\s*{NUMBER}\s*\]")
Box = tuple[float, float, float, float]
Frame = Literal["image", "square"]

MAIN = "acc@0.5"
# COCO rounds corners, so that a box may end a fraction of a pixel outside its picture.
SLACK = 1


class Line(TypedDict):
    """A line of Qwen-VL's files."""

    image: Filled
    sent: Filled
    bbox: list[Number]
    width: int
    height: int


class MirrorRow(TypedDict):
    """A row of a mirror: a box and the sentences about it."""

    question_id: Id
    answer: Texts
    bbox: list[Number]


@dataclass(frozen=True)
class Target:
    """The box that a sentence describes: its corners, and the size of the picture, in pixels."""

    box: Box
    width: int
    height: int

    def relative(self, frame: Frame) -> Box:
        """The box in parts of the picture, or of the square that LLaVA-1.5 pads the picture to."""
        x1, y1, x2, y2 = self.box
        width, height = self.width, self.height
        if frame == "square":
            side = max(width, height)
            left, top = (side - width) // 2, (side - height) // 2
            x1, y1, x2, y2 = x1 + left, y1 + top, x2 + left, y2 + top
            width = height = side
        return x1 / width, y1 / height, x2 / width, y2 / height


def load(files: str, mirror: tuple[str, ...], data: Path, split: str, profile: str, source: str = "auto") -> Dataset:
    """Read a split; everything that can be wrong with its files is said here, images that are missing excepted.

    Args:
        files: what the names of the official files begin with, "refcoco+".
        mirror: repositories on the hub, the newest id first.
    """
    title = f"{files.replace('refcoco', 'RefCOCO')} {split}"
    name = f"{files}_{split}.jsonl"
    official = official_file(
        data, source, title, [*dict.fromkeys((data / files / name, data / "refcoco" / name))], mirror, ORIGIN
    )
    ask = PROMPTS[profile]
    contents = read_mirror(data, mirror, split, source, ask) if official is None else read_official(official, data, ask)
    targets, notes = contents.references, []
    if official is None and (files, split) == ("refcoco", "val"):
        notes.append("the hub's val is another set than the official one, which has UNC's boxes alone")

    def score(asked: Sequence[str], texts: Mapping[str, str]) -> Score:
        return evaluate({name: targets[name] for name in asked}, texts, notes)

    return contents.dataset(
        title,
        profile,
        score,
        lambda question, text: float(overlap(read_box(text), targets[question.id].relative("image")) >= 0.5),
        no_submission,
        {"questions": len(targets), "frame": "image"},
        max_new_tokens=TOKENS,
        normalise=lambda text: str(read_box(text) or text),
    )


def read_official(path: Path, data: Path, ask: str) -> Contents[Target]:
    """The lines of an official file; their numbers are the ids."""
    questions, targets = [], {}
    images, sizes = Folder(data), dict[str, tuple[int, int] | None]()
    for number, (where, line) in enumerate(check_lines(path, Line), start=1):
        name = image_name(line["image"].removeprefix("data/"), where)  # DATA is called data there
        target = target_of(line["bbox"], (line["width"], line["height"]), where)
        if name not in sizes:
            sizes[name] = size_of(images, name) if not images.missing([name]) else None
        if sizes[name] not in (None, (target.width, target.height)):
            raise UserError(
                f"{where} is about a picture of {target.width} x {target.height} pixels, but {images.root / name} has "
                f"{' x '.join(map(str, sizes[name] or ()))}: its boxes belong to another version of the images."
            )
        questions.append(question_of(str(number), ask + line["sent"], name, target))
        targets[str(number)] = target
    return Contents("official", tuple(questions), targets, images, fingerprint([path]))


def read_mirror(data: Path, mirror: Sequence[str], split: str, source: str, ask: str) -> Contents[Target]:
    """The rows of a mirror, each sentence a question of its own."""
    table = open_table(data, mirror, None, split, source)
    table.check_columns(["image"])
    rows, images, pictures = table.records(MirrorRow), table.images(), image_names(table)
    sentences = [(number, sentence) for number, row in enumerate(rows) for sentence in row["answer"]]
    names = unique_ids(rows[number]["question_id"] for number, _ in sentences)
    sizes = {name: size_of(images, name) for name in dict.fromkeys(pictures)}
    boxes = [
        target_of(row["bbox"], sizes[pictures[number]], f"{table.where} row {number}", extent=True)
        for number, row in enumerate(rows)
    ]
    targets = {name: boxes[number] for name, (number, _) in zip(names, sentences, strict=True)}
    questions = [
        question_of(name, ask + sentence, pictures[number], boxes[number])
        for name, (number, sentence) in zip(names, sentences, strict=True)
    ]
    return table.contents(questions, targets, ("question_id", "answer", "bbox"), images)


def question_of(name: str, text: str, image: str, target: Target) -> Question:
    """The question, with the box as LLaVA would answer it."""
    answer = ", ".join(f"{part:.3f}" for part in target.relative("image"))
    return Question(name, text, "", (image,), f"[{answer}]")


def target_of(bbox: Sequence[float], size: tuple[int, int], where: str, extent: bool = False) -> Target:
    """The box, which has to have an area and to lie inside its picture.

    Args:
        size: width and height of the picture.
        extent: the last two numbers are the box's width and height, not its second corner.
    """
    form = "x, y, width and height" if extent else "x1, y1, x2 and y2"
    if len(bbox) != 4:
        raise UserError(f"{where} should have four numbers as bbox ({form}), got {len(bbox)}.")
    x1, y1, x2, y2 = bbox
    if extent:
        x2, y2 = x1 + x2, y1 + y2
    box = f"the bbox {', '.join(f'{part:g}' for part in bbox)}"
    if x2 <= x1 or y2 <= y1:
        raise UserError(f"{where} has {box}, read as {form}: width and height should be above 0.")
    if min(x1, y1) < -SLACK or x2 > size[0] + SLACK or y2 > size[1] + SLACK:
        raise UserError(f"{where} has {box}, read as {form}: outside its picture of {size[0]} x {size[1]} pixels.")
    return Target((x1, y1, x2, y2), *size)


def size_of(images: Folder | Inline, name: str) -> tuple[int, int]:
    """Width and height of a picture; of most files only the beginning is read."""
    from PIL import Image

    try:
        file = images.root / name if isinstance(images, Folder) else io.BytesIO(images.fetch(name))
        with Image.open(file) as picture:
            return picture.size
    except (OSError, Image.DecompressionBombError) as error:
        raise UserError(f"Cannot read the size of the image {name} in {images.where}: {error}.") from error


# -- the metric ------------------------------------------------------------------------------------------------------


def read_box(text: str) -> Box | None:
    """The first "[a, b, c, d]" of a text; None if there is none."""
    found = BOX.search(text)
    if found is None:
        return None
    x1, y1, x2, y2 = map(float, found.groups())
    return x1, y1, x2, y2


def inverted(box: Box) -> bool:
    """Whether the second corner is left of or above the first."""
    return box[2] < box[0] or box[3] < box[1]


def overlap(said: Box | None, target: Box) -> float:
    """Intersection over union of an answer and the box, in [0, 1]; 0 without a box, or where it is inverted."""
    if said is None or inverted(said):
        return 0.0
    width, height = (min(said[axis + 2], target[axis + 2]) - max(said[axis], target[axis]) for axis in (0, 1))
    both = max(0.0, width) * max(0.0, height)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (said, target))
    return both / (areas - both)


def centred(said: Box | None, target: Box) -> float:
    """1 if the centre of the answer lies in the box or on its edge."""
    if said is None or inverted(said):
        return 0.0
    x, y = (said[0] + said[2]) / 2, (said[1] + said[3]) / 2
    return float(target[0] <= x <= target[2] and target[1] <= y <= target[3])


def evaluate(targets: Mapping[str, Target], texts: Mapping[str, str], notes: Sequence[str] = ()) -> Score:
    """Acc@0.5 in the frame of the picture, and beside it the same in the padded square, other thresholds and counts.

    Args:
        targets: question id -> the box, of the questions that were asked.
        texts: question id -> the model's text, one for every question.
    """
    check_coverage(targets, texts, set(targets))
    said = {name: read_box(texts[name]) for name in targets}
    image = {name: overlap(said[name], target.relative("image")) for name, target in targets.items()}
    square = {name: overlap(said[name], target.relative("square")) for name, target in targets.items()}

    def reach(least: float, overlaps: Mapping[str, float]) -> dict[str, float]:
        return {name: float(value >= least) for name, value in overlaps.items()}

    parts: dict[str, dict[str, float]] = {
        MAIN: reach(0.5, image),
        f"{MAIN}_square": reach(0.5, square),
        "acc@0.3": reach(0.3, image),
        "acc@0.7": reach(0.7, image),
        "mean_iou": image,
        "centre_in_box": {name: centred(said[name], target.relative("image")) for name, target in targets.items()},
    }
    counts: dict[str, float | None] = {
        "unparsed": float(sum(box is None for box in said.values())),
        "inverted": float(sum(box is not None and inverted(box) for box in said.values())),
    }
    values: dict[str, float | None] = {name: percent(part.values()) for name, part in parts.items()}
    return Score(
        values | counts,
        {},
        parts[MAIN],
        tuple(notes),
        MAIN,
        frozenset(counts),
        other_terms={name: ratio_terms(part, proportion=True) for name, part in parts.items() if name != MAIN},
    )


# Name of the benchmark -> how its files and its mirror are called, and its splits.
SETS = {
    "refcoco": ("refcoco", "RefCOCO", ("val", "testA", "testB", "test")),
    "refcoco_plus": ("refcoco+", "RefCOCOplus", ("val", "testA", "testB")),
    "refcocog": ("refcocog", "RefCOCOg", ("val", "test")),
}
BENCHMARKS = tuple(
    listed(name, partial(load, files, mirror), splits, model="tinyllava_boxes", mirror=mirror)
    for name, (files, hub, splits) in SETS.items()
    for mirror in [(f"lmms-lab-encoder/{hub}", f"lmms-lab/{hub}")]
)
