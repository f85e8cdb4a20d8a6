"""Every family in every layout: the same model, and what comes with it."""

import json

import pytest
import torch
from transformers import LlavaForConditionalGeneration, VideoLlavaForConditionalGeneration

import llava.model.checkpoint.load
from llava.model.checkpoint.load import HF_CLASSES, load_checkpoint, real_vocabulary
from llava.model.video_llava import LanguageBindVideoTower
from llava.processing.image import ImageProcessor, QwenImageProcessor
from tests.checkpoint_files import (
    SAVERS,
    WORDS,
    assert_same_weights,
    drop_weights,
    edit,
    no_network,  # noqa: F401
    real_rows,
    refused,
    shard_with,
)
from tests.tiny_checkpoints import make_tiny_llava, make_tokenizer, save_original_layout, save_transformers_layout
from tests.tiny_checkpoints_families import (
    FRAMES,
    PINPOINTS,
    make_chatml_tokenizer,
    make_qwen_tokenizer,
    make_tiny_next,
    make_tiny_qwen,
    make_tiny_video,
    save_next_original,
    save_next_transformers,
    save_qwen_transformers,
    save_video_original,
    save_video_transformers,
)

MAKERS = {"llava": make_tiny_llava, "llava_next": lambda: make_tiny_next("mistral"), "video_llava": make_tiny_video}


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return make_tiny_llava()


@pytest.fixture(scope="module")
def filmed() -> VideoLlavaForConditionalGeneration:
    return make_tiny_video()


# The same model, however it was written


@pytest.mark.parametrize("name", [name for name in SAVERS if "qwen" not in name])
def test_every_layout_gives_the_same_model(tmp_path, name):
    (family, layout), temporal = name.replace(",", "").split()[:2], name.startswith("video_llava original")
    model = make_tiny_video(temporal=False) if name == "video_llava transformers" else MAKERS[family]()
    SAVERS[name](tmp_path / "tiny", model)
    loaded = load_checkpoint(tmp_path / "tiny")
    assert_same_weights(loaded.model, model)
    assert isinstance(loaded.model, HF_CLASSES[family]) and not loaded.model.training
    assert (loaded.family, loaded.layout, loaded.name) == (family, layout, "tiny")
    assert loaded.merge == ("spatial_unpad" if family == "llava_next" else None)
    assert (loaded.frames, loaded.temporal) == (FRAMES * (family == "video_llava"), temporal)
    assert loaded.text_tower is None or name.startswith("video_llava original")
    config, given = loaded.model.config, model.config
    assert config.text_config._attn_implementation == config.vision_config._attn_implementation == "sdpa"
    assert config.text_config.rope_parameters == given.text_config.rope_parameters
    assert config.text_config.num_key_value_heads == given.text_config.num_key_value_heads
    assert config.text_config.model_type == given.text_config.model_type
    apart = "transformers" in name or "apart" in name or name in ("llava original", "llava original safetensors")
    assert any("own shards" in note for note in loaded.notes) is not apart
    assert loaded.image_processor == ImageProcessor(56, 56) and loaded.vocabulary == WORDS
    assert loaded.tokenizer("what is red").input_ids == make_tokenizer()("what is red").input_ids
    assert (config.image_token_index, config.image_seq_length) == (WORDS, 16)
    assert loaded.conversation == ("mistral_instruct" if family == "llava_next" else "vicuna_v1")
    if family == "llava_next":
        assert torch.equal(loaded.model.model.image_newline, model.model.image_newline)
        assert config.image_grid_pinpoints == PINPOINTS
    if family == "video_llava":
        tower = loaded.model.model.video_tower
        assert isinstance(tower, LanguageBindVideoTower) is temporal and tower.config._attn_implementation == "sdpa"
        assert ("no attention over time" in loaded.notes[-1]) is not temporal
        assert (config.vision_feature_select_strategy, config.video_seq_length) == ("default", FRAMES * 17)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["llava transformers", "llava original", "llava original safetensors"])
def test_half_precision_and_its_tables(tmp_path, model, layout, dtype):
    """Weights in the dtype asked for; the tables that are in no file are right, the rotary one in float32."""
    SAVERS[layout](tmp_path, model)
    loaded = load_checkpoint(tmp_path, dtype=dtype).model
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


@pytest.mark.parametrize("save", [save_transformers_layout, save_original_layout])
def test_tied_embeddings(tmp_path, save):
    """A tied model has no lm_head in its files."""
    tied = save(tmp_path, make_tiny_llava(tied=True))
    loaded = load_checkpoint(tmp_path).model
    assert loaded.lm_head.weight.data_ptr() == loaded.get_input_embeddings().weight.data_ptr()
    assert torch.equal(loaded.lm_head.weight[:WORDS], tied.lm_head.weight[:WORDS])


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
    assert "own shards, not from clip" in loaded.notes[0]


def test_missing_preprocessor_is_noted(tmp_path, model):
    save_transformers_layout(tmp_path, model)
    (tmp_path / "preprocessor_config.json").unlink()
    loaded = load_checkpoint(tmp_path)
    assert loaded.image_processor == ImageProcessor(56, 56)
    assert "56 pixels were assumed" in loaded.notes[0]


def test_preprocessor_inside_the_processor_config(tmp_path, model):
    """transformers 5 writes one file for image processor and tokenizer."""
    save_transformers_layout(tmp_path, model)
    inner = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {**inner, "image_mean": [0.5] * 3}}))
    assert load_checkpoint(tmp_path).image_processor.mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("rows, expected", [(32064, 32000), (31000, 31000)])
def test_placeholder_rows_are_no_vocabulary(rows, expected):
    """The hub's 1.5: "<image>" is 32000 and padding 32001 (its Video-LLaVA: "<video>"), of 32064 rows."""

    class HubTokenizer:
        pad_token_id, eos_token_id = 32001, 2

        def __len__(self) -> int:
            return 32002

    assert real_vocabulary(HubTokenizer(), rows, image_token=32000) == expected
    HubTokenizer.pad_token_id = 2
    assert real_vocabulary(HubTokenizer(), rows, image_token=32000, video_token=32001) == expected
    HubTokenizer.pad_token_id = 32001
    HubTokenizer.eos_token_id = 32001
    assert real_vocabulary(HubTokenizer(), 32064, image_token=32000) == 32002, "an end token can be answered"


def test_another_aspect_is_noted_and_padded(tmp_path, model):
    save_original_layout(tmp_path, model, image_aspect_ratio="square")
    loaded = load_checkpoint(tmp_path)
    assert "image_aspect_ratio 'square'" in loaded.notes[0]


# LLaVA-NeXT


def test_templates_follow_decoder_and_tokenizer(tmp_path):
    for decoder, tokenizer, mode in (
        ("llama", None, "vicuna_v1"),
        ("mistral", None, "mistral_instruct"),
        ("yi", make_chatml_tokenizer(), "chatml_direct"),
    ):
        for save in (save_next_transformers, save_next_original):
            folder = tmp_path / f"{decoder} {save.__name__}"
            save(folder, make_tiny_next(decoder), tokenizer)
            assert load_checkpoint(folder).conversation == mode


def test_a_sliding_window_is_noted(tmp_path):
    save_next_original(tmp_path / "none", make_tiny_next("mistral"))
    assert "sliding" not in " ".join(load_checkpoint(tmp_path / "none").notes)
    save_next_original(tmp_path / "some", make_tiny_next("mistral", sliding_window=4096))
    assert "sliding window of 4096 tokens" in load_checkpoint(tmp_path / "some").notes[-1]


def test_a_merge_without_newline(tmp_path):
    """Only unpadding has a newline token, so these shards lack it; the container's place is left empty."""
    save_next_original(tmp_path, safetensors=False, mm_patch_merge_type="spatial")
    drop_weights(shard_with(tmp_path, "model.image_newline"), "model.image_newline")
    loaded = load_checkpoint(tmp_path)
    assert loaded.merge == "spatial"
    assert not loaded.model.model.image_newline.any()


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"image_aspect_ratio": "anyres_max_9"}, "'anyres_max_9' .* 'spatial_unpad'"),
        ({"mm_patch_merge_type": None}, "'anyres' with mm_patch_merge_type 'flat' is not supported; expected 'anyres'"),
        ({"image_aspect_ratio": "pad"}, "'pad' .* 'spatial_unpad'"),
    ],
)
def test_tilings_that_are_not_known(tmp_path, config, sentence):
    save_next_original(tmp_path, **config)
    refused(tmp_path, sentence)


# Video-LLaVA


def test_official_towers_need_no_download(tmp_path, filmed, monkeypatch):
    monkeypatch.setattr(llava.model.checkpoint.load, "LANGUAGEBIND", filmed.config.vision_config.to_dict())
    names = {"mm_image_tower": "LanguageBind/LanguageBind_Image"}
    names["mm_video_tower"] = "LanguageBind/LanguageBind_Video_merge"
    save_video_original(tmp_path, filmed, **names)
    loaded = load_checkpoint(tmp_path)
    assert_same_weights(loaded.model, filmed)
    assert loaded.text_tower == names["mm_image_tower"]
    assert loaded.model.config.vision_config.hidden_act == "gelu"


def test_a_conversion_with_another_activation_is_noted(tmp_path):
    save_video_transformers(tmp_path)
    assert "quick_gelu" not in " ".join(load_checkpoint(tmp_path).notes)
    config = make_tiny_video().config.vision_config.to_dict()
    edit(tmp_path / "config.json", vision_config={**config, "hidden_act": "quick_gelu"})
    assert "activation quick_gelu" in load_checkpoint(tmp_path).notes[-1]


# Qwen


@pytest.mark.parametrize(("version", "family"), [("2", "qwen2_vl"), ("2.5", "qwen2_5_vl")])
@pytest.mark.parametrize("short", [True, False])
def test_qwen_is_the_same_in_both_of_its_forms(tmp_path, version, family, short):
    """As on the hub, and as transformers 5 writes it."""
    model = make_tiny_qwen(version)
    save_qwen_transformers(tmp_path, model) if short else model.save_pretrained(tmp_path)
    if not short:
        make_qwen_tokenizer().save_pretrained(tmp_path)
    loaded = load_checkpoint(tmp_path)
    assert type(loaded.model) is HF_CLASSES[family]
    assert_same_weights(loaded.model, model)
    assert (loaded.family, loaded.layout, loaded.conversation) == (family, "transformers", "qwen2_vl")
    rope = loaded.model.config.text_config.rope_parameters
    assert (rope["rope_theta"], rope["mrope_section"]) == (1_000_000.0, [2, 3, 3])
    assert loaded.tokenizer.convert_tokens_to_ids("<|image_pad|>") == loaded.model.config.image_token_id
    if short:
        assert loaded.image_processor == QwenImageProcessor(min_pixels=4 * 28 * 28, max_pixels=64 * 28 * 28)
        assert loaded.notes == ()
    else:
        assert "3136 to 1003520 pixels were assumed" in loaded.notes[0]
