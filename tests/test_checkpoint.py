"""Both layouts of the same tiny model have to give the same model, and damaged ones a sentence."""

import json
import os
import shutil
import socket
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration

import llava.checkpoint
import llava.files
from llava.checkpoint import Checkpoint, load_checkpoint, real_vocabulary
from llava.errors import UserError
from llava.image import ImageProcessor
from llava.original_layout import CLIP_L_336, CLIP_L_336_NAME, to_transformers_config, to_transformers_key
from tests.tiny_checkpoints import make_tiny_llava, make_tokenizer, save_original_layout, save_transformers_layout

KEYS = json.loads((Path(__file__).parent / "data" / "llava_keys" / "llava-v1.5-7b.json").read_text())
WORDS = len(make_tokenizer())

# config.json of liuhaotian/llava-v1.5-7b, the fields that say something about the model.
LLAVA_7B = {
    "model_type": "llava_llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": CLIP_L_336_NAME,
}


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return make_tiny_llava()


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A test that reaches for the hub by mistake fails at once."""

    def refuse(*_args, **_kwargs):
        raise ConnectionError("no network in tests")

    monkeypatch.setattr(llava.files, "snapshot_download", refuse)


def write(layout: str, directory: Path, model: LlavaForConditionalGeneration) -> Path:
    match layout:
        case "transformers":
            save_transformers_layout(directory, model)
        case "transformers bin":
            save_transformers_layout(directory, model, safetensors=False)
        case "original":
            save_original_layout(directory, model)
        case "original safetensors":
            save_original_layout(directory, model, safetensors=True, shards=3)
        case "original with tower":
            save_original_layout(directory, model, tower_in_shards=True)
    return directory


LAYOUTS = ("transformers", "transformers bin", "original", "original safetensors", "original with tower")


def real_rows(name: str, weight: Tensor) -> Tensor:
    """Original files end with the last word; the hub's have spare rows."""
    return weight[:WORDS] if name.endswith(("embed_tokens.weight", "lm_head.weight")) else weight


@torch.no_grad()
def logits(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """All visual tokens and some words through the stock classes; [tokens, WORDS]."""
    visual = torch.stack(list(model.get_image_features(pixels, return_dict=True).pooler_output))
    words = model.get_input_embeddings()(torch.tensor([[1, 5, 9, 30]]))
    embeds = torch.cat((words[:, :2], visual, words[:, 2:]), dim=1)
    return model(inputs_embeds=embeds).logits[0, :, :WORDS]


# The same model, however it was written


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_model(tmp_path, model, layout):
    loaded = load_checkpoint(write(layout, tmp_path / "tiny", model))
    ours, theirs = loaded.model.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert torch.equal(real_rows(name, ours[name]), real_rows(name, weight)), name
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    expected = logits(model, pixels)
    assert torch.equal(logits(loaded.model, pixels), expected)
    assert (logits(loaded.model, pixels + 1) - expected).abs().max() > 0.1, "the pixels must matter in this test"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_comes_with_the_model(tmp_path, model, layout):
    loaded = load_checkpoint(write(layout, tmp_path / "tiny", model))
    assert isinstance(loaded, Checkpoint)
    assert not loaded.model.training
    assert loaded.model.config.text_config._attn_implementation == "sdpa"
    assert loaded.model.config.vision_config._attn_implementation == "sdpa"
    assert loaded.layout == layout.split()[0]
    assert loaded.name == "tiny"
    assert loaded.image_processor == ImageProcessor(56, 56, aspect="pad")
    assert loaded.conversation == "vicuna_v1"
    assert loaded.vocabulary == WORDS
    assert loaded.tokenizer("what is red").input_ids == make_tokenizer()("what is red").input_ids
    assert loaded.text_tower is None
    assert loaded.model.config.image_token_index == WORDS
    assert loaded.model.config.image_seq_length == 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["transformers", "original", "original safetensors"])
def test_half_precision_and_its_tables(tmp_path, model, layout, dtype):
    """Weights in the dtype asked for; the tables that are in no file are right, the rotary one in float32."""
    loaded = load_checkpoint(write(layout, tmp_path / "tiny", model), dtype=dtype).model
    for (name, ours), theirs in zip(loaded.state_dict().items(), model.state_dict().values(), strict=True):
        assert ours.dtype == dtype, name
        assert torch.equal(real_rows(name, ours), real_rows(name, theirs).to(dtype)), name
    buffers = dict(model.named_buffers())
    assert dict(loaded.named_buffers()).keys() == buffers.keys()
    for name, buffer in loaded.named_buffers():
        assert buffer.device.type == "cpu"
        assert torch.equal(buffer, buffers[name]), name
        assert buffer.dtype == buffers[name].dtype, name
    assert any(name.endswith("inv_freq") for name in buffers)


@pytest.mark.parametrize("layout", ["transformers", "original"])
def test_tied_embeddings(tmp_path, layout):
    """A tied model has no lm_head in its files."""
    tied = make_tiny_llava(tied=True)
    loaded = load_checkpoint(write(layout, tmp_path / "tiny", tied)).model
    assert loaded.lm_head.weight.data_ptr() == loaded.get_input_embeddings().weight.data_ptr()
    assert torch.equal(loaded.lm_head.weight[:WORDS], tied.lm_head.weight[:WORDS])


@pytest.mark.parametrize("safetensors", [True, False])
def test_weights_in_one_file_without_index(tmp_path, model, safetensors):
    save_original_layout(tmp_path, model, shards=1, safetensors=safetensors)
    (index,) = tmp_path.glob("*.index.json")
    index.unlink()
    (weights,) = tmp_path.glob("*-00001-of-00001.*")
    weights.rename(tmp_path / ("model.safetensors" if safetensors else "pytorch_model.bin"))
    loaded = load_checkpoint(tmp_path).model
    assert torch.equal(loaded.model.language_model.norm.weight, model.model.language_model.norm.weight)


def test_text_tower_and_conversation_of_an_own_checkpoint(tmp_path, model):
    save_transformers_layout(tmp_path / "own", model)
    (tmp_path / "own" / "text_tower").mkdir()
    edit(tmp_path / "own" / "config.json", conversation="llava_v1")
    loaded = load_checkpoint(str(tmp_path / "own"))
    assert loaded.text_tower == tmp_path / "own" / "text_tower"
    assert loaded.conversation == "llava_v1"


# Where the vision tower comes from


def test_tower_in_the_shards_wins(tmp_path, model):
    """Official code ignores a fine-tuned tower in 1.5 shards (LLaVA issues 382, 1694)."""
    save_original_layout(tmp_path / "tiny", model, tower_in_shards=True)
    tower = tmp_path / "tiny" / "clip" / "pytorch_model.bin"
    torch.save({key: torch.zeros_like(weight) for key, weight in torch.load(tower).items()}, tower)
    loaded = load_checkpoint(tmp_path / "tiny")
    assert torch.equal(
        loaded.model.model.vision_tower.pre_layrnorm.weight, model.model.vision_tower.pre_layrnorm.weight
    )
    assert loaded.vision_tower_source == "the checkpoint's shards"
    assert "own shards, not from clip" in loaded.notes[0]


def test_tower_beside_the_checkpoint(tmp_path, model):
    save_original_layout(tmp_path / "tiny", model)
    (tmp_path / "tiny" / "clip").rename(tmp_path / "tower")
    for name in ("../tower", str(tmp_path / "tower")):
        edit(tmp_path / "tiny" / "config.json", mm_vision_tower=name)
        assert load_checkpoint(tmp_path / "tiny").vision_tower_source == f"mm_vision_tower {name}"


@pytest.mark.parametrize("name", ["/nowhere/clip", "some/clip"])
def test_tower_that_cannot_be_found(tmp_path, model, name):
    save_original_layout(tmp_path, model, mm_vision_tower=name)
    with pytest.raises(UserError, match=rf"vision tower .*{name}"):
        load_checkpoint(tmp_path)


def test_official_tower_name_needs_no_download_when_the_shards_hold_it(tmp_path, model, monkeypatch):
    monkeypatch.setattr(llava.checkpoint, "CLIP_L_336", model.config.vision_config.to_dict())
    save_original_layout(tmp_path, model, tower_in_shards=True, mm_vision_tower=CLIP_L_336_NAME)
    loaded = load_checkpoint(tmp_path)
    assert torch.equal(
        loaded.model.model.vision_tower.pre_layrnorm.weight, model.model.vision_tower.pre_layrnorm.weight
    )


def test_missing_preprocessor_is_noted(tmp_path, model):
    save_transformers_layout(tmp_path, model)
    (tmp_path / "preprocessor_config.json").unlink()
    loaded = load_checkpoint(tmp_path)
    assert loaded.image_processor == ImageProcessor(56, 56)
    assert "CLIP's mean and deviation at 56 pixels were assumed" in loaded.notes[0]


def test_preprocessor_inside_the_processor_config(tmp_path, model):
    """transformers 5 writes one file for image processor and tokenizer."""
    save_transformers_layout(tmp_path, model)
    inner = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {**inner, "image_mean": [0.5] * 3}}))
    assert load_checkpoint(tmp_path).image_processor.mean == (0.5, 0.5, 0.5)


# The key map, against the real model


def test_every_original_key_has_its_place():
    """All 686 weights of llava-v1.5-7b: none missing, none left, every shape equal."""
    with torch.device("meta"):
        container = LlavaForConditionalGeneration(LlavaConfig.from_dict(to_transformers_config(LLAVA_7B, CLIP_L_336)))
    expected = {name: list(weight.shape) for name, weight in container.state_dict().items()}
    assert len(KEYS) == 686
    assert {to_transformers_key(row["original"]): row["shape"] for row in KEYS} == expected
    assert all(to_transformers_key(row["original"]) == row["hf_v5"] for row in KEYS)


def test_the_translated_config_says_what_the_hub_says():
    config = LlavaConfig.from_dict(to_transformers_config(LLAVA_7B, CLIP_L_336))
    assert (config.image_token_index, config.image_seq_length, config.vision_feature_layer) == (32000, 576, -2)
    assert (config.vision_feature_select_strategy, config.projector_hidden_act) == ("default", "gelu")
    assert config.text_config.rope_parameters["rope_theta"] == 10000
    assert config.text_config.rms_norm_eps == 1e-5
    assert config.vision_config.hidden_act == "quick_gelu"


@pytest.mark.parametrize("rows, expected", [(32064, 32000), (31000, 31000)])
def test_placeholder_rows_are_no_vocabulary(rows, expected):
    """The hub's 1.5: "<image>" is 32000 and padding 32001, the embedding has 32064 rows."""

    class HubTokenizer:
        pad_token_id, eos_token_id = 32001, 2

        def __len__(self) -> int:
            return 32002

    assert real_vocabulary(HubTokenizer(), rows, image_token=32000) == expected
    HubTokenizer.eos_token_id = 32001
    assert real_vocabulary(HubTokenizer(), 32064, image_token=32000) == 32002, "an end token can be answered"


# Errors


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
        (lambda folder: edit(folder / "config.json", quantization_config={"a": 1}), "is quantised; give"),
        (lambda folder: edit(folder / "config.json", image_seq_length="many"), "describes no LLaVA model"),
        (
            lambda folder: edit(folder / "preprocessor_config.json", crop_size={"height": 28, "width": 28}),
            "images are cut to 28 pixels, but the tower expects 56",
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
    ("config", "family"),
    [
        ({"model_type": "llava_next", "text_config": {}, "vision_config": {}}, "llava_next"),
        ({"model_type": "video_llava", "text_config": {}, "vision_config": {}}, "video_llava"),
        ({"model_type": "qwen2_5_vl", "vision_config": {}}, "qwen2_5_vl"),
        ({"model_type": "llama"}, "llama"),
        ({**LLAVA_7B, "model_type": "llava", "image_aspect_ratio": "anyres"}, "LLaVA-NeXT"),
        ({**LLAVA_7B, "model_type": "llava", "mm_patch_merge_type": "spatial_unpad"}, "LLaVA-NeXT"),
        ({**LLAVA_7B, "model_type": "llava_mistral"}, "llava_mistral"),
        ({**LLAVA_7B, "model_type": "llava", "mm_image_tower": "LanguageBind/LanguageBind_Image"}, "Video-LLaVA"),
        (
            {"model_type": "llava", "text_config": {"model_type": "qwen2"}, "vision_config": {"model_type": "siglip"}},
            r"llava \(siglip tower, qwen2 decoder\)",
        ),
    ],
)
def test_other_families_are_refused_by_name(tmp_path, config, family):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=rf"of the family {family}, which is not supported yet: this version reads LLaVA-1\.5"
    ):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("model_type", ["llava", "llava_llama"])
def test_original_layout_under_both_of_its_names(tmp_path, model, model_type):
    """The name "llava" is also that of the transformers layout: it must not decide."""
    save_original_layout(tmp_path, model, model_type=model_type)
    assert load_checkpoint(tmp_path).layout == "original"


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"mm_projector_type": "linear"}, "projector type 'linear' is not supported: .* exactly two linear layers"),
        ({"mm_projector_type": "mlp3x_gelu"}, "projector type 'mlp3x_gelu' is not supported"),
        ({"mm_use_im_start_end": True}, "image start and end tokens are not supported"),
        ({"mm_vision_select_feature": "cls"}, "is 'cls'; expected one of cls_patch, patch"),
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


def test_another_aspect_is_noted_and_padded(tmp_path, model):
    save_original_layout(tmp_path, model, image_aspect_ratio="square")
    loaded = load_checkpoint(tmp_path)
    assert loaded.image_processor.aspect == "pad"
    assert "asks for image_aspect_ratio 'square'; images are padded" in loaded.notes[0]


# The hub


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

    monkeypatch.setattr(llava.files, "snapshot_download", fetch)
    loaded = load_checkpoint("some/model")
    assert loaded.name == "some/model"
    assert torch.equal(loaded.model.lm_head.weight[:WORDS], model.lm_head.weight[:WORDS])
    assert not [name for name in extra if (local / name).exists()]


def test_loading_opens_no_connection(tmp_path, model, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("a folder was given, yet a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    load_checkpoint(write("original", tmp_path / "o", model))
    load_checkpoint(write("transformers", tmp_path / "t", model))
