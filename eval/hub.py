"""Data sets of the hub as lmms-eval reads them: a local copy below DATA/hub, or the hub itself when asked for.

    DATA/hub/lmms-lab/POPE/...   as `hf download lmms-lab/POPE --repo-type dataset --local-dir DATA/hub/lmms-lab/POPE`

The sets moved from one owner to another in 2026; copies under either name are found. Nothing of a data set is
executed: its tables are read by the `datasets` library, its pictures as bytes.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.pictures import Inline
from llava.errors import UserError


@dataclass(frozen=True)
class Table:
    """One split of a data set.

    Attributes:
        id: of the repository, "lmms-lab/POPE".
        where: the local copy or the hub's address, for sentences.
        rows: datasets.Dataset whose pictures are not decoded.
    """

    id: str
    where: str
    rows: Any

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, name: str) -> list[Any]:
        """All values of a column."""
        return list(self.rows[name])

    def records(self, columns: Sequence[str], optional: Sequence[str] = ()) -> list[dict[str, Any]]:
        """The rows without their pictures.

        Args:
            columns: UserError if one is not there.
            optional: left out of the rows where the table has no such column.
        """
        if lost := [name for name in columns if name not in self.rows.column_names]:
            raise UserError(
                f"{self.where} has no column {', '.join(lost)}; it has {', '.join(self.rows.column_names)}."
            )
        names = [*columns, *(name for name in optional if name in self.rows.column_names)]
        return self.rows.select_columns(names).to_list()

    def fingerprint(self, columns: Sequence[str]) -> str:
        """Hash of these columns' contents."""
        text = json.dumps(self.records(columns), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def pictures(self, columns: Sequence[str] = ("image",)) -> Inline:
        """Pictures named "ROW/COLUMN", or "ROW/COLUMN/NUMBER" where a cell is a list of them."""
        names: set[str] = set()
        for column in (name for name in columns if name in self.rows.column_names):
            names |= cell_names(self.rows.data.column(column), column)
        return Inline(self.where, frozenset(names), self._bytes)

    def _bytes(self, name: str) -> bytes:
        row, column, *number = name.split("/")
        cell = self.rows[int(row)][column]
        if number:
            cell = cell[int(number[0])]
        if not isinstance(cell, dict) or not cell.get("bytes"):
            raise UserError(f"Picture {name} in {self.where} has no bytes; fetch the data set again.")
        return cell["bytes"]


def cell_names(cells: Any, column: str) -> set[str]:
    """Names of the pictures in an Arrow column, without touching their bytes: a split may hold many gigabytes."""
    import pyarrow
    import pyarrow.compute

    if pyarrow.types.is_list(cells.type) or pyarrow.types.is_large_list(cells.type):
        counts = pyarrow.compute.list_value_length(cells).to_pylist()
        return {f"{row}/{column}/{number}" for row, count in enumerate(counts) for number in range(count or 0)}
    return {f"{row}/{column}" for row, there in enumerate(cells.is_valid().to_pylist()) if there}


def local_copy(data: Path, ids: Iterable[str]) -> tuple[str, Path] | None:
    """The first of `ids` that lies below DATA/hub."""
    return next(((name, data / "hub" / name) for name in ids if (data / "hub" / name).is_dir()), None)


def open_table(data: Path, ids: Sequence[str], config: str | None, split: str, download: bool = False) -> Table:
    """A split of a data set.

    Args:
        ids: repositories, the newest id first.
        download: ask the hub when there is no local copy.
    """
    found = local_copy(data, ids)
    if found is None and not download:
        raise UserError(
            f"No copy of {' or '.join(ids)} below {data / 'hub'}; download it there "
            f"(hf download {ids[0]} --repo-type dataset --local-dir {data / 'hub' / ids[0]}), "
            "or let --source mirror read it from the hub."
        )
    if found is not None:
        return _open(*found, config, split)
    failures = []
    for name in ids:
        try:
            return _open(name, None, config, split)
        except UserError as error:
            failures.append(str(error))
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

    files = [path for path in sorted(folder.rglob("*.*")) if path.is_file()]
    state = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return Path(datasets.config.HF_DATASETS_CACHE) / "local" / hashlib.sha256(repr(state).encode()).hexdigest()[:16]


def undecoded(rows: Any) -> Any:
    """The same rows with pictures as bytes: decoding is done once, by the one function that opens pictures here."""
    import datasets

    for column, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
        elif isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image):
            rows = rows.cast_column(column, datasets.List(datasets.Image(decode=False)))
    return rows
