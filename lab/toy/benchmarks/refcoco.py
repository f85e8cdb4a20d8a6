"""Toy RefCOCO in Qwen-VL's layout: one sentence a line, and the box of what it describes in pixels of its picture.

testA asks for big shapes and testB for small shapes and frames, in the pictures of GQA's testdev. val asks for these
and for panels in the pictures of GQA's val and in strips of further scenes, which are not square: LLaVA pads them, so
boxes relative to the picture and to the padded square differ there. RefCOCO+ and RefCOCOg are links to the same files.
The hub's split test, which the official files lack, holds boxes of testA.
"""

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from lab.toy.benchmarks import (
    FLOATS,
    IMAGE,
    OWNER,
    QUALITY,
    STRING,
    STRINGS,
    fresh,
    generator,
    images,
    link,
    picture,
    write_file,
    write_jsonl,
    write_splits,
)
from lab.toy.benchmarks.gqa_and_videos import SPLITS
from lab.toy.data.corpus import inside, strip
from lab.toy.data.regions import refer
from lab.toy.data.scenes import SIDE, Thing, scene

GQA_IMAGES = Path("coco", "train2014")  # linked: the place of COCO's images in the official files
STRIPS = Path("refcoco", "strips")
ON_HUB = 20  # boxes in the hub's table
COLUMNS = {"question_id": STRING, "image": IMAGE, "answer": STRINGS, "bbox": FLOATS}
STRIP_SCENES = 25  # of each kind, after those of GQA's val
# Split -> the kinds of things that a picture is asked for, in turns.
ASKED: dict[str, Sequence[Sequence[str]]] = {
    "testA": [["big"]],
    "testB": [["small"], ["frame"]],
    "val": [["big", "panel"], ["small", "frame"]],
}


def write(root: Path) -> None:
    """ROOT/refcoco, the folders that link to it, the hub's table, and ROOT/coco with the link to GQA's images."""
    for name in ("refcoco", "refcoco+", "refcocog", "coco"):
        fresh(root / name)
    link(root / GQA_IMAGES, images(root))
    for name, turns in ASKED.items():
        shown = squares("val" if name == "val" else "testdev")
        # A turn is a natural and a dense scene.
        rows = [row for place, one in enumerate(shown) for row in lines(*one, turns[place // 2 % len(turns)])]
        for place, (file, shot, things, boxes) in enumerate(strips() if name == "val" else ()):
            asked = list(lines(file, shot.size, things, boxes, turns[place // 2 % len(turns)]))
            if asked:
                write_file(root / file, jpeg(shot))
            rows += asked
        file = root / "refcoco" / f"refcoco_{name}.jsonl"
        write_jsonl(file, rows)
        link(root / "refcoco+" / f"refcoco+_{name}.jsonl", file)
        if name != "testB":
            link(root / "refcocog" / f"refcocog_{'val' if name == 'val' else 'test'}.jsonl", file)
        if name == "testA":
            write_splits(fresh(root / "hub" / OWNER / "RefCOCO"), COLUMNS, {"test": [*mirrored(rows[:ON_HUB])]})


def mirrored(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows of the hub's table from lines of an official file; every second box is described by two sentences."""
    for number, row in enumerate(rows):
        (x1, y1, x2, y2), name = row["bbox"], Path(row["image"]).stem
        yield {
            "question_id": str(number),
            "image": picture(int(name[-6:-1]), name.endswith("d")).cell,
            "answer": [row["sent"], f"{row['sent']} of the picture"][: 1 + number % 2],
            "bbox": [x1, y1, x2 - x1, y2 - y1],
        }


Boxes = Sequence[Sequence[int]]


def squares(split: str) -> Iterator[tuple[Path, tuple[int, int], tuple[Thing, ...], Boxes]]:
    """File, width and height, things and boxes of the pictures of a split of GQA, natural and dense in turn."""
    part, first, count = SPLITS[split]
    for index, dense in ((first + row // 2, row % 2 == 1) for row in range(2 * count)):
        drawn = scene(part, index, dense)
        yield GQA_IMAGES / f"{part}{index:05d}{'d' if dense else 'n'}.jpg", (SIDE, SIDE), drawn.things, drawn.boxes


def strips() -> Iterator[tuple[Path, Image.Image, tuple[Thing, ...], Boxes]]:
    """File, picture, the scene's things and their boxes in the picture, zeros where a thing is not wholly in it."""
    part, first, count = SPLITS["val"]
    for row in range(2 * STRIP_SCENES):
        index, dense = first + count + row // 2, row % 2 == 1
        drawn, shown = scene(part, index, dense), strip(row)
        left, top = shown[:2]
        boxes = [
            (x1 - left, y1 - top, x2 - left, y2 - top) if inside((x1, y1, x2, y2), shown) else (0, 0, 0, 0)
            for x1, y1, x2, y2 in drawn.boxes
        ]
        picture = Image.fromarray(drawn.image).crop(shown)
        yield STRIPS / f"{part}{index:05d}{'d' if dense else 'n'}.jpg", picture, drawn.things, boxes


def jpeg(picture: Image.Image) -> bytes:
    """A JPEG file, smaller than the toy GQA's."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=QUALITY, optimize=True)
    return file.getvalue()


def lines(
    file: Path, size: tuple[int, int], things: tuple[Thing, ...], boxes: Boxes, kinds: Iterable[str]
) -> Iterator[dict[str, Any]]:
    """A line for each of the kinds, where there is a thing of it that a sentence singles out; no sentence twice."""
    rng, seen = generator("refcoco", file.name), set()
    for kind in kinds:
        found = refer(things, kind, rng)
        if found is None or not any(boxes[found[0]]) or found[1] in seen:
            continue
        seen.add(found[1])
        width, height = size
        yield {
            "image": str(file),
            "sent": found[1],
            "bbox": [*map(float, boxes[found[0]])],
            "width": width,
            "height": height,
        }
