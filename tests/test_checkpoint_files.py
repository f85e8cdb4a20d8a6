"""What is fetched of a checkpoint on the hub and read: each weight once, none held twice; and what is quantised.

Files that are damaged or incomplete, or ask for what is not done, end in one sentence.
"""

import json
import os
import pickle
import shutil
from fnmatch import fnmatch
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants
from torch import nn
from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration
from transformers.quantizers.quantizers_utils import should_convert_module

import llava.model.checkpoint.files
import llava.model.checkpoint.load
from llava.errors import UserError
from llava.model.checkpoint.files import folder_of, name_of
from llava.model.checkpoint.load import load_checkpoint, outline_checkpoint
from tests.checkpoint_files import (
    SAVERS,
    WORDS,
    assert_same_weights,
    drop_weights,
    edit,
    hub_cache,
    layouts_of,
    no_network,  # noqa: F401
    refused,
    shard_with,
)
from tests.tiny_checkpoints import make_tiny_llava, save_original_layout, save_transformers_layout
from tests.tiny_checkpoints_families import make_tiny_next, make_tiny_video, save_next_transformers


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return make_tiny_llava()


def test_a_folder_that_is_not_there_and_a_hub_out_of_reach():
    for source in ("/nowhere/at/all", "nowhere", "a/b/c", "../x"):
        refused(source, f"There is no checkpoint folder {source}; give a folder or a hub id")
    refused("some/model", "'some/model' .*ConnectionError")


def test_without_a_network_the_sentence_names_the_variables_of_the_hub(monkeypatch):
    """Offline, the advice was to check the network; neither HF_HUB_OFFLINE nor HF_HOME was named."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/large/disk/hub")
    for offline in (True, False):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        refused("some/model", r"(?=.*HF_HUB_OFFLINE)(?=.*HF_HOME)(?=.*/large/disk/hub).*hf download some/model")


def test_a_model_in_the_cache_of_the_hub_is_named_by_its_id(tmp_path, model, monkeypatch):
    """A snapshot's path named the model by its commit, the cache's own folder was refused, and so was ~."""
    save_transformers_layout(tmp_path / "plain" / "my-llava", model)
    snapshot = hub_cache(tmp_path / "hub", tmp_path / "plain" / "my-llava", "models", "owner/llava-v1.5-7b")
    (tmp_path / "link").symlink_to(snapshot)
    (tmp_path / "whole").symlink_to(snapshot.parents[1])
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "hub")
    sources = [snapshot, f"{snapshot}/", tmp_path / "link", "~/link", snapshot.parents[1], f"{snapshot.parents[1]}/"]
    sources += ["~/hub/models--owner--llava-v1.5-7b", tmp_path / "whole", "models--owner--llava-v1.5-7b"]
    for source in sources:
        loaded = load_checkpoint(source)
        assert loaded.name == "owner/llava-v1.5-7b" == outline_checkpoint(source).name, source
        assert "owner/llava-v1.5-7b at commit 0123abc" in loaded.notes[-1]
        assert {state.path.parent.resolve() for state in loaded.files.values()} == {snapshot.resolve()}
    for source in (tmp_path / "plain" / "my-llava", "~/plain/my-llava/"):
        assert load_checkpoint(source).name == "my-llava" and not load_checkpoint(source).notes


def test_which_snapshot_of_several_is_meant(tmp_path):
    """Nothing says which one to take where the cache knows no branch main."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text("{}")
    one, two = (
        hub_cache(tmp_path / "hub", tmp_path / "source", "models", "owner/name", commit, main=False)
        for commit in ("aaa", "bbb")
    )
    repository = one.parents[1]
    with pytest.raises(UserError, match=r"has 2 snapshots \(aaa, bbb\)"):
        folder_of(repository)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("bbb")
    assert folder_of(repository) == two
    (repository / "refs" / "main").write_text("ccc")
    with pytest.raises(UserError, match="main, ccc, is missing"):
        folder_of(repository)
    (repository / "refs" / "main").unlink()
    shutil.rmtree(two)
    assert folder_of(repository) == one and name_of(repository) == name_of(one) == "owner/name"
    shutil.rmtree(one)
    with pytest.raises(UserError, match="has no snapshot"):
        folder_of(repository)


@pytest.mark.parametrize("form", ["{snapshot}", "{snapshot}/", "{repository}", "~/hub/{name}", "../hub/{name}"])
def test_a_tower_in_the_cache_of_the_hub(tmp_path, model, monkeypatch, form):
    """A tower's path in config.json may be a folder of the hub's cache, too; the notes name it by its id."""
    save_original_layout(tmp_path / "checkpoint", model, tower_in_shards=True)
    snapshot = hub_cache(tmp_path / "hub", tmp_path / "checkpoint" / "clip", "models", "openai/clip")
    shutil.rmtree(tmp_path / "checkpoint" / "clip")
    monkeypatch.setenv("HOME", str(tmp_path))
    repository = snapshot.parents[1]
    named = form.format(snapshot=snapshot, repository=repository, name=repository.name)
    edit(tmp_path / "checkpoint" / "config.json", mm_vision_tower=named)
    loaded = load_checkpoint(tmp_path / "checkpoint")
    assert any(note.endswith("not from openai/clip.") for note in loaded.notes), loaded.notes
    assert outline_checkpoint(tmp_path / "checkpoint").image_processor == loaded.image_processor


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


@pytest.mark.parametrize("name", [name for name in SAVERS if len(name.split()) == 2])
def test_weights_stay_where_they_are_mapped_or_own_exactly_their_bytes(tmp_path, monkeypatch, name):
    """In the right dtype they are the files'; converted, none is a view that keeps something larger alive."""
    SAVERS[name](tmp_path)
    mapped = set()

    def read(directory):
        weights = llava.model.checkpoint.files.read_weights(directory)
        mapped.update(tensor.data_ptr() for tensor in weights.values())
        return weights

    monkeypatch.setattr(llava.model.checkpoint.load, "read_weights", read)
    assert {weight.data_ptr() for weight in load_checkpoint(tmp_path).model.parameters()} <= mapped
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


@pytest.mark.parametrize("choice", ["8bit", "4bit"])
@pytest.mark.parametrize("name", ["llava original", "video_llava original", "qwen2_5_vl transformers"])
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
    assert f"quantised to {choice[0]} bits" in loaded.notes[-1]


def test_choices_that_cannot_be_met(monkeypatch):
    """Said before anything is read or fetched."""
    monkeypatch.setattr(llava.model.checkpoint.load, "find_spec", lambda name: None)
    refused("/nowhere", r"quantization '4bit' needs the package bitsandbytes, .* pip install", quantization="4bit")
    refused("/nowhere", r"Unknown quantization '3bit'\. .* Available: 4bit, 8bit", quantization="3bit")


def test_the_video_tower_with_time_is_not_quantised_either():
    """Its attention over time is new to the library, its path is not."""
    linears = [path for path, module in make_tiny_video().named_modules() if isinstance(module, nn.Linear)]
    temporal = [path for path in linears if "temporal_attn" in path]
    assert len(temporal) == 12
    assert not any(should_convert_module(path, list(llava.model.checkpoint.load.KEPT)) for path in temporal)


# What is damaged, incomplete or not done


def test_unexpected_weights_are_named_and_counted(tmp_path, model):
    save_transformers_layout(tmp_path, model)
    extra = {f"extra.{number}": torch.zeros(1) for number in range(7)}
    drop_weights(tmp_path / "model.safetensors", "language_model.model.norm.weight", **extra)
    refused(tmp_path, r"1 missing: .*norm.weight; 7 unexpected: extra.0, .*, extra.4 and 2 more\.")


def test_weights_of_a_quantised_type_are_refused(tmp_path, model):
    """Integers were taken for the weights themselves."""
    save_transformers_layout(tmp_path, model)
    name = "language_model.model.norm.weight"
    drop_weights(tmp_path / "model.safetensors", name, **{name: torch.ones(64, dtype=torch.int8)})
    refused(tmp_path, r"1 of a quantised type: .*norm.weight int8\.")


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
    refused(tmp_path, rf"lacks 1 of \d .*index\.json: {shard.name};")


@pytest.mark.parametrize("layout", layouts_of("llava")[:4])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.7])
def test_truncated_weights(tmp_path, model, layout, share):
    SAVERS[layout](tmp_path, model)
    weights = next(path for suffix in ("safetensors", "bin") for path in sorted(tmp_path.glob(f"*.{suffix}")))
    os.truncate(weights, int(share * weights.stat().st_size))
    refused(tmp_path, rf"Cannot read the weights in .*{weights.name}; the file is damaged")


@pytest.mark.parametrize("layout", ["llava transformers bin", "llava original", "llava_next original bin"])
def test_weights_in_the_format_before_torch_1_6(tmp_path, layout):
    """Files of torch.save that are no archive, from torch 1.5 and older, were called damaged."""
    SAVERS[layout](tmp_path)
    expected = load_checkpoint(tmp_path)
    for path in tmp_path.rglob("*.bin"):
        weights = torch.load(path)
        path.unlink()  # the expected weights are mapped to it
        torch.save(weights, path, _use_new_zipfile_serialization=False)
    assert_same_weights(load_checkpoint(tmp_path).model, expected.model)


def test_damage_and_code_in_the_format_before_torch_1_6(tmp_path, model, monkeypatch):
    """A wrong byte there is an IndexError or KeyError of the reader; code in it is not run either."""
    save_transformers_layout(tmp_path, model, safetensors=False)
    path = tmp_path / "pytorch_model.bin"
    torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    cut = [whole[:size] for size in (5, 20, 400, len(whole) // 2, len(whole) - 3)]
    for content in (*cut, b"<html>404</html>", pickle.dumps({"weight": 1})):
        path.write_bytes(content)
        refused(tmp_path, r"pytorch_model\.bin; .* damaged")
    exploit = Exploit()
    exploit.trace = tmp_path / "ran"
    torch.save({"weight": exploit}, path, _use_new_zipfile_serialization=False)
    refused(tmp_path, r"pytorch_model\.bin .* not unpickled")
    assert not exploit.trace.exists()
    path.write_bytes(whole)

    def full(*_args, **_options):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "load", full)
    refused(tmp_path, r"pytorch_model\.bin do not fit into the free memory")


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
        (lambda folder: (folder / "config.json").unlink(), r"has no config\.json"),
        (lambda folder: (folder / "config.json").write_text('{"a": '), r"config\.json is not valid"),
        (lambda folder: (folder / "config.json").write_text("[1]"), r"config\.json holds no JSON object"),
        (
            lambda folder: (folder / "tokenizer.json").unlink(),
            r"has no tokenizer \(tokenizer\.json or tokenizer\.model\)",
        ),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "Cannot read the tokenizer"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"has no weights \(model\.safetensors or"),
        (
            lambda folder: edit(folder / "config.json", quantization_config={"quant_method": "bitsandbytes"}),
            "quantised with bitsandbytes",
        ),
        (
            lambda folder: edit(folder / "preprocessor_config.json", crop_size={"height": 28, "width": 28}),
            "28 pixels, .* 56",
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
    refused(tmp_path, f"It has {name}: merge")


def test_a_tower_that_is_not_clip(tmp_path, model):
    save_original_layout(tmp_path, model)
    edit(tmp_path / "clip" / "config.json", model_type="siglip_vision_model")
    refused(tmp_path, "siglip_vision_model")


@pytest.mark.parametrize(
    ("save", "changes", "sentence"),
    [
        # 99 and -99 were taken modulo the depth.
        (save_transformers_layout, {"vision_feature_layer": 99}, "layer 99 of .* 3 blocks"),
        (save_original_layout, {"mm_vision_select_layer": -5}, "layer -5 of .* from -4 to 3"),
        (save_transformers_layout, {"vision_feature_layer": [-2, -1]}, r"layer \[-2, -1\]"),
        # The class token was dropped: 16 tokens where transformers gives 17.
        (save_transformers_layout, {"vision_feature_select_strategy": "full"}, "'full'; only 'default'"),
        (save_original_layout, {"mm_vision_select_feature": "cls_patch"}, "'cls_patch'; only 'patch'"),
        (save_original_layout, {"mm_projector_type": "linear"}, "'linear' is not supported"),
        (save_original_layout, {"hidden_size": ..., "vocab_size": ...}, r"config\.json lacks hidden_size, vocab_size"),
        (save_original_layout, {"mm_vision_tower": 3}, "impossible values: mm_vision_tower"),
        # A KeyError named the activation, not its place.
        (save_transformers_layout, {"projector_hidden_act": "gelo"}, "projector_hidden_act in .*Did you mean 'gelu'"),
        (save_original_layout, {"hidden_act": "silo"}, "hidden_act in .*Did you mean 'silu'"),
        (save_original_layout, {"num_hidden_layers": "4"}, "no LLaVA model: .*num_hidden_layers"),
        (save_original_layout, {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "no LLaVA model: .*rope_par"),
    ],
)
def test_values_without_a_meaning_are_refused(tmp_path, model, save, changes, sentence):
    save(tmp_path, model)
    edit(tmp_path / "config.json", **changes)
    refused(tmp_path, sentence)


@pytest.mark.parametrize("save", [save_original_layout, save_transformers_layout])
def test_a_tokenizer_with_more_ids_than_the_embedding_has_rows(tmp_path, model, save):
    """It loaded, and the first question with such a word ended in an IndexError. Padding may have an id above."""
    save(tmp_path, model)
    config = json.loads((tmp_path / "config.json").read_text())
    rows, path = config.get("text_config", config)["vocab_size"], tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    words = content["model"]["vocab"]
    words["unheard-of"] = rows
    path.write_text(json.dumps(content))
    refused(tmp_path, f"ids up to {rows} .'unheard-of'.*{rows} rows")
    edit(tmp_path / "tokenizer_config.json", pad_token="unheard-of")
    assert load_checkpoint(tmp_path).vocabulary <= rows


def test_weights_of_the_right_dtype_need_no_memory(tmp_path, model, monkeypatch):
    """They stay mapped to their files; as another dtype they need memory."""
    save_transformers_layout(tmp_path, model)
    monkeypatch.setattr(llava.model.checkpoint.load, "free_memory", lambda _device: 2**10)
    assert load_checkpoint(tmp_path)
    needed = r"needs about 0\.0 GiB of memory on cpu in bfloat16, 0\.0 GiB are free; use a smaller dtype"
    refused(tmp_path, needed, dtype=torch.bfloat16)


@pytest.mark.parametrize("weight_map", [{}, {"a": ["x.bin"]}, {"a": "../x.bin"}, None])
def test_an_index_with_other_entries_than_file_names(tmp_path, model, weight_map):
    save_original_layout(tmp_path, model)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    refused(tmp_path, r"index\.json .* weight_map")


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
