"""Files of checkpoints: find or download them, read and check them without running code that they hold, and hash them.

Stored answers are filed under the hashes of the model's files, so that with any changed byte it is another model. A
file of many gigabytes is read once (1.4 GB/s on one core), and its hash is remembered in the user's cache folder for as
long as the file's state stays the same (llava/file_state.py). Files are hashed after loading, and their state is
recorded before. A file that changes in between is refused, because nobody could say which content was loaded.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Annotated

import torch
from huggingface_hub import constants, snapshot_download
from pydantic import Field
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from llava.errors import UserError, how_to_get, is_out_of_memory
from llava.file_state import FileState, file_state
from llava.places import check_bundled
from llava.processing.json_files import Schema, checked, read_json

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
CACHED = "models--"  # before owner and name in the hub's cache
SMALL_FILES = ("*.json", "*.jinja", "merges.txt", "tokenizer.model", "text_tower/*")
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # in the order of preference, each also with an index

# How files of torch.save begin: since torch 1.6 as an archive, which can be mapped, before that with a pickled number.
ARCHIVE = b"PK\x03\x04"
PICKLED = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."

# Buffers that the modules compute themselves; old checkpoints store them, to no effect.
IGNORED_KEYS = (".inv_freq", ".position_ids")
NAMED = 5  # names listed in an error; the others are counted

# What is hashed besides the weights: configurations and tokenizers.
READ = ("*.json", "*.model", "*.jinja", "merges.txt", "vocab.txt")
LARGE = 64 << 20  # bytes; smaller files are hashed again by every process
BLOCK = 16 << 20  # bytes read at once
THREADS = 8
DIGITS = 16


def locate(source: str | Path, what: str, weights: bool = True) -> Path:
    """Return the folder of a model. A model of the hub is downloaded: small files first, then one form of the weights.

    Args:
        what: the model in words, for errors.
        weights: False downloads no weights.
    """
    if (folder := folder_of(source)) is not None:
        return folder
    check_bundled(source)
    hub_id = str(source).rstrip("/")
    if not HUB_ID.match(hub_id):
        raise UserError(f"There is no {what} folder {source}; give a folder or a hub id such as owner/name.")
    directory = _download(hub_id, SMALL_FILES, what)
    for name in WEIGHT_FILES if weights else ():
        index = directory / f"{name}.index.json"
        shards = _index_shards(index) if index.is_file() else [name]
        directory = _download(hub_id, shards, what)
        if all((directory / shard).is_file() for shard in shards):
            break
    return directory


def folder_of(source: str | Path) -> Path | None:
    """Return the folder of a model that is on this machine; None for anything else, such as a hub id.

    For a model's folder in the hub's cache, models--OWNER--NAME, this is its snapshot of the branch main, or its only
    snapshot.

    Raises:
        UserError: it is not clear which snapshot is meant.
    """
    folder = Path(os.path.expanduser(source))
    if not folder.is_dir():
        return None
    snapshots = folder / "snapshots"
    if not folder.resolve().name.startswith(CACHED) or not snapshots.is_dir():
        return folder
    there = sorted(path.name for path in snapshots.iterdir() if path.is_dir())
    main = folder / "refs" / "main"
    commit = main.read_text().strip() if main.is_file() else there[0] if len(there) == 1 else ""
    if commit not in there:
        known = f"has {len(there)} snapshots ({listed(there)})" if there else "has no snapshot"
        wanted = f"that of its branch main, {commit}, is missing" if commit else "no branch main"
        raise UserError(
            f"{folder} {known} and {wanted}; give the path of a snapshot, or run hf download {_hub_id(folder)}."
        )
    return snapshots / commit


def snapshot_of(folder: str | Path) -> tuple[str, str] | None:
    """Return hub id and commit of a snapshot, .../models--OWNER--NAME/snapshots/COMMIT; None for another folder."""
    path = Path(folder)
    repository = path.parent.parent
    if path.parent.name != "snapshots" or not repository.name.startswith(CACHED):
        return None
    return _hub_id(repository), path.name


def _hub_id(repository: Path) -> str:
    return repository.resolve().name.removeprefix(CACHED).replace("--", "/")


def name_of(source: str | Path) -> str:
    """Return a model's name in results: its hub id, also if the source is a snapshot's path, or its folder's name."""
    folder = folder_of(source)
    if folder is None:
        return str(source).rstrip("/")
    snapshot = snapshot_of(folder.resolve())
    return snapshot[0] if snapshot is not None else folder.resolve().name


def about_snapshot(folder: Path) -> tuple[str, ...]:
    """Return a note that says which snapshot of the hub's cache was read; () for another folder."""
    snapshot = snapshot_of(folder.resolve())
    return () if snapshot is None else (f"The files are those of {snapshot[0]} at commit {snapshot[1]}.",)


def _download(hub_id: str, patterns: Iterable[str], what: str) -> Path:
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(patterns)))
    # The hub's client raises errors of several layers (its own, HTTP, sockets); all mean the same to the user.
    except Exception as error:
        raise UserError(
            f"The {what} {hub_id!r} is no folder here and could not be fetched from the Hugging Face hub "
            f"({type(error).__name__}): {how_to_get(hub_id, constants.HF_HUB_OFFLINE)}."
        ) from error


# Weights


class WeightIndex(Schema):
    """model.safetensors.index.json or pytorch_model.bin.index.json: tensor name -> file name."""

    weight_map: dict[str, Annotated[str, Field(pattern=r"^[^/\\\x00]+$")]] = Field(min_length=1)


def _index_shards(index: Path) -> list[str]:
    return sorted(set(checked(WeightIndex, read_json(index), index).weight_map.values()))


def weight_files(directory: Path) -> list[Path]:
    """Return the files that hold the weights of a folder."""
    for name in WEIGHT_FILES:
        index = directory / f"{name}.index.json"
        if index.is_file():
            shards = [directory / shard for shard in _index_shards(index)]
            missing = [shard.name for shard in shards if not shard.is_file()]
            if missing:
                raise UserError(
                    f"{directory} lacks {len(missing)} of {len(shards)} weight files named in {index.name}: "
                    f"{listed(missing)}; fetch them."
                )
            return shards
        if (directory / name).is_file():
            return [directory / name]
    partial = [
        n for n in ("adapter_config.json", "mm_projector.bin", "non_lora_trainables.bin") if (directory / n).is_file()
    ]
    hint = f" It has {partial[0]}: merge LoRA or projector-only weights into their base model first." if partial else ""
    raise UserError(f"{directory} has no weights ({' or '.join(WEIGHT_FILES)}, whole or with an index).{hint}")


def read_weights(directory: Path) -> dict[str, Tensor]:
    """Return all weights of a folder by their names in the files.

    They are mapped to the files. Weights in the format of torch 1.5 and older cannot be mapped and are in memory.
    """
    shards = [_open_weights(path) for path in weight_files(directory)]
    return {key: tensor for shard in shards for key, tensor in shard.items() if not key.endswith(IGNORED_KEYS)}


def _open_weights(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        with path.open("rb") as file:
            head = file.read(32)
        archived = head.startswith(ARCHIVE)
        if not archived and PICKLED not in head:
            raise ValueError("no file of torch.save")
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=archived)
    except UnpicklingError as error:
        raise UserError(f"{path} holds more than weights and was not unpickled; convert it to safetensors.") from error
    # torch reads the format of torch 1.5 without checks: a damaged file fails where a wrong byte is first used.
    except Exception as error:
        if is_out_of_memory(error):
            raise UserError(f"The weights in {path} do not fit into the free memory of this machine.") from error
        raise UserError(
            f"Cannot read the weights in {path}; the file is damaged or incomplete, fetch it again."
        ) from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{path} holds no table of weights; a state dict was expected.")
    return weights


def listed(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


# Hashes


def files_of(folder: Path, prefix: str = "", weights: bool = True) -> dict[str, FileState]:
    """Return the files of a folder that loading may read, by their names in it. Call this before they are read.

    Args:
        prefix: put before the names.
        weights: False leaves out the weights, for a folder whose weights are not used.
    """
    paths = {path for pattern in READ for path in folder.glob(pattern) if path.is_file()}
    paths |= set(weight_files(folder)) if weights else set()
    return {f"{prefix}{path.relative_to(folder).as_posix()}": file_state(path) for path in sorted(paths)}


def hashes_of(files: Mapping[str, FileState]) -> dict[str, str]:
    """Return name -> hash of the content. After a second, a progress bar appears.

    Raises:
        UserError: a file cannot be read, or is no longer in the given state.
    """
    try:
        total = sum(state.size for state in files.values())
        with (
            tqdm(total=total, desc="hash of the model's files", unit="B", unit_scale=True, delay=1, leave=False) as bar,
            ThreadPoolExecutor(THREADS) as pool,
        ):
            return dict(zip(files, pool.map(lambda state: hash_of(state, bar.update), files.values()), strict=True))
    except OSError as error:
        raise UserError(f"Cannot read {error.filename} ({error.strerror}); check its permissions.") from error


def check_same(files: Mapping[str, FileState], hashes: Mapping[str, str]) -> None:
    """Raise UserError if a file's content no longer has its hash. Files in the same state are not read again."""
    for name, state in files.items():
        try:
            now = file_state(state.path)
            same = now == state or hash_of(now, lambda _: None) == hashes[name]
        except OSError:
            same = False
        if not same:
            raise UserError(changed(state.path))


def changed(path: Path) -> str:
    """The sentence about a file that is no longer what was read."""
    return f"{path} has changed since it was read; run the same command again when the model's files stay as they are."


def hash_of(state: FileState, advance: Callable[[int], object]) -> str:
    """Return the hash of a file, from the user's cache folder if it is there.

    Args:
        advance: called with the number of bytes that are done since the last call.

    Raises:
        UserError: the file is no longer in this state.
    """
    if state.size < LARGE:
        return read_hash(state, advance)
    known = (str(state.path.resolve()), *state[1:])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "visual-token-reduction"
    memory = cache / hashlib.sha256(repr(known).encode()).hexdigest()
    with suppress(OSError, UnicodeDecodeError):
        # It is shorter if its writer was killed, and something else if a disk has failed.
        if re.fullmatch(rf"[0-9a-f]{{{DIGITS}}}", remembered := memory.read_text()):
            advance(state.size)
            return remembered
    fresh = read_hash(state, advance)
    with suppress(OSError):  # if the cache folder cannot be written to, every process reads the file
        cache.mkdir(parents=True, exist_ok=True)
        memory.write_text(fresh)
    return fresh


def read_hash(state: FileState, advance: Callable[[int], object]) -> str:
    """Return the hash of a file's content."""
    digest = hashlib.sha256()
    with state.path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK):
            digest.update(block)
            advance(len(block))
    if file_state(state.path) != state:
        raise UserError(changed(state.path))
    return digest.hexdigest()[:DIGITS]
