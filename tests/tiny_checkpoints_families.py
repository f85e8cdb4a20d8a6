"""Small random checkpoints of LLaVA-NeXT, Video-LLaVA and the Qwen-VLs, in each layout that exists of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)

from llava.model.video_llava import LanguageBindVideoTower
from tests.tiny_checkpoints import (
    IMAGE,
    TEXT,
    VISION,
    make_tokenizer,
    randomise,
    save_original,
    save_tower,
    text_config,
    write_json,
    write_preprocessor,
)

PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
FRAMES = 8
QWEN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
QWEN_TOKENS += ("<|image_pad|>", "<|video_pad|>")


def make_chatml_tokenizer() -> PreTrainedTokenizerFast:
    """make_tokenizer's words and ChatML's tokens, as Yi's tokenizer has them."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


def make_qwen_tokenizer() -> PreTrainedTokenizerFast:
    """One id per word and no BOS; the tokens of ChatML and of images come last, as in Qwen's."""
    words = ["<unk>", *dict.fromkeys(f"{TEXT} system helpful You".split())]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in QWEN_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


# LLaVA-NeXT


def make_tiny_next(decoder: str = "llama", **text: Any) -> LlavaNextForConditionalGeneration:
    """A LLaVA-NeXT with 16 visual tokens per crop.

    Args:
        decoder: "llama" (Vicuna), "yi" or "mistral".
    """
    words = len(make_tokenizer())
    config = LlavaNextConfig(
        text_config=text_config(decoder, **text),
        vision_config=VISION,
        image_token_index=words,
        image_seq_length=(IMAGE // 14) ** 2,
        image_grid_pinpoints=PINPOINTS,
    )
    config._attn_implementation = "sdpa"
    return randomise(LlavaNextForConditionalGeneration(config).eval())


def save_next_transformers(
    directory: Path, model: PreTrainedModel | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> PreTrainedModel:
    """Write what a llava-hf/llava-v1.6 repository holds."""
    model = make_tiny_next() if model is None else model
    _save_hub(directory, model, tokenizer or make_tokenizer(), hub_name)
    write_preprocessor(directory, model.config.vision_config.image_size)
    return model


def save_next_original(
    directory: Path,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    safetensors: bool = True,
    tower_in_shards: bool = True,
    **config: Any,
) -> PreTrainedModel:
    """Write what a liuhaotian/llava-v1.6 repository holds; `config` overrides fields of config.json."""
    model = make_tiny_next() if model is None else model
    tokenizer = tokenizer or make_tokenizer()
    mistral = model.config.text_config.model_type == "mistral"
    own = {
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": model.config.image_grid_pinpoints,
        "mm_patch_merge_type": "spatial_unpad",
        "unfreeze_mm_vision_tower": True,
    }
    if mistral:
        own["architectures"], own["model_type"] = ["LlavaMistralForCausalLM"], "llava_mistral"
        own["sliding_window"] = model.config.text_config.sliding_window
    save_original(directory, model, tokenizer, {**own, **config}, safetensors, tower_in_shards)
    save_tower(directory / "clip", model)
    return model


# Video-LLaVA


def make_tiny_video(temporal: bool = True) -> VideoLlavaForConditionalGeneration:
    """A Video-LLaVA with 16 visual tokens per image and 8 x 17 per video.

    Args:
        temporal: its video tower attends over time, as the original's does and a conversion's does not.
    """
    words = len(make_tokenizer())
    config = VideoLlavaConfig(
        text_config=text_config("llama"),
        vision_config={**VISION, "hidden_act": "gelu"},
        image_token_index=words,
        video_token_index=words + 1,
        image_seq_length=(IMAGE // 14) ** 2,
        video_seq_length=FRAMES * ((IMAGE // 14) ** 2 + 1),
    )
    config._attn_implementation = "sdpa"
    model = VideoLlavaForConditionalGeneration(config)
    if temporal:
        model.model.video_tower = LanguageBindVideoTower(model.config.vision_config, FRAMES)
    return randomise(model.eval())


def save_video_transformers(directory: Path, model: PreTrainedModel | None = None) -> PreTrainedModel:
    """Write what LanguageBind/Video-LLaVA-7B-hf holds, whose video tower has no attention over time."""
    model = make_tiny_video(temporal=False) if model is None else model
    _save_hub(directory, model, make_tokenizer(), hub_name)
    write_preprocessor(directory, IMAGE)
    return model


def save_video_original(
    directory: Path,
    model: PreTrainedModel | None = None,
    safetensors: bool = False,
    towers_in_shards: bool = True,
    **config: Any,
) -> PreTrainedModel:
    """Write what LanguageBind/Video-LLaVA-7B holds, with both towers once more in the folders image/ and video/."""
    model = make_tiny_video() if model is None else model
    own = {"mm_vision_tower": ..., "mm_image_tower": "image", "mm_video_tower": "video"}
    save_original(directory, model, make_tokenizer(), {**own, **config}, safetensors, towers_in_shards)
    for name in ("image", "video"):
        tower = getattr(model.model, f"{name}_tower")
        (directory / name).mkdir(exist_ok=True)
        weights = {f"vision_model.{key}": tensor for key, tensor in tower.state_dict().items()}
        stray = {"text_model.final_layer_norm.bias": next(iter(weights.values())) * 0}
        save_file({**weights, **stray}, directory / name / "model.safetensors")
        vision = {**tower.config.to_dict(), "add_time_attn": name == "video", "num_frames": FRAMES, "lora_r": 0}
        whole = {"model_type": f"LanguageBind{name.title()}", "vision_config": vision, "text_config": {}}
        write_json(directory / name / "config.json", whole)
    write_preprocessor(directory / "image", IMAGE)
    return model


# Qwen-VL


def make_tiny_qwen(version: str = "2.5", tied: bool = False) -> PreTrainedModel:
    """A Qwen2-VL ("2") or Qwen2.5-VL ("2.5") of 4 layers; groups of 2 x 2 patches of 14 x 14 pixels are a token."""
    tokenizer = make_qwen_tokenizer()
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in QWEN_TOKENS}
    text = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": (len(tokenizer) // 64 + 1) * 64,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1_000_000.0},
        "eos_token_id": ids["<|im_end|>"],
        "bos_token_id": ids["<|endoftext|>"],
    }
    shared = {"depth": 3, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
    arguments = {
        "text_config": text,
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": tied,
    }
    if version == "2.5":
        vision = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "window_size": 56}
        config = Qwen2_5_VLConfig(vision_config={**shared, **vision, "fullatt_block_indexes": [1]}, **arguments)
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    else:
        vision = {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
        config = Qwen2VLConfig(vision_config={**shared, **vision}, **arguments)
        model = Qwen2VLForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    return randomise(model.eval())


def save_qwen_transformers(directory: Path, model: PreTrainedModel | None = None) -> PreTrainedModel:
    """Write what a Qwen/Qwen2.5-VL repository holds: the decoder's fields at the top of config.json, short names."""
    model = make_tiny_qwen() if model is None else model
    _save_hub(directory, model, make_qwen_tokenizer(), qwen_name)
    config = model.config.to_dict()
    text, vision = config.pop("text_config"), config.pop("vision_config")
    rope = text.pop("rope_parameters")
    flat = {key: value for key, value in {**text, **config}.items() if value is not None}
    flat["rope_theta"] = rope["rope_theta"]
    flat["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    vision["model_type"] = model.config.model_type
    write_json(directory / "config.json", {**flat, "vision_config": vision, "model_type": model.config.model_type})
    edges = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    bounds = {"min_pixels": 4 * 28 * 28, "max_pixels": 64 * 28 * 28}
    preprocessor = {"image_processor_type": "Qwen2VLImageProcessor", **bounds, **edges}
    write_json(directory / "preprocessor_config.json", preprocessor)
    return model


# Names


def hub_name(key: str) -> str:
    """A path in the container -> its name in the files of the hub; written out, not taken from the loader's map."""
    if key.startswith("lm_head."):
        return f"language_model.{key}"
    key = key.removeprefix("model.")
    module, _, rest = key.partition(".")
    inner = {"language_model": "model.", "vision_tower": "vision_model.", "image_tower": "vision_model."}
    inner["video_tower"] = "vision_model."
    return f"{module}.{inner.get(module, '')}{rest}" if rest else module


def qwen_name(key: str) -> str:
    """The same for the Qwen-VLs."""
    return key.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def _save_hub(
    directory: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: Callable[[str], str]
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(directory)
    weights = {name(key): tensor.clone() for key, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del weights[name("lm_head.weight")]
    save_file(weights, directory / "model.safetensors")
    tokenizer.save_pretrained(directory)
