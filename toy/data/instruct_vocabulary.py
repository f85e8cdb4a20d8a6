"""The words of the toy model of all answer formats: those of the toy model, and what the formats add.

Instructions are single tokens, as the toy model's one is. Option letters are cased tokens of their own: "A" is an
option, "a" an article.
"""

from functools import cached_property

from eval.benchmarks.prompts import LETTER, LETTER_CN, VIZ
from toy.data.chinese import PARTICLES, WORDS
from toy.data.formats import (
    CAPTION,
    DESCRIBE,
    LETTER_CN_LMMS,
    LETTERS,
    ONLY_LETTER,
    ONLY_WORD,
    SEVERAL,
    SINGLE_WORD,
    STEP_BY_STEP,
    UNANSWERABLE,
)
from toy.data.vocabulary import SHORT_ANSWER, TOY_WORDS, Vocabulary, grown

# Instruction -> the old token that its embedding starts from.
INSTRUCTIONS = {
    VIZ.splitlines()[0]: SHORT_ANSWER,
    SINGLE_WORD: SHORT_ANSWER,
    ONLY_WORD: SHORT_ANSWER,
    LETTER: SHORT_ANSWER,
    LETTER_CN_LMMS: SHORT_ANSWER,
    LETTER_CN: SHORT_ANSWER,
    ONLY_LETTER: SHORT_ANSWER,
    SEVERAL: "which",
    CAPTION: "image",
    DESCRIBE: "image",
    STEP_BY_STEP: "what",
}
PUNCTUATION = (".", ",", ":", "(", ")", "<", ">")
_WORDS = ("reference", "ocr", "token", "options", "context", "look", "at", "and", "an", "with", "says", UNANSWERABLE)


_CHINESE = tuple(dict.fromkeys([*WORDS.values(), *PARTICLES]))


class InstructVocabulary(Vocabulary):
    """Reads text with the tokenizer, because letters are cased and punctuation stands beside words."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text without the beginning-of-text token."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    @cached_property
    def tokenizer(self):
        """The vocabulary as a transformers tokenizer; option letters are tokens only as words of their own."""
        from tokenizers import AddedToken

        made = Vocabulary(self.words, phrases=self.phrases).tokenizer
        made.add_tokens([AddedToken(letter, single_word=True, normalized=False) for letter in LETTERS])
        return made


INSTRUCT_WORDS = InstructVocabulary(
    grown(TOY_WORDS.words, (*INSTRUCTIONS, *LETTERS, *PUNCTUATION, *_WORDS, *_CHINESE)),
    phrases=(*INSTRUCTIONS, *_CHINESE),
)
