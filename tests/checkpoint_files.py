"""Small checkpoints written to disk in every layout, and the damage that tests do to them."""

import hashlib
import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

import llava.model.checkpoint.files
from llava.errors import UserError
from llava.model.checkpoint.load import load_checkpoint
from tests.tiny_checkpoints import make_tokenizer, save_original_layout, save_transformers_layout
from tests.tiny_checkpoints_families import (
    save_next_original,
    save_next_transformers,
    save_qwen_transformers,
    save_video_original,
    save_video_transformers,
)

WORDS = len(make_tokenizer())


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A test that reaches for the hub by mistake fails at once."""

    def refuse(*_args, **_kwargs):
        raise ConnectionError("no network in tests")

    monkeypatch.setattr(llava.model.checkpoint.files, "snapshot_download", refuse)


def refused(folder: str | Path, sentence: str, **options: Any) -> None:
    """Loading ends in one sentence, a regular expression, on one line."""
    with pytest.raises(UserError, match=sentence) as caught:
        load_checkpoint(folder, **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 900


# How each family is written, (folder, model=None) -> model: "family layout" as on the hub, and variants of it.
SAVERS = {
    "llava transformers": save_transformers_layout,
    "llava transformers bin": partial(save_transformers_layout, safetensors=False),
    "llava original": save_original_layout,
    "llava original safetensors": partial(save_original_layout, safetensors=True),
    "llava original with tower": partial(save_original_layout, tower_in_shards=True),
    "llava_next transformers": save_next_transformers,
    "llava_next original": save_next_original,
    "llava_next original bin": partial(save_next_original, safetensors=False),
    "llava_next original, tower apart": partial(save_next_original, tower_in_shards=False),
    "video_llava transformers": save_video_transformers,
    "video_llava original": save_video_original,
    "video_llava original safetensors": partial(save_video_original, safetensors=True),
    "video_llava original, towers apart": partial(save_video_original, towers_in_shards=False),
    "qwen2_5_vl transformers": save_qwen_transformers,
}


def layouts_of(family: str) -> list[str]:
    return [name for name in SAVERS if name.split()[0] == family]


def real_rows(name: str, weight: Tensor) -> Tensor:
    """Original files end with the last word; the hub's have spare rows."""
    return weight[:WORDS] if name.endswith(("embed_tokens.weight", "lm_head.weight")) else weight


def assert_same_weights(ours: PreTrainedModel, theirs: PreTrainedModel) -> None:
    """Every weight and every table equal, the spare rows of the vocabulary apart."""
    loaded, expected = ours.state_dict(), theirs.state_dict()
    assert loaded.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(real_rows(name, loaded[name]), real_rows(name, weight)), name
    tables = dict(theirs.named_buffers())
    assert dict(ours.named_buffers()).keys() == tables.keys()
    for name, table in ours.named_buffers():
        assert torch.equal(table, tables[name]), name


def hub_cache(home: Path, source: Path, kind: str, name: str, commit: str = "0123abc", main: bool = True) -> Path:
    """Put the files of a folder into a cache of the hub as it lies on disk: links to blobs.

    Args:
        home: its `hub` folder.
        kind: "models" or "datasets".

    Returns:
        The snapshot.
    """
    repository = home / f"{kind}--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        blob = repository / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, blob)
        link = snapshot / path.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    if main:
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(commit)
    return snapshot


def edit(path: Path, **changes) -> None:
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def drop_weights(path: Path, *names: str, **added: Tensor) -> None:
    weights = load_file(path) if path.suffix == ".safetensors" else torch.load(path)
    weights = {key: weight for key, weight in weights.items() if key not in names} | added
    save_file(weights, path) if path.suffix == ".safetensors" else torch.save(weights, path)


def shard_with(directory: Path, key: str) -> Path:
    index = json.loads((directory / "pytorch_model.bin.index.json").read_text())
    return directory / index["weight_map"][key]
