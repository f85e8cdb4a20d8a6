"""Hashes of a checkpoint's files: whatever is changed in one of them, stored answers are not taken for its answers.

Every byte counts. A file of many gigabytes is read once (1.4 GB/s on one core) and its hash remembered in the user's
cache folder, for as long as its path, size, times and inode stay the same.
"""

import fcntl
import hashlib
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

from tqdm import tqdm

from llava.errors import UserError
from llava.model.checkpoint.files import weight_files

# What is read beside the weights: configurations and tokenizers.
READ = ("*.json", "*.model", "*.jinja", "merges.txt", "vocab.txt")
LARGE = 64 << 20  # bytes; smaller files are read again by every process
BLOCK = 16 << 20  # bytes read at once
THREADS = 8
DIGITS = 16


def files_of(folder: Path, prefix: str = "", weights: bool = True) -> dict[str, Path]:
    """Return the files of a folder that loading may read, by their names in it.

    Args:
        prefix: put before the names.
        weights: False leaves out the weights, for a folder of which they are not used.
    """
    found = {path for pattern in READ for path in folder.glob(pattern) if path.is_file()}
    found |= set(weight_files(folder)) if weights else set()
    return {f"{prefix}{path.relative_to(folder).as_posix()}": path for path in sorted(found)}


def hashes_of(files: Mapping[str, Path]) -> dict[str, str]:
    """Return name -> hash of the content. After a second, a progress bar shows how far it is."""
    try:
        total = sum(path.stat().st_size for path in files.values())
        with (
            tqdm(total=total, desc="hash of the model's files", unit="B", unit_scale=True, delay=1, leave=False) as bar,
            ThreadPoolExecutor(THREADS) as pool,
        ):
            return dict(zip(files, pool.map(lambda path: hash_of(path, bar.update), files.values()), strict=True))
    except OSError as error:
        raise UserError(f"Cannot read {error.filename} ({error.strerror}); check its permissions.") from error


def hash_of(path: Path, advance: Callable[[int], object]) -> str:
    """Return the hash of a file, from the user's cache folder if it is there.

    The lock lets one process of several read the file while the others wait for its hash. Where the cache folder cannot
    be written to, each of them reads it.

    Args:
        advance: called with the number of bytes that are done.
    """
    state = path.stat()
    if state.st_size < LARGE:
        return read_hash(path, advance)
    known = (str(path.resolve()), state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "visual-token-reduction"
    with ExitStack() as stack:
        memory = None
        with suppress(OSError):
            cache.mkdir(parents=True, exist_ok=True)
            memory = stack.enter_context(open(cache / hashlib.sha256(repr(known).encode()).hexdigest(), "a+"))
            fcntl.flock(memory, fcntl.LOCK_EX)
            memory.seek(0)
            if len(found := memory.read()) == DIGITS:
                advance(state.st_size)
                return found
        found = read_hash(path, advance)
        if memory is not None:
            with suppress(OSError):
                memory.truncate(0)  # of a process that was killed while it wrote
                memory.write(found)
                memory.flush()
        return found


def read_hash(path: Path, advance: Callable[[int], object]) -> str:
    """Return the hash of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()[:DIGITS]
