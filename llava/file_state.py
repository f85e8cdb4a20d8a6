"""What tells that a file is still the one that was read. Whatever remembers something about a file asks this."""

from pathlib import Path
from typing import NamedTuple


class FileState(NamedTuple):
    """A file at one moment; any write to it, and any other file in its place, gives another state.

    The time of the last change (st_ctime) belongs to it because the time of modification can be set back: `cp -p`,
    `rsync -t` and `touch -r` do. The inode belongs to it because a file can be replaced within one tick of the clock.
    """

    path: Path
    size: int
    modified_ns: int
    changed_ns: int
    inode: int


def file_state(path: Path) -> FileState:
    """The state of a file now, links followed.

    Raises:
        OSError: there is no such file.
    """
    found = path.stat()
    return FileState(path.absolute(), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)
