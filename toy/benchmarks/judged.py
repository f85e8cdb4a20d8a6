"""MM-Vet and LLaVA-Bench (in the wild) in their official layouts: free answers that a judge reads."""

from pathlib import Path

from toy.benchmarks.asking import about, generator, rotation, spelled
from toy.benchmarks.files import fresh, link, write_json, write_jsonl
from toy.benchmarks.pictures import Picture, images, linked
from toy.data.formats import Pair, compose
from toy.data.paint import Thing
from toy.data.vocabulary import COLOR_NAMES, PATTERNS, SHAPES, SIZES

# What MM-Vet calls the abilities that a family asks for.
CAPABILITIES = {
    "color": ("rec",),
    "shape": ("rec",),
    "exist": ("rec", "know"),
    "count": ("rec", "math"),
    "digit": ("ocr",),
    "relate": ("rec", "spat"),
    "verify": ("rec", "spat"),
    "choose": ("rec", "spat"),
    "side": ("rec", "spat"),
    "describe": ("rec", "ocr", "gen", "spat"),
}


def write(root: Path) -> None:
    """Everything below ROOT/mm-vet and ROOT/llava-bench-in-the-wild."""
    write_mmvet(root)
    write_llavabench(root)


def write_mmvet(root: Path) -> None:
    """References join what an answer must name with <AND> and different ways to say it with <OR>."""
    folder, rng = fresh(root / "mm-vet"), generator("mm-vet")
    records, lines = {}, []
    for row, picture in enumerate(linked(44, 20)):
        asked = list(about(picture, "bare", rng, rotation(row, 2)))
        if row % 3 == 0 and (description := compose(picture.things, "describe", rng)):
            asked.append(description)
        for pair in asked:
            number = len(lines)
            records[f"v1_{number}"] = {
                "imagename": picture.file,
                "question": pair.question,
                "answer": reference(pair),
                "imagesource": "drawn scenes",
                "capability": list(CAPABILITIES[pair.family]),
            }
            line = {"image": picture.file, "text": pair.question, "category": "conv", "question_id": number}
            lines.append(line)
    write_json(folder / "mm-vet.json", records)
    write_jsonl(folder / "llava-mm-vet.jsonl", lines)
    link(folder / "images", images(root))


def reference(pair: Pair) -> str:
    """MM-Vet's ground truth."""
    if pair.family == "describe":
        return "<AND>".join(pair.answer.split(" and "))
    return "<OR>".join(dict.fromkeys((pair.answer, spelled(pair.answer))))


# Twenty pictures, each with a question of every category.
WILD = 20


def write_llavabench(root: Path) -> None:
    """Captions that name everything in a picture stand in for it when a judge reads the answers."""
    folder, rng = fresh(root / "llava-bench-in-the-wild"), generator("llava-bench")
    questions, references, contexts = [], [], []
    for picture in linked(2 * WILD, 200):
        simple = next(about(picture, "bare", rng, ("color",)), None)
        harder = next(about(picture, "bare", rng, ("relate",)), None)
        description = compose(picture.things, "describe", rng)
        if len(contexts) == WILD or not (simple and harder and description):
            continue
        contexts.append({"id": f"{len(contexts) + 1:03d}", "image": picture.file, "caption": caption(picture)})
        for category, pair in (("conv", simple), ("detail", description), ("complex", harder)):
            identity, text = len(questions), pair.question
            questions.append({"question_id": identity, "image": picture.file, "category": category, "text": text})
            answer = {"question_id": identity, "prompt": text, "text": pair.answer}
            references.append({**answer, "answer_id": f"drawn{identity}", "model_id": "drawing", "metadata": {}})
    write_jsonl(folder / "questions.jsonl", questions)
    write_jsonl(folder / "context.jsonl", contexts)
    write_jsonl(folder / "answers_gpt4.jsonl", references)
    link(folder / "images", images(root))


def caption(picture: Picture) -> str:
    """All there is in a picture, from left to right."""
    return (
        f"A drawing with {', '.join(_named(t) for t in sorted(picture.things, key=lambda t: t.x))}, from left to right."
    )


def _named(thing: Thing) -> str:
    if thing.kind == "panel":
        return f"a {PATTERNS[thing.pattern]} panel"
    color = COLOR_NAMES[thing.color]
    if thing.kind == "frame":
        return f"a {color} frame with the digit {thing.digit}"
    return f"a {SIZES[thing.big]} {color} {SHAPES[thing.shape]}"
