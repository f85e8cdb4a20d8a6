"""MMBench's .tsv files: rows of text, and base64 pictures that stay on the disk until they are asked for.

A file has about 200 MB, nearly all of it pictures. It is read once; of the pictures only the place of their row is
kept.
"""

import base64
import binascii
import csv
import hashlib
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from eval.pictures import Inline
from llava.errors import UserError

Row = dict[str, str | None]

# Cells that pandas, with which the official tools read these files, takes for empty: an option "None" is no option.
EMPTY = frozenset(
    ("", "nan", "NaN", "-nan", "-NaN", "null", "NULL", "None", "NA", "N/A", "n/a", "<NA>", "#NA", "#N/A", "#N/A N/A")
) | {"1.#IND", "-1.#IND", "1.#QNAN", "-1.#QNAN"}
REQUIRED = ("index", "question", "A", "B", "image")
# A shorter picture is the index of another row that shows the same one.
SHORTEST_PICTURE = 64
LONGEST_CELL = 1 << 30


@dataclass(frozen=True)
class Tsv:
    """A file that was read.

    Attributes:
        columns: as the file names and orders them.
        rows: without the picture; empty cells are None. "picture" names what `pictures` opens.
        fingerprint: hash of the file, as eval.dataset.fingerprint has it.
    """

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    pictures: Inline
    fingerprint: str


class Lines:
    """The lines of a file as text, with their place and a hash of them all."""

    def __init__(self, path: Path):
        self.path = path
        self.end = 0
        self.hash = hashlib.sha256()

    def __iter__(self) -> Iterator[str]:
        with open(self.path, "rb") as file:
            for line in file:
                encoding = "utf-8" if self.end else "utf-8-sig"
                self.end += len(line)
                self.hash.update(line)
                yield line.decode(encoding)


def read_tsv(path: Path) -> Tsv:
    """A question file of MMBench."""
    lines, rows, places, shared = Lines(path), [], {}, {}
    try:
        table = parse(lines)
        columns = tuple(next(table, ()))
        if lost := [name for name in REQUIRED if name not in columns]:
            raise UserError(f"{path} has no column {', '.join(lost)}; it should be one of MMBench's .tsv files.")
        start = lines.end
        for number, cells in enumerate(table, start=1):
            where = f"{path} row {number}"
            row, picture = read_row(columns, cells, where)
            name = str(row["index"])
            if name in places or name in shared:
                raise UserError(f"{where} has the index {name}, which an earlier row has too.")
            # Asked for after the row was read: a quoted cell may hold newlines, so a row is not always one line.
            if len(picture) > SHORTEST_PICTURE:
                places[name] = (start, lines.end - start)
            else:
                shared[name] = picture
            start = lines.end
            rows.append(row)
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a table of MMBench ({error}).") from error
    if not rows:
        raise UserError(f"{path} has no rows.")
    for row in rows:
        row["picture"] = find_picture(str(row["index"]), shared, places, path)

    def fetch(name: str) -> bytes:
        return read_picture(path, columns, *places[name])

    seal = hashlib.sha256(lines.hash.digest()).hexdigest()[:16]
    return Tsv(columns, tuple(rows), Inline(str(path), frozenset(places), fetch), seal)


def parse(lines: Iterable[str]) -> Iterator[list[str]]:
    """Rows of cells, blank lines left out."""
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_CELL))
    return (cells for cells in csv.reader(lines, delimiter="\t") if cells)


def read_row(columns: tuple[str, ...], cells: list[str], where: str) -> tuple[Row, str]:
    """The row without its picture, and the picture as it stands in the file."""
    if len(cells) != len(columns):
        raise UserError(f"{where} has {len(cells)} cells, the first line names {len(columns)} columns.")
    row: Row = {name: None if cell in EMPTY else cell for name, cell in zip(columns, cells, strict=True)}
    index, picture = row["index"] or "", row.pop("image")
    if not (index.isascii() and index.isdigit()):
        raise UserError(f"{where} has the index {index!r}, which should be a whole number.")
    row["index"] = str(int(index))
    if row["question"] is None or picture is None:
        raise UserError(f"{where} has no {'question' if row['question'] is None else 'image'}.")
    return row, picture


def find_picture(name: str, shared: dict[str, str], places: dict[str, tuple[int, int]], path: Path) -> str:
    """Index of the row that holds the picture of row `name`."""
    picture = shared.get(name, name)
    if picture not in places:
        raise UserError(f"Row {name} in {path} shows the picture of row {picture!r}, which has none.")
    return picture


def read_picture(path: Path, columns: tuple[str, ...], start: int, length: int) -> bytes:
    """The image file in the row at this place."""
    try:
        with open(path, "rb") as file:
            file.seek(start)
            text = file.read(length).decode()
        cells = next(parse(io.StringIO(text, newline="\n")))
        return base64.b64decode(cells[columns.index("image")], validate=True)
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error
    except (binascii.Error, ValueError, IndexError, StopIteration) as error:
        raise UserError(f"{path} has no readable picture at byte {start:,} ({error}); get the file again.") from error
