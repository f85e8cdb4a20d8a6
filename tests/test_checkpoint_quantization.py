"""8 and 4 bits: what is handed to transformers, and what is said without bitsandbytes."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.quantizers.quantizers_utils import should_convert_module

import llava.model.checkpoint.load
from llava.model.checkpoint.load import load_checkpoint
from tests.checkpoint_files import edit, refused
from tests.tiny_checkpoints import save_original_layout, save_transformers_layout
from tests.tiny_checkpoints_families import (
    make_tiny_video,
    save_next_original,
    save_qwen_transformers,
    save_video_original,
)

SAVERS = {
    "llava": save_transformers_layout,
    "llava original": save_original_layout,
    "llava_next": save_next_original,
    "video_llava": save_video_original,
    "qwen2_5_vl": save_qwen_transformers,
}


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(llava.model.checkpoint.load, "find_spec", lambda name: SimpleNamespace(name=name))


@pytest.fixture
def missing(monkeypatch):
    monkeypatch.setattr(llava.model.checkpoint.load, "find_spec", lambda name: None)


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


@pytest.mark.parametrize("name", SAVERS)
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


def test_without_a_choice_nothing_is_passed_on(tmp_path, missing, given):
    save_transformers_layout(tmp_path)
    loaded = load_checkpoint(tmp_path)
    assert given["quantization_config"] is None
    assert given["device_map"] is None
    assert loaded.notes == ()


def test_bitsandbytes_that_is_not_there(missing):
    """Said before anything is read or fetched."""
    refused("/nowhere", r"quantization '4bit' needs the package bitsandbytes, .* pip install", quantization="4bit")


def test_a_choice_that_does_not_exist(installed):
    refused("/nowhere", r"Unknown quantization '3bit'\. .* Available: 4bit, 8bit", quantization="3bit")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn])
def test_numbers_without_a_meaning_are_refused(tmp_path, dtype):
    """int8 and bool weights without a quantization_config were loaded as if they were the weights themselves."""
    save_transformers_layout(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(key for key in weights if key.endswith("q_proj.weight"))
    save_file(weights | {name: weights[name].to(dtype)}, tmp_path / "model.safetensors", {"format": "pt"})
    kind = str(dtype).removeprefix("torch.")
    refused(tmp_path, rf"has weights of {kind} \(.*q_proj.weight\), which are not supported")


@pytest.mark.parametrize("save", [save_transformers_layout, save_original_layout])
@pytest.mark.parametrize(
    ("stored", "method"),
    [({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"), ({"bits": 4}, "an unnamed method")],
)
def test_files_that_are_quantised_already_are_refused(tmp_path, save, stored, method):
    save(tmp_path)
    edit(tmp_path / "config.json", quantization_config=stored)
    refused(tmp_path, f"is quantised with {method}, which is not supported; take it unquantised")


def test_errors_of_a_plain_model_are_not_blamed_on_quantisation(tmp_path, monkeypatch):
    save_transformers_layout(tmp_path)

    def from_pretrained(*_args, **_kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(llava.model.checkpoint.load.HF_CLASSES["llava"], "from_pretrained", from_pretrained)
    with pytest.raises(RuntimeError, match="out of memory"):
        load_checkpoint(tmp_path)


def test_the_video_tower_with_time_is_not_quantised_either():
    """Its attention over time is new to the library, its path is not."""
    linears = [path for path, module in make_tiny_video().named_modules() if isinstance(module, nn.Linear)]
    temporal = [path for path in linears if "temporal_attn" in path]
    assert len(temporal) == 12
    assert not any(should_convert_module(path, list(llava.model.checkpoint.load.KEPT)) for path in temporal)
