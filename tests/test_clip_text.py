"""The CLIP text tower: where it is found, how it reads, and which sign of its similarity is relevance."""

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPModel

import llava.model.checkpoint.files
from llava.errors import UserError
from llava.model.builder import load
from llava.model.checkpoint.config import CLIP_L_336_NAME
from llava.model.llava_arch import Llava
from llava.model.multimodal_encoder.clip_text_encoder import ClipText, load_clip_text
from llava.reduction import registry
from llava.reduction.states import RELEVANCE, EncoderState
from llava.reduction.token_layout import PatchGrid
from tests.checkpoint_files import edit, no_network  # noqa: F401
from tests.conftest import samples
from tests.tiny_checkpoints import (
    make_tiny_clip,
    make_tiny_llava,
    make_tokenizer,
    save_original_layout,
    save_text_tower,
    save_transformers_layout,
)

QUESTIONS = ("is there a star ?", "what color is the small cat on the left of the tree ?", "")
LENGTH = 20  # tokens that the tiny text tower can read


@pytest.fixture(scope="module")
def model():
    return make_tiny_llava()


def save_clip(directory, model, safetensors=True) -> CLIPModel:
    """A whole CLIP as the hub has them, with its own tokenizer."""
    clip = make_tiny_clip(model)
    clip.save_pretrained(directory)
    if not safetensors:
        (directory / "model.safetensors").unlink()
        torch.save(clip.state_dict(), directory / "pytorch_model.bin")
    make_tokenizer().save_pretrained(directory)
    return clip


def end_states(clip: CLIPModel, texts) -> torch.Tensor:
    """[B, P] by transformers' own model, one text at a time, read off at the end token."""
    words = make_tokenizer()
    rows = []
    for text in texts:
        ids = torch.tensor([[1, *words(text, add_special_tokens=False).input_ids, 2]])
        rows.append(clip.text_projection(clip.text_model(ids).last_hidden_state[:, -1]))
    return torch.cat(rows)


# What it computes


@torch.inference_mode()
def test_texts_equal_the_transformers_model_one_by_one(tiny, model):
    """Texts of different length in one batch: padding must not be seen."""
    embedded, mask, _ = tiny.clip.text(QUESTIONS)
    assert embedded.shape == (3, 1, 32) and mask.all()
    torch.testing.assert_close(embedded[:, 0], end_states(make_tiny_clip(model), QUESTIONS), atol=1e-5, rtol=0)


@torch.inference_mode()
def test_patches_go_through_the_towers_last_norm_and_the_projection(tiny, model):
    clip = make_tiny_clip(model)
    pixels = torch.stack([tiny.image_processor(sample.image) for sample in samples(2)])
    features = clip.vision_model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    expected = clip.visual_projection(clip.vision_model.post_layernorm(features))
    torch.testing.assert_close(tiny.clip.image(features)[0], expected)


@torch.inference_mode()
def test_every_token_of_every_chunk_is_embedded_where_it_is_asked_for(tiny, model):
    """VisionTrim compares patches with single tokens: those of a text of three chunks, and of a short one beside it."""
    clip, texts = make_tiny_clip(model), ("is there a star ?", " ".join(["cat dog tree"] * 15))
    embedded, mask, _ = tiny.clip.text(texts, every_token=True)
    for row, text in enumerate(texts):
        hidden = [clip.text_model(torch.tensor([chunk])).last_hidden_state[0] for chunk in tiny.clip.chunks(text)]
        expected = clip.text_projection(torch.cat(hidden))
        assert len(hidden) == (1, 3)[row] and mask[row].tolist() == [True] * len(expected) + [False] * (
            mask.shape[1] - len(expected)
        )
        torch.testing.assert_close(embedded[row, : len(expected)], expected, atol=1e-5, rtol=0)
        assert not embedded[row, len(expected) :].any()


@torch.inference_mode()
def test_patches_without_the_norm_are_only_projected(tiny):
    features = torch.randn(2, 16, 32)
    projected = features @ tiny.clip.visual_projection.weight.T
    torch.testing.assert_close(tiny.clip.image(features, normed=False)[0], projected)


@torch.inference_mode()
@pytest.mark.parametrize("cosine", [True, False])
def test_similarity_is_the_mean_over_chunks(tiny, cosine):
    """A short text beside one of three chunks: chunks that do not exist must not count."""
    texts = ("is there a star ?", " ".join(["cat dog tree"] * 15))
    state = EncoderState(ids=("a", "b"), features=torch.randn(2, 16, 32), scores={}, layout=tiny.layout)
    state.clip = tiny.clip
    found = state.relevance(texts, "plain", cosine)
    for row, text in enumerate(texts):
        image = tiny.clip.image(state.features[row])[0]
        values = []
        for chunk in tiny.clip.chunks(text):
            words = make_tokenizer().decode(chunk, skip_special_tokens=True)
            embedded = tiny.clip.text((words,))[0][0, 0]
            scale = image.norm(dim=-1) * embedded.norm() if cosine else 1
            values.append(image @ embedded / scale)
        assert len(values) == (1, 3)[row]
        torch.testing.assert_close(found[row], torch.stack(values).mean(0), atol=1e-5, rtol=0)


@torch.inference_mode()
def test_flops_equal_what_torch_counts(tiny):
    features = torch.randn(2, 16, 32)
    # The counter knows no fused attention on a CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        text = tiny.clip.text((*QUESTIONS, "star " * 50))[2]
        text += tiny.clip.text((*QUESTIONS, "star " * 50), every_token=True)[2]
        image = tiny.clip.image(features)[1] + tiny.clip.image(features, normed=False)[1]
    assert counter.get_total_flops() == text + image


# Long texts


def numbers(length: int = LENGTH, end: int = 99, configured: int = 99) -> ClipText:
    """A tower whose words are numbers."""
    config = CLIPConfig(
        text_config={
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "vocab_size": 100,
            "max_position_embeddings": length,
            "projection_dim": 8,
            "bos_token_id": 98,
            "eos_token_id": configured,
        }
    ).text_config
    return ClipText(config, 8, torch.nn.LayerNorm(8), lambda text: [int(word) for word in text.split()], 98, end)


def test_every_chunk_is_a_framed_text():
    clip = numbers(length=5)
    assert clip.chunks("1 2 3 4 5 6 7") == [[98, 1, 2, 3, 99], [98, 4, 5, 6, 99], [98, 7, 99]]
    assert clip.chunks("") == [[98, 99]]
    # TRIM's release leaves the cutting to CLIP's tokenizer: truncated texts keep their end token.
    assert clip.chunks("1 2 3 4 5 6 7", "truncate") == [[98, 1, 2, 3, 99]]
    assert (
        clip.chunks("1 2 3") == clip.chunks("1 2 3", "truncate") == clip.chunks("1 2 3", "cut") == [[98, 1, 2, 3, 99]]
    )


@torch.inference_mode()
@pytest.mark.parametrize("configured", [2, 99])
def test_cut_texts_equal_the_transformers_model(configured):
    """CDPruner's release cuts the framed text, pads the last chunk with zeros and takes whatever the model pools: the
    begin token or any word, by the age of the configuration (with an end id of 2 the highest id of a chunk)."""
    clip = numbers(length=6, configured=configured)
    text = " ".join(str(3 + i * 7 % 90) for i in range(14))
    embedded, mask, _ = clip.text((text,), "cut")
    framed = [98, *map(int, text.split()), 99]
    ids = torch.tensor(framed + [0] * (-len(framed) % 6)).view(-1, 6)
    expected = clip.text_projection(clip.text_model(ids, attention_mask=(ids != 0).long()).pooler_output)
    assert mask.sum() == len(expected) == 3
    torch.testing.assert_close(embedded[0], expected, atol=1e-5, rtol=0)


# Where it is found


def test_a_checkpoint_without_one_says_what_to_do(tmp_path, model):
    """A vision tower alone is no CLIP."""
    for save in (save_transformers_layout, save_original_layout):
        save(tmp_path / save.__name__, model)
        loaded = load(tmp_path / save.__name__, device="cpu")
        assert not loaded.spec.has_text_tower
        with pytest.raises(UserError, match=r"text_tower/ .*mm_vision_tower"):
            registry.build("trim", 8).check(loaded.spec)


@torch.inference_mode()
@pytest.mark.parametrize("safetensors", [True, False])
def test_in_the_clip_that_an_original_checkpoint_names(tmp_path, model, safetensors):
    """mm_vision_tower is a whole CLIP, as openai/clip-vit-large-patch14-336 is."""
    save_original_layout(tmp_path / "llava", model)
    for file in (tmp_path / "llava" / "clip").glob("*"):
        file.unlink() if file.name != "preprocessor_config.json" else None
    clip = save_clip(tmp_path / "llava" / "clip", model, safetensors=safetensors)
    loaded = load(tmp_path / "llava", device="cpu")
    assert loaded.spec.has_text_tower
    torch.testing.assert_close(loaded.clip.text(QUESTIONS)[0][:, 0], end_states(clip, QUESTIONS), atol=1e-5, rtol=0)


def test_the_official_clip_is_named_without_fetching_it(tmp_path, model, monkeypatch):
    """Tower in the shards, text half on the hub: known to exist, fetched by the first method that asks."""
    monkeypatch.setattr("llava.model.checkpoint.load.CLIP_L_336", model.config.vision_config.to_dict())
    save_original_layout(tmp_path / "llava", model, tower_in_shards=True, mm_vision_tower=CLIP_L_336_NAME)
    loaded = load(tmp_path / "llava", device="cpu")
    assert loaded.spec.has_text_tower and loaded.text_tower == CLIP_L_336_NAME
    with pytest.raises(UserError, match=f"{CLIP_L_336_NAME}' .*fetched"):
        loaded.clip
    save_clip(tmp_path / "hub", model)
    monkeypatch.setattr(
        llava.model.checkpoint.files, "snapshot_download", lambda name, allow_patterns: str(tmp_path / "hub")
    )
    assert loaded.clip.length == LENGTH


def test_a_user_names_one(tmp_path, model):
    save_transformers_layout(tmp_path / "llava", model)
    save_clip(tmp_path / "clip", model)
    loaded = load(tmp_path / "llava", device="cpu", text_tower=tmp_path / "clip")
    assert loaded.spec.has_text_tower and loaded.clip.length == LENGTH
    with pytest.raises(UserError, match=str(tmp_path / "nowhere")):
        load(tmp_path / "llava", device="cpu", text_tower=tmp_path / "nowhere")


# What is refused


def reload(folder, model: Llava) -> ClipText:
    return load_clip_text(folder, model.tower, model.tokenizer, model.device)


def damaged_tokenizer(folder, model) -> None:
    save_clip(folder, model)
    (folder / "tokenizer.json").write_text("{")


@pytest.mark.parametrize(
    ("save", "sentence"),
    [
        (
            lambda folder, _: save_clip(folder, make_tiny_llava(vision_hidden=40)),
            r"vision tower \(32 channels\).*visual_projection",
        ),
        (lambda folder, model: model.config.vision_config.save_pretrained(folder), "no text tower"),
        # The official text tower without its tokenizer: LLaVA's ids would be read as other words, without an error.
        (
            lambda folder, model: save_text_tower(folder, model, bos_token_id=0, eos_token_id=1),
            r"has no tokenizer \(tokenizer\.json or vocab\.json\)",
        ),
        (lambda folder, model: save_text_tower(folder, model, vocab_size=50), "111 tokens, .* 50"),
        (damaged_tokenizer, "Cannot read the tokenizer"),
    ],
)
def test_a_clip_that_does_not_fit_is_refused(tmp_path, tiny, model, save, sentence):
    save(tmp_path, model)
    with pytest.raises(UserError, match=sentence):
        reload(tmp_path, tiny)


def test_the_folders_own_tokenizer_comes_first(tmp_path, tiny, model):
    """A byte-pair tokenizer like CLIP's, with other ids than LLaVA's."""
    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"{letter}</w>" for letter in "abcdefghijklmnopqrstuvwxyz")]
    words = [*letters, "<|startoftext|>", "<|endoftext|>"]
    save_text_tower(tmp_path, model, bos_token_id=52, eos_token_id=53)
    (tmp_path / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    assert reload(tmp_path, tiny).chunks("A bc") == [[52, 26, 1, 28, 53]]


@pytest.mark.parametrize(("told", "relevance"), [(None, "negated"), ("plain", "plain"), ("negated", "negated")])
def test_the_text_tower_says_which_sign_is_relevance(tmp_path, model, told, relevance):
    """Without a word it is the release's: patches of a CLIP trained on its CLS token lie far from what they show."""
    save_clip(tmp_path, model)
    edit(tmp_path / "config.json", **({"patch_similarity": told} if told else {}))
    clip = load_clip_text(tmp_path, model.model.vision_tower, make_tokenizer(), torch.device("cpu"))
    assert clip.relevance == relevance
    features = torch.randn(1, 16, model.config.vision_config.hidden_size)
    state = EncoderState(ids=("a",), features=features, scores={}, layout=PatchGrid(4, 4), clip=clip)
    with torch.inference_mode():
        found = {sign: state.relevance(("is there a star ?",), sign, cosine=True) for sign in RELEVANCE}
    assert torch.equal(found["tower"], found[relevance]) and torch.equal(found["negated"], -found["plain"])
