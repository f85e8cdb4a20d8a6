"""The toy benchmarks in the file layouts of the real ones: what their writers share.

File writers: compact JSON, JSON lines, relative links, parquet tables with pictures. Pictures: those of the toy GQA,
linked, and small copies of further test scenes. Question-answer pairs about them: no text occurs twice about a picture,
every option letter is right equally often, and ten people answer.
"""

import io
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image, ImageFilter

from eval.yaml_files import read_yaml
from lab.toy.data.formats import LETTERS, Pair, compose
from lab.toy.data.scenes import Scene, Thing, scene
from lab.toy.data.vocabulary import COLOR_NAMES, DIGITS, SHAPES

NAMES: dict[str, Any] = read_yaml(Path(__file__).with_name("names.yaml"))

# Files.

# Of every table: written in one piece, so that a picture that several questions share is stored once.
ROWS_TOGETHER = 10_000


def fresh(folder: Path) -> Path:
    """An empty folder in place of whatever was there."""
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder


def write_file(path: Path, content: str | bytes) -> None:
    """One file, its folders made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, content: Any) -> None:
    """One JSON document on one line."""
    write_jsonl(path, [content])


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """One JSON object a line."""
    write_file(path, "".join(f"{json.dumps(row, ensure_ascii=False, separators=(',', ':'))}\n" for row in rows))


def prompt(identity: int | str, image: str, message: str, category: str = "default") -> dict[str, Any]:
    """A line of LLaVA's question files."""
    return {"question_id": identity, "image": image, "text": message, "category": category}


def link(path: Path, target: Path) -> None:
    """A symbolic link at `path` to `target`, relative, so that it holds in every copy of the repository."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(os.path.relpath(target, path.parent))


OWNER = "lmms-lab-encoder"  # of most repositories on the hub
# Column types of the tables, for arrow and for the library `datasets`.
STRING, INTEGER, STRINGS, FLOATS, IMAGE = "string", "int64", "strings", "floats", "image"
_TEXT: dict[str, str] = {"dtype": "string", "_type": "Value"}
_TYPES = {
    STRING: (pa.string(), _TEXT),
    INTEGER: (pa.int64(), {"dtype": "int64", "_type": "Value"}),
    STRINGS: (pa.list_(pa.string()), {"feature": _TEXT, "_type": "List"}),
    FLOATS: (pa.list_(pa.float64()), {"feature": {"dtype": "float64", "_type": "Value"}, "_type": "List"}),
    IMAGE: (pa.struct([("bytes", pa.binary()), ("path", pa.string())]), {"_type": "Image"}),
}


def write_table(path: Path, columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> None:
    """A parquet table as the hub holds them.

    Args:
        columns: name -> one of the types above.
        rows: pictures as {"bytes": the file, "path": its name}; a missing key is an empty cell.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    features = {name: _TYPES[kind][1] for name, kind in columns.items()}
    schema = pa.schema(
        [(name, _TYPES[kind][0]) for name, kind in columns.items()],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    table = pa.Table.from_pylist([{name: row.get(name) for name in columns} for row in rows], schema)
    pq.write_table(table, path, row_group_size=ROWS_TOGETHER, compression="zstd")


def write_splits(
    folder: Path, columns: Mapping[str, str], splits: Mapping[str, Sequence[Mapping[str, Any]]], card: bool = False
) -> None:
    """A table for each split, data/SPLIT-00000-of-00001.parquet; with `card` also the README.md that lists them."""
    files = {split: f"data/{split}-00000-of-00001.parquet" for split in splits}
    for split, rows in splits.items():
        write_table(folder / files[split], columns, rows)
    if card:
        write_card(folder, {"default": files})


def write_card(folder: Path, configs: Mapping[str, Mapping[str, str]]) -> None:
    """The README.md that tells `datasets` which files hold which split: config -> split -> path in `folder`."""
    listed = [
        {"config_name": config, "data_files": [{"split": split, "path": path} for split, path in splits.items()]}
        for config, splits in configs.items()
    ]
    told = yaml.safe_dump({"configs": listed}, sort_keys=False)
    about_it = "Drawn scenes in the layout of the data set of this name; see ../../../README.md."
    write_file(folder / "README.md", f"---\n{told}---\n\n{about_it}\n")


# Pictures.

# Test scenes of each kind in assets/eval/gqa; the copies are drawn from later scenes.
LINKED = 150
# Further scenes of each kind, of which the smoothest are taken: sensor noise is what fills a JPEG file.
DRAWN = 100
QUALITY = 60
PALETTE = 128


@dataclass(frozen=True)
class Picture:
    """A test scene; `picture` gives the one object of a scene, which is drawn once."""

    index: int
    dense: bool

    @property
    def name(self) -> str:
        """File stem, "test00000n" for the first natural scene."""
        return f"test{self.index:05d}{'d' if self.dense else 'n'}"

    @property
    def file(self) -> str:
        """File name in assets/eval/gqa/data/images."""
        return f"{self.name}.jpg"

    @cached_property
    def _scene(self) -> Scene:
        return scene("test", self.index, self.dense)

    @property
    def things(self) -> tuple[Thing, ...]:
        return self._scene.things

    @property
    def original(self) -> bytes:
        """The JPEG file as assets/eval/gqa ships it."""
        return self._scene.jpeg

    @cached_property
    def jpeg(self) -> bytes:
        """A smaller JPEG file."""
        return self.compressed(QUALITY)

    def compressed(self, quality: int) -> bytes:
        """A JPEG file of that quality."""
        file = io.BytesIO()
        Image.fromarray(self._scene.image).save(file, "JPEG", quality=quality, optimize=True)
        return file.getvalue()

    @cached_property
    def png(self) -> bytes:
        """A PNG file with few colours."""
        file = io.BytesIO()
        # Noise does not compress. Median cut, the default, would leave small things no colour of their own.
        smooth = Image.fromarray(self._scene.image).filter(ImageFilter.MedianFilter(3))
        smooth.quantize(PALETTE, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
        return file.getvalue()

    @property
    def cell(self) -> dict[str, object]:
        """The smaller JPEG file as a cell of a table."""
        return {"bytes": self.jpeg, "path": self.file}


picture = cache(Picture)


def linked(count: int, first: int = 0) -> list[Picture]:
    """`count` pictures that assets/eval/gqa/data/images holds, natural and dense in turn, from scene `first` on."""
    return [picture((first + row // 2) % LINKED, row % 2 == 1) for row in range(count)]


def by_size(pictures: Iterable[Picture]) -> list[Picture]:
    """The smallest files first."""
    return sorted(pictures, key=lambda one: (len(one.original), one.name))


def small(pictures: Iterable[Picture], count: int) -> list[Picture]:
    """The `count` pictures with the smallest files, in the order given."""
    pictures = list(pictures)
    chosen = by_size(pictures)[:count]
    return [picture for picture in pictures if picture in chosen]


@cache
def _smooth() -> tuple[Picture, ...]:
    """Pictures of the scenes after those of GQA, natural and dense in turn, the smallest files first."""
    kinds = [by_size(picture(LINKED + row, dense) for row in range(DRAWN)) for dense in (False, True)]
    return tuple(one for pair in zip(*kinds, strict=True) for one in pair)


def copied(count: int, first: int = 0) -> list[Picture]:
    """`count` pictures for sets that hold their own small copies, the smoothest from place `first` on."""
    return list(_smooth()[first : first + count])


def objects(one: Picture) -> set[str]:
    """Colour and shape of everything in a picture, "red star"."""
    return {f"{COLOR_NAMES[t.color]} {SHAPES[t.shape]}" for t in one.things if t.kind == "shape"}


def images(root: Path) -> Path:
    """The folder that sets link to, ROOT being assets/eval."""
    return root / "gqa" / "data" / "images"


# Question-answer pairs.

# Families of lab.toy.data.questions by what their answers are.
MANY = ("color", "shape", "relate", "count", "digit")  # four different answers or more
PAIRS = ("exist", "verify", "choose", "side")  # one of two
ALL = MANY + PAIRS

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DRAWS = 400  # until the right answer stands where it should


def generator(*parts: str | int) -> np.random.Generator:
    """A random generator for a set, or for a part of it. "minis" is part of the seed: the sets depend on it."""
    return np.random.default_rng([zlib.crc32(str(part).encode()) for part in ("minis", *parts)])


def about(one: Picture, name: str, rng: np.random.Generator, families: Sequence[str]) -> Iterator[Pair]:
    """At most one pair of format `name` for each of the families, no question twice."""
    seen = set()
    for family in families:
        pair = compose(one.things, name, rng, family=family)
        if pair is not None and asked(pair) not in seen:
            seen.add(asked(pair))
            yield pair


def asked(pair: Pair) -> str:
    """The question without options and reference tokens, which may follow on further lines."""
    return pair.question.split("\n")[0]


def rotation(row: int, count: int, among: Sequence[str] = ALL) -> list[str]:
    """`count` of the families, different ones for the picture of each row."""
    return [among[(row * count + place) % len(among)] for place in range(count)]


def answered(
    pictures: Sequence[Picture], name: str, rng: np.random.Generator, each: int, among: Sequence[str] = ALL
) -> Iterator[tuple[Picture, Pair]]:
    """Up to `each` pairs of a format about every picture, of other families from picture to picture."""
    for row, one in enumerate(pictures):
        for pair in about(one, name, rng, rotation(row, each, among)):
            yield one, pair


def lettered(
    one: Picture, name: str, rng: np.random.Generator, place: int, families: Sequence[str], options: int = 4
) -> Pair | None:
    """A pair with that many options whose answer stands at `place`, of the first family of which the scene has one."""
    for family in families:
        for _ in range(DRAWS):
            pair = compose(one.things, name, rng, family=family)
            if pair is None:
                break
            if len(pair.options) == options and pair.answer == LETTERS[place % options]:
                return pair
    return None


def lettered_set(
    pictures: Sequence[Picture], name: str, rng: np.random.Generator, count: int, each: int, among: Sequence[str] = MANY
) -> Iterator[tuple[Picture, Pair]]:
    """`count` pairs with four options, up to `each` about a picture; A, B, C and D are right equally often."""
    made = 0
    for row, one in enumerate(pictures):
        seen = set()
        for family in rotation(row, each, among):
            pair = lettered(one, name, rng, made, [family])
            if made == count or pair is None or asked(pair) in seen:
                continue
            seen.add(asked(pair))
            made += 1
            yield one, pair


def spelled(answer: str) -> str:
    """A digit as a word, everything else as it is."""
    return NUMBER_WORDS[int(answer)] if answer in DIGITS else answer


def forms(answer: str) -> list[str]:
    """What counts as right: a number also as a word."""
    return list(dict.fromkeys((answer, spelled(answer))))


def ten_answers(answer: str, rng: np.random.Generator) -> list[str]:
    """Seven to ten people give the answer, some of them spell a number out; the others are wrong, each in a way."""
    kinds = (COLOR_NAMES, SHAPES, DIGITS, ("yes", "no"), ("left", "right"), ("above", "below"), ("top", "bottom"))
    kind = next((kind for kind in kinds if answer in kind), ())
    wrong = [word for word in (*kind, "unanswerable") if word != answer] or ["unsuitable"]
    right = int(rng.integers(7, 11))
    given = [spelled(answer) if rng.random() < 0.1 else answer for _ in range(right)]
    given += [wrong[int(rng.integers(len(wrong)))] for _ in range(10 - right)]
    return [given[place] for place in rng.permutation(10)]


def answer_type(answer: str) -> str:
    """VQA's type of an answer."""
    return "yes/no" if answer in ("yes", "no") else "number" if answer in DIGITS else "other"


def cells(picture: Picture, pair: Pair, **more: Any) -> dict[str, Any]:
    """A row of a table: question, answer and image, and what the set has besides or instead."""
    return {"question": pair.question, "answer": pair.answer, "image": picture.cell, **more}
