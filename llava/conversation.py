"""The prompt templates of the LLaVA and Qwen-VL checkpoints.

Templates are data. A checkpoint was trained on these characters, so every character must match. The texts are those of
the official code, and tests/test_prompt.py compares the rendered prompts.

Questions of this project are single turns, which llava/processing/prompt.py writes; `render` writes one for a
processor of transformers. Scripts written for LLaVA's own package add turns to a copy of one of `conv_templates` and
ask it for the prompt.

Official code read: haotian-liu/LLaVA@c121f04, llava/conversation.py; chat_template of Qwen/Qwen2-VL-7B-Instruct, which
Qwen2.5-VL has word for word; LLaVA-VL/LLaVA-NeXT@df17966, llava/conversation.py, whose llava_llama_3 renders with the
chat_template of meta-llama/Meta-Llama-3-8B-Instruct
Differs from it: MODES has the templates of checkpoints that can be loaded here. conv_templates has the names that
scripts use, without default, v0, llama_2 and templates of other decoders; an unknown name is an error. stop_string of
mistral_instruct is "</s>" (theirs is the separator before a turn). The headers of llava_llama_3 are those of training.
"""

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, NoReturn

from llava.errors import UserError, unknown

# The answer-format instructions of LLaVA's benchmark files. The first ends with the second, so it is tried first.
SHORT = "Answer the question using a single word or phrase."
ANSWER_FORMATS = (
    f"When the provided information is insufficient, respond with 'Unanswerable'.\n{SHORT}",
    SHORT,
    "Answer with the option's letter from the given choices directly.",
    "请直接回答选项字母。",
)


@dataclass(frozen=True)
class Template:
    """One template. A prompt is `system`, `user`, the message and `assistant`; the model's answer follows.

    Attributes:
        system: text before the user's turn.
        user: text before the message.
        assistant: text between the message and its answer.
        stop: text that ends an answer.
        slot: text of an image before the message; the visual tokens replace "<image>" in it.
        trim: whether spaces and line ends at both ends of a message are removed.
        answered: text between `assistant` and the next turn, with the answer in place of the braces.
    """

    system: str
    user: str
    assistant: str
    stop: str
    slot: str = "<image>\n"
    trim: bool = False
    answered: str = " {}</s>"


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
    "mistral_instruct": Template(system="", user="[INST] ", assistant=" [/INST]", stop="</s>", answered=" {} </s>"),
    # LLaVA-1.6 34B
    "chatml_direct": Template(
        system="<|im_start|>system\nAnswer the questions.<|im_end|>",
        user="<|im_start|>user\n",
        assistant="<|im_end|><|im_start|>assistant\n",
        stop="<|im_end|>",
        answered="{}<|im_end|>",
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
    ),
    # Qwen2-VL and Qwen2.5-VL; "<image>" replaces <|image_pad|>, which is repeated for every visual token.
    "qwen2_vl": Template(
        system="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
        user="<|im_start|>user\n",
        assistant="<|im_end|>\n<|im_start|>assistant\n",
        stop="<|im_end|>",
        slot="<|vision_start|><image><|vision_end|>",
        answered="{}<|im_end|>\n",
    ),
}


def conversation(mode: str) -> Template:
    if mode not in MODES:
        raise unknown("conversation mode", mode, MODES)
    return MODES[mode]


def stop_string(mode: str) -> str:
    """Return the text that ends an answer. Cut it off the answer if the tokenizer has no special token for it."""
    return conversation(mode).stop


def render(mode: str, message: str) -> str:
    """Return the prompt text of a message, which ends where the model continues."""
    template = conversation(mode)
    return template.system + template.user + (message.strip() if template.trim else message) + template.assistant


# Conversations, for scripts written for LLaVA


class SeparatorStyle(Enum):
    """How a template separates turns, by LLaVA's names; scripts choose the text that ends an answer by it."""

    SINGLE = 1
    TWO = 2
    MPT = 3
    PLAIN = 4
    LLAMA_2 = 5
    CHATML = 6
    LLAMA_3 = 7


@dataclass
class Conversation:
    """The turns of a conversation, with the fields of LLaVA's class, which scripts read and set.

    Attributes:
        system: text before the first turn, without the separator that follows it.
        roles: texts with which the user's and the model's turns begin.
        messages: [role, message] of alternating turns of the user and the model; None where the model shall continue.
            The message may be a tuple that begins with the text: (text, image, how the image is shown).
        offset: number of messages at the beginning that are an example.
        sep_style: how turns are separated.
        sep: text that ends a turn; in the styles TWO and PLAIN only the user's turn. In LLAMA_2, text before a user's
            turn.
        sep2: text that ends an answer if it is not `sep`.
        version: if it contains "mmtag", the image of the first message has a turn of its own.
    """

    system: str
    roles: tuple[str, str]
    messages: list[list[Any]] = field(default_factory=list)
    offset: int = 0
    sep_style: SeparatorStyle = SeparatorStyle.SINGLE
    sep: str = "###"
    sep2: str | None = None
    version: str = "Unknown"

    def copy(self) -> "Conversation":
        return replace(self, messages=[list(turn) for turn in self.messages])

    def append_message(self, role: str, message: Any) -> None:
        self.messages.append([role, message])

    def get_prompt(self) -> str:
        """The text of all turns, which ends where the model continues if the last message is None.

        Raises:
            UserError: in the style LLAMA_2 there is no first message, which would hold the system's text.
        """
        style, text = self.sep_style, self.system
        if style is SeparatorStyle.LLAMA_2:
            text, system = "", f"<<SYS>>\n{self.system}\n<</SYS>>\n\n" if self.system else ""
            for number, (_, message) in enumerate(self._texts()):
                if not number and not message:
                    raise UserError("The first message of this template must be a text of the user; append it first.")
                if message:
                    text += f" {message} {self.sep2}" if number % 2 else f"{self.sep}[INST] {system}{message} [/INST]"
                system = ""
            return text.removeprefix(self.sep)
        if style is not SeparatorStyle.PLAIN and not (style is SeparatorStyle.CHATML and not text):
            text += self._ended("")
        for number, (role, message) in enumerate(self._texts()):
            begun = {SeparatorStyle.PLAIN: "", SeparatorStyle.CHATML: f"{role}\n"}.get(style, role)
            if style in (SeparatorStyle.SINGLE, SeparatorStyle.TWO):
                begun += ": " if message else ":"
            text += begun + (self._ended(message, number) if message else "")
        return text

    def _texts(self) -> list[tuple[str, str]]:
        """Role and text of every turn, with "<image>" for an image of the first message."""
        texts = [(role, message[0] if isinstance(message, tuple) else message or "") for role, message in self.messages]
        if texts and isinstance(self.messages[0][1], tuple):
            role, text = texts[0][0], texts[0][1].replace("<image>", "").strip()
            shown = [(self.roles[0], "<Image><image></Image>"), (self.roles[1], "Received.")]
            texts[:1] = [*shown, (role, text)] if "mmtag" in self.version else [(role, f"<image>\n{text}")]
        return texts

    def _ended(self, text: str, number: int = 0) -> str:
        """The text of turn `number` with the text that ends it."""
        if self.sep_style is SeparatorStyle.LLAMA_3:
            text = text.strip()
        if self.sep_style in (SeparatorStyle.TWO, SeparatorStyle.PLAIN) and number % 2:
            return f"{text}{self.sep2 or ''}"
        return f"{text}{self.sep}\n" if self.sep_style is SeparatorStyle.CHATML else text + self.sep


class _Known(dict[str, Conversation]):
    def __missing__(self, mode: str) -> NoReturn:
        raise unknown("conversation mode", mode, self)


WITH_TAGS = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant is able to understand the "
    "visual content that the user provides, and assist the user with a variety of tasks using natural language."
)
TAGS = "The visual content will be provided with the following format: <Image>visual content</Image>."
ABOUT_IMAGES = "Answer the questions about the visual content that the user provides."
ASSISTED = (
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
)
_VICUNA: dict[str, Any] = {"roles": ("USER", "ASSISTANT"), "sep_style": SeparatorStyle.TWO, "sep": " ", "sep2": "</s>"}
_LLAMA_2: dict[str, Any] = {**_VICUNA, "sep_style": SeparatorStyle.LLAMA_2, "sep": "<s>", "version": "llama_v2"}
_CHATML = ("<|im_start|>user", "<|im_start|>assistant")
_MPT: dict[str, Any] = {
    "roles": tuple(f"{role}\n" for role in _CHATML),
    "sep_style": SeparatorStyle.MPT,
    "sep": "<|im_end|>",
    "version": "mpt",
}

default_conversation = Conversation(CURIOUS.format(who="user").rstrip(), **_VICUNA, version="v1")
_V0 = Conversation(CURIOUS.format(who="human").rstrip(), ("Human", "Assistant"))
_V0_TAGS = replace(_V0, system=WITH_TAGS + TAGS, version="v0_mmtag")
_V1_TAGS = replace(default_conversation, system=WITH_TAGS + TAGS, version="v1_mmtag")
_PLAIN = Conversation("", ("", ""), sep_style=SeparatorStyle.PLAIN, sep="\n")
_MISTRAL = Conversation("", **{**_LLAMA_2, "sep": ""})
_DIRECT = Conversation("<|im_start|>system\nAnswer the questions.", **_MPT)
_QWEN = Conversation(
    "<|im_start|>system\nYou are a helpful assistant.",
    _CHATML,
    sep_style=SeparatorStyle.CHATML,
    sep="<|im_end|>",
    version="qwen",
)
_HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
_LLAMA_3 = Conversation(
    f"<|begin_of_text|>{_HEADER.format('system')}{HELPFUL_VISION}",
    (_HEADER.format("user"), _HEADER.format("assistant")),
    sep_style=SeparatorStyle.LLAMA_3,
    sep="<|eot_id|>",
    version="llama_v3",
)
conv_templates = _Known(
    {
        "v1": default_conversation,
        "vicuna_v1": default_conversation,
        "llava_v0": _V0,
        "llava_v1": replace(default_conversation, system=CURIOUS.format(who="human").rstrip()),
        "v0_mmtag": _V0_TAGS,
        "llava_v0_mmtag": _V0_TAGS,
        "v1_mmtag": _V1_TAGS,
        "llava_v1_mmtag": _V1_TAGS,
        "plain": _PLAIN,
        "v0_plain": _PLAIN,
        "llava_llama_2": Conversation(HELPFUL_VISION, **_LLAMA_2),
        "llava_llama_2_mmtag": Conversation(ABOUT_IMAGES + TAGS, **{**_LLAMA_2, "version": "llama_v2_mmtag"}),
        "llava_llama_3": _LLAMA_3,
        "mistral_instruct": _MISTRAL,
        "llava_mistral_instruct": _MISTRAL,
        "chatml_direct": _DIRECT,
        "mistral_direct": _DIRECT,
        "mpt": Conversation(f"<|im_start|>system\n{ASSISTED}", **_MPT),
        "qwen_1_5": _QWEN,
        "qwen_2": _QWEN,
        "qwen2_vl": _QWEN,  # LLaVA does not have this name; MODES has it, with the same texts
    }
)
