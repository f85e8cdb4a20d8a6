"""LLaVA-NeXT, Video-LLaVA and the Qwen-VLs: the same model from every layout, and what comes with it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlavaNextForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    VideoLlavaForConditionalGeneration,
)

import llava.model.checkpoint.load
from llava.errors import UserError
from llava.model.checkpoint.load import load_checkpoint
from llava.model.multimodal_encoder.languagebind import LanguageBindVideoTower
from llava.processing.qwen_image import QwenImageProcessor
from tests.checkpoint_files import (
    assert_same_weights,
    drop_weights,
    edit,
    no_network,  # noqa: F401
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

WORDS = len(make_tokenizer())
NEXT = {
    "transformers": save_next_transformers,
    "original": save_next_original,
    "original bin": lambda *args: save_next_original(*args, safetensors=False),
    "original, tower apart": lambda *args: save_next_original(*args, tower_in_shards=False),
}
VIDEO = {
    "original": save_video_original,
    "original safetensors": lambda *args: save_video_original(*args, safetensors=True),
    "original, towers apart": lambda *args: save_video_original(*args, towers_in_shards=False),
    "transformers": save_video_transformers,
}


@pytest.fixture(scope="module", params=["llama", "yi", "mistral"])
def tiled(request) -> LlavaNextForConditionalGeneration:
    return make_tiny_next(request.param)


@pytest.fixture(scope="module")
def filmed() -> VideoLlavaForConditionalGeneration:
    return make_tiny_video()


def rope_of(model: PreTrainedModel) -> dict:
    return model.config.text_config.rope_parameters


# LLaVA-NeXT


@pytest.mark.parametrize("layout", NEXT)
def test_next_is_the_same_from_every_layout(tmp_path, tiled, layout):
    NEXT[layout](tmp_path / "tiny", tiled)
    loaded = load_checkpoint(tmp_path / "tiny")
    assert type(loaded.model) is LlavaNextForConditionalGeneration
    assert_same_weights(loaded.model, tiled)
    assert torch.equal(loaded.model.model.image_newline, tiled.model.image_newline)
    assert (loaded.family, loaded.layout) == ("llava_next", layout.split(",")[0].split()[0])
    assert (loaded.aspect, loaded.merge) == ("anyres", "spatial_unpad")
    assert loaded.pinpoints == tuple((a, b) for a, b in PINPOINTS)
    assert loaded.model.config.image_grid_pinpoints == PINPOINTS
    assert (loaded.video_conversation, loaded.frames, loaded.temporal) == (None, 0, False)
    assert rope_of(loaded.model) == rope_of(tiled)
    ours, theirs = loaded.model.config.text_config, tiled.config.text_config
    assert (ours.model_type, ours.num_key_value_heads) == (theirs.model_type, theirs.num_key_value_heads)
    apart = layout.endswith("apart")
    assert loaded.vision_tower_source == {"transformers": "the checkpoint"}.get(
        layout, "mm_vision_tower clip" if apart else "the checkpoint's shards"
    )


@torch.no_grad()
def test_next_answers_alike(tmp_path, tiled):
    """Weights in their places and a config that says the same: the logits are equal bit by bit."""
    save_next_original(tmp_path, tiled)
    loaded = load_checkpoint(tmp_path).model
    pixels = torch.randn(1, 3, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 5, 9, 30]])

    def logits(model: PreTrainedModel) -> torch.Tensor:
        visual = model.get_image_features(
            pixels, image_sizes=torch.tensor([[56, 100]]), return_dict=True
        ).pooler_output[0]
        words = model.get_input_embeddings()(ids)
        embeds = torch.cat((words[:, :2], visual[None], words[:, 2:]), dim=1)
        return model(inputs_embeds=embeds).logits[0, :, :WORDS]

    assert torch.equal(logits(loaded), logits(tiled))


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
            edit(folder / "config.json", conversation="llava_v1")
            assert load_checkpoint(folder).conversation == "llava_v1"


def test_a_sliding_window_is_noted(tmp_path):
    save_next_original(tmp_path / "none", make_tiny_next("mistral"))
    assert "sliding" not in " ".join(load_checkpoint(tmp_path / "none").notes)
    save_next_original(tmp_path / "some", make_tiny_next("mistral", sliding_window=4096))
    assert "sliding window of 4096 tokens is not applied" in load_checkpoint(tmp_path / "some").notes[-1]


@pytest.mark.parametrize("text", [str(PINPOINTS), "(1x1),...,(2x2)"])
def test_pinpoints_written_as_text(tmp_path, text):
    save_next_original(tmp_path, image_grid_pinpoints=text)
    ranged = ((56, 56), (56, 112), (112, 56), (112, 112))
    assert load_checkpoint(tmp_path).pinpoints == (ranged if "x" in text else tuple(map(tuple, PINPOINTS)))


def test_the_fine_tuned_tower_is_used(tmp_path):
    """Using OpenAI's tower with LLaVA-1.6 is a silent bug: its own was trained."""
    model = save_next_original(tmp_path)
    tower = tmp_path / "clip" / "pytorch_model.bin"
    torch.save({key: torch.zeros_like(weight) for key, weight in torch.load(tower).items()}, tower)
    loaded = load_checkpoint(tmp_path)
    norm = loaded.model.model.vision_tower.pre_layrnorm.weight
    assert torch.equal(norm, model.model.vision_tower.pre_layrnorm.weight)
    assert "own shards, not from clip" in loaded.notes[0]


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
        ({"image_aspect_ratio": "anyres_max_9"}, "'anyres_max_9' with mm_patch_merge_type 'spatial_unpad' is not"),
        ({"mm_patch_merge_type": None}, "'anyres' with mm_patch_merge_type 'flat' is not supported; expected 'anyres'"),
        ({"image_aspect_ratio": "pad"}, "'pad' with mm_patch_merge_type 'spatial_unpad' is not supported"),
        ({"image_grid_pinpoints": None}, "image_grid_pinpoints must be pairs .* got None"),
        ({"image_grid_pinpoints": [[50, 100]]}, "image_grid_pinpoints must be pairs of positive multiples"),
    ],
)
def test_tilings_that_are_not_known(tmp_path, config, sentence):
    save_next_original(tmp_path, **config)
    with pytest.raises(UserError, match=sentence):
        load_checkpoint(tmp_path)


# Video-LLaVA


@pytest.mark.parametrize("layout", VIDEO)
def test_video_is_the_same_from_every_layout(tmp_path, filmed, layout):
    model = make_tiny_video(temporal=False) if layout == "transformers" else filmed
    VIDEO[layout](tmp_path / "tiny", model)
    loaded = load_checkpoint(tmp_path / "tiny")
    assert isinstance(loaded.model, VideoLlavaForConditionalGeneration)
    assert_same_weights(loaded.model, model)
    assert (loaded.family, loaded.layout) == ("video_llava", layout.split(",")[0].split()[0])
    assert (loaded.conversation, loaded.video_conversation) == ("vicuna_v1", "llava_v1")
    assert (loaded.aspect, loaded.merge, loaded.pinpoints) == ("pad", None, ())
    assert (loaded.frames, loaded.vocabulary) == (FRAMES, WORDS)
    temporal = layout != "transformers"
    assert loaded.temporal is temporal
    assert isinstance(loaded.model.model.video_tower, LanguageBindVideoTower) is temporal
    assert ("has no attention over time" in loaded.notes[-1]) is not temporal
    assert loaded.model.config.vision_feature_select_strategy == "default"
    assert loaded.model.config.video_seq_length == FRAMES * 17
    assert loaded.model.model.video_tower.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_videos_are_seen_alike(tmp_path, filmed):
    save_video_original(tmp_path, filmed)
    loaded = load_checkpoint(tmp_path).model
    video = torch.randn(1, FRAMES, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    ours, theirs = (m.model.get_video_features(video, return_dict=True).pooler_output for m in (loaded, filmed))
    assert ours.shape == (FRAMES, 17, 64)
    assert torch.equal(ours, theirs)
    shuffled = loaded.model.get_video_features(video.flip(1), return_dict=True).pooler_output
    assert (shuffled.flip(0) - ours).abs().max() > 0.01, "the order of frames must matter with attention over time"


def test_time_in_the_transformers_layout(tmp_path, filmed):
    """A conversion that kept the temporal weights is as good as the original."""
    save_video_transformers(tmp_path, filmed)
    loaded = load_checkpoint(tmp_path)
    assert loaded.temporal
    assert_same_weights(loaded.model, filmed)


def test_one_tower_in_the_shards_and_one_apart(tmp_path, filmed):
    save_video_original(tmp_path, filmed, safetensors=True)
    for shard in tmp_path.glob("model-*.safetensors"):
        save_file({k: v for k, v in load_file(shard).items() if "video_tower" not in k}, shard)
    loaded = load_checkpoint(tmp_path)
    assert_same_weights(loaded.model, filmed)
    assert loaded.vision_tower_source == "the checkpoint's shards and mm_video_tower video"
    assert "image tower comes from the checkpoint's own shards" in loaded.notes[0]


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
    note = load_checkpoint(tmp_path).notes[-1]
    assert note == "The towers use the activation quick_gelu; LanguageBind's were trained with gelu."


def test_templates_of_videos_can_be_chosen(tmp_path):
    save_video_transformers(tmp_path)
    edit(tmp_path / "config.json", conversation="v1_mmtag")
    loaded = load_checkpoint(tmp_path)
    assert (loaded.conversation, loaded.video_conversation) == ("v1_mmtag", "v1_mmtag")
    edit(tmp_path / "config.json", video_conversation="vicuna_v1")
    loaded = load_checkpoint(tmp_path)
    assert (loaded.conversation, loaded.video_conversation) == ("v1_mmtag", "vicuna_v1")
    edit(tmp_path / "config.json", video_conversation="vicuna")
    with pytest.raises(UserError, match="Unknown conversation mode 'vicuna'"):
        load_checkpoint(tmp_path)


def test_towers_that_differ(tmp_path):
    save_video_original(tmp_path)
    config = make_tiny_video().config.vision_config.to_dict()
    edit(
        tmp_path / "video" / "config.json", vision_config={**config, "hidden_act": "quick_gelu", "num_hidden_layers": 9}
    )
    with pytest.raises(
        UserError, match="towers image and video differ in num_hidden_layers, hidden_act; the two towers"
    ):
        load_checkpoint(tmp_path)


# Qwen


@pytest.mark.parametrize(
    ("version", "family", "build"),
    [("2", "qwen2_vl", Qwen2VLForConditionalGeneration), ("2.5", "qwen2_5_vl", Qwen2_5_VLForConditionalGeneration)],
)
@pytest.mark.parametrize("short", [True, False])
def test_qwen_is_the_same_in_both_of_its_forms(tmp_path, version, family, build, short):
    """As on the hub, and as transformers 5 writes it."""
    model = make_tiny_qwen(version)
    save_qwen_transformers(tmp_path, model) if short else model.save_pretrained(tmp_path)
    if not short:
        make_qwen_tokenizer().save_pretrained(tmp_path)
    loaded = load_checkpoint(tmp_path)
    assert type(loaded.model) is build
    assert_same_weights(loaded.model, model)
    assert (loaded.family, loaded.layout, loaded.conversation) == (family, "transformers", "qwen2_vl")
    assert (loaded.aspect, loaded.merge, loaded.pinpoints, loaded.frames) == ("native", None, (), 0)
    rope = rope_of(loaded.model)
    assert (rope["rope_theta"], rope["mrope_section"]) == (1_000_000.0, [2, 3, 3])
    assert loaded.tokenizer.convert_tokens_to_ids("<|image_pad|>") == loaded.model.config.image_token_id
    if short:
        assert loaded.image_processor == QwenImageProcessor(min_pixels=4 * 28 * 28, max_pixels=64 * 28 * 28)
        assert loaded.notes == ()
    else:
        assert "3136 to 1003520 pixels were assumed" in loaded.notes[0]


def test_qwen_with_tied_embeddings(tmp_path):
    model = make_tiny_qwen(tied=True)
    save_qwen_transformers(tmp_path, model)
    loaded = load_checkpoint(tmp_path).model
    assert loaded.lm_head.weight.data_ptr() == loaded.get_input_embeddings().weight.data_ptr()
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_qwen_patches_of_another_size(tmp_path):
    save_qwen_transformers(tmp_path)
    edit(tmp_path / "preprocessor_config.json", patch_size=16)
    with pytest.raises(
        UserError, match=r"patches, groups and frames of \(16, 2, 2\), but the tower expects \(14, 2, 2\)"
    ):
        load_checkpoint(tmp_path)


# What is missing or mixed


def without(prefix: str, folder: Path) -> None:
    for file in folder.glob("model*.safetensors"):
        save_file({k: v for k, v in load_file(file).items() if not k.startswith(prefix)}, file)


@pytest.mark.parametrize(
    ("save", "prefix", "part"),
    [
        (save_transformers_layout, "vision_tower.", r"the vision tower \(model.vision_tower\), which LLaVA needs"),
        (save_next_transformers, "vision_tower.", r"the vision tower \(model.vision_tower\), which LLaVA-NeXT needs"),
        (save_next_transformers, "image_newline", r"image_newline \(model.image_newline\), which LLaVA-NeXT needs"),
        (save_next_original, "model.image_newline", r"image_newline \(model.image_newline\), which LLaVA-NeXT needs"),
        (save_video_transformers, "video_tower.", r"the video tower \(model.video_tower\), which Video-LLaVA needs"),
        (save_video_transformers, "image_tower.", r"the image tower \(model.image_tower\), which Video-LLaVA needs"),
        (save_qwen_transformers, "visual.", r"the vision tower \(model.visual\), which Qwen2.5-VL needs"),
    ],
)
def test_a_whole_part_is_missing(tmp_path, save, prefix, part):
    save(tmp_path)
    without(prefix, tmp_path)
    with pytest.raises(UserError, match=f"hold nothing of {part}; fetch all") as caught:
        load_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


def test_weights_of_a_block_of_time_are_missing(tmp_path):
    save_video_original(tmp_path, safetensors=True)
    without("model.video_tower.video_tower.encoder.layers.1.temporal_attn.q_proj.weight", tmp_path)
    with pytest.raises(UserError, match=r"1 missing: model\.video_tower\.encoder\.layers\.1\.temporal_attn\.q_proj"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("config_of", ["transformers", "original"])
def test_config_of_one_layout_and_weights_of_the_other(tmp_path, config_of):
    model = make_tiny_llava()
    save_transformers_layout(tmp_path / "transformers", model)
    save_original_layout(tmp_path / "original", model, safetensors=True, shards=1)
    other = {"transformers": "original", "original": "transformers"}[config_of]
    (tmp_path / config_of / "model.safetensors").unlink(missing_ok=True)
    for index in (tmp_path / config_of).glob("*.index.json"):
        index.unlink()
    weights = next((tmp_path / other).glob("*.safetensors"))
    weights.rename(tmp_path / config_of / "model.safetensors")
    with pytest.raises(
        UserError,
        match=f"mixes two layouts: config.json is of the {config_of} layout, but the weight .* of the {other} one",
    ):
        load_checkpoint(tmp_path / config_of)
