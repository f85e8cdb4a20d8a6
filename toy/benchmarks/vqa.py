"""TextVQA, VizWiz and VQAv2 in their official layouts: short answers by ten people."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from eval.benchmarks.prompts import SHORT, VIZ
from toy.benchmarks.asking import ALL, about, answer_type, generator, rotation, ten_answers
from toy.benchmarks.files import fresh, link, write_json, write_jsonl
from toy.benchmarks.pictures import Picture, images, linked, small
from toy.data.formats import OCR_TOKENS, UNANSWERABLE, VIZ_FAMILIES
from toy.data.scenes import SIDE


def write(root: Path) -> None:
    """Everything below ROOT/textvqa, ROOT/vizwiz and ROOT/vqav2."""
    write_textvqa(root)
    write_vizwiz(root)
    write_vqav2(root)


def prompt(identity: int | str, picture: Picture, message: str) -> dict[str, Any]:
    """A line of LLaVA's question files."""
    return {"question_id": identity, "image": picture.file, "text": message, "category": "default"}


def write_textvqa(root: Path) -> None:
    """Digits in frames, with the tokens that a reader of text found."""
    folder, rng = fresh(root / "textvqa"), generator("textvqa")
    records, lines = [], []
    for row, picture in enumerate(linked(90)):
        for pair in about(picture, "ocr", rng, ("digit", "digit", "color" if row % 3 else "count")):
            text, tokens = pair.question.split(f"\n{OCR_TOKENS}")
            lines.append(prompt(picture.name, picture, f"{text}\n{OCR_TOKENS}{tokens}\n{SHORT}"))
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
        for row, picture in enumerate(pictures):
            for pair in about(picture, "viz", rng, rotation(row, 1, VIZ_FAMILIES)):
                lines.append(prompt(len(lines), picture, f"{pair.question}\n{VIZ}"))
                record: dict[str, Any] = {"image": picture.file, "question": pair.question}
                if split == "val":
                    answers = ten_answers(pair.answer, rng)
                    missing = pair.answer == UNANSWERABLE
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
            lines.append(prompt(1000 * (row + 1) + number, picture, pair.message))
    write_jsonl(folder / "llava_vqav2_mscoco_test2015.jsonl", lines)
    write_jsonl(folder / "llava_vqav2_mscoco_test-dev2015.jsonl", lines[: 2 * len(lines) // 3])
    link(folder / "test2015", images(root))
    write_val(root, folder, small(linked(80, 60), 12))


def write_val(root: Path, folder: Path, pictures: Iterable[Picture]) -> None:
    """The validation split, whose images are found by number."""
    rng, questions, annotations = generator("vqav2", "val"), [], []
    for image, picture in enumerate(pictures, start=1):
        link(folder / "val2014" / f"COCO_val2014_{image:012d}.jpg", images(root) / picture.file)
        for number, pair in enumerate(about(picture, "short", rng, ALL)):
            identity = {"question_id": 1000 * image + number, "image_id": image}
            questions.append({**identity, "question": pair.question})
            answers = ten_answers(pair.answer, rng)
            annotations.append(
                {
                    **identity,
                    "question_type": " ".join(pair.question.lower().split()[:2]),
                    "answer_type": answer_type(pair.answer),
                    "multiple_choice_answer": pair.answer,
                    "answers": [
                        {"answer": answer, "answer_confidence": "yes", "answer_id": person}
                        for person, answer in enumerate(answers, start=1)
                    ],
                }
            )
    head = {"info": {"description": "drawn scenes", "version": "2.0"}, "license": {"name": "", "url": ""}}
    kind = {"data_type": "mscoco", "data_subtype": "val2014"}
    asked = {**head, "task_type": "Open-Ended", **kind, "questions": questions}
    write_json(folder / "v2_OpenEnded_mscoco_val2014_questions.json", asked)
    write_json(folder / "v2_mscoco_val2014_annotations.json", {**head, **kind, "annotations": annotations})
