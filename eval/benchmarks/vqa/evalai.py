"""The answer processor of the EvalAI servers, which LLaVA runs on every short answer before it is uploaded or scored.

Source of the definitions: EvalAIAnswerProcessor (m4c_evaluator.py of LLaVA @ c121f04, from MMF). Equal to it on the
strings in tests/data/vqa, its oddities included: "what's" becomes "what 's", "a/b" becomes "b", "None." becomes "0",
and at most 32 full stops are deleted.
"""

import re
from functools import lru_cache

from eval.benchmarks.vqa.words import ARTICLES, CONTRACTIONS, NUMBERS, PUNCTUATION

DIGITS_WITH_COMMA = re.compile(r"\d,\d")
# Not a decimal point. The official pattern also means to look behind, but is written so that it never does.
FULL_STOP = re.compile(r"\.(?!\d)")
# A regular-expression flag stands where the number of replacements belongs; its value is 32.
FULL_STOPS = 32


# Data sets ask for the same few words thousands of times.
@lru_cache(maxsize=1 << 16)
def process(text: str) -> str:
    """An answer as it is compared or uploaded."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return normalise(one_line(text))


def one_line(text: str) -> str:
    """Newlines and tabs as spaces, none around the text."""
    return text.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(maxsize=1 << 16)
def normalise(text: str) -> str:
    """The part that the VQA toolkit has in common: punctuation, then numbers, articles and contractions."""
    return plain_words(without_punctuation(text))


def without_punctuation(text: str) -> str:
    """Each mark deleted if it stands next to a space somewhere, else replaced by a space; full stops deleted.

    With a comma between digits all marks are deleted, not only the comma.
    """
    numeric = DIGITS_WITH_COMMA.search(text) is not None
    found = text
    for mark in PUNCTUATION:
        delete = numeric or f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if delete else " ")
    return FULL_STOP.sub("", found, count=FULL_STOPS)


def plain_words(text: str) -> str:
    """Lower case, number words to ten as digits, no articles, contractions with their apostrophes."""
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)
