"""What is fetched of a checkpoint on the hub and read: each weight once, none held twice; and what is quantised."""

import shutil
from fnmatch import fnmatch
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration
from transformers.quantizers.quantizers_utils import should_convert_module

import llava.model.checkpoint.files
import llava.model.checkpoint.load
from llava.model.checkpoint.load import load_checkpoint
from tests.checkpoint_files import (
    SAVERS,
    WORDS,
    edit,
    layouts_of,
    no_network,  # noqa: F401
    refused,
)
from tests.tiny_checkpoints import make_tiny_llava, save_original_layout, save_transformers_layout
from tests.tiny_checkpoints_families import make_tiny_video


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return make_tiny_llava()


@pytest.mark.parametrize("source", ["/nowhere/at/all", "nowhere", "a/b/c", "../x"])
def test_a_folder_that_is_not_there(source):
    refused(source, f"There is no checkpoint folder {source}; give a folder or a hub id")


def test_hub_out_of_reach():
    refused("some/model", r"checkpoint 'some/model' is no folder here and could not be fetched .*ConnectionError")


@pytest.mark.parametrize("layout", layouts_of("llava")[:4])
def test_hub_fetches_the_weights_once(tmp_path, model, monkeypatch, layout):
    """Repositories often hold the weights twice, as .bin and as .safetensors, and more besides."""
    remote, local = tmp_path / "remote", tmp_path / "local"
    SAVERS[layout](remote, model)
    extra = ["training_args.bin", "mm_projector.bin", "model.gguf"]
    if layout == "llava transformers":
        extra.append("pytorch_model.bin")
    for name in extra:
        (remote / name).write_bytes(b"large")
    if "original" in layout:
        shutil.move(remote / "clip", tmp_path / "clip")
        edit(remote / "config.json", mm_vision_tower=str(tmp_path / "clip"))

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
    save_original_layout(tmp_path / "o", model, tower_in_shards=True, mm_vision_tower="some/clip")
    (tmp_path / "o" / "clip").rename(tmp_path / "clip")
    asked = []

    def fetch(hub_id: str, allow_patterns: list[str]) -> str:
        asked.append((hub_id, *allow_patterns))
        return str(tmp_path / "clip")

    monkeypatch.setattr(llava.model.checkpoint.files, "snapshot_download", fetch)
    load_checkpoint(tmp_path / "o")
    assert asked == [("some/clip", *llava.model.checkpoint.files.SMALL_FILES)]


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


# Quantisation: what is handed to transformers, and what is said without bitsandbytes


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(llava.model.checkpoint.load, "find_spec", lambda name: SimpleNamespace(name=name))


@pytest.fixture
def given(monkeypatch) -> dict:
    """What from_pretrained was called with; the model is loaded without quantisation."""
    seen = {}

    def watch(build):
        original = build.from_pretrained.__func__

        def from_pretrained(cls, *args, quantization_config=None, **kwargs):
            seen.update(quantization_config=quantization_config, **kwargs)
            return original(cls, *args, **kwargs)

        monkeypatch.setattr(build, "from_pretrained", classmethod(from_pretrained))

    for build in llava.model.checkpoint.load.HF_CLASSES.values():
        watch(build)
    return seen


@pytest.mark.parametrize("name", [name for name in SAVERS if len(name.split()) == 2])
@pytest.mark.parametrize("choice", ["8bit", "4bit"])
def test_the_decoder_alone_is_quantised(tmp_path, installed, given, name, choice):
    SAVERS[name](tmp_path / "tiny")
    loaded = load_checkpoint(tmp_path / "tiny", dtype=torch.bfloat16, quantization=choice)
    asked = given["quantization_config"]
    assert isinstance(asked, BitsAndBytesConfig)
    assert (asked.load_in_8bit, asked.load_in_4bit) == (choice == "8bit", choice == "4bit")
    if choice == "4bit":
        assert (asked.bnb_4bit_quant_type, asked.bnb_4bit_use_double_quant) == ("nf4", True)
        assert asked.bnb_4bit_compute_dtype == torch.bfloat16
    linears = [path for path, module in loaded.model.named_modules() if isinstance(module, nn.Linear)]
    converted = [path for path in linears if should_convert_module(path, asked.llm_int8_skip_modules)]
    assert converted == [path for path in linears if path.startswith("model.language_model.")]
    assert 28 == len(converted) < len(linears)
    assert given["device_map"] == {"": torch.device("cpu")}, "bitsandbytes takes a device map only"
    assert loaded.notes[-1] == f"The decoder is quantised to {choice[0]} bits by bitsandbytes."


def test_choices_that_cannot_be_met(monkeypatch):
    """Said before anything is read or fetched."""
    monkeypatch.setattr(llava.model.checkpoint.load, "find_spec", lambda name: None)
    refused("/nowhere", r"quantization '4bit' needs the package bitsandbytes, .* pip install", quantization="4bit")
    refused("/nowhere", r"Unknown quantization '3bit'\. .* Available: 4bit, 8bit", quantization="3bit")


@pytest.mark.parametrize("save", [save_transformers_layout, save_original_layout])
@pytest.mark.parametrize(
    ("stored", "method"),
    [({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"), ({"bits": 4}, "an unnamed method")],
)
def test_files_that_are_quantised_already_are_refused(tmp_path, save, stored, method):
    save(tmp_path)
    edit(tmp_path / "config.json", quantization_config=stored)
    refused(tmp_path, f"is quantised with {method}, which is not supported; take it unquantised")


def test_the_video_tower_with_time_is_not_quantised_either():
    """Its attention over time is new to the library, its path is not."""
    linears = [path for path, module in make_tiny_video().named_modules() if isinstance(module, nn.Linear)]
    temporal = [path for path in linears if "temporal_attn" in path]
    assert len(temporal) == 12
    assert not any(should_convert_module(path, list(llava.model.checkpoint.load.KEPT)) for path in temporal)
