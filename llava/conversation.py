"""The prompt templates of the LLaVA and Qwen-VL checkpoints.

Templates are data: a checkpoint was trained on these characters, so every character must match. The texts are those of
the official code; tests/test_prompt.py compares the rendered prompts.

Questions here are single turns, which `render` writes. Scripts written for LLaVA's own package add turns to a copy of
one of `conv_templates` and ask it for the prompt.

Official code read: haotian-liu/LLaVA@c121f04, llava/conversation.py; chat_template of Qwen/Qwen2-VL-7B-Instruct, which
Qwen2.5-VL has word for word; LLaVA-VL/LLaVA-NeXT, llava/conversation.py (llava_llama_3), which renders with the
chat_template of meta-llama/Meta-Llama-3-8B-Instruct
Differs from it: templates of checkpoints that cannot be loaded here (LLaVA 1.0, MPT, Llama-2-chat, pre-training) are
left out; stop_string of mistral_instruct is "</s>" (theirs is the separator before a turn).
"""

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import NoReturn

from llava.errors import unknown

# The answer-format instructions of LLaVA's benchmark files. The first ends with the second, so it is tried first.
SHORT = "Answer the question using a single word or phrase."
ANSWER_FORMATS = (
    f"When the provided information is insufficient, respond with 'Unanswerable'.\n{SHORT}",
    SHORT,
    "Answer with the option's letter from the given choices directly.",
    "请直接回答选项字母。",
)


class SeparatorStyle(Enum):
    """How a template divides turns, by LLaVA's names; scripts take the text that ends an answer by it."""

    SINGLE = 1
    TWO = 2
    MPT = 3
    PLAIN = 4
    LLAMA_2 = 5


@dataclass(frozen=True)
class Template:
    """One template. A prompt is `system`, `user`, the message and `assistant`; the answer of the model follows.

    Attributes:
        system: text before the user's turn.
        user: text before the message.
        assistant: text between the message and its answer.
        stop: text that ends an answer.
        slot: text of an image before the message; the visual tokens replace "<image>" in it.
        trim: spaces and line ends at both ends of a message are removed.
        answered: an answer, in place of the braces, between `assistant` and the next turn.
        style: LLaVA's name for the separators.
    """

    system: str
    user: str
    assistant: str
    stop: str
    slot: str = "<image>\n"
    trim: bool = False
    answered: str = " {}</s>"
    style: SeparatorStyle = SeparatorStyle.TWO


CURIOUS = (
    "A chat between a curious {who} and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the {who}'s questions. "
)
HELPFUL_VISION = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
VICUNA_V1 = Template(system=CURIOUS.format(who="user"), user="USER: ", assistant=" ASSISTANT:", stop="</s>")
DEFAULT_MODE = "vicuna_v1"

MODES: dict[str, Template] = {
    "vicuna_v1": VICUNA_V1,  # LLaVA-1.5 and LLaVA-1.6 vicuna, all benchmark scripts
    "llava_v1": replace(VICUNA_V1, system=CURIOUS.format(who="human")),  # Video-LLaVA's videos
    # LLaVA-1.6 mistral
    "mistral_instruct": Template(
        system="",
        user="[INST] ",
        assistant=" [/INST]",
        stop="</s>",
        answered=" {} </s>",
        style=SeparatorStyle.LLAMA_2,
    ),
    # LLaVA-1.6 34B
    "chatml_direct": Template(
        system="<|im_start|>system\nAnswer the questions.<|im_end|>",
        user="<|im_start|>user\n",
        assistant="<|im_end|><|im_start|>assistant\n",
        stop="<|im_end|>",
        answered="{}<|im_end|>",
        style=SeparatorStyle.MPT,
    ),
    # LLaVA-NeXT with a Llama-3 decoder. The text begins with the BOS token and the tokenizer adds another one, as in
    # the official code.
    "llava_llama_3": Template(
        system=f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{HELPFUL_VISION}<|eot_id|>",
        user="<|start_header_id|>user<|end_header_id|>\n\n",
        assistant="<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        stop="<|eot_id|>",
        trim=True,
        answered="{}<|eot_id|>",
        style=SeparatorStyle.MPT,
    ),
    # Qwen2-VL and Qwen2.5-VL; "<image>" replaces <|image_pad|>, which is repeated for every visual token.
    "qwen2_vl": Template(
        system="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
        user="<|im_start|>user\n",
        assistant="<|im_end|>\n<|im_start|>assistant\n",
        stop="<|im_end|>",
        slot="<|vision_start|><image><|vision_end|>",
        answered="{}<|im_end|>\n",
        style=SeparatorStyle.MPT,
    ),
}


def conversation(mode: str) -> Template:
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


@dataclass
class Conversation:
    """The turns of a conversation under a template, as LLaVA's scripts write them down.

    Attributes:
        template: its texts.
        system: text before the first turn.
        messages: [role, text] of the turns, the user's and the model's in turns; None where the model shall continue.
    """

    template: Template
    system: str
    messages: list[list[str | None]] = field(default_factory=list)

    @property
    def sep_style(self) -> SeparatorStyle:
        return self.template.style

    @property
    def roles(self) -> tuple[str, str]:
        if self.sep_style is not SeparatorStyle.MPT:
            return "USER", "ASSISTANT"
        return self.template.user, self.template.assistant.removeprefix(self.sep2)

    @property
    def sep(self) -> str:
        return {SeparatorStyle.TWO: " ", SeparatorStyle.LLAMA_2: ""}.get(self.sep_style, self.sep2)

    @property
    def sep2(self) -> str:
        return self.template.stop

    def copy(self) -> "Conversation":
        return replace(self, messages=[list(turn) for turn in self.messages])

    def append_message(self, role: str, message: str | None) -> None:
        self.messages.append([role, message])

    def get_prompt(self) -> str:
        """The text of all turns, which ends where the model continues if the last turn is a None of its own."""
        template, text = self.template, self.system
        for number, (_, message) in enumerate(self.messages):
            message = (message or "").strip() if template.trim else message or ""
            if number % 2 == 0:
                text += template.user + message
            else:
                text += template.assistant + (template.answered.format(message) if message else "")
        return text


class _Known(dict[str, Conversation]):
    def __missing__(self, mode: str) -> NoReturn:
        raise unknown("conversation mode", mode, self)


NAMED = {**MODES, "v1": MODES["vicuna_v1"], "mistral_direct": MODES["chatml_direct"]}  # with LLaVA's other names
conv_templates = _Known({mode: Conversation(template, template.system) for mode, template in NAMED.items()})
