"""Sets whose answers are words or sentences.

In their official layouts TextVQA, VizWiz and VQAv2, short answers by ten people, and MM-Vet and LLaVA-Bench (in the
wild), free answers that a judge reads. As tables of the hub ChartQA, DocVQA, InfoVQA, OCRBench and RealWorldQA, one
question a row, and Flickr30k and NoCaps, one picture a row, with captions as people might write them.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from eval.benchmarks.llava_files import SHORT, VIZ
from lab.toy.benchmarks import (
    ALL,
    IMAGE,
    INTEGER,
    NAMES,
    OWNER,
    STRING,
    STRINGS,
    Picture,
    about,
    answer_type,
    answered,
    cells,
    copied,
    forms,
    fresh,
    generator,
    images,
    link,
    linked,
    prompt,
    rotation,
    small,
    ten_answers,
    write_card,
    write_json,
    write_jsonl,
    write_splits,
    write_table,
)
from lab.toy.data.formats import OCR_TOKENS, UNANSWERABLE, VIZ_FAMILIES, caption_references, compose
from lab.toy.data.questions import attempt
from lab.toy.data.scenes import SIDE
from lab.toy.data.vocabulary import COLOR_NAMES, PATTERNS, SHAPES, SIZES

# Short answers by ten people.


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
                "answer": "<AND>".join(pair.answer.split(" and "))
                if pair.family == "describe"
                else "<OR>".join(forms(pair.answer)),
                "imagesource": "drawn scenes",
                "capability": NAMES["mmvet"][pair.family],
            }
            lines.append({"image": picture.file, "text": pair.question, "category": "conv", "question_id": number})
    write_json(folder / "mm-vet.json", records)
    write_jsonl(folder / "llava-mm-vet.jsonl", lines)
    link(folder / "images", images(root))


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


# Sets of questions.


def write_chartqa(root: Path) -> None:
    """One half counts as asked by people, the other as made from them."""
    folder = fresh(root / "hub" / OWNER / "ChartQA")
    columns = {"type": STRING, "question": STRING, "answer": STRING, "image": IMAGE}
    made = list(
        answered(copied(16, 10), "single_word", generator("chartqa"), 5, ("count", "digit", "color", "shape", "relate"))
    )
    rows = [
        cells(picture, pair, type="human_test" if 2 * number < len(made) else "augmented_test")
        for number, (picture, pair) in enumerate(made)
    ]
    write_splits(folder, columns, {"test": rows})


def write_docvqa(root: Path) -> None:
    """Validation with answers and test without, for both configurations."""
    folder = fresh(root / "hub" / OWNER / "DocVQA")
    columns = {"questionId": STRING, "question": STRING, "image": IMAGE, "answers": STRINGS, "data_split": STRING}
    card: dict[str, dict[str, str]] = {}
    for place, (config, among) in enumerate(NAMES["documents"].items()):
        for split, pictures in (("validation", copied(12, 14 + 12 * place)), ("test", copied(4, 50 + 4 * place))):
            rows = []
            for picture, pair in answered(pictures, "short", generator(f"{config} {split}"), 4, among):
                row = cells(picture, pair, questionId=str(49153 + len(rows)), data_split=split)
                if split == "validation":
                    row |= {"answers": forms(pair.answer), "data_split": "val"}
                rows.append(row)
            file = f"{config}/{split}-00000-of-00001.parquet"
            write_table(folder / file, columns, rows)
            card.setdefault(config, {})[split] = file
    write_card(folder, card)


def write_realworldqa(root: Path) -> None:
    """Questions that hold their own instruction: mostly a letter, else a word."""
    folder = fresh(root / "hub" / OWNER / "RealWorldQA")
    columns = {"image": IMAGE, "question": STRING, "answer": STRING}
    rows = [cells(*one) for one in answered(copied(16, 30), "realworld", generator("realworldqa"), 5)]
    write_splits(folder, columns, {"test": rows})


def write_ocrbench(root: Path) -> None:
    """Handwritten digits, ten questions of every type."""
    folder = fresh(root / "hub" / "echo840" / "OCRBench")
    columns = {"dataset": STRING, "question": STRING, "question_type": STRING, "answer": STRINGS, "image": IMAGE}
    made = list(answered(copied(44, 4), "bare", generator("ocrbench"), 4, ("digit",)))
    rows = [
        cells(picture, pair, dataset=dataset, question_type=kind, answer=[pair.answer])
        for number, (kind, dataset) in enumerate(NAMES["ocrbench"].items())
        for picture, pair in made[10 * number : 10 * number + 10]
    ]
    write_splits(folder, columns, {"test": rows}, card=True)


# Captions.

CAPTIONED = 20  # pictures of a set


def write_captions(root: Path) -> None:
    """Flickr30k with five captions a picture and NoCaps with ten, below ROOT/hub."""
    hub = root / "hub" / OWNER
    columns = {"image": IMAGE, "caption": STRINGS, "sentids": STRINGS, "split": STRING, "img_id": STRING}
    rows = [
        {"image": picture.cell, "caption": list(captions), "sentids": [str(5 * row + place) for place in range(5)]}
        | {"split": "test", "img_id": str(row), "filename": picture.file}
        for row, (picture, captions) in enumerate(islice(captioned(copied(48)), CAPTIONED))
    ]
    write_splits(fresh(hub / "flickr30k"), {**columns, "filename": STRING}, {"test": rows})

    columns = {"image": IMAGE, "image_id": INTEGER, "image_file_name": STRING, "annotations_captions": STRINGS}
    rows = [
        {"image": picture.cell, "image_id": row, "image_file_name": picture.file}
        | {"annotations_captions": reworded(captions)}
        for row, (picture, captions) in enumerate(islice(captioned(copied(48, 60)), CAPTIONED))
    ]
    # The captions of the test split are not public.
    hidden = [
        {"image": picture.cell, "image_id": 1000 + row, "image_file_name": picture.file}
        for row, picture in enumerate(copied(6, 48))
    ]
    write_splits(fresh(hub / "NoCaps"), columns, {"validation": rows, "test": hidden})


def captioned(pictures: Iterable[Picture]) -> Iterator[tuple[Picture, tuple[str, ...]]]:
    """The pictures whose big shapes have a clear order, each with five captions."""
    for picture in pictures:
        captions = attempt(lambda: caption_references(picture.things), 1)  # noqa: B023
        if captions is not None:
            yield picture, captions


def reworded(captions: tuple[str, ...]) -> list[str]:
    """Ten captions: the five, and the five in other words."""
    plain = captions[0].replace("big ", "")
    drawings = [f"a drawing of {captions[place]}" for place in (0, 3)]
    return [*captions, *drawings, plain, f"a picture with {plain}", f"{captions[0]} on a plain background"]
