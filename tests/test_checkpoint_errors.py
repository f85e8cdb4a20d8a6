"""Checkpoints that are damaged, incomplete or contradict themselves, or whose config.json has impossible values.

Each is refused with one sentence, before anything slow or large happens. The configurations loaded and answered
nonsense, hung, took all memory or ended in a traceback.
"""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from llava.errors import UserError
from llava.model.checkpoint import load
from llava.model.checkpoint.config import DecoderConfig, NestedConfig, OriginalConfig, QwenFlatConfig
from llava.model.checkpoint.load import load_checkpoint
from llava.processing.json_files import checked, read_json
from tests.checkpoint_files import (
    SAVERS,
    drop_weights,
    edit,
    layouts_of,
    no_network,  # noqa: F401
    refused,
    shard_with,
)
from tests.tiny_checkpoints import make_tiny_llava, save_original_layout, save_transformers_layout
from tests.tiny_checkpoints_families import (
    make_tiny_next,
    make_tiny_qwen,
    save_next_transformers,
    save_qwen_transformers,
)


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return make_tiny_llava()


def test_unexpected_weights_are_named_and_counted(tmp_path, model):
    save_transformers_layout(tmp_path, model)
    extra = {f"extra.{number}": torch.zeros(1) for number in range(7)}
    drop_weights(tmp_path / "model.safetensors", "language_model.model.norm.weight", **extra)
    refused(tmp_path, r"1 missing: .*norm.weight; 7 unexpected: extra.0, .*, extra.4 and 2 more\.")


@pytest.mark.parametrize("size", [128, 2**22])
def test_a_weight_of_another_shape(tmp_path, model, size):
    """Large sizes were allocated until the process was killed."""
    save_original_layout(tmp_path, model, intermediate_size=size)
    refused(tmp_path, rf"12 of another shape: .*down_proj.weight \(64, 96\) instead of \(64, {size}\)")


@pytest.mark.parametrize(
    ("save", "key"),
    [
        (save_transformers_layout, "language_model.model.layers.0.self_attn.rotary_emb.inv_freq"),
        (save_transformers_layout, "vision_tower.vision_model.embeddings.position_ids"),
        (save_original_layout, "model.layers.1.self_attn.rotary_emb.inv_freq"),
        (save_original_layout, "model.vision_tower.vision_tower.vision_model.embeddings.position_ids"),
    ],
)
def test_stored_tables_are_ignored(tmp_path, model, save, key):
    save(tmp_path, model)
    single = tmp_path / "model.safetensors"
    drop_weights(single if single.exists() else shard_with(tmp_path, "lm_head.weight"), **{key: torch.full((3,), 7.0)})
    loaded = load_checkpoint(tmp_path).model
    buffers = dict(model.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in loaded.named_buffers())


@pytest.mark.parametrize("layout", ["llava original", "llava original safetensors"])
def test_missing_shard(tmp_path, model, layout):
    SAVERS[layout](tmp_path, model)
    shard = next(tmp_path.glob("*-00002-of-*"))
    shard.unlink()
    refused(tmp_path, rf"lacks 1 of \d weight files named in .*index\.json: {shard.name}; fetch them")


@pytest.mark.parametrize("layout", layouts_of("llava")[:4])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.7])
def test_truncated_weights(tmp_path, model, layout, share):
    SAVERS[layout](tmp_path, model)
    weights = next(path for suffix in ("safetensors", "bin") for path in sorted(tmp_path.glob(f"*.{suffix}")))
    os.truncate(weights, int(share * weights.stat().st_size))
    refused(tmp_path, rf"Cannot read the weights in .*{weights.name}; the file is damaged")


class Exploit:
    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_a_pickle_of_anything_but_weights_is_not_read(tmp_path, model):
    """Code in it is not run."""
    save_transformers_layout(tmp_path, model, safetensors=False)
    exploit = Exploit()
    exploit.trace = tmp_path / "ran"
    torch.save({"weight": exploit}, tmp_path / "pytorch_model.bin")
    refused(tmp_path, r"pytorch_model\.bin holds more than weights and was not unpickled")
    assert not exploit.trace.exists()
    torch.save({"model": {"weight": torch.zeros(1)}}, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "holds no table of weights")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"has no config\.json; is it the folder of a checkpoint"),
        (lambda folder: (folder / "config.json").write_text('{"a": '), r"config\.json is not valid JSON"),
        (lambda folder: (folder / "config.json").write_text("[1]"), r"config\.json holds no JSON object"),
        (
            lambda folder: (folder / "tokenizer.json").unlink(),
            r"has no tokenizer \(tokenizer\.json or tokenizer\.model\)",
        ),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "Cannot read the tokenizer in"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"has no weights \(model\.safetensors or"),
        (lambda folder: edit(folder / "config.json", quantization_config={"a": 1}), "quantised with an unnamed method"),
        (lambda folder: edit(folder / "config.json", image_seq_length="many"), "image_seq_length is 'many'"),
        (
            lambda folder: edit(folder / "preprocessor_config.json", crop_size={"height": 28, "width": 28}),
            "images are cropped to 28 pixels, but the tower expects 56",
        ),
    ],
)
def test_damaged_folders(tmp_path, model, damage, sentence):
    save_transformers_layout(tmp_path, model)
    damage(tmp_path)
    refused(tmp_path, sentence)


@pytest.mark.parametrize("name", ["adapter_config.json", "mm_projector.bin", "non_lora_trainables.bin"])
def test_partial_checkpoints_say_what_to_do(tmp_path, model, name):
    save_transformers_layout(tmp_path, model)
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    refused(tmp_path, f"It has {name}: merge LoRA or projector-only weights")


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"mm_projector_type": "linear"}, "projector type 'linear' is not supported: .* exactly two linear layers"),
        ({"mm_projector_type": "mlp3x_gelu"}, "projector type 'mlp3x_gelu' is not supported"),
        ({"mm_use_im_start_end": True}, "image start and end tokens are not supported"),
        ({"hidden_size": ..., "vocab_size": ...}, r"config\.json lacks hidden_size, vocab_size"),
    ],
)
def test_original_configs_that_the_container_cannot_hold(tmp_path, model, config, sentence):
    save_original_layout(tmp_path, model)
    edit(tmp_path / "config.json", **config)
    refused(tmp_path, sentence)


def test_a_tower_that_is_not_clip(tmp_path, model):
    save_original_layout(tmp_path, model)
    edit(tmp_path / "clip" / "config.json", model_type="siglip_vision_model")
    refused(tmp_path, "is a siglip_vision_model; only CLIP towers")


NAN, HUGE = float("nan"), 10**30


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
    # 5,000 layers took over a minute to build before the missing weights were reported.
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
        refused(folders["original"], rf"clip/config\.json has impossible values: .*{field}")
    finally:
        path.write_text(before)


@pytest.mark.parametrize("layer", [99, -99, 4, -5, [-2, -1]])
def test_a_feature_layer_that_the_tower_lacks_is_refused(loading, layer):
    """99 and -99 were taken modulo the depth."""
    sentence = (
        rf"features from layer {re.escape(str(layer))} of a vision tower with 3 blocks; expected one layer from -4"
    )
    with pytest.raises(UserError, match=sentence):
        loading("transformers", {"vision_feature_layer": layer})
    with pytest.raises(UserError, match=sentence):
        loading("original", {"mm_vision_select_layer": layer})


@pytest.mark.parametrize(
    ("layout", "changes", "sentence"),
    [
        # rope_theta 0 or NaN ran to the end with 0 % accuracy.
        *(("original", {"rope_theta": value}, "rope_theta") for value in (0, NAN, -5.0, "many")),
        ("transformers", {"text_config.rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "rope_theta"),
        ("transformers", {"text_config.rope_parameters": {"rope_theta": None}}, "text_config.rope_parameters"),
        ("transformers", {"text_config.rope_parameters": {"rope_type": None}}, "text_config.rope_parameters"),
        ("original", {"rope_scaling": {"rope_type": "yarnn", "factor": 2.0}}, "rope_scaling"),
        ("original", {"rope_scaling": {"type": "linear", "factor": NAN}}, "rope_scaling"),
        ("original", {"rope_scaling": 3}, "rope_scaling"),
        ("qwen", {"vision_config.depth": 5_000}, "vision_config.depth"),
        ("qwen", {"vision_config.num_heads": 0}, "vision_config.num_heads"),
        ("qwen", {"vision_config.spatial_merge_size": 0}, "vision_config.spatial_merge_size"),
        ("qwen", {"vision_config.patch_size": -14}, "vision_config.patch_size"),
        ("transformers", {"architectures": 3}, "architectures"),
        ("transformers", {"model_type": ["llava"]}, "model_type"),
        ("transformers", {"text_config.model_type": 7}, "text_config.model_type"),
        ("transformers", {"vision_config": [1]}, "vision_config"),
        ("transformers", {"dtype": 16}, "dtype"),
        ("transformers", {"vision_config.patch_size": None}, "vision_config.patch_size"),
        ("original", {"architectures": [["LlavaLlamaForCausalLM"]]}, "architectures"),
        ("original", {"mm_vision_tower": 3}, "mm_vision_tower"),
        ("original", {"image_aspect_ratio": {}}, "image_aspect_ratio"),
    ],
)
def test_impossible_values_and_types_are_refused(loading, layout, changes, sentence):
    with pytest.raises(UserError, match=f"impossible values: .*{sentence}"):
        loading(layout, changes)


def test_features_with_the_class_token_are_refused(loading):
    """The class token was dropped: 16 tokens where transformers gives 17."""
    with pytest.raises(UserError, match="strategy is 'full'; only 'default' is supported, which drops the class token"):
        loading("transformers", {"vision_feature_select_strategy": "full"})
    with pytest.raises(UserError, match="mm_vision_select_feature is 'cls_patch'; only 'patch' is supported"):
        loading("original", {"mm_vision_select_feature": "cls_patch"})


def test_a_rope_type_without_its_numbers_is_refused(loading):
    with pytest.raises(UserError, match=r"config\.json describes no LLaVA model: .*Missing required keys in `rope_par"):
        loading("original", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}})


def test_unknown_fields_are_no_fault(loading):
    extra = {"use_flash": True, "mm_resampler_type": None, "rope_scaling": None, "pad_token_id": -1}
    assert loading("original", extra)
    assert loading("transformers", {"text_config.note": {"a": NAN}})


# Sizes


def test_weights_of_the_right_dtype_need_no_memory(folders, monkeypatch):
    """They stay mapped to their files; as another dtype they need memory."""
    monkeypatch.setattr(load, "free_memory", lambda _device: 2**10)
    assert load_checkpoint(folders["transformers"])
    needed = r"needs about 0\.0 GiB of memory on cpu in bfloat16, 0\.0 GiB are free; use a smaller dtype"
    refused(folders["transformers"], needed, dtype=torch.bfloat16)


# Files


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "is not valid JSON"),
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


def test_files_that_are_no_files(tmp_path):
    """A FIFO hung for ever; a folder and a link to itself ended in tracebacks."""
    path = tmp_path / "config.json"
    path.mkdir()
    refused(tmp_path, "is no regular file")
    path.rmdir()
    os.mkfifo(path)
    refused(tmp_path, "is no regular file")
    path.unlink()
    path.symlink_to(path)
    refused(tmp_path, r"Cannot read .*config\.json")
    path.unlink()
    path.symlink_to(tmp_path / "absent")
    refused(tmp_path, r"has no config\.json")


@pytest.mark.parametrize(
    "weight_map", [{}, {"a": 1}, {"a": None}, {"a": ["x.bin"]}, {"a": ""}, {"a": "../x.bin"}, ["x.bin"], None]
)
def test_an_index_with_other_entries_than_file_names(tmp_path, model, weight_map):
    save_original_layout(tmp_path, model)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    refused(tmp_path, r"index\.json has impossible values: weight_map")


def test_a_weight_in_two_shards(tmp_path, model):
    save_original_layout(tmp_path, model)
    one, two = sorted(tmp_path.glob("pytorch_model-*.bin"))[:2]
    weights = torch.load(one)
    torch.save({**torch.load(two), "lm_head.weight": weights.get("lm_head.weight", torch.zeros(1))}, two)
    torch.save({**weights, "lm_head.weight": torch.zeros(1)}, one)
    refused(tmp_path, f"weight lm_head.weight is in two files of .*, {one.name} and {two.name}")


# What must go on working: values from the official config.json files


LLAMA_2 = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_2 |= {"num_key_value_heads": 32, "hidden_act": "silu", "max_position_embeddings": 4096, "rms_norm_eps": 1e-05}
LLAMA_2 |= {"rope_scaling": None, "vocab_size": 32000, "pad_token_id": 0}
ROPE = {"type": "mrope", "mrope_section": [16, 24, 24]}
QWEN = {**LLAMA_2, "vocab_size": 152064, "rope_scaling": ROPE, "rope_theta": 1000000.0, "sliding_window": 32768}
QWEN_VISION = {"depth": 32, "hidden_size": 1280, "num_heads": 16, "in_chans": 3, "window_size": 112}
HUB = {"text_config": {"vocab_size": 32064, "rms_norm_eps": 1e-05}, "vision_config": {"image_size": 336}}


@pytest.mark.parametrize(
    ("schema", "config"),
    [
        (OriginalConfig, {**LLAMA_2, "mm_vision_tower": "openai/clip", "image_aspect_ratio": "pad"}),
        (NestedConfig, {**HUB, "pad_token_id": 32001, "vision_feature_layer": -2}),
        (DecoderConfig, {"rope_theta": 90000.0, "vocab_size": 128256, "eos_token_id": [128001, 9], "head_dim": None}),
        (QwenFlatConfig, {**QWEN, "vision_config": QWEN_VISION}),
    ],
)
def test_official_configurations_pass(schema, config):
    assert checked(schema, config, "config.json")


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
