"""The words of the toy models, and their tokenizers in the transformers format.

One token per word. The fixed sentences of a conversation (system sentence, roles, answer-format suffix) are single
tokens: the prompt text is that of a 7B model, and takes only a few tokens.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from eval.yaml_files import read_yaml

WORDS: dict[str, Any] = read_yaml(Path(__file__).with_name("words.yaml"))
COLORS: dict[str, tuple[int, int, int]] = {name: tuple(rgb) for name, rgb in WORDS["colors"].items()}
COLOR_NAMES = tuple(COLORS)
SHAPES, PATTERNS, SIZES = (tuple(WORDS[kind]) for kind in ("shapes", "patterns", "sizes"))
PLURALS = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES}
DIGITS = tuple(str(digit) for digit in range(10))

PAD, BOS, UNKNOWN, IMAGE, EOS = "<pad>", "<s>", "<unk>", "<image>", "</s>"
VIDEO = "<video>"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# The system sentence of `llava_v1`, the conversation of Video-LLaVA.
VIDEO_SYSTEM = SYSTEM.replace("curious user", "curious human").replace("the user's", "the human's")
USER, ASSISTANT = "USER:", "ASSISTANT:"
SHORT_ANSWER = "Answer the question using a single word or phrase."


class Vocabulary:
    """The words of one toy model.

    Args:
        words: all tokens in id order.
        system: the system sentence of the conversation.
        suffix: the answer-format instruction after a question.
        phrases: sentences that are single tokens, beside those of the conversation `vicuna_v1`.
        special: further special tokens.
        letters: words that are tokens only as words of their own, in their case: "A" is an option, "a" an article.
        longest: tokens of the longest prompt, visual tokens included.
        glued: replacements in decoded text, which has a space between any two words.
    """

    def __init__(
        self,
        words: Sequence[str],
        system: str = SYSTEM,
        suffix: str = SHORT_ANSWER,
        phrases: Sequence[str] = (),
        special: Sequence[str] = (),
        letters: Sequence[str] = (),
        longest: int = 1024,
        glued: Sequence[tuple[str, str]] = (),
    ):
        self.words = tuple(words)
        self.ids = {word: index for index, word in enumerate(self.words)}
        self.system, self.phrases, self.special, self.letters = system, tuple(phrases), list(special), letters
        self.suffix, self.longest, self.glued = suffix, longest, glued

    def __len__(self) -> int:
        return len(self.words)

    @property
    def prefix(self) -> list[int]:
        """The ids of the prompt before the image or video."""
        return [self.ids[token] for token in (BOS, self.system, USER)]

    def encode(self, text: str) -> list[int]:
        """Ids of a text without the beginning-of-text token."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    @cached_property
    def tokenizer(self):
        """The same vocabulary as a transformers tokenizer, which puts BOS before every text as Llama's does."""
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast

        backend = Tokenizer(models.WordLevel(self.ids, unk_token=UNKNOWN))
        backend.normalizer = normalizers.Lowercase()
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        start = [(BOS, self.ids[BOS])]
        backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=start)
        if self.glued:
            spaced = decoders.Replace(Regex("^"), " ")  # of every word
            glue = [decoders.Replace(apart, together) for apart, together in self.glued]
            backend.decoder = decoders.Sequence([spaced, decoders.Fuse(), *glue, decoders.Strip(" ", 1, 0)])
        sentences = (SYSTEM, USER, ASSISTANT, SHORT_ANSWER, *self.phrases)
        backend.add_tokens([AddedToken(sentence, normalized=False) for sentence in sentences])
        made = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            pad_token=PAD,
            bos_token=BOS,
            eos_token=EOS,
            unk_token=UNKNOWN,
            additional_special_tokens=[IMAGE, *self.special],
            padding_side="left",
            model_max_length=self.longest,
        )
        made.add_tokens([AddedToken(letter, single_word=True, normalized=False) for letter in self.letters])
        return made


def grown(words: Sequence[str], new: Sequence[str]) -> tuple[str, ...]:
    """A vocabulary with new words: old words keep their ids, except the end token, which stays the last one."""
    return (*words[:-1], *new, words[-1])


_PLAIN = sorted({*WORDS["questions"].split(), *COLOR_NAMES, *SHAPES, *PLURALS.values(), *PATTERNS, *SIZES, *DIGITS})
# The end token is the last one: CLIP's text tower finds it by the largest id.
_WORDS = (PAD, BOS, UNKNOWN, IMAGE, SYSTEM, USER, ASSISTANT, SHORT_ANSWER, *_PLAIN, EOS)
LONG = 4096  # tokens of the longest prompt of the models with tiles or frames

TOY_WORDS = Vocabulary(_WORDS)
NEXT_WORDS = Vocabulary(_WORDS, longest=LONG)
VIDEO_WORDS = Vocabulary(
    grown(_WORDS, (VIDEO, VIDEO_SYSTEM, *WORDS["videos"].split())),
    system=VIDEO_SYSTEM,
    suffix="",
    phrases=(VIDEO_SYSTEM,),
    special=(VIDEO,),
    longest=LONG,
)
