"""Family, layout and decoder from the fields of a config.json; contradictions are refused by name."""

from pathlib import Path

import pytest

from llava.errors import UserError
from llava.model.checkpoint.identify import Kind, default_mode, identify

HERE = Path("folder")
ORIGINAL = {"model_type": "llava", "mm_vision_tower": "openai/clip-vit-large-patch14-336"}
NEXT = {**ORIGINAL, "image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
VIDEO = {
    "model_type": "llava",
    "mm_image_tower": "LanguageBind/LanguageBind_Image",
    "mm_video_tower": "LanguageBind/LanguageBind_Video_merge",
    "image_grid_pinpoints": None,
}
NESTED = {"text_config": {"model_type": "llama"}, "vision_config": {"model_type": "clip_vision_model"}}
MISTRAL = {**NESTED, "text_config": {"model_type": "mistral"}}
QWEN = {"vision_start_token_id": 1, "hidden_size": 64}


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (ORIGINAL, ("llava", "original", "llama")),
        ({**ORIGINAL, "model_type": "llava_llama"}, ("llava", "original", "llama")),
        ({**ORIGINAL, "image_aspect_ratio": "pad", "mm_patch_merge_type": None}, ("llava", "original", "llama")),
        ({**ORIGINAL, "model_type": "llava_mistral"}, ("llava", "original", "mistral")),
        (NEXT, ("llava_next", "original", "llama")),
        ({**ORIGINAL, "image_aspect_ratio": "anyres"}, ("llava_next", "original", "llama")),
        ({**ORIGINAL, "mm_patch_merge_type": "spatial"}, ("llava_next", "original", "llama")),
        # The class is more than the type, which "llava" hides.
        ({**NEXT, "architectures": ["LlavaMistralForCausalLM"]}, ("llava_next", "original", "mistral")),
        (VIDEO, ("video_llava", "original", "llama")),
        ({**VIDEO, "mm_vision_tower": None}, ("video_llava", "original", "llama")),
        ({**NESTED, "model_type": "llava"}, ("llava", "transformers", "llama")),
        ({"model_type": "llava", "text_config": {}, "vision_config": {}}, ("llava", "transformers", "llama")),
        ({**MISTRAL, "model_type": "llava"}, ("llava", "transformers", "mistral")),
        (
            {**NESTED, "model_type": "llava_next", "image_grid_pinpoints": [[1]]},
            ("llava_next", "transformers", "llama"),
        ),
        ({**MISTRAL, "model_type": "llava_next"}, ("llava_next", "transformers", "mistral")),
        ({**NESTED, "model_type": "video_llava", "video_token_index": 9}, ("video_llava", "transformers", "llama")),
        ({**QWEN, "model_type": "qwen2_vl", "vision_config": {"embed_dim": 8}}, ("qwen2_vl", "transformers", "qwen2")),
        (
            {**QWEN, "model_type": "qwen2_5_vl", "vision_config": {"window_size": 112}},
            ("qwen2_5_vl", "transformers", "qwen2"),
        ),
        (
            {"model_type": "qwen2_5_vl", "text_config": {}, "vision_config": {"fullatt_block_indexes": [7]}},
            ("qwen2_5_vl", "transformers", "qwen2"),
        ),
    ],
)
def test_what_a_config_says(config, kind):
    assert identify(config, HERE) == Kind(*kind)


@pytest.mark.parametrize(
    ("config", "family"),
    [
        ({"model_type": "llama"}, "llama"),
        ({}, "unknown"),
        ({**NESTED, "model_type": "llava_next_video", "image_grid_pinpoints": [[1]]}, "llava_next_video"),
        ({**NESTED, "model_type": "llava_onevision"}, "llava_onevision"),
        ({**ORIGINAL, "model_type": "llava_qwen"}, "llava_qwen"),
        ({**ORIGINAL, "architectures": ["LlavaMptForCausalLM"]}, "LlavaMptForCausalLM"),
        ({**QWEN, "model_type": "qwen3_vl", "vision_config": {}}, "qwen3_vl"),
        ({"model_type": "llava", "vision_config": {}}, "llava"),
        (
            {"model_type": "llava", "text_config": {"model_type": "qwen2"}, "vision_config": {"model_type": "siglip"}},
            r"llava \(siglip tower, qwen2 decoder\)",
        ),
    ],
)
def test_other_families_are_refused_by_name(config, family):
    with pytest.raises(UserError, match=rf"^folder is a checkpoint of the family {family}, which is not supported: "):
        identify(config, HERE)


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({**ORIGINAL, **NESTED}, "mm_vision_tower, a field of the original layout, and text_config, one of transf"),
        ({**VIDEO, "vision_config": {}}, "mm_image_tower, a field of the original layout, and vision_config"),
        ({**VIDEO, **ORIGINAL}, "mm_vision_tower and mm_image_tower, which are of different families"),
        ({**NESTED, "model_type": "llava", "image_grid_pinpoints": [[1]]}, "model_type llava and image_grid_pinpoints"),
        ({**NESTED, "model_type": "llava_next", "video_seq_length": 9}, "model_type llava_next and video tokens"),
        (
            {**QWEN, "model_type": "qwen2_vl", "vision_config": {"window_size": 9}},
            "model_type qwen2_vl and a vision_config of qwen2_5_vl",
        ),
    ],
)
def test_contradictions(config, what):
    with pytest.raises(UserError, match=f"config.json contradicts itself: it has {what}") as caught:
        identify(config, HERE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("missing", "there"), [("mm_video_tower", "mm_image_tower"), ("mm_image_tower", "mm_video_tower")]
)
def test_a_video_checkpoint_needs_two_towers(missing, there):
    config = {key: value for key, value in VIDEO.items() if key != missing}
    with pytest.raises(UserError, match=rf"names only one tower \({there}\).*add {missing} to config.json"):
        identify(config, HERE)


@pytest.mark.parametrize(
    ("kind", "tokens", "mode"),
    [
        (("llava", "original", "llama"), (), "vicuna_v1"),
        (("llava_next", "transformers", "llama"), (), "vicuna_v1"),
        (("video_llava", "original", "llama"), (), "vicuna_v1"),
        (("llava_next", "original", "mistral"), (), "mistral_instruct"),
        (("llava_next", "original", "llama"), ("<|im_start|>", "<|im_end|>"), "chatml_direct"),
        (("llava_next", "original", "mistral"), ("<|im_start|>", "<|im_end|>"), "chatml_direct"),
        (("llava_next", "original", "llama"), ("<|im_end|>",), "vicuna_v1"),
        (("qwen2_vl", "transformers", "qwen2"), ("<|im_start|>", "<|im_end|>"), "qwen2_vl"),
        (("qwen2_5_vl", "transformers", "qwen2"), ("<|im_start|>", "<|im_end|>"), "qwen2_vl"),
    ],
)
def test_the_template_of_the_benchmark_scripts(kind, tokens, mode):
    assert default_mode(Kind(*kind), {token: number for number, token in enumerate(tokens)}) == mode
