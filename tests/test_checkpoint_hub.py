"""Checkpoints of the Hugging Face hub: what is fetched, and what is said when nothing can be."""

import shutil
import socket
from fnmatch import fnmatch

import pytest
import torch
from transformers import LlavaForConditionalGeneration

import llava.model.checkpoint.files
from llava.errors import UserError
from llava.model.checkpoint.load import load_checkpoint
from tests.checkpoint_files import (
    WORDS,
    edit,
    no_network,  # noqa: F401
    write,
)
from tests.tiny_checkpoints import make_tiny_llava


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return make_tiny_llava()


@pytest.mark.parametrize("source", ["/nowhere/at/all", "nowhere", "a/b/c", "../x"])
def test_a_folder_that_is_not_there(source):
    with pytest.raises(UserError, match=f"There is no checkpoint folder {source}; give a folder or a hub id"):
        load_checkpoint(source)


def test_hub_out_of_reach():
    with pytest.raises(
        UserError, match=r"checkpoint 'some/model' is no folder here and could not be fetched .*ConnectionError"
    ):
        load_checkpoint("some/model")


@pytest.mark.parametrize("layout", ["transformers", "transformers bin", "original", "original safetensors"])
def test_hub_fetches_the_weights_once(tmp_path, model, monkeypatch, layout):
    """Repositories often hold the weights twice, as .bin and as .safetensors, and more besides."""
    remote, local = write(layout, tmp_path / "remote", model), tmp_path / "local"
    extra = ["training_args.bin", "mm_projector.bin", "model.gguf"]
    if layout == "transformers":
        extra.append("pytorch_model.bin")
    for name in extra:
        (remote / name).write_bytes(b"large")
    shutil.move(remote / "clip", tmp_path / "clip") if "original" in layout else None
    edit(remote / "config.json", **({"mm_vision_tower": str(tmp_path / "clip")} if "original" in layout else {}))

    def fetch(hub_id: str, allow_patterns: list[str]) -> str:
        assert hub_id == "some/model"
        for path in remote.iterdir():
            if any(fnmatch(path.name, pattern) for pattern in allow_patterns):
                local.mkdir(exist_ok=True)
                shutil.copy(path, local)
        return str(local)

    monkeypatch.setattr(llava.model.checkpoint.files, "snapshot_download", fetch)
    loaded = load_checkpoint("some/model")
    assert loaded.name == "some/model"
    assert torch.equal(loaded.model.lm_head.weight[:WORDS], model.lm_head.weight[:WORDS])
    assert not [name for name in extra if (local / name).exists()]


def test_of_a_tower_that_the_shards_hold_only_the_config_is_fetched(tmp_path, model, monkeypatch):
    folder = write("original with tower", tmp_path / "o", model)
    (folder / "clip").rename(tmp_path / "clip")
    edit(folder / "config.json", mm_vision_tower="some/clip")
    asked = []

    def fetch(hub_id: str, allow_patterns: list[str]) -> str:
        asked.append((hub_id, *allow_patterns))
        return str(tmp_path / "clip")

    monkeypatch.setattr(llava.model.checkpoint.files, "snapshot_download", fetch)
    load_checkpoint(folder)
    assert asked == [("some/clip", *llava.model.checkpoint.files.SMALL_FILES)]


def test_loading_opens_no_connection(tmp_path, model, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("a folder was given, yet a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    load_checkpoint(write("original", tmp_path / "o", model))
    load_checkpoint(write("transformers", tmp_path / "t", model))
