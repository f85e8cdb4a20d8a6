"""MMBench's .tsv files: rows of text, and base64 images that are decoded when they are asked for."""

import base64
import binascii
import csv
import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from eval.answers.jsonl import read_bytes
from eval.benchmarks.base import fingerprint
from eval.benchmarks.media import Inline
from llava.errors import UserError

if TYPE_CHECKING:
    import pandas

Row = dict[str, str | None]

# Cells that pandas, with which the official tools read these files, takes for empty: an option "None" is no option.
# Listed here because other versions of pandas have other lists.
EMPTY = frozenset(
    ("", "nan", "NaN", "-nan", "-NaN", "null", "NULL", "None", "NA", "N/A", "n/a", "<NA>", "#NA", "#N/A", "#N/A N/A")
) | {"1.#IND", "-1.#IND", "1.#QNAN", "-1.#QNAN"}
REQUIRED = ("index", "question", "A", "B", "image")
# A shorter image is the index of another row that shows the same one.
SHORTEST_PICTURE = 64
LONGEST_CELL = 1 << 30
LONGEST_INDEX = 18


@dataclass(frozen=True)
class Tsv:
    """A file that was read.

    Attributes:
        columns: as the file names and orders them.
        rows: without the image; empty cells are None, words like "None" are kept. "picture" names what `pictures`
            opens.
        fingerprint: hash of the file, as eval.benchmarks.base.fingerprint has it.
    """

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    pictures: Inline
    fingerprint: str


def read_tsv(path: Path) -> Tsv:
    """A question file of MMBench."""
    table = read_table(path)
    columns = tuple(table.columns)
    if lost := [name for name in REQUIRED if name not in columns]:
        raise UserError(f"{path} has no column {', '.join(lost)}; it should be one of MMBench's .tsv files.")
    rows: list[Row] = []
    encoded: dict[str, str] = {}
    shared: dict[str, str] = {}
    for number, cells in enumerate(table.itertuples(index=False, name=None), start=1):
        where = f"{path} row {number}"
        row, picture = read_row(columns, cells, where)
        name = str(row["index"])
        if name in encoded or name in shared:
            raise UserError(f"{where} has the index {name}, which an earlier row has too.")
        (encoded if len(picture) > SHORTEST_PICTURE else shared)[name] = picture
        rows.append(row)
    if not rows:
        raise UserError(f"{path} has no rows.")
    for row in rows:
        row["picture"] = find_picture(str(row["index"]), shared, encoded, path)

    def fetch(name: str) -> bytes:
        return decode(encoded[name], f"{path}, index {name},")

    return Tsv(columns, tuple(rows), Inline(str(path), frozenset(encoded), fetch), fingerprint([path]))


def read_table(path: Path) -> "pandas.DataFrame":
    """The cells of a file as text; cells that a row lacks are NaN."""
    # Imported here: other benchmarks do without it.
    import pandas

    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_CELL))
    content = io.BytesIO(read_bytes(path))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pandas.errors.ParserWarning)  # said of rows with too many cells
            # The other engine of pandas fills short rows with empty cells, so that a cut file would go unnoticed.
            return pandas.read_csv(
                content,
                sep="\t",
                dtype=str,
                keep_default_na=False,
                index_col=False,
                engine="python",
                encoding="utf-8-sig",
            )
    except (ValueError, pandas.errors.ParserWarning) as error:  # ParserError, EmptyDataError, UnicodeDecodeError
        raise UserError(f"{path} is not a table of MMBench ({str(error).splitlines()[0]}).") from error


def read_row(columns: tuple[str, ...], cells: tuple[object, ...], where: str) -> tuple[Row, str]:
    """The row without its image, and the image as it stands in the file."""
    there = sum(isinstance(cell, str) for cell in cells)
    if there != len(columns):
        raise UserError(f"{where} has {there} cells, the first line names {len(columns)} columns.")
    row: Row = {name: str(cell) or None for name, cell in zip(columns, cells, strict=True)}
    index, picture = row["index"] or "", row.pop("image")
    if not (index.isascii() and index.isdigit() and len(index) <= LONGEST_INDEX):
        raise UserError(
            f"{where} has the index {index[:40]!r}, which should be a whole number of at most {LONGEST_INDEX} digits."
        )
    row["index"] = str(int(index))
    if row["question"] in EMPTY or row["question"] is None or picture in EMPTY or picture is None:
        raise UserError(f"{where} has no {'image' if row['question'] not in (None, *EMPTY) else 'question'}.")
    return row, picture


def find_picture(name: str, shared: Mapping[str, str], encoded: Mapping[str, str], path: Path) -> str:
    """Index of the row that holds the image of row `name`."""
    picture = shared.get(name, name)
    if picture not in encoded:
        raise UserError(f"Row {name} in {path} shows the image of row {picture!r}, which has none.")
    return picture


def decode(text: str, where: str) -> bytes:
    """The image file that a cell holds."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"{where} has no readable image ({error}); get the file again.") from error
