"""File writers of the toy benchmarks: compact JSON, JSON lines, relative links, parquet tables with pictures."""

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

# Of every table: written in one piece, so that a picture that several questions share is stored once.
ROWS_TOGETHER = 10_000


def fresh(folder: Path) -> Path:
    """An empty folder in place of whatever was there."""
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder


def write_text(path: Path, text: str) -> None:
    """One text file, its folders made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """One binary file, its folders made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_json(path: Path, content: Any) -> None:
    """One JSON document on one line."""
    write_text(path, _json(content) + "\n")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object a line."""
    write_text(path, "".join(f"{_json(row)}\n" for row in rows))


def _json(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))


def prompt(identity: int | str, image: str, message: str, category: str = "default") -> dict[str, Any]:
    """A line of LLaVA's question files."""
    return {"question_id": identity, "image": image, "text": message, "category": category}


def link(path: Path, target: Path) -> None:
    """A symbolic link at `path` to `target`, relative, so that it holds in every copy of the repository."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(os.path.relpath(target, path.parent))


# Column types of the tables.
STRING, INTEGER, STRINGS = "string", "int64", "strings"
IMAGE, IMAGES = "image", "images"

_BYTES = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_ARROW = {
    STRING: pa.string(),
    INTEGER: pa.int64(),
    STRINGS: pa.list_(pa.string()),
    IMAGE: _BYTES,
    IMAGES: pa.list_(_BYTES),
}
_FEATURES = {
    STRING: {"dtype": "string", "_type": "Value"},
    INTEGER: {"dtype": "int64", "_type": "Value"},
    STRINGS: {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"},
    IMAGE: {"_type": "Image"},
    IMAGES: {"feature": {"_type": "Image"}, "_type": "List"},
}


def write_table(path: Path, columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> None:
    """A parquet table as the hub holds them.

    Args:
        columns: name -> one of the types above.
        rows: pictures as {"bytes": the file, "path": its name}; a missing key is an empty cell.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    features = {name: _FEATURES[kind] for name, kind in columns.items()}
    schema = pa.schema(
        [(name, _ARROW[kind]) for name, kind in columns.items()],
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
    lines = ["---", "configs:"]
    for config, splits in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split, path in splits.items():
            lines += [f"  - split: {split}", f"    path: {path}"]
    lines += ["---", "", "Drawn scenes in the layout of the data set of this name; see ../../../README.md.", ""]
    write_text(folder / "README.md", "\n".join(lines))
