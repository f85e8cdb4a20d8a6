"""Benchmarks that are read as tables of the hub: MMStar, AI2D, ChartQA, DocVQA, InfoVQA, OCRBench, RealWorldQA."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from toy.benchmarks.asking import ALL, about, asked, generator, lettered_set, rotation, spelled
from toy.benchmarks.files import IMAGE, INTEGER, STRING, STRINGS, fresh, write_card, write_table
from toy.benchmarks.pictures import Picture, copied
from toy.data.formats import Pair

OWNER = "lmms-lab-encoder"
Row = dict[str, Any]


def write(root: Path) -> None:
    """Everything of these sets below ROOT/hub."""
    hub = root / "hub"
    write_mmstar(fresh(hub / "Lin-Chen" / "MMStar"))
    write_ai2d(fresh(hub / OWNER / "ai2d"))
    write_chartqa(fresh(hub / OWNER / "ChartQA"))
    write_docvqa(fresh(hub / OWNER / "DocVQA"))
    write_realworldqa(fresh(hub / OWNER / "RealWorldQA"))
    write_ocrbench(fresh(hub / "echo840" / "OCRBench"))


def answered(
    pictures: Sequence[Picture], name: str, seed: str, each: int, among: Sequence[str] = ALL
) -> Iterator[tuple[Picture, Pair]]:
    """Up to `each` pairs of a format about every picture."""
    rng = generator(seed)
    for row, picture in enumerate(pictures):
        for pair in about(picture, name, rng, rotation(row, each, among)):
            yield picture, pair


def forms(answer: str) -> list[str]:
    """What counts as right: a number also as a word."""
    return list(dict.fromkeys((answer, spelled(answer))))


# Categories of MMStar with the finer ones in each.
MMSTAR = {
    "coarse perception": ("image scene & topic", "image style & quality", "image emotion"),
    "fine-grained perception": ("attribute & celebrity recognition", "object location", "object counting"),
    "instance reasoning": (
        "single-instance reasoning",
        "cross-instance attribute reasoning",
        "cross-instance relation",
    ),
    "logical reasoning": ("diagram reasoning", "code & sequence reasoning", "common reasoning"),
    "science & technology": ("biology & chemistry & physics", "electronics & energy", "geography & earth science"),
    "math": ("numeric commonsense & calculation", "geometry", "statistical reasoning"),
}


def write_mmstar(folder: Path) -> None:
    """Seventy-two questions, four for each of the finer categories."""
    columns = {"index": INTEGER, "question": STRING, "image": IMAGE, "answer": STRING}
    columns |= {"category": STRING, "l2_category": STRING}
    kinds = [(category, finer) for category, all_finer in MMSTAR.items() for finer in all_finer for _ in range(4)]
    made = lettered_set(copied(22, 2), "mmstar", generator("mmstar"), len(kinds), 5)
    rows = [
        {"index": index, "question": pair.question, "image": picture.cell, "answer": pair.answer}
        | {"category": category, "l2_category": finer}
        for index, ((category, finer), (picture, pair)) in enumerate(zip(kinds, made, strict=True))
    ]
    write_table(folder / "mmstar.parquet", columns, rows)
    write_card(folder, {"val": {"val": "mmstar.parquet"}})


def write_ai2d(folder: Path) -> None:
    """The answer is the place of the right option, as a string."""
    columns = {"question": STRING, "options": STRINGS, "answer": STRING, "image": IMAGE}
    rows = [
        {
            "question": asked(pair),
            "options": list(pair.options),
            "answer": str("ABCD".index(pair.answer)),
            "image": picture.cell,
        }
        for picture, pair in lettered_set(copied(20, 6), "letters", generator("ai2d"), 60, 4)
    ]
    write_table(folder / "data" / "test-00000-of-00001.parquet", columns, rows)


def write_chartqa(folder: Path) -> None:
    """One half counts as asked by people, the other as made from them."""
    columns = {"type": STRING, "question": STRING, "answer": STRING, "image": IMAGE}
    made = list(answered(copied(16, 10), "single_word", "chartqa", 5, ("count", "digit", "color", "shape", "relate")))
    rows = [
        {"type": "human_test" if 2 * number < len(made) else "augmented_test", "question": pair.question}
        | {"answer": pair.answer, "image": picture.cell}
        for number, (picture, pair) in enumerate(made)
    ]
    write_table(folder / "data" / "test-00000-of-00001.parquet", columns, rows)


# The two sets that share a repository, with the families that they ask.
DOCUMENTS = {
    "DocVQA": ("digit", "color", "digit", "shape", "count"),
    "InfographicVQA": ("count", "relate", "digit", "side"),
}


def write_docvqa(folder: Path) -> None:
    """Validation with answers and test without, for both configurations."""
    columns = {"questionId": STRING, "question": STRING, "image": IMAGE, "answers": STRINGS, "data_split": STRING}
    card: dict[str, dict[str, str]] = {}
    for place, (config, among) in enumerate(DOCUMENTS.items()):
        for split, pictures in (("validation", copied(12, 14 + 12 * place)), ("test", copied(4, 50 + 4 * place))):
            made = answered(pictures, "short", f"{config} {split}", 4, among)
            rows = [
                {"questionId": str(49153 + number), "question": pair.question, "image": picture.cell}
                | {"answers": forms(pair.answer) if split == "validation" else None}
                | {"data_split": "val" if split == "validation" else split}
                for number, (picture, pair) in enumerate(made)
            ]
            file = f"{config}/{split}-00000-of-00001.parquet"
            write_table(folder / file, columns, rows)
            card.setdefault(config, {})[split] = file
    write_card(folder, card)


def write_realworldqa(folder: Path) -> None:
    """Questions that hold their own instruction: mostly a letter, else a word."""
    columns = {"image": IMAGE, "question": STRING, "answer": STRING}
    rows = [
        {"image": picture.cell, "question": pair.question, "answer": pair.answer}
        for picture, pair in answered(copied(16, 30), "realworld", "realworldqa", 5)
    ]
    write_table(folder / "data" / "test-00000-of-00001.parquet", columns, rows)


# Types of OCRBench with the data set that a type comes from; HME100k is the one that is compared differently.
OCRBENCH = {
    "Regular Text Recognition": "IIIT5K",
    "Irregular Text Recognition": "svtp",
    "Artistic Text Recognition": "WordArt",
    "Handwriting Recognition": "IAM",
    "Digit String Recognition": "ORAND",
    "Non-Semantic Text Recognition": "NonSemanticText",
    "Scene Text-centric VQA": "TextVQA",
    "Doc-oriented VQA": "docVQA",
    "Key Information Extraction": "FUNSD",
    "Handwritten Mathematical Expression Recognition": "HME100k",
}


def write_ocrbench(folder: Path) -> None:
    """Handwritten digits, ten questions of every type."""
    columns = {"dataset": STRING, "question": STRING, "question_type": STRING, "answer": STRINGS, "image": IMAGE}
    made = list(answered(copied(44, 4), "bare", "ocrbench", 4, ("digit",)))
    rows = [
        {"dataset": dataset, "question": pair.question, "question_type": kind}
        | {"answer": [pair.answer], "image": picture.cell}
        for number, (kind, dataset) in enumerate(OCRBENCH.items())
        for picture, pair in made[10 * number : 10 * number + 10]
    ]
    write_table(folder / "data" / "test-00000-of-00001.parquet", columns, rows)
    write_card(folder, {"default": {"test": "data/test-00000-of-00001.parquet"}})
