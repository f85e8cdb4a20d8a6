"""The words of the embedded Video-LLaVA: those of the embedded model, and what it takes to speak of change.

Its conversation is `llava_v1`, whose system sentence says "human" where `vicuna_v1` says "user".
"""

from functools import cache

from tinyllava import vocabulary

VIDEO = "<video>"
SYSTEM = vocabulary.SYSTEM.replace("curious user", "curious human").replace("the user's", "the human's")
_NEW_WORDS = """
move moves appear appears disappear disappears first last start end at that times up down where go video
"""


@cache
def words() -> tuple[str, ...]:
    """All tokens in id order: the old ones keep their ids but for the end token, which stays the last."""
    return (*vocabulary.words()[:-1], VIDEO, SYSTEM, *_NEW_WORDS.split(), vocabulary.EOS)


@cache
def ids() -> dict[str, int]:
    return {word: index for index, word in enumerate(words())}


def encode(text: str) -> list[int]:
    """Ids of lower-case words split at spaces; raises KeyError for a word that is not in the vocabulary."""
    return [ids()[word] for word in text.lower().replace("?", " ?").split()]


def prefix_ids() -> list[int]:
    """What the tokenizer makes of the prompt in front of the video."""
    return [ids()[token] for token in (vocabulary.BOS, SYSTEM, vocabulary.USER)]


def tokenizer():
    """The vocabulary as a transformers tokenizer."""
    return vocabulary.tokenizer(words(), (SYSTEM,), (VIDEO,), 4096)
