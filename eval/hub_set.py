"""What benchmarks share that exist as a data set of the hub only: there the official layout is the mirror."""

import hashlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from eval.dataset import Dataset, Question
from eval.hub import Table, open_table
from eval.metrics import Score, first_names
from llava.errors import UserError


def open_split(data: Path, ids: Sequence[str], config: str | None, split: str, source: str) -> Table:
    """The split from DATA/hub; from the hub itself only when a source was asked for by name.

    Args:
        ids: repositories, the newest owner first.
        source: of eval.dataset.SOURCES; "official" and "mirror" are the same data set.
    """
    table = open_table(data, ids, config, split, download=source != "auto")
    if not len(table):
        raise UserError(f"Split {split} of {table.where} has no rows; fetch the data set again.")
    return table


def facts(table: Table, profile: str, expected: int | None = None, **more: Any) -> dict[str, Any]:
    """The `facts` of a data set.

    Args:
        expected: questions of the split that published numbers are about.
    """
    counts = {"questions": len(table)} | ({"expected_questions": expected} if expected is not None else {})
    return {"source": "mirror", "data_set": table.id, "profile": profile, **counts, **more}


def dataset_of(
    title: str,
    table: Table,
    columns: Sequence[str],
    questions: Sequence[Question],
    score: Callable[[Sequence[str], Mapping[str, str]], Score],
    judge: Callable[[Question, str], float],
    profile: str,
    expected: int,
    max_new_tokens: int,
) -> Dataset:
    """A set that no server grades.

    Args:
        columns: those that questions and scores depend on.
        score: asked ids and texts by id -> the metric, to which a note about the set's version is added.
        expected: questions of the split that published numbers are about.
    """
    return Dataset(
        title,
        tuple(questions),
        table.pictures(),
        table.fingerprint(columns),
        lambda asked, texts: with_version(score(asked, texts), len(questions), expected),
        judge,
        no_submission,
        max_new_tokens=max_new_tokens,
        facts=facts(table, profile, expected),
    )


def with_version(score: Score, found: int, expected: int) -> Score:
    """The score, with a note if the split has another number of questions than published results."""
    if found == expected:
        return score
    note = f"the data set has {found:,} questions, published numbers are about {expected:,}"
    return replace(score, notes=(*score.notes, note))


def no_submission(texts: Mapping[str, str]) -> dict[str, Any]:
    """For sets that no server grades and whose scripts read no file of answers alone."""
    return {}


def unique_ids(names: Iterable[Any]) -> list[str]:
    """Ids as strings; those that stand for several rows get "#1", "#2", ... in file order."""
    names = [str(name) for name in names]
    repeated = {name for name, count in Counter(names).items() if count > 1}
    seen: Counter[str] = Counter()
    unique = []
    for name in names:
        seen[name] += 1
        unique.append(f"{name}#{seen[name]}" if name in repeated else name)
    return unique


def picture_names(keys: Iterable[Hashable], column: str = "image") -> list[str]:
    """Per row the picture's name in Table.pictures; rows with the same key share the first one's.

    Rows about one picture then share one pass of the vision tower, and intervals can draw pictures.
    """
    first: dict[Hashable, int] = {}
    return [f"{first.setdefault(key, row)}/{column}" for row, key in enumerate(keys)]


def picture_hashes(table: Table, column: str = "image") -> list[Hashable]:
    """Per row a hash of the encoded picture, where no column says which rows are about the same one."""
    cells = enumerate(table.rows[column])
    return [hashlib.sha256(cell["bytes"]).digest() if cell and cell.get("bytes") else row for row, cell in cells]


def letters(options: Sequence[str]) -> dict[str, str]:
    """Options under their letters A, B, C, ..."""
    return {chr(ord("A") + place): str(option) for place, option in enumerate(options)}


def option_lines(options: Mapping[str, str], form: str = "{}. {}") -> str:
    """One line per option."""
    return "\n".join(form.format(letter, option) for letter, option in options.items())


def check_answers(where: str, answers: Mapping[str, Any]) -> None:
    """References have to be there before a model runs for hours."""
    if lost := [name for name, answer in answers.items() if answer in (None, "", [])]:
        raise UserError(f"{len(lost):,} rows of {where} have no answer: {first_names(lost)}.")


def ungraded(main: str, file: str, server: str) -> Score:
    """The score of a split whose answers only a server knows."""
    return Score({main: None}, {}, {}, (f"answers are not public: upload {file} to {server}",), main=main)
