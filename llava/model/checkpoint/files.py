"""Files of checkpoints: find or download them, read and check them without running code that they hold, and hash them.

Stored answers belong to the hashes: whatever is changed in one of the files, they are not taken for its answers. Every
byte counts. A file of many gigabytes is read once (1.4 GB/s on one core) and its hash remembered in the user's cache
folder, for as long as its state stays the same (llava/file_state.py). Files are hashed after they were loaded, so their
state is taken before: a file that changes in between is refused, because nobody could say which content was loaded.
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
from huggingface_hub import snapshot_download
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from llava.errors import UserError
from llava.file_state import FileState, file_state
from llava.processing.json_files import Schema, checked, read_json

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
SMALL_FILES = ("*.json", "*.jinja", "merges.txt", "tokenizer.model", "text_tower/*")
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # in the order of preference, each also with an index

# Buffers that the modules compute themselves; old checkpoints store them without effect.
IGNORED_KEYS = (".inv_freq", ".position_ids")
NAMED = 5  # names listed in an error; the others are counted

# What is hashed beside the weights: configurations and tokenizers.
READ = ("*.json", "*.model", "*.jinja", "merges.txt", "vocab.txt")
LARGE = 64 << 20  # bytes; smaller files are hashed again by every process
BLOCK = 16 << 20  # bytes read at once
THREADS = 8
DIGITS = 16


def locate(source: str | Path, what: str, weights: bool = True) -> Path:
    """Return the folder of a model. A model of the hub is downloaded: small files first, then only the weights used.

    Args:
        what: the model in words, for errors.
        weights: False downloads no weights.
    """
    if Path(source).is_dir():
        return Path(source)
    if not HUB_ID.match(str(source)):
        raise UserError(f"There is no {what} folder {source}; give a folder or a hub id such as owner/name.")
    directory = _download(str(source), SMALL_FILES, what)
    for name in WEIGHT_FILES if weights else ():
        index = directory / f"{name}.index.json"
        shards = _index_shards(index) if index.is_file() else [name]
        directory = _download(str(source), shards, what)
        if all((directory / shard).is_file() for shard in shards):
            break
    return directory


def _download(hub_id: str, patterns: Iterable[str], what: str) -> Path:
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(patterns)))
    # The hub's client raises errors of several layers (its own, HTTP, sockets); all mean the same to the user.
    except Exception as error:
        raise UserError(
            f"The {what} {hub_id!r} is no folder here and could not be fetched from the Hugging Face hub "
            f"({type(error).__name__}); check the name and the network, or download it and give its folder."
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
    """Return all weights of a folder as memory-mapped tensors, by their names in the files."""
    shards = [_open_weights(path) for path in weight_files(directory)]
    return {key: tensor for shard in shards for key, tensor in shard.items() if not key.endswith(IGNORED_KEYS)}


def _open_weights(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError as error:
        raise UserError(f"{path} holds more than weights and was not unpickled; convert it to safetensors.") from error
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError) as error:
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
    """Return the files of a folder that loading may read, by their names in it; to be called before it reads them.

    Args:
        prefix: put before the names.
        weights: False leaves out the weights, for a folder of which they are not used.
    """
    paths = {path for pattern in READ for path in folder.glob(pattern) if path.is_file()}
    paths |= set(weight_files(folder)) if weights else set()
    return {f"{prefix}{path.relative_to(folder).as_posix()}": file_state(path) for path in sorted(paths)}


def hashes_of(files: Mapping[str, FileState]) -> dict[str, str]:
    """Return name -> hash of the content. After a second, a progress bar shows how far it is.

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
    """Raise UserError if a file has another content than the one with this hash; files of the same state have not."""
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
        advance: called with the number of bytes that are done.

    Raises:
        UserError: the file is no longer in this state.
    """
    if state.size < LARGE:
        return read_hash(state, advance)
    known = (str(state.path.resolve()), *state[1:])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "visual-token-reduction"
    memory = cache / hashlib.sha256(repr(known).encode()).hexdigest()
    with suppress(OSError):
        if len(remembered := memory.read_text()) == DIGITS:  # shorter where its writer was killed
            advance(state.size)
            return remembered
    fresh = read_hash(state, advance)
    with suppress(OSError):  # a cache folder that cannot be written to: every process reads the file
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
