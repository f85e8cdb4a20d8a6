"""JSON files: readers whose errors name the file and line, and writers that replace a file in one step.

`DurableLines` is an append-only JSON-lines file that survives kill -9 and a full disk.
"""

import contextlib
import json
import os
import re
import stat
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.errors import UserError

# An escape that may be half of a surrogate pair: JSON can write one alone, UTF-8 cannot.
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class Row:
    """One answer as a file has it.

    Attributes:
        where: file and line, for errors.
        id: None where the file names none.
        text: the model's raw text.
        prompt: what the model was asked, if the file says it.
        asked: the question as the data set has it, where the file holds that.
        number: row of the data set, which lmms-eval's files give instead of an id.
        fields: the whole record.
    """

    where: str
    id: str | None
    text: str
    prompt: str | None = None
    number: int | None = None
    asked: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


def is_file(path: Path) -> bool:
    """Whether there is a regular file; UserError if something else has its name.

    A folder, a pipe or a broken link in the place of an optional file must not count as "no such file".
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        if path.is_symlink():
            goal = os.readlink(path)
            raise UserError(f"Cannot read {path}: it is a link to {goal}, which does not exist.") from error
        return False
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"Cannot read {path}: {getattr(error, 'strerror', None) or error}.") from error
    if not stat.S_ISREG(mode):
        kind = "folder" if stat.S_ISDIR(mode) else "pipe, socket or device"
        raise UserError(f"Cannot read {path}: it should be a regular file, not a {kind}.")
    return True


def read_bytes(path: Path) -> bytes:
    """The content of a regular file."""
    if not is_file(path):
        raise UserError(f"Cannot read {path}: No such file or directory.")
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error


def read_json(path: Path) -> Any:
    """One JSON document."""
    return parse_json(read_bytes(path), str(path))


def parse_json(content: bytes, where: str) -> Any:
    """A JSON document, refused if Python would read it in silence as something else than it says.

    Args:
        where: file, or file and line, for the error.
    """
    try:
        document = DECODER.decode(content.decode(json.detect_encoding(content)))
        if SURROGATE.search(content):
            json.dumps(document, ensure_ascii=False).encode()
    except RecursionError as error:
        raise UserError(f"{where} is not valid JSON (nested too deeply).") from error
    except UnicodeEncodeError as error:
        raise UserError(f"{where} is not valid JSON (it holds half of a surrogate pair, which is no text).") from error
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, a number with thousands of digits, a double key
        reason = "a number with too many digits" if "integer string conversion" in str(error) else error
        raise UserError(f"{where} is not valid JSON ({reason}).") from error
    return document


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON document; json.loads alone would keep the last of two entries with the same key."""
    # The lines of a file have the same keys: one string for all of them is a third of the memory of a large store.
    found = {sys.intern(key): value for key, value in pairs}
    if len(found) < len(pairs):
        repeated = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {repeated[:80]!r} stands twice in one object")
    return found


# One decoder for every line: json.loads builds a new one per call when it is given a hook.
DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)


def parse_line(path: Path, number: int, line: bytes) -> dict[str, Any]:
    """One line of a JSON-lines file: it must be an object."""
    row = parse_json(line, f"{path} line {number}")
    if not isinstance(row, dict):
        raise UserError(f"{path} line {number} should be a JSON object, got {type(row).__name__}.")
    return row


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) for every line that is not blank."""
    # Split on the newline byte only: str.splitlines would also break inside a text at U+2028.
    for number, line in enumerate(read_bytes(path).split(b"\n"), start=1):
        if line.strip():
            yield number, parse_line(path, number, line)


def read_appended(path: Path) -> Iterator[tuple[int, bytes, dict[str, Any] | None]]:
    """(line number, bytes, object) of every line of a file that a process may have been killed while appending to.

    Only the last line can be torn, so it is left out if it has no newline and is no JSON object. A line that is whole
    but for its newline comes without one. Blank lines have no object.

    Raises:
        UserError: any other line is not a JSON object.
    """
    if not is_file(path):
        return
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    row = None
                elif line.endswith(b"\n"):
                    row = parse_line(path, number, line)
                else:
                    try:
                        row = parse_line(path, number, line)
                    except UserError:
                        return
                yield number, line, row
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error


def write_json(path: Path, content: Any) -> None:
    """Replace `path` by one JSON document."""
    write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())


def write_file(path: Path, content: Any) -> None:
    """Replace `path`: bytes and text as they are, everything else as JSON. Its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        write_bytes(path, content)
    elif isinstance(content, str):
        write_bytes(path, content.encode())
    else:
        write_json(path, content)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` in one step: a reader, or a crash, sees the old file or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"Cannot write {path}: {error.strerror}.") from error
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make new names in `folder` durable; a file system that cannot do it is left alone."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class DurableLines:
    """An append-only JSON-lines file in which every line that was ever acknowledged stays readable.

    A process can only die in the middle of the last line, so opening cuts that line and nothing else.

    Attributes:
        rows: every line there is, in file order.
    """

    def __init__(self, path: Path):
        """Open or create the file."""
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self._end = self._synced = 0
        try:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"Cannot open {self.path}: {error.strerror}.") from error
        try:
            self._recover()
        except BaseException:
            self.close()
            raise

    def _recover(self) -> None:
        unfinished = None
        for _, line, row in read_appended(self.path):
            if not line.endswith(b"\n"):
                unfinished = row
                break
            self._end += len(line)
            if row is not None:
                self.rows.append(row)
        self._synced = self._end
        if self._end < os.fstat(self._descriptor).st_size:
            self._cut(self._end)
        if unfinished is not None:
            # Cut exactly before the newline: the line is whole, only its end mark is missing.
            self.append([unfinished])

    @property
    def unlinked(self) -> bool:
        """Whether another process deleted the file."""
        return os.fstat(self._descriptor).st_nlink == 0

    def append(self, rows: Iterable[dict[str, Any]], sync: bool = True) -> None:
        """Write `rows`; on return they survive the end of this process.

        Args:
            sync: also wait until they would survive a power failure.

        Raises:
            UserError: the disk is full or fails; none of the rows is in the file then.
        """
        rows = list(rows)
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        try:
            os.lseek(self._descriptor, self._end, os.SEEK_SET)
            left = memoryview(data)
            while left:
                left = left[os.write(self._descriptor, left) :]
        except BaseException as error:  # Ctrl-C between two writes, too
            self._cut(self._end)
            if not isinstance(error, OSError):
                raise
            raise UserError(
                f"Cannot write {self.path}: {error.strerror}; everything before this batch is kept, "
                "so make room and run the same command again."
            ) from error
        self._end += len(data)
        self.rows += rows
        if sync:
            self.sync()

    def sync(self) -> None:
        """Return when every line would survive a power failure."""
        if self._synced == self._end or self._descriptor < 0:
            return
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            # What the file system still holds of the lines after the last sync is unknown.
            self._cut(self._synced)
            self._end = self._synced
            raise UserError(
                f"Cannot write {self.path}: {error.strerror}; the lines since the last sync are lost and everything "
                "before them is kept, so make room and run the same command again."
            ) from error
        self._synced = self._end

    def _cut(self, end: int) -> None:
        with contextlib.suppress(OSError):  # if this fails too, the next start cuts the torn line
            os.ftruncate(self._descriptor, end)

    def close(self) -> None:
        """Sync and close; further calls do nothing."""
        if self._descriptor >= 0:
            try:
                self.sync()
            finally:
                os.close(self._descriptor)
                self._descriptor = -1
