"""8 and 4 bits: what is handed to transformers, and what is said without bitsandbytes."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.quantizers.quantizers_utils import should_convert_module

import llava.model.checkpoint.hf_model
import llava.model.checkpoint.quantization
from llava.errors import UserError
from llava.model.checkpoint.load import load_checkpoint
from tests.checkpoint_files import edit
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
    monkeypatch.setattr(llava.model.checkpoint.quantization, "find_spec", lambda name: SimpleNamespace(name=name))


@pytest.fixture
def missing(monkeypatch):
    monkeypatch.setattr(llava.model.checkpoint.quantization, "find_spec", lambda name: None)


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

    for build in llava.model.checkpoint.hf_model.HF_CLASSES.values():
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
    with pytest.raises(UserError, match=r"quantization '4bit' needs the package bitsandbytes, .* pip install"):
        load_checkpoint("/nowhere", quantization="4bit")


def test_a_choice_that_does_not_exist(installed):
    with pytest.raises(UserError, match=r"Unknown quantization '3bit'\. .* Available: 4bit, 8bit"):
        load_checkpoint("/nowhere", quantization="3bit")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn])
def test_numbers_without_a_meaning_are_refused(tmp_path, dtype):
    """int8 and bool weights without a quantization_config were loaded as if they were the weights themselves."""
    save_transformers_layout(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(key for key in weights if key.endswith("q_proj.weight"))
    save_file(weights | {name: weights[name].to(dtype)}, tmp_path / "model.safetensors", {"format": "pt"})
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(UserError, match=rf"has weights of {kind} \(.*q_proj.weight\), and its config.json has no"):
        load_checkpoint(tmp_path)


STORED = {"quant_method": "bitsandbytes", "load_in_8bit": False, "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize("save", [save_transformers_layout, save_original_layout])
def test_files_that_are_quantised_reach_transformers(tmp_path, installed, monkeypatch, save):
    """Their own configuration is in the container's config; ours is not put in its place."""
    save(tmp_path)
    edit(tmp_path / "config.json", quantization_config=STORED)
    seen = {}

    def from_pretrained(*_args, **kwargs):
        seen.update(kwargs)
        raise ImportError("stop here")

    monkeypatch.setattr(llava.model.checkpoint.hf_model.HF_CLASSES["llava"], "from_pretrained", from_pretrained)
    with pytest.raises(UserError, match=r"Cannot load .* quantised here: stop here"):
        load_checkpoint(tmp_path)
    assert seen["config"].quantization_config == STORED
    assert seen["quantization_config"] is None


@pytest.mark.parametrize(
    ("stored", "choice", "sentence"),
    [
        (STORED, None, "which is quantised with bitsandbytes, needs the package bitsandbytes"),
        ({"quant_method": "magic"}, None, "is quantised with magic, which is not supported"),
        ({"bits": 4}, None, "is quantised with an unnamed method"),
    ],
)
def test_quantised_files_that_cannot_be_read(tmp_path, missing, stored, choice, sentence):
    save_transformers_layout(tmp_path)
    edit(tmp_path / "config.json", quantization_config=stored)
    with pytest.raises(UserError, match=sentence):
        load_checkpoint(tmp_path, quantization=choice)


def test_quantised_twice(tmp_path, installed):
    save_transformers_layout(tmp_path)
    edit(tmp_path / "config.json", quantization_config=STORED)
    with pytest.raises(UserError, match="is quantised already; load it without quantization '8bit'"):
        load_checkpoint(tmp_path, quantization="8bit")


def test_errors_of_a_plain_model_are_not_blamed_on_quantisation(tmp_path, monkeypatch):
    save_transformers_layout(tmp_path)

    def from_pretrained(*_args, **_kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(llava.model.checkpoint.hf_model.HF_CLASSES["llava"], "from_pretrained", from_pretrained)
    with pytest.raises(RuntimeError, match="out of memory"):
        load_checkpoint(tmp_path)


def test_the_video_tower_with_time_is_not_quantised_either():
    """Its attention over time is new to the library, its path is not."""
    linears = [path for path, module in make_tiny_video().named_modules() if isinstance(module, nn.Linear)]
    temporal = [path for path in linears if "temporal_attn" in path]
    assert len(temporal) == 12
    assert not any(should_convert_module(path, list(llava.model.checkpoint.quantization.KEPT)) for path in temporal)


def test_the_config_of_an_original_checkpoint_keeps_its_quantisation(tmp_path, installed):
    save_original_layout(tmp_path)
    edit(tmp_path / "config.json", quantization_config={"quant_method": "magic"})
    with pytest.raises(UserError, match="quantised with magic"):
        load_checkpoint(tmp_path)
