"""Configurations with impossible values are refused with one sentence, before anything slow or large happens.

Each of them loaded and answered nonsense, hung, took all memory or ended in a traceback.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from llava.errors import UserError
from llava.model.checkpoint import limits as config_limits
from llava.model.checkpoint.files import read_json
from llava.model.checkpoint.limits import parameters
from llava.model.checkpoint.load import load_checkpoint
from llava.processing.config_schema import DecoderConfig, LlavaHfConfig, OriginalConfig, QwenFlatConfig, checked
from tests.checkpoint_files import edit, no_network  # noqa: F401
from tests.tiny_checkpoints import make_tiny_llava, save_original_layout, save_transformers_layout
from tests.tiny_checkpoints_families import (
    make_tiny_next,
    make_tiny_qwen,
    save_next_transformers,
    save_qwen_transformers,
)

NAN, HUGE = float("nan"), 10**30


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return make_tiny_llava()


@pytest.fixture(scope="module")
def folders(tmp_path_factory, model) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("folders")
    save_transformers_layout(base / "transformers", model)
    save_original_layout(base / "original", model)
    save_qwen_transformers(base / "qwen", make_tiny_qwen("2.5"))
    return {path.name: path for path in base.iterdir()}


@pytest.fixture
def loading(folders):
    """Load a checkpoint with changed values, given as {"part.field": value}; restore config.json afterwards."""
    before = {path: (path / "config.json").read_text() for path in folders.values()}

    def load(name: str, changes: dict):
        path = folders[name] / "config.json"
        config = json.loads(path.read_text())
        for field, value in changes.items():
            *parts, last = field.split(".")
            place = config
            for part in parts:
                place = place[part]
            place[last] = value
        path.write_text(json.dumps(config))
        return load_checkpoint(folders[name])

    yield load
    for path, text in before.items():
        (path / "config.json").write_text(text)


DECODER = {
    "rms_norm_eps": [NAN, -1.0, 0.0, 7.0, float("inf"), "1e-5", [1e-5]],
    "hidden_size": [0, -64, 10**9, 64.0, "64", True],
    "intermediate_size": [0, -1, HUGE],
    "num_hidden_layers": [0, -1, 5_000, HUGE],
    "num_attention_heads": [0, -2, 3, 10**9],
    "num_key_value_heads": [0, -2, 3],
    "vocab_size": [0, -1, HUGE],
    "max_position_embeddings": [0, -4],
    "hidden_act": ["silly", 3, ["silu"]],
    "pad_token_id": [10**6, -2, "0"],
    "eos_token_id": [10**6, [2, 10**6], [[2]]],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in DECODER.items() for value in values])
@pytest.mark.parametrize("layout", ["transformers", "original"])
def test_impossible_decoder_values_are_refused(loading, layout, field, value):
    prefix = "text_config." if layout == "transformers" else ""
    with pytest.raises(UserError, match=rf"config\.json has impossible values: .*{field}") as caught:
        loading(layout, {prefix + field: value})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 900


@pytest.mark.parametrize("value", [0, NAN, -5.0, "many"])
def test_impossible_rope_theta_is_refused(loading, value):
    """rope_theta 0 or NaN ran to the end with 0 % accuracy."""
    with pytest.raises(UserError, match="rope_theta"):
        loading("original", {"rope_theta": value})
    with pytest.raises(UserError, match="rope_theta"):
        loading("transformers", {"text_config.rope_parameters": {"rope_type": "default", "rope_theta": value}})


@pytest.mark.parametrize(
    "rope",
    [{"rope_type": "yarnn", "factor": 2.0}, {"type": "dynamik", "factor": 2.0}, {"type": "linear", "factor": NAN}, 3],
)
def test_an_unknown_rope_type_is_refused(loading, rope):
    with pytest.raises(UserError, match="rope_scaling"):
        loading("original", {"rope_scaling": rope})


@pytest.mark.parametrize("rope", [{"rope_type": "linear"}, {"rope_type": "llama3", "factor": 2.0}])
def test_a_rope_type_without_its_numbers_is_refused(loading, rope):
    with pytest.raises(UserError, match=r"rope_scaling: .* needs"):
        loading("original", {"rope_scaling": rope})


TOWER = {
    "layer_norm_eps": [NAN, -1.0, 0.0],
    "hidden_size": [0, 33, HUGE],
    "num_hidden_layers": [0, 5_000],
    "num_attention_heads": [0, -1],
    "image_size": [0, -56, 10**9, [56, 56]],
    "patch_size": [0, 57, "14"],
    "hidden_act": ["silly"],
    "num_channels": [1],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in TOWER.items() for value in values])
def test_impossible_tower_values_are_refused(loading, folders, field, value):
    with pytest.raises(UserError, match=rf"config\.json has impossible values: .*{field}"):
        loading("transformers", {f"vision_config.{field}": value})
    path = folders["original"] / "clip" / "config.json"
    before = path.read_text()
    try:
        edit(path, **{field: value})
        with pytest.raises(UserError, match=rf"clip/config\.json has impossible values: .*{field}"):
            load_checkpoint(folders["original"])
    finally:
        path.write_text(before)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vision_config.depth", 5_000),
        ("vision_config.num_heads", 0),
        ("vision_config.spatial_merge_size", 0),
        ("vision_config.patch_size", -14),
        ("vision_config.hidden_act", "silly"),
    ],
)
def test_impossible_qwen_values_are_refused(loading, field, value):
    with pytest.raises(UserError, match=rf"impossible values: {field}"):
        loading("qwen", {field: value})


@pytest.mark.parametrize("layer", [99, -99, 4, -5])
def test_a_feature_layer_that_the_tower_lacks_is_refused(loading, layer):
    """99 and -99 were taken modulo the depth."""
    sentence = rf"features from layer {layer} of a vision tower with 3 blocks; expected -4 to 3"
    with pytest.raises(UserError, match=sentence):
        loading("transformers", {"vision_feature_layer": layer})
    with pytest.raises(UserError, match=sentence):
        loading("original", {"mm_vision_select_layer": layer})


@pytest.mark.parametrize("layer", [3, -4, 0, -1])
def test_every_layer_of_the_tower_is_accepted(loading, layer):
    assert loading("original", {"mm_vision_select_layer": layer}).model.config.vision_feature_layer == layer


def test_several_feature_layers_are_refused(loading):
    with pytest.raises(UserError, match=r"vision_feature_layer is .*valid integer"):
        loading("transformers", {"vision_feature_layer": [-2, -1]})


def test_a_class_token_among_the_features_is_refused(loading):
    """Both settings were accepted and the class token was dropped: 16 tokens where transformers gives 17."""
    with pytest.raises(UserError, match=r"vision_feature_select_strategy is 'full'; only 'default' is supported"):
        loading("transformers", {"vision_feature_select_strategy": "full"})
    with pytest.raises(UserError, match=r"mm_vision_select_feature is 'cls_patch'; only 'patch' is supported"):
        loading("original", {"mm_vision_select_feature": "cls_patch"})


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        ("transformers", {"architectures": 3}),
        ("transformers", {"model_type": ["llava"]}),
        ("transformers", {"text_config.model_type": 7}),
        ("transformers", {"vision_config": [1]}),
        ("transformers", {"conversation": ["vicuna_v1"]}),
        ("transformers", {"dtype": 16}),
        ("transformers", {"text_config.rope_parameters": {"rope_theta": None}}),
        ("transformers", {"text_config.rope_parameters": {"rope_type": None}}),
        ("transformers", {"vision_config.patch_size": None}),
        ("original", {"architectures": [["LlavaLlamaForCausalLM"]]}),
        ("original", {"mm_vision_tower": 3}),
        ("original", {"image_aspect_ratio": {}}),
    ],
)
def test_fields_of_another_type_are_refused(loading, layout, changes):
    with pytest.raises(UserError, match=rf"impossible values: {next(iter(changes))}"):
        loading(layout, changes)


def test_unknown_fields_are_no_fault(loading):
    extra = {"use_flash": True, "mm_resampler_type": None, "rope_scaling": None, "pad_token_id": -1}
    assert loading("original", extra)
    assert loading("transformers", {"text_config.note": {"a": NAN}})


# Sizes


def test_thousands_of_layers_are_refused_before_they_are_built(loading, monkeypatch):
    """5,000 layers took over a minute to build before the missing weights were reported."""
    monkeypatch.setattr(LlavaForConditionalGeneration, "__init__", lambda *_, **__: pytest.fail("layers are built"))
    with pytest.raises(UserError, match=r"has num_hidden_layers 900, but the weights hold 4 decoder layers"):
        loading("transformers", {"text_config.num_hidden_layers": 900})


def test_a_model_beyond_the_memory_says_what_it_needs(loading, monkeypatch):
    """Such sizes were allocated until the process was killed."""
    monkeypatch.setattr(config_limits, "free_memory", lambda _device: 3 * 2**30)
    with pytest.raises(UserError, match=r"needs about 15\.0 GiB of memory on cpu in float32, 3\.0 GiB are free"):
        loading("original", {"intermediate_size": 2**22 + 2**20})


def test_weights_of_the_right_dtype_need_no_memory(folders, monkeypatch):
    """They stay mapped to their files; as another dtype they need memory."""
    monkeypatch.setattr(config_limits, "free_memory", lambda _device: 2**10)
    assert load_checkpoint(folders["transformers"])
    with pytest.raises(UserError, match="use a smaller dtype"):
        load_checkpoint(folders["transformers"], dtype=torch.bfloat16)


@pytest.mark.parametrize("make", [make_tiny_llava, make_tiny_next, lambda: make_tiny_qwen("2")])
def test_the_estimate_of_parameters_is_near(make):
    model = make()
    true = sum(weight.numel() for weight in model.parameters())
    assert 0.6 * true < parameters(model.config) <= true


# Files


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested deeper than 64 levels"),
        ('{"a": ' + "[" * 100 + "]" * 100 + "}", "nested deeper than 64 levels"),
        ('{"a": ' + "9" * 5_000 + "}", "is not valid JSON"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "contains 'c' twice"),
        ("\xff", "is not valid JSON"),
    ],
)
def test_json_that_python_cannot_or_should_not_read(tmp_path, text, sentence):
    """Deep nesting ended in a RecursionError, 5,000 digits in a ValueError; of duplicate keys the last won silently."""
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=sentence):
        read_json(tmp_path / "config.json")


def test_json_of_some_depth_is_read(tmp_path):
    (tmp_path / "a.json").write_text('{"a": ' + "[" * 60 + "]" * 60 + "}")
    assert read_json(tmp_path / "a.json")


def test_files_that_are_no_files(tmp_path):
    """A FIFO hung for ever; a folder and a link to itself ended in tracebacks."""
    path = tmp_path / "config.json"
    path.mkdir()
    with pytest.raises(UserError, match="is no regular file"):
        load_checkpoint(tmp_path)
    path.rmdir()
    os.mkfifo(path)
    with pytest.raises(UserError, match="is no regular file"):
        load_checkpoint(tmp_path)
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(UserError, match=r"Cannot read .*config\.json"):
        load_checkpoint(tmp_path)
    path.unlink()
    path.symlink_to(tmp_path / "absent")
    with pytest.raises(UserError, match=r"has no config\.json"):
        load_checkpoint(tmp_path)


def test_an_unreadable_file(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")

    def refuse(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(UserError, match=r"Cannot read .*config\.json \(Permission denied\)"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    "weight_map", [{}, {"a": 1}, {"a": None}, {"a": ["x.bin"]}, {"a": ""}, {"a": "../x.bin"}, ["x.bin"], None]
)
def test_an_index_with_other_entries_than_file_names(tmp_path, model, weight_map):
    save_original_layout(tmp_path, model)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=r"index\.json has impossible values: weight_map"):
        load_checkpoint(tmp_path)


def test_an_index_that_names_a_weight_twice(tmp_path, model):
    """The second file won without a word."""
    save_original_layout(tmp_path, model)
    index = tmp_path / "pytorch_model.bin.index.json"
    files = json.loads(index.read_text())["weight_map"]
    key, name = next(iter(files.items()))
    index.write_text(index.read_text().replace(f'"{key}": "{name}"', f'"{key}": "{name}", "{key}": "other.bin"'))
    with pytest.raises(UserError, match=f"contains '{key}' twice"):
        load_checkpoint(tmp_path)


def test_a_weight_in_two_shards(tmp_path, model):
    save_original_layout(tmp_path, model)
    one, two = sorted(tmp_path.glob("pytorch_model-*.bin"))[:2]
    weights = torch.load(one)
    torch.save({**torch.load(two), "lm_head.weight": weights.get("lm_head.weight", torch.zeros(1))}, two)
    torch.save({**weights, "lm_head.weight": torch.zeros(1)}, one)
    with pytest.raises(UserError, match=f"weight lm_head.weight is in two files of .*, {one.name} and {two.name}"):
        load_checkpoint(tmp_path)


# What must go on working: values from the official config.json files


LLAMA_2 = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "vocab_size": 32000,
    "pad_token_id": 0,
}


def test_official_configurations_pass():
    original = {**LLAMA_2, "mm_vision_tower": "openai/clip", "mm_vision_select_layer": -2, "image_aspect_ratio": "pad"}
    assert checked(OriginalConfig, original, "LLaVA-1.5")
    hub = {"text_config": {"vocab_size": 32064, "rms_norm_eps": 1e-05}, "vision_config": {"image_size": 336}}
    assert checked(LlavaHfConfig, {**hub, "pad_token_id": 32001, "vision_feature_layer": -2}, "llava-hf")
    llama3 = {"rope_theta": 90000.0, "vocab_size": 128256, "eos_token_id": [128001, 128009], "head_dim": None}
    assert checked(DecoderConfig, llama3, "Llama-3")
    rope = {"type": "mrope", "mrope_section": [16, 24, 24]}
    qwen = {**LLAMA_2, "vocab_size": 152064, "rope_scaling": rope, "rope_theta": 1000000.0, "sliding_window": 32768}
    vision = {"depth": 32, "hidden_size": 1280, "num_heads": 16, "in_chans": 3, "window_size": 112}
    assert checked(QwenFlatConfig, {**qwen, "vision_config": vision}, "Qwen2.5-VL")


def test_next_with_a_llama_3_tokenizer_gets_its_template(tmp_path):
    """It was asked with vicuna_v1 and the stop string "</s>"."""
    save_next_transformers(tmp_path, make_tiny_next("llama"))
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    words = content["model"]["vocab"]
    for name, old in (("<|start_header_id|>", "cat"), ("<|end_header_id|>", "dog"), ("<|eot_id|>", "man")):
        words[name] = words.pop(old)
    path.write_text(json.dumps(content))
    assert load_checkpoint(tmp_path).conversation == "llava_llama_3"
