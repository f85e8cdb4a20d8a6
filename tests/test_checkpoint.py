"""Both layouts of the same tiny LLaVA-1.5 have to give the same model."""

import json

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

import llava.model.checkpoint.load
from llava.errors import UserError
from llava.model.checkpoint.load import Checkpoint, load_checkpoint, real_vocabulary
from llava.model.checkpoint.original_layout import CLIP_L_336_NAME
from llava.processing.clip_image import ImageProcessor
from tests.checkpoint_files import (
    LAYOUTS,
    WORDS,
    assert_same_weights,
    edit,
    no_network,  # noqa: F401
    real_rows,
    write,
)
from tests.tiny_checkpoints import make_tiny_llava, make_tokenizer, save_original_layout, save_transformers_layout


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return make_tiny_llava()


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
    assert_same_weights(loaded.model, model)
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
    monkeypatch.setattr(llava.model.checkpoint.load, "CLIP_L_336", model.config.vision_config.to_dict())
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


def test_the_video_placeholder_is_no_word_either():
    """The hub's Video-LLaVA: "<image>" is 32000, "<video>" 32001, padding 32002."""

    class HubTokenizer:
        pad_token_id, eos_token_id = 32002, 2

        def __len__(self) -> int:
            return 32003

    assert real_vocabulary(HubTokenizer(), 32064, image_token=32000, video_token=32001) == 32000


def test_another_aspect_is_noted_and_padded(tmp_path, model):
    save_original_layout(tmp_path, model, image_aspect_ratio="square")
    loaded = load_checkpoint(tmp_path)
    assert loaded.image_processor.aspect == "pad"
    assert "asks for image_aspect_ratio 'square'; images are padded" in loaded.notes[0]


@pytest.mark.parametrize("model_type", ["llava", "llava_llama"])
def test_original_layout_under_both_of_its_names(tmp_path, model, model_type):
    """The name "llava" is also that of the transformers layout: it must not decide."""
    save_original_layout(tmp_path, model, model_type=model_type)
    assert load_checkpoint(tmp_path).layout == "original"
