"""Prompt templates against the texts that the official code renders."""

import json
from pathlib import Path

import pytest

from llava.conversation import DEFAULT_MODE, MODES, conversation, render, stop_string
from llava.errors import UserError

PROMPTS = json.loads((Path(__file__).parent / "data" / "llava_preproc" / "prompts.json").read_text())
RENDERED = sorted(PROMPTS)

SUFFIX = "Answer the question using a single word or phrase."


@pytest.mark.parametrize("mode", RENDERED)
def test_templates_equal_the_official_ones(mode):
    question = f"<image>\nWhat is this?\n{SUFFIX}"
    assert render(mode, [(question, None)]) == PROMPTS[mode]["single_turn"]
    assert render(mode, [("<image>\nQ1", "A1"), ("Q2", None)]) == PROMPTS[mode]["two_turn"]


def test_no_template_without_an_official_counterpart():
    assert MODES.keys() - PROMPTS == {"qwen2_vl", "llava_llama_3"}
    assert DEFAULT_MODE == "vicuna_v1"


@pytest.mark.parametrize("mode", RENDERED)
def test_stop_string_is_what_closes_an_answer(mode):
    closed = render(mode, [("Q", "A1"), ("Q", None)])
    assert closed.partition("A1")[2].lstrip().startswith(stop_string(mode))
    official = PROMPTS[mode]["sep2"] or PROMPTS[mode]["sep"]
    assert stop_string(mode) == official


@pytest.mark.parametrize("call", [stop_string, lambda mode: render(mode, [("Q", None)])])
def test_unknown_mode_names_the_nearest(call):
    with pytest.raises(UserError, match=r"Unknown conversation mode 'vicuna_v2'\. Did you mean 'vicuna_v1'"):
        call("vicuna_v2")
    with pytest.raises(UserError, match="Unknown conversation mode 'plain'"):
        call("plain")


@pytest.mark.parametrize("turns", [[], [("Q1", None), ("Q2", None)]])
def test_an_open_turn_in_the_middle_is_a_bug(turns):
    with pytest.raises(ValueError, match="only its last answer may be None"):
        render("vicuna_v1", turns)


def test_qwen_renders_what_its_chat_template_renders():
    """Qwen2-VL's chat_template with one picture and a generation prompt; <image> stands for its <|image_pad|>."""
    begin = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    picture = "<|vision_start|><image><|vision_end|>"
    end = "<|im_end|>\n<|im_start|>assistant\n"
    assert conversation("qwen2_vl").slot == picture
    assert render("qwen2_vl", [(picture + "Q1", None)]) == f"{begin}{picture}Q1{end}"
    two = render("qwen2_vl", [(picture + "Q1", "A1"), ("Q2", None)])
    assert two == f"{begin}{picture}Q1{end}A1<|im_end|>\n<|im_start|>user\nQ2{end}"
    assert stop_string("qwen2_vl") == "<|im_end|>"


LLAMA_3 = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, and assist the user with a variety of tasks "
    "using natural language.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
)
LLAMA_3_ANSWER = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
LLAMA_3_USER = "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"


def test_llama_3_renders_what_its_chat_template_renders():
    """A LLaVA-NeXT with a Llama-3 decoder was loaded with vicuna_v1 and stop string "</s>", without a word.

    Written out by hand from LLaVA-VL/LLaVA-NeXT's llava_llama_3 (system text, roles, style LLAMA_3) and the
    chat_template
    of meta-llama/Meta-Llama-3-8B-Instruct: header, two line ends, trimmed message, <|eot_id|>.
    """
    assert render("llava_llama_3", [("<image>\nQ1", None)]) == f"{LLAMA_3}<image>\nQ1{LLAMA_3_ANSWER}"
    two = render("llava_llama_3", [("<image>\n Q1 \n", " A1 "), (" Q2\n", None)])
    assert two == f"{LLAMA_3}<image>\n Q1{LLAMA_3_ANSWER}A1{LLAMA_3_USER}Q2{LLAMA_3_ANSWER}"
    assert stop_string("llava_llama_3") == "<|eot_id|>"
