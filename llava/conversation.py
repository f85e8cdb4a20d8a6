"""The prompt templates of the LLaVA and Qwen-VL checkpoints.

Templates are data: a checkpoint was trained on these characters, so every character must match. The texts are those of
the official code; tests/test_prompt.py compares the rendered prompts.

Official code read: haotian-liu/LLaVA@c121f04, llava/conversation.py; chat_template of Qwen/Qwen2-VL-7B-Instruct, which
Qwen2.5-VL has word for word; LLaVA-VL/LLaVA-NeXT, llava/conversation.py (llava_llama_3), which renders with the
chat_template of meta-llama/Meta-Llama-3-8B-Instruct
Differs from it: templates of checkpoints that cannot be loaded here (LLaVA 1.0, MPT, Llama-2-chat, pre-training) are
left out; stop_string of mistral_instruct is "</s>" (theirs is the separator before a turn).
"""

from dataclasses import dataclass, replace

from llava.errors import unknown


@dataclass(frozen=True)
class Conversation:
    """One template. A prompt is `system`, `user`, the message and `assistant`; the answer of the model follows.

    Attributes:
        system: text before the user's turn.
        user: text before the message.
        assistant: text between the message and its answer.
        stop: text that ends an answer.
        slot: text of an image before the message; the visual tokens replace "<image>" in it.
        trim: spaces and line ends at both ends of a message are removed.
    """

    system: str
    user: str
    assistant: str
    stop: str
    slot: str = "<image>\n"
    trim: bool = False


CURIOUS = (
    "A chat between a curious {who} and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the {who}'s questions. "
)
HELPFUL_VISION = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
VICUNA_V1 = Conversation(system=CURIOUS.format(who="user"), user="USER: ", assistant=" ASSISTANT:", stop="</s>")
DEFAULT_MODE = "vicuna_v1"

MODES: dict[str, Conversation] = {
    "vicuna_v1": VICUNA_V1,  # LLaVA-1.5 and LLaVA-1.6 vicuna, all benchmark scripts
    "llava_v1": replace(VICUNA_V1, system=CURIOUS.format(who="human")),  # Video-LLaVA's videos
    # LLaVA-1.6 mistral
    "mistral_instruct": Conversation(system="", user="[INST] ", assistant=" [/INST]", stop="</s>"),
    # LLaVA-1.6 34B
    "chatml_direct": Conversation(
        system="<|im_start|>system\nAnswer the questions.<|im_end|>",
        user="<|im_start|>user\n",
        assistant="<|im_end|><|im_start|>assistant\n",
        stop="<|im_end|>",
    ),
    # LLaVA-NeXT with a Llama-3 decoder. The text begins with the BOS token and the tokenizer adds another one, as in
    # the official code.
    "llava_llama_3": Conversation(
        system=f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{HELPFUL_VISION}<|eot_id|>",
        user="<|start_header_id|>user<|end_header_id|>\n\n",
        assistant="<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        stop="<|eot_id|>",
        trim=True,
    ),
    # Qwen2-VL and Qwen2.5-VL; "<image>" replaces <|image_pad|>, which is repeated for every visual token.
    "qwen2_vl": Conversation(
        system="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
        user="<|im_start|>user\n",
        assistant="<|im_end|>\n<|im_start|>assistant\n",
        stop="<|im_end|>",
        slot="<|vision_start|><image><|vision_end|>",
    ),
}


def conversation(mode: str) -> Conversation:
    if mode not in MODES:
        raise unknown("conversation mode", mode, MODES)
    return MODES[mode]


def stop_string(mode: str) -> str:
    """Return the text that ends an answer. Cut it off if it is no special token of the tokenizer."""
    return conversation(mode).stop


def render(mode: str, message: str) -> str:
    """Return the prompt text of a message, which ends where the model continues."""
    template = conversation(mode)
    return template.system + template.user + (message.strip() if template.trim else message) + template.assistant
