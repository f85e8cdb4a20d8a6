"""JSON files: readers whose errors name the file and line, and writers that replace a file in one step.

`DurableLines` is an append-only JSON-lines file that survives kill -9 and a full disk.
"""

import contextlib
import fcntl
import glob
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
class AnswerRow:
    """One answer, read from an answer file.

    Attributes:
        where: file and line, for errors.
        id: the question's id; None if the file gives none.
        text: the model's raw answer.
        prompt: what the model was asked, if the file records it.
        asked: the question as worded in the data set, if the file records it.
        number: row number in the data set, which lmms-eval's files give instead of an id.
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
    """Whether `path` is a regular file; UserError if something else has this name.

    A folder, a pipe or a broken link in place of an optional file must not be mistaken for a missing file.
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
    """Parse a JSON document strictly: double keys and half surrogate pairs, which Python accepts, are errors.

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
    """A JSON object as a dict; ValueError if a key occurs twice, where json.loads would keep the last entry."""
    # All lines of a file have the same keys; sharing one string per key saves much of the memory of a large store.
    found = {sys.intern(key): value for key, value in pairs}
    if len(found) < len(pairs):
        repeated = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {repeated[:80]!r} stands twice in one object")
    return found


# One decoder for every line: json.loads builds a new one per call when it is given a hook.
DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)


def parse_line(path: Path, number: int, line: bytes) -> dict[str, Any]:
    """The JSON object in one line of a JSON-lines file; UserError if it holds anything else."""
    row = parse_json(line, f"{path} line {number}")
    if not isinstance(row, dict):
        raise UserError(f"{path} line {number} should be a JSON object, got {type(row).__name__}.")
    return row


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line of a JSON-lines file, without blank lines."""
    # Split at the newline byte only: str.splitlines would also split a text at U+2028.
    for number, line in enumerate(read_bytes(path).split(b"\n"), start=1):
        if line.strip():
            yield number, parse_line(path, number, line)


def read_appended(path: Path) -> Iterator[tuple[int, bytes, dict[str, Any] | None]]:
    """(line number, bytes, object) of every line of a file whose writer may have been killed.

    Only the last line can be incomplete. It is skipped if it lacks its newline and is not a JSON object. If only the
    newline is missing, the line is returned without it. The object of a blank line is None.

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
    """Replace `path` and make its folder. Bytes and text are written as they are, everything else as JSON."""
    make_folder(path.parent)
    if isinstance(content, bytes):
        write_bytes(path, content)
    elif isinstance(content, str):
        write_bytes(path, content.encode())
    else:
        write_json(path, content)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` in one step: a reader, or a crash, sees the old file or the new one, never half of it.

    Raises:
        UserError: the disk is full or fails.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        remove_abandoned(path)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            with contextlib.suppress(OSError):  # on a file system without locks `remove_abandoned` does nothing
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            write_all(descriptor, content)
            os.fsync(descriptor)
            os.replace(temporary, path)
        finally:
            os.close(descriptor)
    except BaseException as error:  # Ctrl-C, too
        with contextlib.suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError):
            raise
        raise UserError(f"Cannot write {path}: {error.strerror}.") from error
    sync_folder(path.parent)


def write_all(descriptor: int, content: bytes) -> None:
    """Write all of `content`; a single system call may write only part of it."""
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]


def remove_abandoned(path: Path) -> None:
    """Delete the temporary files of processes that were killed in `write_bytes(path, ...)`.

    A process keeps its temporary file locked, so a file without a lock has lost its process, on whatever machine.
    """
    for other in path.parent.glob(f".{glob.escape(path.name)}.*"):
        if other.name.removeprefix(f".{path.name}.").isdecimal():
            with contextlib.suppress(OSError), open(other, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                other.unlink()


def make_folder(folder: Path) -> None:
    """Make a folder and its parents; it may exist already.

    Raises:
        UserError: the disk fails, or something that is not a folder has the name.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"Cannot make the folder {folder}: {reason}.") from error
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make new file names in `folder` survive a power failure, if the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class DurableLines:
    """An append-only JSON-lines file: a line stays readable once `append` has returned.

    A process that is killed can leave only its last line incomplete, so opening the file cuts that line and nothing
    else. Lines are appended at the current end of the file. If two processes write to one file, because the file system
    has no locks, they do not overwrite each other's lines.

    Attributes:
        rows: all lines, in file order.
    """

    def __init__(self, path: Path):
        """Open or create the file, and cut a last line that is incomplete."""
        self.path = path
        self.rows: list[dict[str, Any]] = []
        # The end of the file in bytes, and the bytes and lines that are safe from a power failure.
        self._end = self._synced = self._synced_rows = 0
        self._shared = False  # whether another process was seen writing to the file
        try:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise UserError(f"Cannot open {self.path}: {error.strerror}.") from error
        try:
            unfinished = None
            for _, line, row in read_appended(self.path):
                if not line.endswith(b"\n"):
                    unfinished = row
                    break
                self._end += len(line)
                if row is not None:
                    self.rows.append(row)
            self._synced, self._synced_rows = self._end, len(self.rows)
            if self._end < os.fstat(self._descriptor).st_size:
                self._cut(self._end)
            if unfinished is not None:  # only the newline of this line is missing
                self.append([unfinished])
        except BaseException:
            self.close()
            raise

    @property
    def unlinked(self) -> bool:
        """Whether another process deleted the file."""
        return os.fstat(self._descriptor).st_nlink == 0

    def append(self, rows: Iterable[dict[str, Any]], sync: bool = True) -> None:
        """Write `rows`; once this returns they survive a kill of this process.

        Args:
            sync: also wait until they survive a power failure.

        Raises:
            UserError: the disk is full or fails; then none of the rows is in the file.
        """
        rows = list(rows)
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        start = self._end
        try:
            start = os.fstat(self._descriptor).st_size
            write_all(self._descriptor, data)
        except BaseException as error:  # Ctrl-C between two writes, too
            with contextlib.suppress(OSError):
                if data.startswith(os.pread(self._descriptor, len(data) + 1, start)):  # else another process wrote it
                    self._cut(start)
            if not isinstance(error, OSError):
                raise
            raise UserError(
                f"Cannot write {self.path}: {error.strerror}; everything before this batch is kept, "
                "so make room and run the same command again."
            ) from error
        self._shared |= start != self._end
        self._end = start + len(data)
        self.rows += rows
        if sync:
            self.sync()

    def sync(self) -> None:
        """Wait until every line survives a power failure.

        Raises:
            UserError: the disk is full or fails; the lines since the last sync are lost.
        """
        if self._synced == self._end or self._descriptor < 0:
            return
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            # Which of the lines after the last sync the file system still holds is unknown.
            with contextlib.suppress(OSError):
                if not self._shared and os.fstat(self._descriptor).st_size == self._end:
                    self._cut(self._synced)
            self._end = self._synced
            del self.rows[self._synced_rows :]
            raise UserError(
                f"Cannot write {self.path}: {error.strerror}; the lines since the last sync are lost and everything "
                "before them is kept, so make room and run the same command again."
            ) from error
        self._synced, self._synced_rows = self._end, len(self.rows)

    def _cut(self, end: int) -> None:
        with contextlib.suppress(OSError):  # if this fails too, the next start cuts the incomplete line
            os.ftruncate(self._descriptor, end)

    def close(self) -> None:
        """Sync and close; further calls do nothing.

        Raises:
            UserError: the disk is full or fails.
        """
        if self._descriptor < 0:
            return
        try:
            self.sync()
        finally:
            descriptor, self._descriptor = self._descriptor, -1
            try:
                os.close(descriptor)
            except OSError as error:
                raise UserError(
                    f"Cannot close {self.path}: {error.strerror}; run the same command again, which asks what is lost."
                ) from error
