"""What is fetched of a checkpoint on the hub, and what is read: each weight once, and none is held twice."""

import shutil
import socket
from fnmatch import fnmatch

import pytest
import torch
from transformers import LlavaForConditionalGeneration

import llava.model.checkpoint.files
import llava.model.checkpoint.load
from llava.model.checkpoint.load import load_checkpoint
from tests.checkpoint_files import (
    WORDS,
    edit,
    no_network,  # noqa: F401
    refused,
    write,
)
from tests.tiny_checkpoints import make_tiny_llava, save_original_layout, save_transformers_layout
from tests.tiny_checkpoints_families import save_next_original, save_qwen_transformers, save_video_original


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return make_tiny_llava()


@pytest.mark.parametrize("source", ["/nowhere/at/all", "nowhere", "a/b/c", "../x"])
def test_a_folder_that_is_not_there(source):
    refused(source, f"There is no checkpoint folder {source}; give a folder or a hub id")


def test_hub_out_of_reach():
    refused("some/model", r"checkpoint 'some/model' is no folder here and could not be fetched .*ConnectionError")


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


SAVERS = {
    "llava": save_transformers_layout,
    "llava bin": lambda path: save_transformers_layout(path, safetensors=False),
    "original": save_original_layout,
    "next": save_next_original,
    "video": save_video_original,
    "video, towers apart": lambda path: save_video_original(path, towers_in_shards=False),
    "qwen": save_qwen_transformers,
}


@pytest.mark.parametrize("name", SAVERS)
def test_weights_in_the_right_dtype_stay_where_they_are_mapped(tmp_path, monkeypatch, name):
    SAVERS[name](tmp_path)
    mapped = set()

    def read(directory):
        weights = llava.model.checkpoint.files.read_weights(directory)
        mapped.update(tensor.data_ptr() for tensor in weights.values())
        return weights

    monkeypatch.setattr(llava.model.checkpoint.load, "read_weights", read)
    model = load_checkpoint(tmp_path).model
    assert {weight.data_ptr() for weight in model.parameters()} <= mapped


@pytest.mark.parametrize("name", SAVERS)
def test_converted_weights_own_exactly_their_bytes(tmp_path, name):
    """No weight is a view into something larger that would be kept alive with it."""
    SAVERS[name](tmp_path)
    for key, weight in load_checkpoint(tmp_path, dtype=torch.bfloat16).model.state_dict().items():
        assert weight.untyped_storage().nbytes() == weight.nbytes, key
