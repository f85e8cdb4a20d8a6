"""Checkpoints that are damaged, incomplete or contradict themselves give a sentence."""

import os

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from llava.errors import UserError
from llava.model.checkpoint.load import load_checkpoint
from tests.checkpoint_files import (
    LAYOUTS,
    drop_weights,
    edit,
    no_network,  # noqa: F401
    shard_with,
    write,
)
from tests.tiny_checkpoints import make_tiny_llava, save_original_layout, save_transformers_layout


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return make_tiny_llava()


def test_missing_weights_are_named_and_counted(tmp_path, model):
    save_original_layout(tmp_path, model)
    for key in ("model.mm_projector.2.bias", "model.norm.weight"):
        drop_weights(shard_with(tmp_path, key), key)
    names = "model.language_model.norm.weight, model.multi_modal_projector.linear_2.bias"
    with pytest.raises(UserError, match=f"do not fit its config.json, 2 missing: {names}\\."):
        load_checkpoint(tmp_path)


def test_unexpected_weights_are_named_and_counted(tmp_path, model):
    save_transformers_layout(tmp_path, model)
    extra = {f"extra.{number}": torch.zeros(1) for number in range(7)}
    drop_weights(tmp_path / "model.safetensors", "language_model.model.norm.weight", **extra)
    with pytest.raises(UserError, match=r"1 missing: .*norm.weight; 7 unexpected: extra.0, .*, extra.4 and 2 more\."):
        load_checkpoint(tmp_path)


def test_a_weight_of_another_shape(tmp_path, model):
    save_original_layout(tmp_path, model, intermediate_size=128)
    with pytest.raises(UserError, match=r"12 of another shape: .*down_proj.weight \(64, 96\) instead of \(64, 128\)"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("layout", ["transformers", "original"])
@pytest.mark.parametrize("key", ["rotary_emb.inv_freq", "embeddings.position_ids"])
def test_stored_tables_are_ignored(tmp_path, model, layout, key):
    write(layout, tmp_path, model)
    names = {
        ("transformers", "rotary_emb.inv_freq"): "language_model.model.layers.0.self_attn.rotary_emb.inv_freq",
        ("transformers", "embeddings.position_ids"): "vision_tower.vision_model.embeddings.position_ids",
        ("original", "rotary_emb.inv_freq"): "model.layers.1.self_attn.rotary_emb.inv_freq",
        ("original", "embeddings.position_ids"): "model.vision_tower.vision_tower.vision_model.embeddings.position_ids",
    }
    weights = tmp_path / "model.safetensors" if layout == "transformers" else shard_with(tmp_path, "lm_head.weight")
    drop_weights(weights, **{names[layout, key]: torch.full((3,), 7.0)})
    loaded = load_checkpoint(tmp_path).model
    buffers = dict(model.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in loaded.named_buffers())


@pytest.mark.parametrize("layout", ["original", "original safetensors"])
def test_missing_shard(tmp_path, model, layout):
    write(layout, tmp_path, model)
    shard = next(tmp_path.glob("*-00002-of-*"))
    shard.unlink()
    with pytest.raises(
        UserError, match=rf"lacks 1 of \d weight files named in .*index\.json: {shard.name}; fetch them"
    ):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS[:4])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.7])
def test_truncated_weights(tmp_path, model, layout, share):
    write(layout, tmp_path, model)
    weights = next(path for suffix in ("safetensors", "bin") for path in sorted(tmp_path.glob(f"*.{suffix}")))
    os.truncate(weights, int(share * weights.stat().st_size))
    with pytest.raises(UserError, match=rf"Cannot read the weights in .*{weights.name}; the file is damaged"):
        load_checkpoint(tmp_path)


class Exploit:
    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_a_pickle_with_code_is_not_run(tmp_path, model):
    save_transformers_layout(tmp_path, model, safetensors=False)
    exploit = Exploit()
    exploit.trace = tmp_path / "ran"
    torch.save({"weight": exploit}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin holds more than weights and was not unpickled"):
        load_checkpoint(tmp_path)
    assert not exploit.trace.exists()


def test_a_bin_that_is_no_state_dict(tmp_path, model):
    save_transformers_layout(tmp_path, model, safetensors=False)
    torch.save({"model": {"weight": torch.zeros(1)}}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="holds no table of weights"):
        load_checkpoint(tmp_path)


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
        (lambda folder: edit(folder / "config.json", conversation="vicuna"), "Unknown conversation mode 'vicuna'"),
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
    with pytest.raises(UserError, match=sentence) as caught:
        load_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["adapter_config.json", "mm_projector.bin", "non_lora_trainables.bin"])
def test_partial_checkpoints_say_what_to_do(tmp_path, model, name):
    save_transformers_layout(tmp_path, model)
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    with pytest.raises(UserError, match=f"It has {name}: merge LoRA or projector-only weights"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"mm_projector_type": "linear"}, "projector type 'linear' is not supported: .* exactly two linear layers"),
        ({"mm_projector_type": "mlp3x_gelu"}, "projector type 'mlp3x_gelu' is not supported"),
        ({"mm_use_im_start_end": True}, "image start and end tokens are not supported"),
        ({"mm_vision_select_feature": "cls"}, "mm_vision_select_feature is 'cls'; only 'patch' is supported"),
        ({"hidden_size": ..., "vocab_size": ...}, r"config\.json lacks hidden_size, vocab_size"),
    ],
)
def test_original_configs_that_the_container_cannot_hold(tmp_path, model, config, sentence):
    save_original_layout(tmp_path, model)
    edit(tmp_path / "config.json", **config)
    with pytest.raises(UserError, match=sentence):
        load_checkpoint(tmp_path)


def test_a_tower_that_is_not_clip(tmp_path, model):
    save_original_layout(tmp_path, model)
    edit(tmp_path / "clip" / "config.json", model_type="siglip_vision_model")
    with pytest.raises(UserError, match="is a siglip_vision_model; only CLIP towers"):
        load_checkpoint(tmp_path)
