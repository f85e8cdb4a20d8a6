"""Benchmarks that are read as tables of the hub.

MMStar, AI2D, ChartQA, DocVQA, InfoVQA, OCRBench and RealWorldQA: one question a row. Flickr30k and NoCaps: one picture
a row, with captions as people might write them. MMMU: thirty subjects, options as the text of a list, up to seven
images.
"""

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from toy.benchmarks import (
    ALL,
    IMAGE,
    INTEGER,
    MANY,
    NAMES,
    STRING,
    STRINGS,
    Picture,
    about,
    answered,
    asked,
    copied,
    forms,
    fresh,
    generator,
    lettered,
    lettered_set,
    objects,
    write_card,
    write_splits,
    write_table,
)
from toy.data.formats import LETTERS, Pair, caption_references
from toy.data.questions import attempt

OWNER = "lmms-lab-encoder"


def cells(picture: Picture, pair: Pair, **more: Any) -> dict[str, Any]:
    """A row of a table: question, answer and image, and what the set has besides or instead."""
    return {"question": pair.question, "answer": pair.answer, "image": picture.cell, **more}


# Sets of questions.


def write_tables(root: Path) -> None:
    """Everything of these sets below ROOT/hub."""
    hub = root / "hub"
    write_mmstar(fresh(hub / "Lin-Chen" / "MMStar"))
    write_ai2d(fresh(hub / OWNER / "ai2d"))
    write_chartqa(fresh(hub / OWNER / "ChartQA"))
    write_docvqa(fresh(hub / OWNER / "DocVQA"))
    write_realworldqa(fresh(hub / OWNER / "RealWorldQA"))
    write_ocrbench(fresh(hub / "echo840" / "OCRBench"))


def write_mmstar(folder: Path) -> None:
    """Seventy-two questions, four for each of the finer categories."""
    columns = {"index": INTEGER, "question": STRING, "image": IMAGE, "answer": STRING}
    columns |= {"category": STRING, "l2_category": STRING}
    kinds = [
        (category, finer) for category, all_finer in NAMES["mmstar"].items() for finer in all_finer for _ in range(4)
    ]
    made = lettered_set(copied(22, 2), "mmstar", generator("mmstar"), len(kinds), 5)
    rows = [
        cells(picture, pair, index=index, category=category, l2_category=finer)
        for index, ((category, finer), (picture, pair)) in enumerate(zip(kinds, made, strict=True))
    ]
    write_table(folder / "mmstar.parquet", columns, rows)
    write_card(folder, {"val": {"val": "mmstar.parquet"}})


def write_ai2d(folder: Path) -> None:
    """The answer is the place of the right option, as a string."""
    columns = {"question": STRING, "options": STRINGS, "answer": STRING, "image": IMAGE}
    rows = [
        cells(picture, pair, question=asked(pair), options=list(pair.options), answer=str(LETTERS.index(pair.answer)))
        for picture, pair in lettered_set(copied(20, 6), "letters", generator("ai2d"), 60, 4)
    ]
    write_splits(folder, columns, {"test": rows})


def write_chartqa(folder: Path) -> None:
    """One half counts as asked by people, the other as made from them."""
    columns = {"type": STRING, "question": STRING, "answer": STRING, "image": IMAGE}
    made = list(
        answered(copied(16, 10), "single_word", generator("chartqa"), 5, ("count", "digit", "color", "shape", "relate"))
    )
    rows = [
        cells(picture, pair, type="human_test" if 2 * number < len(made) else "augmented_test")
        for number, (picture, pair) in enumerate(made)
    ]
    write_splits(folder, columns, {"test": rows})


def write_docvqa(folder: Path) -> None:
    """Validation with answers and test without, for both configurations."""
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


def write_realworldqa(folder: Path) -> None:
    """Questions that hold their own instruction: mostly a letter, else a word."""
    columns = {"image": IMAGE, "question": STRING, "answer": STRING}
    rows = [cells(*one) for one in answered(copied(16, 30), "realworld", generator("realworldqa"), 5)]
    write_splits(folder, columns, {"test": rows})


def write_ocrbench(folder: Path) -> None:
    """Handwritten digits, ten questions of every type."""
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


# MMMU.

MMMU_COLUMNS = {"id": STRING, "question": STRING, "options": STRING, "explanation": STRING}
MMMU_COLUMNS |= dict.fromkeys([f"image_{number}" for number in range(1, 8)], IMAGE)
MMMU_COLUMNS |= dict.fromkeys(("img_type", "answer", "topic_difficulty", "question_type", "subfield"), STRING)
ALWAYS = {"explanation": "", "img_type": "['Drawings']", "topic_difficulty": "Easy"}


def write_mmmu(root: Path) -> None:
    """Everything below ROOT/hub/lmms-lab-encoder/MMMU: two questions for each subject, some of them open."""
    folder, rng, pictures = fresh(root / "hub" / OWNER / "MMMU"), generator("mmmu"), copied(20, 8)
    rows, subjects = [], list(chain.from_iterable(NAMES["mmmu"]))
    for number, subject in enumerate(subjects):
        picture = pictures[number % len(pictures)]
        if number % 10 == 9:
            second = which_picture(pictures[number % 20], pictures[(number + 5) % 20], rng, number % 20 > 9)
        elif number % 2:
            second = mmmu_cells(next(about(picture, "short", rng, ALL[number % 5 :])), picture)
        else:
            second = with_options(picture, rng, number // 2)
        for place, asked_cells in enumerate((with_options(picture, rng, number), second), start=1):
            rows.append({"id": f"validation_{subject}_{place}", "subfield": subject, **ALWAYS, **asked_cells})
    # The answers of the test split are not public.
    hidden = [
        {"id": f"test_{subject}_1", "subfield": subject, **ALWAYS, **with_options(picture, rng, number), "answer": "?"}
        for number, (subject, picture) in enumerate(zip(subjects, copied(8, 60), strict=False))
    ]
    write_splits(folder, MMMU_COLUMNS, {"validation": rows, "test": hidden}, card=True)


def with_options(picture: Picture, rng: np.random.Generator, number: int) -> dict[str, Any]:
    """A question with four options."""
    return mmmu_cells(lettered(picture, "letters", rng, number, (MANY[number % len(MANY)], *MANY)), picture)


def mmmu_cells(pair: Pair, picture: Picture) -> dict[str, Any]:
    """A question about one picture, whose place MMMU marks in the text; options are a Python list as text."""
    return {
        "question": f"<image 1> {asked(pair)}",
        "options": repr(list(pair.options)),
        "image_1": picture.cell,
        "answer": pair.answer,
        "question_type": "multiple-choice" if pair.options else "open",
    }


def which_picture(first: Picture, second: Picture, rng: np.random.Generator, swap: bool) -> dict[str, Any]:
    """Which of two pictures, both options, holds an object."""
    own = sorted(objects(first) - objects(second))
    pictures = (second, first) if swap else (first, second)
    return {
        "question": f"Which image contains a {own[int(rng.integers(len(own)))]}?",
        "options": repr(["<image 1>", "<image 2>"]),
        "image_1": pictures[0].cell,
        "image_2": pictures[1].cell,
        "answer": LETTERS[pictures.index(first)],
        "question_type": "multiple-choice",
    }
