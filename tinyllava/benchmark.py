"""Write the embedded benchmark in GQA's official file layout.

    python -m tinyllava.benchmark --output assets/eval

Files and fields as in the real thing: `gqa/llava_gqa_{split}_balanced.jsonl` (LLaVA's question file),
`gqa/data/{split}_balanced_questions.json` (GQA's annotations), `gqa/data/images/`. The family of a question is its
`types.detailed`, and whether its scene is natural or dense its `groups.global`.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tinyllava.questions import FAMILIES, Question, ask
from tinyllava.scenes import Thing, scene
from tinyllava.vocabulary import SHORT_ANSWER

# GQA's split name -> (our seed range, first scene of each kind, scenes of each kind). The validation scenes lie behind
# those that training watches.
SPLITS = {"testdev": ("test", 0, 150), "val": ("val", 1000, 75)}


def scene_questions(split: str, index: int, dense: bool, things) -> list[Question]:
    """At most one question of each family, no text twice."""
    rng = np.random.default_rng([index, dense, {"test": 1, "val": 2}[split]])
    found: dict[str, Question] = {}
    for family in FAMILIES:
        question = ask(things, family, rng)
        if question is not None:
            found.setdefault(question.text, question)
    return list(found.values())


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
    """File and things of a picture of the embedded benchmark."""
    drawn = scene(split, index, dense)
    return drawn.jpeg, drawn.things


def write_split(root: Path, name: str, part: tuple[str, int, int], draw: Draw = draw_scene) -> int:
    """Write one split, `part` being its entry in SPLITS; returns the number of its questions."""
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
            text = f"{question.text}\n{SHORT_ANSWER}"
            lines.append({"question_id": identity, "image": f"{image}.jpg", "text": text, "category": "default"})
    (root / "data" / f"{name}_balanced_questions.json").write_text(
        json.dumps(annotations, separators=(",", ":")) + "\n"
    )
    with open(root / f"llava_gqa_{name}_balanced.jsonl", "w") as out:
        out.writelines(json.dumps(line) + "\n" for line in lines)
    return len(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    for name, part in SPLITS.items():
        print(f"{name}: {write_split(args.output / 'gqa', name, part)} questions")
    size = sum(f.stat().st_size for f in args.output.rglob("*") if f.is_file())
    print(f"Wrote {args.output}: {size / 1e6:.1f} MB.")


if __name__ == "__main__":
    main()
