"""One writer per output folder."""

import contextlib
import os
import re
from pathlib import Path

from filelock import FileLock, Timeout

from llava.errors import UserError

# Files that `eval.answers.jsonl.write_bytes` had not renamed yet when its process (the number) was killed.
UNFINISHED = re.compile(r"\..+\.\w+\.\d+")

# Sub-folders that a run does not write its own files to.
SEPARATE = re.compile(r"replaced-\d+|wandb|shards")
# limit50/mme_results/ is the deepest folder that a run writes to.
DEPTH = 2


def lock_folder(folder: Path) -> tuple[FileLock | None, str | None]:
    """Take the folder for this process until `release()`, or until the process ends, however it ends.

    The file `lock` names the host and the process that took the folder last; it stays in the folder.

    Returns:
        (lock, None), or on a file system without locks (None, a sentence that says so): unprotected is better than
        unusable.

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
    # No fallback to a lock by the existence of a file: a process that is killed would leave the folder locked.
    lock = FileLock(path, timeout=0, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError(
            f"{folder} is in use by another run{owner(path)}; wait for it or choose another --output."
        ) from error
    except OSError as error:
        return None, (
            f"the file system of {folder} has no locks ({error.strerror}): a second run that writes to this folder at "
            "the same time would not have been noticed"
        )
    with contextlib.suppress(OSError):  # the name only helps to read the message above
        path.write_text(f"{os.uname().nodename} {os.getpid()}\n")
    return lock, None


def owner(path: Path) -> str:
    """Who holds a lock, for an error; empty if its file does not say it."""
    words = path.read_text(errors="replace").split()
    return f" (process {words[1]} on host {words[0]})" if len(words) == 2 and words[1].isdigit() else ""


def remove_unfinished(folder: Path) -> None:
    """Delete temporary files of processes that were killed while they wrote, in a run's folder and its sub-folders.

    The folder must be locked: then no other process writes there, whatever its number. Sub-folders that are runs of
    their own, or that --restart made, are left alone.
    """
    for path, folders, files in os.walk(folder):
        place = Path(path)
        folders[:] = [name for name in folders if not SEPARATE.fullmatch(name) and not (place / name / "lock").exists()]
        if len(place.relative_to(folder).parts) >= DEPTH:
            folders.clear()
        for name in filter(UNFINISHED.fullmatch, files):
            (place / name).unlink(missing_ok=True)
