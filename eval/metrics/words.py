"""Words of a text, for matches that need no LLM judge."""

import re
from collections.abc import Sequence

WORD = re.compile(r"(?<!\w)-?\d+(?:[.,]\d+)*|\w+")


def words(text: str) -> tuple[str, ...]:
    """Lower-case words and numbers, signs kept, without punctuation."""
    return tuple(word.replace(",", "") for word in WORD.findall(text.lower()))


def contains(said: Sequence[str], element: Sequence[str]) -> bool:
    """Whether the words of `element` follow each other in `said`."""
    count = len(element)
    return count > 0 and any(said[start : start + count] == element for start in range(len(said) - count + 1))
