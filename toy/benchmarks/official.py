"""Benchmarks in their official layouts whose answers are words or sentences.

TextVQA, VizWiz and VQAv2: short answers by ten people. MM-Vet and LLaVA-Bench (in the wild): free answers that a judge
reads. POPE, also as the hub holds it, and MME: yes or no.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.benchmarks.llava_files import SHORT, VIZ
from toy.benchmarks import (
    ALL,
    IMAGE,
    LINKED,
    NAMES,
    STRING,
    Picture,
    about,
    answer_type,
    answered,
    by_size,
    copied,
    forms,
    fresh,
    generator,
    images,
    link,
    linked,
    objects,
    prompt,
    rotation,
    ten_answers,
    write_file,
    write_json,
    write_jsonl,
    write_splits,
)
from toy.data.formats import OCR_TOKENS, UNANSWERABLE, VIZ_FAMILIES, Pair, claim, compose, distractors, draw
from toy.data.questions import Retry, attempt, pick
from toy.data.scenes import SIDE, Thing
from toy.data.vocabulary import COLOR_NAMES, PATTERNS, SHAPES, SIZES

# Short answers by ten people.


def write_vqa(root: Path) -> None:
    """Everything below ROOT/textvqa, ROOT/vizwiz and ROOT/vqav2."""
    write_textvqa(root)
    write_vizwiz(root)
    write_vqav2(root)


def write_textvqa(root: Path) -> None:
    """Digits in frames, with the tokens that a reader of text found."""
    folder, rng = fresh(root / "textvqa"), generator("textvqa")
    records, lines = [], []
    for row, picture in enumerate(linked(90)):
        for pair in about(picture, "ocr", rng, ("digit", "digit", "color" if row % 3 else "count")):
            text = pair.question.split(f"\n{OCR_TOKENS}")[0]
            lines.append(prompt(picture.name, picture.file, f"{pair.question}\n{SHORT}"))
            records.append(
                {
                    "question": text,
                    "image_id": picture.name,
                    "image_classes": ["Drawing"],
                    "flickr_original_url": "",
                    "flickr_300k_url": "",
                    "image_width": SIDE,
                    "image_height": SIDE,
                    "answers": ten_answers(pair.answer, rng),
                    "question_tokens": text.lower().rstrip("?").split(),
                    "question_id": 34602 + len(records),
                    "set_name": "val",
                }
            )
    write_jsonl(folder / "llava_textvqa_val_v051_ocr.jsonl", lines)
    head = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    write_json(folder / "TextVQA_0.5.1_val.json", {**head, "data": records})
    link(folder / "train_images", images(root))


def write_vizwiz(root: Path) -> None:
    """One question about a picture, half of which have no answer; the test split is shipped without answers."""
    folder = fresh(root / "vizwiz")
    for split, pictures in (("test", linked(150)), ("val", linked(120, 75))):
        rng, records, lines = generator("vizwiz", split), [], []
        for picture, pair in answered(pictures, "viz", rng, 1, VIZ_FAMILIES):
            lines.append(prompt(len(lines), picture.file, f"{pair.question}\n{VIZ}"))
            record: dict[str, Any] = {"image": picture.file, "question": pair.question}
            if split == "val":
                answers, missing = ten_answers(pair.answer, rng), pair.answer == UNANSWERABLE
                record["answers"] = [{"answer_confidence": "yes", "answer": answer} for answer in answers]
                record["answer_type"] = UNANSWERABLE if missing else answer_type(pair.answer)
                record["answerable"] = int(not missing)
            records.append(record)
        write_json(folder / f"{split}.json", records)
        if split == "test":
            write_jsonl(folder / "llava_test.jsonl", lines)
        link(folder / split, images(root))


def write_vqav2(root: Path) -> None:
    """Test questions without answers, of which test-dev is the first part, and val with the official annotations."""
    folder, rng = fresh(root / "vqav2"), generator("vqav2", "test")
    lines = []
    for row, picture in enumerate(linked(120)):
        for number, pair in enumerate(about(picture, "short", rng, rotation(row, 2))):
            lines.append(prompt(1000 * (row + 1) + number, picture.file, pair.message))
    write_jsonl(folder / "llava_vqav2_mscoco_test2015.jsonl", lines)
    write_jsonl(folder / "llava_vqav2_mscoco_test-dev2015.jsonl", lines[: 2 * len(lines) // 3])
    link(folder / "test2015", images(root))

    rng, questions, annotations = generator("vqav2", "val"), [], []
    for image, picture in enumerate(small(linked(80, 60), 12), start=1):  # images of val are found by number
        link(folder / "val2014" / f"COCO_val2014_{image:012d}.jpg", images(root) / picture.file)
        for number, pair in enumerate(about(picture, "short", rng, ALL)):
            identity = {"question_id": 1000 * image + number, "image_id": image}
            questions.append({**identity, "question": pair.question})
            annotations.append(
                {
                    **identity,
                    "question_type": " ".join(pair.question.lower().split()[:2]),
                    "answer_type": answer_type(pair.answer),
                    "multiple_choice_answer": pair.answer,
                    "answers": [
                        {"answer": answer, "answer_confidence": "yes", "answer_id": person}
                        for person, answer in enumerate(ten_answers(pair.answer, rng), start=1)
                    ],
                }
            )
    head = {"info": {"description": "drawn scenes", "version": "2.0"}, "license": {"name": "", "url": ""}}
    kind = {"data_type": "mscoco", "data_subtype": "val2014"}
    asked = {**head, "task_type": "Open-Ended", **kind, "questions": questions}
    write_json(folder / "v2_OpenEnded_mscoco_val2014_questions.json", asked)
    write_json(folder / "v2_mscoco_val2014_annotations.json", {**head, **kind, "annotations": annotations})


# Free answers.


def write_judged(root: Path) -> None:
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
                "capability": NAMES["mmvet"][pair.family],
            }
            lines.append({"image": picture.file, "text": pair.question, "category": "conv", "question_id": number})
    write_json(folder / "mm-vet.json", records)
    write_jsonl(folder / "llava-mm-vet.jsonl", lines)
    link(folder / "images", images(root))


def reference(pair: Pair) -> str:
    """MM-Vet's ground truth."""
    if pair.family == "describe":
        return "<AND>".join(pair.answer.split(" and "))
    return "<OR>".join(forms(pair.answer))


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
    names = []
    for thing in sorted(picture.things, key=lambda thing: thing.x):
        if thing.kind == "panel":
            names.append(f"a {PATTERNS[thing.pattern]} panel")
        elif thing.kind == "frame":
            names.append(f"a {COLOR_NAMES[thing.color]} frame with the digit {thing.digit}")
        else:
            names.append(f"a {SIZES[thing.big]} {COLOR_NAMES[thing.color]} {SHAPES[thing.shape]}")
    return f"A drawing with {', '.join(names)}, from left to right."


# POPE. Objects are a colour and a shape. An image has three objects that it holds and, for each category, three that it
# does not: drawn at random, the commonest over all images, or those that are most often seen with the objects of the
# image.

# In the order of LLaVA's question file, with the offsets of its ids.
CATEGORIES = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}
PICTURES, EACH = 16, 3
POPE_FIRST = 40  # scene
LABELS = ("yes", "no")  # of the objects of an image, by turns


def small(pictures: Iterable[Picture], count: int) -> list[Picture]:
    """The `count` pictures with the smallest files, in the order given."""
    pictures = list(pictures)
    chosen = by_size(pictures)[:count]
    return [picture for picture in pictures if picture in chosen]


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


def pope_lines(pictures: Iterable[Picture]) -> dict[str, list[dict]]:
    """The lines of POPE's three files."""
    everything = [objects(picture) for picture in linked(2 * LINKED)]
    lines: dict[str, list[dict]] = {category: [] for category in CATEGORIES}
    for picture in pictures:
        held = objects(picture)
        rng = generator("pope", picture.name)
        present = [sorted(held)[place] for place in rng.permutation(len(held))[:EACH]]
        for category, own in lines.items():
            absent = negatives(category, held, everything, rng)
            names = [name for pair in zip(present, absent, strict=True) for name in pair]
            for name, label in zip(names, LABELS * EACH, strict=True):
                text = f"Is there a {name} in the image?"
                own.append({"question_id": len(own) + 1, "image": picture.file, "text": text, "label": label})
    return lines


def write_pope(root: Path) -> None:
    """Everything below ROOT/pope, and the same questions about the same files as a table below ROOT/hub."""
    pictures = small((picture for picture in linked(140, POPE_FIRST) if len(objects(picture)) >= EACH), PICTURES)
    files = {picture.file: {"bytes": picture.original, "path": picture.file} for picture in pictures}
    folder, prompts, table = fresh(root / "pope"), [], []
    for category, rows in pope_lines(pictures).items():
        write_jsonl(folder / "coco" / f"coco_pope_{category}.json", rows)
        for row in rows:
            number, image, text = row["question_id"], row["image"], row["text"]
            prompts.append(prompt(CATEGORIES[category] + number, image, f"{text}\n{SHORT}", category))
            cells = {"id": str(len(table)), "question_id": str(number), "question": text, "answer": row["label"]}
            cells |= {"image_source": image.removesuffix(".jpg"), "image": files[image], "category": category}
            table.append(cells)
    write_jsonl(folder / "llava_pope_test.jsonl", prompts)
    link(folder / "val2014", images(root))
    columns = dict.fromkeys(("id", "question_id", "question", "answer", "image_source"), STRING)
    columns |= {"image": IMAGE, "category": STRING}
    write_splits(fresh(root / "hub" / "lmms-lab-encoder" / "POPE"), columns, {"test": table}, card=True)


# MME: fourteen tasks, two questions about every image, one right and one wrong.

IMAGES_EACH, TRIES = 5, 400
INSTRUCTION = "Please answer yes or no."

YesNo = tuple[str, str]  # the question whose answer is yes, and the one whose answer is no
Wanted = Callable[[str], bool]  # of the name of a thing
THINGS: dict[str, Wanted] = {
    "all": bool,
    "panels": lambda name: name.endswith("panel"),
    "colours": lambda name: name.endswith(" objects"),
    "shapes": lambda name: not name.endswith(" objects"),
    "sized": lambda name: name.split()[0] in SIZES,
    "unsized": lambda name: name.split()[0] not in SIZES,
    "plain": lambda name: not name.endswith("panel") and name.split()[0] not in SIZES,
}
IN_FOLDERS = ("artwork", "celebrity", "landmark", "posters", "scene")


def yes_and_no(things: tuple[Thing, ...], family: str, wanted: Wanted, rng: np.random.Generator) -> YesNo:
    """A question with each answer: whether a thing is there, whether a relation holds, else two claims about a thing.

    Raises:
        Retry: the draw found no such questions.
    """
    texts: dict[str, str] = {}
    for _ in range(TRIES):
        try:
            question = draw(things, rng, family)
        except Retry:
            if family != "exist":
                raise
            continue
        name = dict(question.program)["select"]
        if family not in ("exist", "verify"):
            if not wanted(name):
                raise Retry
            return claim(question, question.answer), claim(question, pick(distractors(question), rng))
        if wanted(name):
            text = question.text if family == "verify" else f"Is there a {name} in the image?"
            texts.setdefault(question.answer, text)
        if len(texts) == 2:
            return texts["yes"], texts["no"]
    raise Retry


def mme_pairs(task: str, pictures: list[Picture]) -> list[tuple[Picture, YesNo]]:
    """The first pictures of the task's kind that its questions can be asked about."""
    kind, family, things = NAMES["mme"][task]
    made = []
    for picture in pictures:
        if picture.dense != (kind == "dense") or len(made) == IMAGES_EACH:
            continue
        rng = generator("mme", task, picture.name)
        asked = attempt(lambda: yes_and_no(picture.things, family, THINGS[things], rng), TRIES)  # noqa: B023
        if asked is not None:
            made.append((picture, asked))
    return made


def write_mme(root: Path) -> None:
    """Everything below ROOT/MME."""
    folder, lines = fresh(root / "MME"), []
    release = folder / "MME_Benchmark_release_version"
    for number, task in enumerate(NAMES["mme"]):
        pictures, answers = (f"{task}/images", f"{task}/questions_answers_YN") if task in IN_FOLDERS else (task, task)
        for picture, texts in mme_pairs(task, copied(120, first=3 * number)):
            name = f"{pictures}/{picture.file}"
            write_file(release / name, picture.jpeg)
            listed = [f"{text} {INSTRUCTION}\t{answer}\n" for text, answer in zip(texts, ("Yes", "No"), strict=True)]
            write_file(release / answers / f"{picture.name}.txt", "".join(listed))
            lines += [prompt(name, name, f"{text}\n{SHORT}", task) for text in texts]
    write_jsonl(folder / "llava_mme.jsonl", lines)
