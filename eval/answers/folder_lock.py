"""One writer per output folder."""

import contextlib
import os
import re
from pathlib import Path

from filelock import FileLock, Timeout

from llava.errors import UserError

# Files that `eval.jsonl.write_bytes` had not renamed yet when its process (the number) was killed.
UNFINISHED = re.compile(r"\..+\.\w+\.(\d+)")


def lock_folder(folder: Path) -> FileLock | None:
    """Take the folder for this process until `release()`, or until the process ends, however it ends.

    Returns:
        None on a file system without locks: unprotected is better than unusable.

    Raises:
        UserError: another process holds the folder, or it cannot be written to.
    """
    path = folder / "lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.touch()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"Cannot write to the output folder {folder}: {reason}.") from error
    lock = FileLock(path, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout as error:
        owner = path.read_text(errors="replace").strip()
        name = f" (process {owner})" if owner.isdigit() else ""
        raise UserError(f"{folder} is in use by another run{name}; wait for it or choose another --output.") from error
    except OSError:
        return None
    with contextlib.suppress(OSError):  # the number only helps to read the message above
        path.write_text(f"{os.getpid()}\n")
    return lock


def remove_unfinished(folder: Path) -> None:
    """Delete temporary files of processes that were killed while they wrote; the folder must be locked."""
    for path in [*folder.glob(".*"), *folder.glob("*/.*")]:
        found = UNFINISHED.fullmatch(path.name)
        # In a container an earlier process often had this process's number.
        if found and path.is_file() and (int(found[1]) == os.getpid() or not is_running(int(found[1]))):
            path.unlink(missing_ok=True)


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # somebody else's
        return True
    return True
