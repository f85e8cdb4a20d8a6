"""Read an offline W&B run back: what was logged, without a server and without wandb's own reader.

A .wandb file is a 7-byte header and then LevelDB's log format: blocks of 32 KiB, and in them fragments of a 7-byte
head (checksum, length, kind) and their bytes. A record is one whole fragment, or a first, middles and a last one.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from wandb.proto.wandb_internal_pb2 import Record

HEADER = 7
# Variables that change what is logged, and where.
NAMES = "API_KEY MODE DIR DATA_DIR CACHE_DIR CONFIG_DIR BASE_URL PROJECT ENTITY RUN_ID RUN_GROUP JOB_TYPE NAME TAGS"
VARIABLES = [f"WANDB_{name}" for name in NAMES.split()]
BLOCK = 32768
FRAGMENT = struct.Struct("<IHB")
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def without_wandb(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """No key, no mode, no home: what a fresh machine has."""
    monkeypatch.setenv("HOME", str(home))
    for name in ("NETRC", *VARIABLES):
        monkeypatch.setenv(name, "x")  # so that what `eval.tracking` sets for the process is taken back after the test
        monkeypatch.delenv(name)


@dataclass
class OfflineRun:
    """Everything a run told W&B.

    Attributes:
        name: the id of the run.
        history: one dict per `run.log`.
        artifacts: name -> path in the artifact -> file on the disk.
        metadata: name of an artifact -> its metadata.
    """

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    exit_code: int | None = None
    name: str = ""
    job_type: str = ""
    group: str = ""
    tags: tuple[str, ...] = ()
    display_name: str = ""
    artifacts: dict[str, dict[str, Path]] = field(default_factory=dict)
    metadata: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def keys(self) -> set[str]:
        """Everything that a panel can show: keys of the history and of the summary."""
        return {*self.summary, *(key for row in self.history for key in row)}

    def last(self, key: str) -> Any:
        """The last value logged under `key`."""
        return next(row[key] for row in reversed(self.history) if key in row)

    def table(self, key: str) -> dict[str, Any]:
        """The content of a logged table: columns and data, images as `_type` and `path` in `table_files`."""
        return json.loads(self.table_files(key)[f"{key}.table.json"].read_text())

    def media(self, key: str) -> Path:
        """The file that was logged under `key`, such as a plot."""
        return self.folder / "files" / self.last(key)["path"]

    def table_files(self, key: str) -> dict[str, Path]:
        """The artifact that the server shows a table from."""
        return self.artifacts[f"run-{self.name}-{key}"]


def read_fragments(data: bytes) -> Iterator[bytes]:
    """The records of a .wandb file as bytes."""
    if data[:4] != b":W&B":
        raise ValueError(f"not a W&B file, it starts with {data[:8]!r}")
    position, parts = HEADER, b""
    while position + FRAGMENT.size <= len(data):
        room = BLOCK - position % BLOCK
        if room < FRAGMENT.size:  # a head never crosses a block: the rest is padding
            position += room
            continue
        _, length, kind = FRAGMENT.unpack_from(data, position)
        body = data[position + FRAGMENT.size : position + FRAGMENT.size + length]
        position += FRAGMENT.size + length
        parts = body if kind in (WHOLE, FIRST) else parts + body
        if kind in (WHOLE, LAST):
            yield parts


def items(entries: Any) -> dict[str, Any]:
    """Key-value entries of a record, nested keys as nested dicts."""
    tree: dict[str, Any] = {}
    for entry in entries:
        *outer, name = entry.nested_key or [entry.key]
        branch = tree
        for key in outer:
            branch = branch.setdefault(key, {})
        branch[name] = json.loads(entry.value_json)
    return tree


def read_run(folder: Path) -> OfflineRun:
    """Read `offline-run-...`, the folder that `wandb sync` takes."""
    run = OfflineRun(folder)
    (file,) = folder.glob("run-*.wandb")
    for fragment in read_fragments(file.read_bytes()):
        record = Record.FromString(fragment)
        match record.WhichOneof("record_type"):
            case "run":
                run.name, run.job_type, run.group = record.run.run_id, record.run.job_type, record.run.run_group
                run.tags, run.display_name = tuple(record.run.tags), record.run.display_name
                run.config |= items(record.run.config.update)
            case "config":
                run.config |= items(record.config.update)
            case "artifact":
                entries = record.artifact.manifest.contents
                name = record.artifact.name
                run.artifacts[name] = {entry.path: Path(entry.local_path) for entry in entries}
                run.metadata[name] = json.loads(record.artifact.metadata or "{}")
            case "history":
                run.history.append(items(record.history.item))
            case "summary":
                run.summary |= items(record.summary.update)
            case "exit":
                run.exit_code = record.exit.exit_code
    return run


def find_runs(output: Path) -> list[Path]:
    """Offline runs below an output folder, oldest first."""
    return sorted(output.glob("wandb/offline-run-*"))
