"""Small random LLaVA checkpoints in both layouts, for tests. Nothing here is trained."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

TEXT = (
    "a an the is are was there what which how many where who in on of left right above below near image picture photo "
    "red green blue yellow black white circle square star ring heart cat dog man woman car tree table sky number color "
    "shape one two three four five six zero yes no and or answer question using single word phrase with letter option "
    "from given choices directly USER ASSISTANT user assistant A B C D chat between curious artificial intelligence "
    "gives helpful detailed polite answers to s ' . , : ? ! do you see describe it Answer The What Which How Is Are"
)
SPECIAL = ("<unk>", "<s>", "</s>")  # ids 0, 1, 2 as in Llama
IMAGE = 56  # pixels, 4 x 4 patches
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": IMAGE,
    "patch_size": 14,
    "projection_dim": 32,
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One id per word, a BOS in front, no token for "<image>": like Vicuna's, but small enough to read."""
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *dict.fromkeys(TEXT.split())))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


def text_config(decoder: str, **changes: Any) -> dict[str, Any]:
    """A decoder of 4 layers; Vicuna's has as many key heads as query heads, the others have fewer."""
    own: dict[str, Any] = {
        "llava": {"num_key_value_heads": 2, "rope_theta": 5000.0},  # not the default: a loader that drops it is seen
        "llama": {"num_key_value_heads": 4, "rope_theta": 10000.0},
        "yi": {"num_key_value_heads": 2, "rope_theta": 5_000_000.0},
        "mistral": {"num_key_value_heads": 1, "rope_theta": 1_000_000.0, "sliding_window": None},
    }[decoder]
    return {
        "model_type": "mistral" if decoder == "mistral" else "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "vocab_size": (len(make_tokenizer()) // 64 + 1) * 64,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        **own,
        **changes,
    }


def make_tiny_llava(
    image: int = IMAGE, vision_hidden: int = 32, tied: bool = False, **text: Any
) -> LlavaForConditionalGeneration:
    """A LLaVA-1.5 with (image / 14) ** 2 visual tokens per image, 16 by default, and float32 random weights.

    As in the checkpoints of the hub the embedding has more rows than there are words, and the first of the spare ones
    is the image placeholder.
    """
    sizes = {"hidden_size": vision_hidden, "intermediate_size": 2 * vision_hidden, "projection_dim": vision_hidden}
    config = LlavaConfig(
        text_config=text_config("llava", tie_word_embeddings=tied, **text),
        vision_config={**VISION, **sizes, "image_size": image},
        image_token_index=len(make_tokenizer()),
        image_seq_length=(image // 14) ** 2,
        tie_word_embeddings=tied,
    )
    config._attn_implementation = "sdpa"
    return randomise(LlavaForConditionalGeneration(config).eval())


def randomise(model: PreTrainedModel) -> PreTrainedModel:
    """Random weights of sizes at which outputs differ and nothing saturates."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator)
            is_norm_scale = weight.dim() == 1 and name.endswith("weight")
            # About 1 / sqrt(fan in) keeps activations near 1 through the layers.
            scale = 0.1 if weight.dim() == 1 else weight[0].numel() ** -0.5
            weight.copy_(1 + scale * noise if is_norm_scale else scale * noise)
        embeddings = model.model.language_model.embed_tokens
        embeddings.weight.mul_(embeddings.embedding_dim**0.5)
    return model


def save_transformers_layout(
    directory: Path,
    model: LlavaForConditionalGeneration | None = None,
    safetensors: bool = True,
    text_tower: bool = False,
) -> LlavaForConditionalGeneration:
    """Write what a llava-hf repository holds; `safetensors=False` writes one pytorch_model.bin instead.

    Args:
        text_tower: also write what completes the vision tower to a CLIP, into the folder text_tower/.
    """
    model = make_tiny_llava() if model is None else model
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    if not safetensors:
        (directory / "model.safetensors").unlink()
        torch.save(model.state_dict(), directory / "pytorch_model.bin")
    make_tokenizer().save_pretrained(directory)
    write_preprocessor(directory, model.config.vision_config.image_size)
    if text_tower:
        save_text_tower(directory / "text_tower", model)
    return model


def make_tiny_clip(model: LlavaForConditionalGeneration, seed: int = 1, length: int = 20, **text: Any) -> CLIPModel:
    """A random CLIP around the vision tower of a LLaVA; its text half reads the words of `make_tokenizer`."""
    vision = model.config.vision_config.to_dict()
    half = {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "vocab_size": len(make_tokenizer()),
        "max_position_embeddings": length,
        "projection_dim": vision["projection_dim"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    config = CLIPConfig(text_config={**half, **text}, vision_config=vision, projection_dim=vision["projection_dim"])
    clip = CLIPModel(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(clip.named_parameters()):
            if weight.dim() == 2 and not name.startswith("vision_model"):
                # Embeddings as large as what the blocks add, so that every word matters.
                scale = 1.0 if "embedding" in name else weight[0].numel() ** -0.5
                weight.copy_(scale * torch.randn(weight.shape, generator=generator))
    clip.vision_model.load_state_dict(model.model.vision_tower.state_dict())
    return clip


def save_text_tower(directory: Path, model: LlavaForConditionalGeneration, **text: Any) -> CLIPModel:
    """Write what a LLaVA checkpoint leaves out of a CLIP: its text half, both projections and its config."""
    clip = make_tiny_clip(model, **text)
    directory.mkdir(parents=True, exist_ok=True)
    left_out = {key: tensor for key, tensor in clip.state_dict().items() if not key.startswith("vision_model.")}
    save_file(left_out, directory / "model.safetensors")
    clip.config.save_pretrained(directory)
    return clip


def save_original_layout(
    directory: Path,
    model: LlavaForConditionalGeneration | None = None,
    safetensors: bool = False,
    tower_in_shards: bool = False,
    **config: Any,
) -> LlavaForConditionalGeneration:
    """Write what a liuhaotian/llava-v1.5 repository holds, with the CLIP tower in the folder clip/ inside it."""
    model = make_tiny_llava() if model is None else model
    save_original(directory, model, make_tokenizer(), config, safetensors, tower_in_shards)
    save_tower(directory / "clip", model)
    return model


def save_original(
    directory: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: dict[str, Any],
    safetensors: bool,
    towers: bool,
) -> None:
    """Write a model in the original layout, into two files of weights with an index.

    Only the rows of real words are written, as in the official files. `config` overrides fields of config.json; ...
    leaves one out.
    """
    directory.mkdir(parents=True, exist_ok=True)
    content = {**original_config(model, len(tokenizer), "clip"), **config}
    write_json(directory / "config.json", {key: value for key, value in content.items() if value is not ...})
    weights, weight_map = to_original_layout(model, len(tokenizer), towers), {}
    stem, suffix = ("model", "safetensors") if safetensors else ("pytorch_model", "bin")
    for shard in range(2):
        name = f"{stem}-{shard + 1:05d}-of-00002.{suffix}"
        part = {key: weights[key].clone() for key in sorted(weights)[shard::2]}
        weight_map.update(dict.fromkeys(part, name))
        save_file(part, directory / name) if safetensors else torch.save(part, directory / name)
    write_json(directory / f"{stem}.{suffix}.index.json", {"metadata": {}, "weight_map": weight_map})
    tokenizer.save_pretrained(directory)


def save_tower(directory: Path, model: LlavaForConditionalGeneration) -> None:
    """Write the vision tower alone, under the names of openai/clip-vit-large-patch14-336, with a stray text weight."""
    directory.mkdir(parents=True, exist_ok=True)
    tower = CLIPVisionModel(CLIPVisionConfig.from_dict(model.config.vision_config.to_dict()))
    tower.load_state_dict(model.model.vision_tower.state_dict())
    tower.config.save_pretrained(directory)
    weights = {f"vision_model.{key}": tensor for key, tensor in tower.state_dict().items()}
    positions = torch.arange(model.model.vision_tower.embeddings.num_positions)[None]
    extra = {"logit_scale": torch.ones(()), "vision_model.embeddings.position_ids": positions}
    torch.save({**weights, **extra}, directory / "pytorch_model.bin")
    write_preprocessor(directory, model.config.vision_config.image_size)


def original_config(model: PreTrainedModel, words: int, tower: str) -> dict[str, Any]:
    text = model.config.text_config
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    copied = (*sizes, "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")
    return {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        **{field: getattr(text, field) for field in copied},
        "rope_theta": text.rope_parameters["rope_theta"],
        "rope_scaling": None,
        "vocab_size": words,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "pretraining_tp": 1,
        "image_aspect_ratio": "pad",
        "mm_hidden_size": model.config.vision_config.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": model.config.vision_feature_layer,
        "mm_vision_tower": tower,
    }


def to_original_layout(model: PreTrainedModel, words: int, tower: bool) -> dict[str, Tensor]:
    """The weights under their original names, spare rows cut off; written out, not taken from the loader's map."""
    text, projector = model.model.language_model, model.model.multi_modal_projector
    weights = {f"model.{key}": tensor for key, tensor in text.state_dict().items()}
    weights["model.embed_tokens.weight"] = text.embed_tokens.weight.detach()[:words]
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(3)  # old shards hold these tables
    if not model.config.tie_word_embeddings:
        weights["lm_head.weight"] = model.lm_head.weight.detach()[:words]
    for number, linear in (("0", projector.linear_1), ("2", projector.linear_2)):
        for part, tensor in linear.state_dict().items():
            weights[f"model.mm_projector.{number}.{part}"] = tensor
    if hasattr(model.model, "image_newline"):
        weights["model.image_newline"] = model.model.image_newline.detach()
    # The towers of Video-LLaVA are the inner modules of CLIP's vision model.
    inner = {"vision_tower": "vision_model.", "image_tower": "", "video_tower": ""}
    for name, prefix in inner.items() if tower else ():
        for key, tensor in getattr(model.model, name).state_dict().items() if hasattr(model.model, name) else ():
            weights[f"model.{name}.{name}.{prefix}{key}"] = tensor
    return weights


def write_preprocessor(directory: Path, size: int) -> None:
    config = {
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    write_json(directory / "preprocessor_config.json", config)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
