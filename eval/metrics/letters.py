"""How lmms-eval 0.7.3 reads an option's letter out of an answer: the filter of AI2D, the extractor of other sets.

Written from descriptions of both and compared with the released package on thousands of drawn answers.
"""

import re
from collections.abc import Sequence

from eval.metrics.accuracy import bare

FIRST_LETTER = re.compile(r"\s*([A-Z])\.")

# How a letter may stand in a text, and how far each form is trusted.
FORMS = {"({})": 6, "{}.": 5, "{}:": 4, "{})": 3, "{} ": 2}
START, END, AFTER_PHRASE, ANYWHERE = 10, 9, 7, 0

_STEMS = ("answer", "correct answer", "best answer", "correct option", "best option", "choice", "correct choice")
_OTHER_LANGUAGES = ("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは")
PHRASES = (
    *(f"{article}{stem} is" for stem in _STEMS for article in ("the ", "")),
    *("my answer is", "my choice is", "i choose", "i select", "i pick"),
    *_OTHER_LANGUAGES,
)


def leading_letter(text: str) -> str:
    """AI2D's filter: the capital letter that a text begins with, if a full stop follows; else the text."""
    match = FIRST_LETTER.match(text)
    return match.group(1) if match else text


def ai2d_score(text: str, answer: str) -> float:
    """1 if the text is the letter, but for case, punctuation, and white space around it."""
    return float(bare(leading_letter(text).strip()) == bare(answer))


def extract(text: str, letters: Sequence[str] = "ABCD") -> str:
    """The letter that a text most probably means, "" if it holds none.

    Candidates are ranked by form, then by place, the later first. Capital letters inside words count, as does the
    first word of "A dog": only the ranks keep them from winning.
    """
    text = text.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    padded = f" {text} "
    core = padded.strip()
    candidates: list[tuple[int, int, str]] = []
    for letter in letters:
        for form, rank in FORMS.items():
            if (place := padded.rfind(form.format(letter))) >= 0:
                candidates.append((rank, place, letter))
        if core.startswith(letter) and not core[1:2].isalpha():
            candidates.append((START, 0, letter))
        if core.endswith(letter) and not core[-2:-1].isalpha():
            candidates.append((END, len(padded), letter))
        candidates += [(AFTER_PHRASE, place, letter) for place in after_phrases(padded, letter)]
    if not candidates:
        candidates = [(ANYWHERE, padded.rfind(letter), letter) for letter in letters if letter in padded]
    return max(candidates)[2] if candidates else ""


def after_phrases(text: str, letter: str) -> list[int]:
    """Where the letter first stands after each phrase like "the answer is" that the text has."""
    lowered = text.lower()
    starts = ((lowered.find(phrase), len(phrase)) for phrase in PHRASES)
    places = (text.find(letter, start + length) for start, length in starts if start >= 0)
    return [place for place in places if place >= 0]


def realworldqa_score(text: str, answer: str) -> float:
    """1 if the text is right: by letter for letters A to D, else the same text but for case and final full stops."""
    answer = answer.strip()
    if answer.upper() in ("A", "B", "C", "D"):
        return float(extract(text) == answer.upper())
    return float(text.lower().strip().rstrip(".") == answer.lower())
