"""POPE in its official layout and as the hub holds it.

Objects are a colour and a shape. An image has three objects that it holds and, for each category, three that it does
not: drawn at random, the commonest over all images, or those that are most often seen with the objects of the image.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from eval.benchmarks.prompts import SHORT
from toy.benchmarks.asking import generator
from toy.benchmarks.files import IMAGE, STRING, fresh, link, write_card, write_jsonl, write_table
from toy.benchmarks.pictures import LINKED, Picture, images, linked, small
from toy.data.vocabulary import COLOR_NAMES, SHAPES

# In the order of LLaVA's question file, with the offsets of its ids.
CATEGORIES = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}
PICTURES, EACH = 16, 3
FIRST = 40  # scene
LABELS = ("yes", "no")  # of the objects of an image, by turns

COLUMNS = {
    "id": STRING,
    "question_id": STRING,
    "question": STRING,
    "answer": STRING,
    "image_source": STRING,
    "image": IMAGE,
    "category": STRING,
}


def objects(picture: Picture) -> set[str]:
    """Colour and shape of everything in a picture, "red star"."""
    return {f"{COLOR_NAMES[t.color]} {SHAPES[t.shape]}" for t in picture.things if t.kind == "shape"}


def negatives(category: str, held: set[str], everything: Sequence[set[str]], rng: np.random.Generator) -> list[str]:
    """Objects that an image does not hold, by POPE's three rules; ties in alphabetical order."""
    absent = sorted({f"{color} {shape}" for color in COLOR_NAMES for shape in SHAPES} - held)
    if category == "random":
        return [absent[place] for place in rng.permutation(len(absent))[:EACH]]
    counts: Counter[str] = Counter()
    for other in everything:
        # How often an object is seen at all, or together with each object of this image.
        weight = 1 if category == "popular" else len(other & held)
        counts.update(dict.fromkeys(other, weight))
    return sorted(absent, key=lambda name: (-counts[name], name))[:EACH]


def rows(pictures: Iterable[Picture]) -> dict[str, list[dict]]:
    """The lines of POPE's three files."""
    everything = [objects(picture) for picture in linked(2 * LINKED)]
    lines: dict[str, list[dict]] = {category: [] for category in CATEGORIES}
    for picture in pictures:
        held = objects(picture)
        rng = generator("pope", picture.name)
        present = [sorted(held)[place] for place in rng.permutation(len(held))[:EACH]]
        for category, found in lines.items():
            absent = negatives(category, held, everything, rng)
            names = [name for pair in zip(present, absent, strict=True) for name in pair]
            for name, label in zip(names, LABELS * EACH, strict=True):
                text = f"Is there a {name} in the image?"
                found.append({"question_id": len(found) + 1, "image": picture.file, "text": text, "label": label})
    return lines


def write(root: Path) -> None:
    """Everything below ROOT/pope and ROOT/hub/lmms-lab-encoder/POPE."""
    pictures = small((picture for picture in linked(140, FIRST) if len(objects(picture)) >= EACH), PICTURES)
    lines = rows(pictures)
    folder = fresh(root / "pope")
    for category, found in lines.items():
        write_jsonl(folder / "coco" / f"coco_pope_{category}.json", found)
    prompts = [
        {
            "question_id": offset + row["question_id"],
            "image": row["image"],
            "text": f"{row['text']}\n{SHORT}",
            "category": category,
        }
        for category, offset in CATEGORIES.items()
        for row in lines[category]
    ]
    write_jsonl(folder / "llava_pope_test.jsonl", prompts)
    link(folder / "val2014", images(root))
    write_mirror(fresh(root / "hub" / "lmms-lab-encoder" / "POPE"), lines, pictures)


def write_mirror(folder: Path, lines: dict[str, list[dict]], pictures: Sequence[Picture]) -> None:
    """The same questions about the same files as one table."""
    files = {picture.file: {"bytes": picture.original, "path": picture.file} for picture in pictures}
    table = []
    for category, found in lines.items():
        for row in found:
            cells = {"id": str(len(table)), "question_id": str(row["question_id"]), "question": row["text"]}
            source = row["image"].removesuffix(".jpg")
            cells |= {
                "answer": row["label"],
                "image_source": source,
                "image": files[row["image"]],
                "category": category,
            }
            table.append(cells)
    write_table(folder / "data" / "test-00000-of-00001.parquet", COLUMNS, table)
    write_card(folder, {"default": {"test": "data/test-00000-of-00001.parquet"}})
