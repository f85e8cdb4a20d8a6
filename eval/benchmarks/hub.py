"""Data sets of the hub as lmms-eval reads them: a local copy below DATA/hub, or the hub itself when asked for.

    DATA/hub/lmms-lab/POPE/...   as `hf download lmms-lab/POPE --repo-type dataset --local-dir DATA/hub/lmms-lab/POPE`

The sets moved from one owner to another in 2026; copies under either name are found. Nothing of a data set is
executed: its tables are read by the `datasets` library, its images as bytes.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eval.answers.jsonl import is_file
from eval.benchmarks.base import Contents, Question, Reference
from eval.benchmarks.media import Inline
from eval.benchmarks.records import Record, check_all, columns_of
from eval.metrics import Score, first_names
from llava.errors import UserError
from llava.file_state import file_state


@dataclass(frozen=True)
class Table:
    """One split of a data set.

    Attributes:
        id: of the repository, "lmms-lab/POPE".
        where: the local copy or the hub's address, for sentences.
        rows: datasets.Dataset whose images are not decoded.
    """

    id: str
    where: str
    rows: Any

    def __len__(self) -> int:
        return len(self.rows)

    def records(self, schema: type[Record]) -> list[Record]:
        """The rows without their images, checked.

        Args:
            schema: its required fields are the columns that have to be there, its optional ones are left out of the
                rows where the table has no such column.
        """
        required, optional = columns_of(schema)
        names = [*required, *(name for name in optional if name in self.rows.column_names)]
        rows = self._select(names)
        return check_all(schema, ((f"{self.where} row {number}", row) for number, row in enumerate(rows)))

    def fingerprint(self, columns: Sequence[str]) -> str:
        """Hash of these columns' contents."""
        text = json.dumps(self._select(columns), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _select(self, columns: Sequence[str]) -> list[dict[str, Any]]:
        if lost := [name for name in columns if name not in self.rows.column_names]:
            raise UserError(
                f"{self.where} has no column {', '.join(lost)}; it has {', '.join(self.rows.column_names)}."
            )
        rows: list[dict[str, Any]] = self.rows.select_columns(list(columns)).to_list()
        return rows

    def pictures(self, columns: Sequence[str] = ("image",)) -> Inline:
        """Images named "ROW/COLUMN", or "ROW/COLUMN/NUMBER" where a cell is a list of them."""
        names: set[str] = set()
        for column in (name for name in columns if name in self.rows.column_names):
            names |= cell_names(self.rows.data.column(column), column)
        return Inline(self.where, frozenset(names), self._bytes)

    def row_images(self) -> list[str]:
        """The name of each row's image."""
        return [f"{row}/image" for row in range(len(self))]

    def contents(
        self,
        questions: Iterable[Question],
        references: Mapping[str, Reference],
        columns: Sequence[str],
        pictures: Inline | None = None,
    ) -> Contents[Reference]:
        """The questions that were made of the rows.

        Args:
            columns: those that questions and scores depend on.
            pictures: by default those of the column "image".
        """
        return Contents(self.id, tuple(questions), references, pictures or self.pictures(), self.fingerprint(columns))

    def _bytes(self, name: str) -> bytes:
        row, column, *number = name.split("/")
        cell = self.rows[int(row)][column]
        if number:
            cell = cell[int(number[0])]
        if not isinstance(cell, dict) or not cell.get("bytes"):
            raise UserError(f"Image {name} in {self.where} has no bytes; fetch the data set again.")
        content: bytes = cell["bytes"]
        return content


def cell_names(cells: Any, column: str) -> set[str]:
    """Names of the images in an Arrow column, without touching their bytes: a split may hold many gigabytes."""
    import pyarrow
    import pyarrow.compute

    if pyarrow.types.is_list(cells.type) or pyarrow.types.is_large_list(cells.type):
        counts = pyarrow.compute.list_value_length(cells).to_pylist()
        return {f"{row}/{column}/{number}" for row, count in enumerate(counts) for number in range(count or 0)}
    return {f"{row}/{column}" for row, there in enumerate(cells.is_valid().to_pylist()) if there}


def local_copy(data: Path, ids: Iterable[str]) -> tuple[str, Path] | None:
    """The first of `ids` that lies below DATA/hub."""
    return next(((name, data / "hub" / name) for name in ids if (data / "hub" / name).is_dir()), None)


def open_table(data: Path, ids: Sequence[str], config: str | None, split: str, source: str = "auto") -> Table:
    """A split of a data set, from DATA/hub or from the hub itself.

    Args:
        ids: repositories, the newest owner first.
        source: of eval.benchmarks.base.SOURCES; the hub is asked only when one was named. For sets that exist on the
            hub only, "official" and "mirror" are the same.
    """
    copy = local_copy(data, ids)
    if copy is None and source == "auto":
        raise UserError(
            f"No copy of {' or '.join(ids)} below {data / 'hub'}; download it there "
            f"(hf download {ids[0]} --repo-type dataset --local-dir {data / 'hub' / ids[0]}), "
            "or let --source mirror read it from the hub."
        )
    failures = []
    for name, folder in [copy] if copy is not None else [(name, None) for name in ids]:
        try:
            table = _open(name, folder, config, split)
        except UserError as error:
            failures.append(str(error))
            continue
        if not len(table):
            raise UserError(f"Split {split} of {table.where} has no rows; fetch the data set again.")
        return table
    raise UserError(" ".join(failures))


def _open(name: str, folder: Path | None, config: str | None, split: str) -> Table:
    import datasets

    if folder is not None:
        datasets.disable_progress_bars()  # of the library's own copy of a table, which says nothing to a user here
    where = str(folder) if folder is not None else f"hub data set {name}"
    try:
        rows = datasets.load_dataset(
            where if folder is not None else name, config, split=split, cache_dir=folder and str(_cache(folder))
        )
    # The library's errors for a wrong split, configuration, schema and network have no common base.
    except Exception as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        what = f"configuration {config}, split {split}" if config else f"split {split}"
        raise UserError(f"Cannot read {what} of {where} ({line}).") from error
    return Table(name, where, undecoded(rows))


def _cache(folder: Path) -> Path:
    """Where `datasets` keeps what it read from a local copy, another place once a file of the copy has changed.

    On its own, datasets 5.2 does not notice changes in a folder whose README.md lists its files.
    """
    import datasets

    state = [(str(path), *file_state(path)) for path in sorted(folder.rglob("*.*")) if path.is_file()]
    return Path(datasets.config.HF_DATASETS_CACHE) / "local" / hashlib.sha256(repr(state).encode()).hexdigest()[:16]


def undecoded(rows: Any) -> Any:
    """The same rows with images as bytes: decoding is done once, by the one function that opens images here."""
    import datasets

    for column, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
        elif isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image):
            rows = rows.cast_column(column, datasets.List(datasets.Image(decode=False)))
    return rows


def official_file(
    data: Path, source: str, title: str, files: Sequence[Path], mirror: Sequence[str], origin: str = ""
) -> Path | None:
    """The question file to read; None for the mirror.

    Args:
        source: one of eval.benchmarks.base.SOURCES.
        title: of the questions, for the error: "ScienceQA test".
        files: names the official file goes by, the usual one first.
        mirror: repositories on the hub, the newest id first.
        origin: where to get the official file, for the error.
    """
    if source == "mirror":
        return None
    if (there := next((file for file in files if is_file(file)), None)) is not None:
        return there
    if source == "auto" and local_copy(data, mirror) is not None:
        return None
    folder = files[0].relative_to(data).parts[0]
    raise UserError(
        f"No {title} questions at {' or '.join(map(str, files))}"
        + (f" (it is in {origin})" if origin else "")
        + (f" and no copy of {' or '.join(mirror)} below {data / 'hub'}" if source == "auto" else "")
        + f"; --data should be the folder that holds {folder}/"
        + ("." if source == "official" else ", or read them from the hub with --source mirror.")
    )


def with_version(score: Score, there: int, expected: int) -> Score:
    """The score, with a note if the split has another number of questions than published results."""
    if there == expected:
        return score
    note = f"the data set has {there:,} questions, published numbers are about {expected:,}"
    return replace(score, notes=(*score.notes, note))


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


def by_unique_id(rows: Iterable[Record], column: str = "question_id") -> dict[str, Record]:
    """The rows by id, by `unique_ids` where that stands for several."""
    rows = list(rows)
    return dict(zip(unique_ids(row[column] for row in rows), rows, strict=True))


def picture_names(table: Table, keys: Iterable[Hashable] | None = None) -> list[str]:
    """Per row the image's name in Table.pictures; rows with the same key share the first one's.

    Rows about one image then share one pass of the vision tower, and intervals can draw images.

    Args:
        keys: per row what says which image it is about; None takes a hash of the encoded image.
    """
    if keys is None:
        cells = enumerate(table.rows["image"])
        keys = [hashlib.sha256(cell["bytes"]).digest() if cell and cell.get("bytes") else row for row, cell in cells]
    first: dict[Hashable, int] = {}
    return [f"{first.setdefault(key, row)}/image" for row, key in enumerate(keys)]


def letters(options: Sequence[str | int | float]) -> dict[str, str]:
    """Options under their letters A, B, C, ..."""
    return {chr(ord("A") + place): str(option) for place, option in enumerate(options)}


def option_lines(options: Mapping[str, str], form: str = "{}. {}") -> str:
    """One line per option."""
    return "\n".join(form.format(letter, option) for letter, option in options.items())


def check_answers(where: str, answers: Mapping[str, Any]) -> None:
    """References have to be there before a model runs for hours."""
    if lost := [name for name, answer in answers.items() if answer in (None, "", [])]:
        raise UserError(f"{len(lost):,} rows of {where} have no answer: {first_names(lost)}.")


def ungraded(
    main: str, file: str, server: str, more: str = "", whole: int = 0
) -> Callable[[Sequence[str], Mapping[str, str]], Score]:
    """`score` of a split whose answers only a server knows.

    Args:
        main: name of the number that it gives.
        more: what has to be done before the upload.
        whole: questions of the split, all of which the server wants; 0 where the upload has an entry for each.
    """

    def score(asked: Sequence[str], texts: Mapping[str, str]) -> Score:
        note = f"answers are not public: upload {file} to {server}{more}"
        if len(asked) < whole:
            note += f"; it refuses this one, which answers {len(asked):,} of {whole:,} questions"
        return Score({main: None}, {}, {}, (note,), main=main)

    return score
