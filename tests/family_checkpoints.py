"""Tiny checkpoints of families of `llava.hf.families` as they lie on the hub, with template and processor."""

from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from tests.stock_families import PINPOINTS, QWEN_LIKE, make
from tests.tiny_checkpoints import TEXT, write_json

TURN, END = "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }} {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% elif part['type'] == 'video' %}VIDEO"
    "{% else %} {{ part['text'] }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
PIXELS = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}  # of Qwen-VL's processors
PIXELS |= {"size": {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 30}}
# Family -> what its template writes for an image, its special tokens by the names of the tokenizer's attributes, and
# its processor's class and settings.
SAVED: dict[str, tuple[str, dict[str, str], str, dict[str, Any], dict[str, Any]]] = {
    "qwen3_vl": (
        "<|vision_start|><|image_pad|><|vision_end|>",
        {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "vision_start_token": "<|vision_start|>"}
        | {"vision_end_token": "<|vision_end|>"},
        "Qwen3VLProcessor",
        {"image_processor_type": "Qwen2VLImageProcessor", **PIXELS},
        {},
    ),
    "internvl3": (
        "<IMG_CONTEXT>",
        {"context_image_token": "<IMG_CONTEXT>", "start_image_token": "<img>", "end_image_token": "</img>"}
        | {"video_token": "<video>"},
        "InternVLProcessor",
        {"image_processor_type": "GotOcr2ImageProcessor", "size": {"height": 112, "width": 112}}
        | {"crop_to_patches": True, "min_patches": 1, "max_patches": 4},
        {"image_seq_length": 16},
    ),
    "onevision": (
        "<image>",
        {"image_token": "<image>", "video_token": "<video>"},
        "LlavaOnevisionProcessor",
        {"image_processor_type": "LlavaOnevisionImageProcessor", "size": {"height": 56, "width": 56}, **PINPOINTS},
        {"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
    ),
    "idefics3": (
        "<image>",
        {"image_token": "<image>", "fake_image_token": "<fake_token_around_image>"}
        | {"global_image_token": "<global-img>", "end_of_utterance_token": "<end_of_utterance>"},
        "Idefics3Processor",
        {"image_processor_type": "Idefics3ImageProcessor", "size": {"longest_edge": 224}}
        | {"max_image_size": {"longest_edge": 112}},
        {"image_seq_len": 16},
    ),
    "gemma3": (
        "<start_of_image>",
        {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
        "Gemma3Processor",
        {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 112, "width": 112}},
        {"image_seq_length": 16},
    ),
}


# These answer benchmarks of images as other models do (llava/model/qwen_vl.py), and those of videos as families.
FILMED = {"qwen3_vl": SAVED["qwen3_vl"]}
for _name, _kind in (("qwen2_vl", "Qwen2VLProcessor"), ("qwen2_5_vl", "Qwen2_5_VLProcessor")):
    FILMED[_name] = (*SAVED["qwen3_vl"][:2], _kind, *SAVED["qwen3_vl"][3:])


def save_family(name: str, folder: Path) -> Any:
    """Write a checkpoint of random weights, and return the model, which decodes greedily."""
    slot, tokens, processor, images, settings = (SAVED | FILMED)[name]
    words = ["<unk>", "<pad>", *dict.fromkeys(f"{TEXT} user assistant".split())]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    special = [TURN, END, *tokens.values()]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token=END, extra_special_tokens=tokens
    )
    assert len(fast) <= 300
    fast.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(
        TEMPLATE.replace("IMAGE", slot).replace("VIDEO", slot.replace("image", "video"))
    )
    write_json(folder / "preprocessor_config.json", {"processor_class": processor, **images})
    if name in FILMED:
        kind = "Qwen3VLVideoProcessor" if name == "qwen3_vl" else "Qwen2VLVideoProcessor"
        size = {"shortest_edge": 28 * 28 * 4 * 8, "longest_edge": 28 * 28 * 20 * 8}
        write_json(folder / "video_preprocessor_config.json", {"video_processor_type": kind, **PIXELS, "size": size})
    write_json(folder / "processor_config.json", {"processor_class": processor, **settings})
    torch.manual_seed(0)
    ids = {part: fast.convert_tokens_to_ids(token) for part, token in tokens.items()}
    image = ids["context_image_token" if name == "internvl3" else "image_token"]
    changes = {"image_token_id": image, "image_token_index": image}
    if name in QWEN_LIKE:
        changes |= {f"{part}_id": number for part, number in ids.items()}
    model = make(name, changes).eval()
    for key, weight in model.named_parameters():
        if "mm_input_projection_weight" in key:  # zeros, with which pixels do not matter
            weight.data.normal_(0, 0.1)
        elif "layers" in key and weight.dim() == 2:  # too small for answers that depend on the question
            weight.data *= 4
    own = {"eos_token_id": [fast.eos_token_id], "pad_token_id": fast.pad_token_id}
    model.generation_config = hf.GenerationConfig(**own, do_sample=True, repetition_penalty=1.5)
    model.save_pretrained(folder)
    model.generation_config = hf.GenerationConfig(**own)
    return model
