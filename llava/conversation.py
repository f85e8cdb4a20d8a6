"""The prompt templates of the LLaVA and Qwen-VL checkpoints.

Templates are data: a checkpoint was trained on these characters, so every character must match. The texts are those of
the official code; tests/test_conversation.py compares the rendered prompts.

Official code read: haotian-liu/LLaVA@c121f04, llava/conversation.py; chat_template of Qwen/Qwen2-VL-7B-Instruct, which
Qwen2.5-VL has word for word; LLaVA-VL/LLaVA-NeXT, llava/conversation.py (llava_llama_3), which renders with the
chat_template of meta-llama/Meta-Llama-3-8B-Instruct
Differs from it: the pre-training templates ("plain", "v0_plain") are left out, since they cannot ask a question;
stop_string of the [INST] templates is "</s>" (theirs is the separator before a turn).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from llava.errors import unknown

Turn = tuple[str, str | None]  # user message, answer; None where the model is to answer


@dataclass(frozen=True)
class Conversation:
    """One template.

    Attributes:
        style: "colon" is "ROLE: text" (the official SINGLE and TWO), "chatml" is role and text with nothing in between
            (MPT and LLAMA_3), "inst" wraps the user message in [INST] (LLAMA_2).
        user, assistant: role names.
        after_user, after_assistant: text after a message; an "inst" answer stands between two spaces.
        stop: text that ends an answer.
        slot: text of an image before the first message; the visual tokens replace "<image>" in it.
        trim: spaces and line ends at both ends of a message are removed.
        examples: turns before every conversation.
    """

    system: str
    style: Literal["colon", "chatml", "inst"]
    after_user: str
    after_assistant: str
    stop: str
    user: str = "USER"
    assistant: str = "ASSISTANT"
    slot: str = "<image>\n"
    trim: bool = False
    examples: tuple[tuple[str, str], ...] = ()


HELPFUL = "The assistant gives helpful, detailed, and polite answers to the {who}'s questions."
CURIOUS = "A chat between a curious {who} and an artificial intelligence assistant. "
TAGGED = (
    "The assistant is able to understand the visual content that the user provides, and assist the user with a variety "
    "of tasks using natural language.The visual content will be provided with the following format: "
    "<Image>visual content</Image>."
)

VICUNA_V1 = Conversation(
    system=(CURIOUS + HELPFUL).format(who="user") + " ",
    style="colon",
    after_user=" ",
    after_assistant="</s>",
    stop="</s>",
)
LLAVA_V0 = Conversation(
    system=(CURIOUS + HELPFUL).format(who="human") + "###",
    style="colon",
    after_user="###",
    after_assistant="###",
    stop="###",
    user="Human",
    assistant="Assistant",
)
CHATML = Conversation(
    system="<|im_start|>system\nAnswer the questions.<|im_end|>",
    style="chatml",
    after_user="<|im_end|>",
    after_assistant="<|im_end|>",
    stop="<|im_end|>",
    user="<|im_start|>user\n",
    assistant="<|im_start|>assistant\n",
)
QWEN2_VL = Conversation(
    system="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
    style="chatml",
    after_user="<|im_end|>\n",
    after_assistant="<|im_end|>\n",
    stop="<|im_end|>",
    user="<|im_start|>user\n",
    assistant="<|im_start|>assistant\n",
    # "<image>" replaces <|image_pad|>, which is repeated for every visual token.
    slot="<|vision_start|><image><|vision_end|>",
)
HELPFUL_VISION = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
LLAVA_LLAMA_2 = Conversation(
    system=HELPFUL_VISION,
    style="inst",
    after_user="",
    after_assistant="</s><s>",
    stop="</s>",
)
# The text begins with the BOS token and the tokenizer adds another one, as in the official code.
LLAVA_LLAMA_3 = Conversation(
    system=f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{HELPFUL_VISION}<|eot_id|>",
    style="chatml",
    after_user="<|eot_id|>",
    after_assistant="<|eot_id|>",
    stop="<|eot_id|>",
    user="<|start_header_id|>user<|end_header_id|>\n\n",
    assistant="<|start_header_id|>assistant<|end_header_id|>\n\n",
    trim=True,
)

ENERGY = (
    "What are the key differences between renewable and non-renewable energy sources?",
    "Renewable energy sources are those that can be replenished naturally in a relatively short amount of time, such "
    "as solar, wind, hydro, geothermal, and biomass. Non-renewable energy sources, on the other hand, are finite and "
    "will eventually be depleted, such as coal, oil, and natural gas. Here are some key differences between renewable "
    "and non-renewable energy sources:\n"
    "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable energy sources are "
    "finite and will eventually run out.\n"
    "2. Environmental impact: Renewable energy sources have a much lower environmental impact than non-renewable "
    "sources, which can lead to air and water pollution, greenhouse gas emissions, and other negative effects.\n"
    "3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically have lower "
    "operational costs than non-renewable sources.\n"
    "4. Reliability: Renewable energy sources are often more reliable and can be used in more remote locations than "
    "non-renewable sources.\n"
    "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to different situations and "
    "needs, while non-renewable sources are more rigid and inflexible.\n"
    "6. Sustainability: Renewable energy sources are more sustainable over the long term, while non-renewable sources "
    "are not, and their depletion can lead to economic and social instability.\n",
)

MODES: dict[str, Conversation] = {
    "vicuna_v1": VICUNA_V1,  # LLaVA-1.5 and LLaVA-1.6 vicuna, all benchmark scripts
    "v1": VICUNA_V1,
    # Video-LLaVA's videos
    "llava_v1": replace(VICUNA_V1, system=(CURIOUS + HELPFUL).format(who="human") + " "),
    "v1_mmtag": replace(VICUNA_V1, system=CURIOUS.format(who="user") + TAGGED + " "),
    "llava_v0": LLAVA_V0,
    "v0": replace(LLAVA_V0, examples=(ENERGY,)),
    "default": replace(LLAVA_V0, examples=(ENERGY,)),
    "v0_mmtag": replace(LLAVA_V0, system=CURIOUS.format(who="user") + TAGGED + "###"),
    "chatml_direct": CHATML,  # LLaVA-1.6 34B
    "qwen2_vl": QWEN2_VL,  # Qwen2-VL and Qwen2.5-VL
    "mistral_direct": CHATML,
    "mpt": replace(
        CHATML,
        system=(
            "<|im_start|>system\nA conversation between a user and an LLM-based AI assistant. "
            "The assistant gives helpful and honest answers.<|im_end|>"
        ),
    ),
    # LLaVA-1.6 mistral
    "mistral_instruct": replace(LLAVA_LLAMA_2, system="", after_assistant="</s>"),
    "llava_llama_2": LLAVA_LLAMA_2,
    "llava_llama_3": LLAVA_LLAMA_3,  # LLaVA-NeXT with a Llama-3 decoder
    "llama_2": replace(
        LLAVA_LLAMA_2,
        system=(
            "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being "
            "safe.  Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or "
            "illegal content. Please ensure that your responses are socially unbiased and positive in nature.\n\n"
            "If a question does not make any sense, or is not factually coherent, explain why instead of answering "
            "something not correct. If you don't know the answer to a question, please don't share false information."
        ),
    ),
}

DEFAULT_MODE = "vicuna_v1"


def conversation(mode: str) -> Conversation:
    if mode not in MODES:
        raise unknown("conversation mode", mode, MODES)
    return MODES[mode]


def stop_string(mode: str) -> str:
    """Return the text that ends an answer. Cut it off if it is no special token of the tokenizer."""
    return conversation(mode).stop


def render(mode: str, turns: Sequence[Turn]) -> str:
    """Return the prompt text of a conversation. With None as the last answer it ends where the model continues."""
    if not turns or any(answer is None for _, answer in turns[:-1]):
        raise ValueError("a conversation needs at least one turn, and only its last answer may be None")
    template = conversation(mode)
    turns = (*template.examples, *turns)
    if template.trim:
        turns = tuple((message.strip(), answer and answer.strip()) for message, answer in turns)
    if template.style == "inst":
        return _render_inst(template, turns)
    between = ": " if template.style == "colon" else ""
    text = template.system
    for message, answer in turns:
        text += template.user + between + message + template.after_user
        # No space after the last role: the answer's first token begins with it.
        text += template.assistant + between.rstrip()
        if answer is not None:
            text += between[1:] + answer + template.after_assistant
    return text


def _render_inst(template: Conversation, turns: Sequence[Turn]) -> str:
    text = f"<<SYS>>\n{template.system}\n<</SYS>>\n\n" if template.system else ""
    for index, (message, answer) in enumerate(turns):
        text = f"[INST] {text}{message} [/INST]" if index == 0 else f"{text}[INST] {message} [/INST]"
        if answer is not None:
            text += f" {answer} {template.after_assistant}"
    return text
