"""GQA's official file layout, for the scenes of the toy model and for the large pictures of the toy LLaVA-NeXT.

Files and fields as in the real thing: `gqa/llava_gqa_{split}_balanced.jsonl` (LLaVA's question file),
`gqa/data/{split}_balanced_questions.json` (GQA's annotations), `gqa/data/images/`. The family of a question is its
`types.detailed`, and whether its scene is natural or dense its `groups.global`.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from toy.benchmarks.files import prompt, write_json
from toy.data.questions import FAMILIES, Question, ask
from toy.data.scenes import Thing, centred, large_scene, scene
from toy.data.vocabulary import SHORT_ANSWER

Part = tuple[str, int, int]  # our seed range, first scene of each kind, scenes of each kind
# GQA's split name -> its part. The validation scenes come after those that training watches.
SPLITS: dict[str, Part] = {"testdev": ("test", 0, 150), "val": ("val", 1000, 75)}
LARGE_SPLITS: dict[str, Part] = {"testdev": ("test", 0, 75), "val": ("val", 1000, 30)}


def scene_questions(split: str, index: int, dense: bool, things) -> list[Question]:
    """At most one question of each family, no text twice."""
    rng = np.random.default_rng([index, dense, {"test": 1, "val": 2}[split]])
    by_text: dict[str, Question] = {}
    for family in FAMILIES:
        question = ask(things, family, rng)
        if question is not None:
            by_text.setdefault(question.text, question)
    return list(by_text.values())


def annotation(question: Question, identity: str, image: str, dense: bool) -> dict:
    """One entry of GQA's questions file."""
    program = [
        {"operation": operation, "dependencies": [step - 1] if step else [], "argument": argument}
        for step, (operation, argument) in enumerate(question.program)
    ]
    return {
        "question": question.text,
        "answer": question.answer,
        "fullAnswer": question.answer,
        "imageId": image,
        "isBalanced": True,
        "groups": {"global": "dense" if dense else "natural", "local": question.family},
        "entailed": [],
        "equivalent": [identity],
        "types": {"structural": question.structural, "semantic": question.semantic, "detailed": question.family},
        "semantic": program,
        "semanticStr": "->".join(f"{operation}: {argument}" for operation, argument in question.program),
        "annotations": {"question": {}, "answer": {}, "fullAnswer": {}},
    }


Draw = Callable[[str, int, bool], tuple[bytes, tuple[Thing, ...]]]


def draw_scene(split: str, index: int, dense: bool) -> tuple[bytes, tuple[Thing, ...]]:
    """File and things of a picture."""
    drawn = scene(split, index, dense)
    return drawn.jpeg, drawn.things


def draw_large(split: str, index: int, dense: bool) -> tuple[bytes, tuple[Thing, ...]]:
    """File of a large picture and its things, the picture's centre where the question writer expects it."""
    drawn = large_scene(split, index, dense)
    return drawn.jpeg, centred(drawn.things, drawn.image.shape[1], drawn.image.shape[0])


def write_gqa(root: Path) -> None:
    """Everything below ROOT/gqa."""
    for name, part in SPLITS.items():
        write_split(root / "gqa", name, part)


def write_large_gqa(root: Path) -> None:
    """The same about large pictures."""
    for name, part in LARGE_SPLITS.items():
        write_split(root / "gqa", name, part, draw_large)


def write_split(root: Path, name: str, part: Part, draw: Draw = draw_scene) -> None:
    """Write one split, `part` being its entry in SPLITS."""
    split, first, count = part
    images = root / "data" / "images"
    images.mkdir(parents=True, exist_ok=True)
    annotations, lines = {}, []
    for row in tqdm(range(2 * count), desc=f"gqa {name}"):
        index, dense = first + row // 2, row % 2 == 1
        jpeg, things = draw(split, index, dense)
        image = f"{split}{index:05d}{'d' if dense else 'n'}"
        (images / f"{image}.jpg").write_bytes(jpeg)
        for question in scene_questions(split, index, dense, things):
            identity = f"{2 if split == 'test' else 1}{len(lines):07d}"
            annotations[identity] = annotation(question, identity, image, dense)
            lines.append(prompt(identity, f"{image}.jpg", f"{question.text}\n{SHORT_ANSWER}"))
    write_json(root / "data" / f"{name}_balanced_questions.json", annotations)
    with open(root / f"llava_gqa_{name}_balanced.jsonl", "w") as out:
        out.writelines(json.dumps(line) + "\n" for line in lines)
