"""MMMU's validation split as a table of the hub: thirty subjects, options as the text of a list, up to seven images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from toy.benchmarks.asking import ALL, MANY, about, asked, generator, lettered
from toy.benchmarks.files import IMAGE, STRING, fresh, write_card, write_table
from toy.benchmarks.pictures import Picture, copied
from toy.benchmarks.pope import objects
from toy.benchmarks.tables import OWNER
from toy.data.formats import LETTERS, Pair

# Subjects by domain, as in MMMU.
SUBJECTS = (
    *("Art", "Art_Theory", "Design", "Music"),
    *("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    *("Biology", "Chemistry", "Geography", "Math", "Physics"),
    *("Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine", "Pharmacy", "Public_Health"),
    *("History", "Literature", "Psychology", "Sociology"),
    *("Agriculture", "Architecture_and_Engineering", "Computer_Science", "Electronics", "Energy_and_Power"),
    *("Materials", "Mechanical_Engineering"),
)
PLACEHOLDERS = tuple(f"image_{number}" for number in range(1, 8))
COLUMNS = {"id": STRING, "question": STRING, "options": STRING, "explanation": STRING}
COLUMNS |= dict.fromkeys(PLACEHOLDERS, IMAGE)
COLUMNS |= dict.fromkeys(("img_type", "answer", "topic_difficulty", "question_type", "subfield"), STRING)


def write(root: Path) -> None:
    """Everything below ROOT/hub/lmms-lab-encoder/MMMU: two questions for each subject, some of them open."""
    folder, rng, pictures = fresh(root / "hub" / OWNER / "MMMU"), generator("mmmu"), copied(20, 8)
    rows = []
    for number, subject in enumerate(SUBJECTS):
        picture = pictures[number % len(pictures)]
        if number % 10 == 9:
            second = which(pictures[number % 20], pictures[(number + 5) % 20], rng, number % 20 > 9)
        elif number % 2:
            second = opened(picture, rng, number)
        else:
            second = chosen(picture, rng, number // 2)
        for place, cells in enumerate((chosen(picture, rng, number), second), start=1):
            rows.append({"id": f"validation_{subject}_{place}", "subfield": subject, **ALWAYS, **cells})
    # The answers of the test split are not public.
    hidden = [
        {"id": f"test_{subject}_1", "subfield": subject, **ALWAYS, **chosen(picture, rng, number), "answer": "?"}
        for number, (subject, picture) in enumerate(zip(SUBJECTS, copied(8, 60), strict=False))
    ]
    files = {"validation": rows, "test": hidden}
    for split, table in files.items():
        write_table(folder / "data" / f"{split}-00000-of-00001.parquet", COLUMNS, table)
    write_card(folder, {"default": {split: f"data/{split}-00000-of-00001.parquet" for split in files}})


ALWAYS = {"explanation": "", "img_type": "['Drawings']", "topic_difficulty": "Easy"}


def chosen(picture: Picture, rng: np.random.Generator, number: int) -> dict[str, Any]:
    """A question with four options."""
    for family in (MANY[number % len(MANY)], *MANY):
        pair = lettered(picture, "letters", rng, number, family)
        if pair is not None:
            return cells(pair, picture)
    raise ValueError(f"{picture.name} allows no question.")


def opened(picture: Picture, rng: np.random.Generator, number: int) -> dict[str, Any]:
    """A question without options."""
    families = ALL[number % 5 :]
    return cells(next(about(picture, "short", rng, families)), picture)


def cells(pair: Pair, picture: Picture) -> dict[str, Any]:
    """A question about one picture, whose place MMMU marks in the text."""
    return {
        "question": f"<image 1> {asked(pair)}",
        "options": listed(pair.options),
        "image_1": picture.cell,
        "answer": pair.answer,
        "question_type": "multiple-choice" if pair.options else "open",
    }


def which(first: Picture, second: Picture, rng: np.random.Generator, swap: bool) -> dict[str, Any]:
    """Which of two pictures, both options, holds an object."""
    own = sorted(objects(first) - objects(second))
    pictures = (second, first) if swap else (first, second)
    return {
        "question": f"Which image contains a {own[int(rng.integers(len(own)))]}?",
        "options": listed(["<image 1>", "<image 2>"]),
        "image_1": pictures[0].cell,
        "image_2": pictures[1].cell,
        "answer": LETTERS[pictures.index(first)],
        "question_type": "multiple-choice",
    }


def listed(options: Sequence[str]) -> str:
    """A Python list as text, which is how MMMU stores options."""
    return repr(list(options))
