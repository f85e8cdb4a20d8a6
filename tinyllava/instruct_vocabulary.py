"""The words of the embedded model that knows the benchmarks' formats: the embedded model's, and what formats need.

Instructions are single tokens, as the embedded model's one is. Option letters are cased tokens of their own: "A" is an
option, "a" an article.
"""

from functools import cache

from eval.benchmarks.prompts import LETTER, LETTER_CN, VIZ
from tinyllava import vocabulary
from tinyllava.chinese import PARTICLES, WORDS
from tinyllava.formats import (
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

# Instruction -> the old token that its embedding starts from.
INSTRUCTIONS = {
    VIZ.splitlines()[0]: vocabulary.SHORT_ANSWER,
    SINGLE_WORD: vocabulary.SHORT_ANSWER,
    ONLY_WORD: vocabulary.SHORT_ANSWER,
    LETTER: vocabulary.SHORT_ANSWER,
    LETTER_CN_LMMS: vocabulary.SHORT_ANSWER,
    LETTER_CN: vocabulary.SHORT_ANSWER,
    ONLY_LETTER: vocabulary.SHORT_ANSWER,
    SEVERAL: "which",
    CAPTION: "image",
    DESCRIBE: "image",
    STEP_BY_STEP: "what",
}
PUNCTUATION = (".", ",", ":", "(", ")", "<", ">")
_WORDS = ("reference", "ocr", "token", "options", "context", "look", "at", "and", "an", "with", "says", UNANSWERABLE)


@cache
def words() -> tuple[str, ...]:
    """All tokens in id order: the old ones keep their ids but for the end token, which stays the last."""
    chinese = dict.fromkeys([*WORDS.values(), *PARTICLES])
    new = (*INSTRUCTIONS, *LETTERS, *PUNCTUATION, *_WORDS, *chinese)
    return (*vocabulary.words()[:-1], *new, vocabulary.EOS)


@cache
def ids() -> dict[str, int]:
    return {word: index for index, word in enumerate(words())}


@cache
def tokenizer():
    """The vocabulary as a transformers tokenizer; training and evaluation read text with it."""
    from tokenizers import AddedToken

    made = vocabulary.tokenizer(words(), (*INSTRUCTIONS, *dict.fromkeys([*WORDS.values(), *PARTICLES])))
    made.add_tokens([AddedToken(letter, single_word=True, normalized=False) for letter in LETTERS])
    return made


def encode(text: str) -> list[int]:
    """Ids of a text without the beginning-of-text token."""
    return tokenizer()(text, add_special_tokens=False).input_ids
