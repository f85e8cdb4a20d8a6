"""Files of checkpoints: find or fetch them, read them without running anything that is in them."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llava.errors import UserError

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
SMALL_FILES = ("*.json", "tokenizer.model", "text_tower/*")
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # in the order of preference, each also with an index

# Tables that the modules compute for themselves; old checkpoints store them, to no effect.
IGNORED_KEYS = (".inv_freq", ".position_ids")
NAMED = 5  # keys spelled out in an error, the rest is counted


def locate(source: str | Path, what: str, weights: bool = True) -> Path:
    """The folder of a model; one of the hub is fetched, small files first, then only the weights that are used.

    Args:
        what: the model in words, for errors.
        weights: False fetches none.
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
    # The hub's client passes on the errors of several layers (its own, HTTP, sockets); all mean the same to the user.
    except Exception as error:
        raise UserError(
            f"The {what} {hub_id!r} is no folder here and could not be fetched from the Hugging Face hub "
            f"({type(error).__name__}); check the name and the network, or download it and give its folder."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path.parent} has no {path.name}; is it the folder of a checkpoint?") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); fetch it again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; fetch it again.")
    return content


def _index_shards(index: Path) -> list[str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map; fetch it again.")
    return sorted(set(weight_map.values()))


def _weight_files(directory: Path) -> list[Path]:
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
    """All weights of a folder as memory-mapped tensors under the names in the files."""
    weights: dict[str, Tensor] = {}
    for path in _weight_files(directory):
        weights.update(_open_weights(path))
    return {key: tensor for key, tensor in weights.items() if not key.endswith(IGNORED_KEYS)}


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
