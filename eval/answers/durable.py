"""An append-only JSON-lines file that survives kill -9 and a full disk."""

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from eval.answers.jsonl import garbage_collection_paused, read_appended
from llava.errors import UserError


class DurableLines:
    """An append-only JSON-lines file in which every line that was ever acknowledged stays readable.

    A process can only die in the middle of the last line, so opening cuts that line and nothing else.

    Attributes:
        rows: every line there is, in file order; empty with `keep=False`.
        count: number of lines.
    """

    def __init__(self, path: Path, keep: bool = True):
        """Open or create the file.

        Args:
            keep: hold the rows in memory.
        """
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self.count = 0
        self._keep = keep
        self._end = self._synced = 0
        self._descriptor = self._open()
        try:
            self._recover()
        except BaseException:
            self.close()
            raise

    def _open(self) -> int:
        try:
            return os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"Cannot open {self.path}: {error.strerror}.") from error

    def _recover(self) -> None:
        unfinished = None
        with garbage_collection_paused():
            for _, line, row in read_appended(self.path):
                if not line.endswith(b"\n"):
                    unfinished = row
                    break
                self._end += len(line)
                if row is not None:
                    self._remember([row])
        self._synced = self._end
        if self._end < os.fstat(self._descriptor).st_size:
            self._cut(self._end)
        if unfinished is not None:
            # Cut exactly before the newline: the line is whole, only its end mark is missing.
            self.append([unfinished])

    def _remember(self, rows: list[dict[str, Any]]) -> None:
        self.count += len(rows)
        if self._keep:
            self.rows.extend(rows)

    @property
    def size(self) -> int:
        """Bytes of all lines."""
        return self._end

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
            if sync:
                os.fsync(self._descriptor)
        except OSError as error:
            self._cut(self._end)
            raise UserError(
                f"Cannot write {self.path}: {error.strerror}; everything before this batch is kept, "
                "so make room and run the same command again."
            ) from error
        except BaseException:  # Ctrl-C between two writes
            self._cut(self._end)
            raise
        self._end += len(data)
        if sync:
            self._synced = self._end
        self._remember(rows)

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

    def replace(self, temporary: Path, rows: list[dict[str, Any]]) -> None:
        """Take `temporary` as the file in one step: it holds the present lines and, after them, those of `rows`."""
        os.replace(temporary, self.path)
        descriptor = self._open()
        os.close(self._descriptor)
        self._descriptor = descriptor
        self._end = self._synced = os.fstat(descriptor).st_size
        self._remember(rows)

    def keep_first(self, count: int) -> None:
        """Cut every line after the first `count`."""
        if count >= self.count:
            return
        end = found = 0
        for _, line, row in read_appended(self.path):
            if found == count:
                break
            end += len(line)
            found += row is not None
        self._cut(end)
        self._end = self._synced = end
        self.count = count
        del self.rows[count:]

    def forget_rows(self) -> None:
        """Hold no rows in memory from now on."""
        self.rows, self._keep = [], False

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
