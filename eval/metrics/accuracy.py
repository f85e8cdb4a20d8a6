"""What most metrics share: coverage of questions, means in percent, breakdowns, matches of short texts, letters."""

import re
import string
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from eval.metrics import Score, first_names
from llava.errors import UserError

Reference = TypeVar("Reference")

PUNCTUATION = str.maketrans("", "", string.punctuation)
WORD = re.compile(r"(?<!\w)-?\d+(?:[.,]\d+)*|\w+")


def check_coverage(balanced: Iterable[str], predictions: Iterable[str], known: set[str]) -> None:
    """Raise UserError unless every question of `balanced` has a prediction and every prediction's id is `known`."""
    predicted = set(predictions)
    if missing := [name for name in balanced if name not in predicted]:
        noun = "question" if len(missing) == 1 else "questions"
        raise UserError(f"{len(missing):,} {noun} without a prediction: {first_names(missing)}.")
    if extra := sorted(predicted - known):
        noun = "prediction" if len(extra) == 1 else "predictions"
        raise UserError(f"{len(extra):,} {noun} for questions that are not in the question file: {first_names(extra)}.")


def percent(sample_scores: Iterable[float]) -> float:
    """100 x the mean, or 0 without scores; operations in the official order, so that the last digit agrees."""
    sample_scores = list(sample_scores)
    return sum(sample_scores) / len(sample_scores) * 100 if sample_scores else 0.0


def grouped(correct: Mapping[str, float], key: Mapping[str, Any]) -> dict[str, tuple[float, int]]:
    """Percent correct and number of questions for each group, sorted by group.

    Args:
        key: question id -> group (text or number), or a list of groups, in each of which the question counts;
            questions that are not in `key` are left out.
    """
    buckets: dict[Any, list[float]] = defaultdict(list)
    for name, sample_score in correct.items():
        values = key.get(name, ())
        for value in values if isinstance(values, list | tuple) else [values]:
            buckets[value].append(sample_score)
    return {str(value): (percent(buckets[value]), len(buckets[value])) for value in sorted(buckets)}


def mean_score(
    answers: Mapping[str, Reference],
    texts: Mapping[str, str],
    sample_score: Callable[[str, Reference], float | bool],
    kinds: Mapping[str, Mapping[str, Any]] | None = None,
    main: str = "accuracy",
) -> Score:
    """The mean of sample scores in percent, as a `Score`.

    Args:
        answers: question id -> reference, for the questions that were asked.
        texts: question id -> the model's text, one for every question.
        sample_score: (text, reference) -> score in [0, 1].
        kinds: name of a breakdown -> question id -> group, see `grouped`; empty breakdowns are left out.
        main: name of the number.
    """
    check_coverage(answers, texts, set(answers))
    correct = {name: float(sample_score(texts[name], answer)) for name, answer in answers.items()}
    kinds = {title: key for title, key in (kinds or {}).items() if key}
    groups = {title: grouped(correct, key) for title, key in kinds.items()}
    return Score({main: percent(correct.values())}, groups, correct, main=main, kinds=kinds)


def normalise(text: str) -> str:
    """A text as GQA compares it: in lower case without final full stops, as LLaVA does, and nothing else."""
    return text.rstrip(".").lower()


def bare(text: str) -> str:
    """The text in lower case without punctuation."""
    return text.lower().translate(PUNCTUATION)


def exact_match(text: str, answer: str) -> float:
    """1 if the text is the answer, ignoring case, final full stops and surrounding spaces."""
    return float(normalise(text.strip()) == normalise(answer.strip()))


def loose_match(text: str, answer: str) -> float:
    """1 if the text is the answer, ignoring case and punctuation: lmms-eval's exact_match with both switches on."""
    return float(bare(text) == bare(answer))


def words(text: str) -> tuple[str, ...]:
    """Words and numbers of a text in lower case, with signs but no punctuation, for matches without an LLM judge."""
    return tuple(word.replace(",", "") for word in WORD.findall(text.lower()))


def contains(said: Sequence[str], element: Sequence[str]) -> bool:
    """Whether `said` contains the words of `element` in sequence."""
    count = len(element)
    return count > 0 and any(said[start : start + count] == element for start in range(len(said) - count + 1))


# -- letters ---------------------------------------------------------------------------------------------------------

# How lmms-eval 0.7.3 reads the letter of an option from an answer: AI2D's filter, and the extractor of other sets.
# Written from descriptions of both and compared with the released package on thousands of random answers.

FIRST_LETTER = re.compile(r"\s*([A-Z])\.")

# Forms in which a letter may stand in a text, with the rank of each; a higher rank wins.
FORMS = {"({})": 6, "{}.": 5, "{}:": 4, "{})": 3, "{} ": 2}
START, END, AFTER_PHRASE, ANYWHERE = 10, 9, 7, 0

_STEMS = ("answer", "correct answer", "best answer", "correct option", "best option", "choice", "correct choice")
_OTHER_LANGUAGES = ("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは")
PHRASES = (
    *(f"{article}{stem} is" for stem in _STEMS for article in ("the ", "")),
    *("my answer is", "my choice is", "i choose", "i select", "i pick"),
    *_OTHER_LANGUAGES,
)


def ai2d_score(text: str, answer: str) -> float:
    """1 if the text is the letter, ignoring case, punctuation and surrounding white space.

    If the text begins with a capital letter and a full stop, AI2D's filter takes only that letter.
    """
    match = FIRST_LETTER.match(text)
    return float(bare((match.group(1) if match else text).strip()) == bare(answer))


def extract_letter(text: str, letters: Sequence[str] = "ABCD") -> str:
    """The letter that a text most probably means; "" if it contains none.

    Candidates are ranked by form; of equal ranks the last in the text wins. Capital letters inside words are candidates
    too, and so is the first word of "A dog"; only their rank keeps them from winning.
    """
    text = text.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    padded = f" {text} "
    core, lowered = padded.strip(), padded.lower()
    candidates: list[tuple[int, int, str]] = []
    for letter in letters:
        for form, rank in FORMS.items():
            if (place := padded.rfind(form.format(letter))) >= 0:
                candidates.append((rank, place, letter))
        if core.startswith(letter) and not core[1:2].isalpha():
            candidates.append((START, 0, letter))
        if core.endswith(letter) and not core[-2:-1].isalpha():
            candidates.append((END, len(padded), letter))
        for phrase in PHRASES:
            start = lowered.find(phrase)
            if start >= 0 and (place := padded.find(letter, start + len(phrase))) >= 0:
                candidates.append((AFTER_PHRASE, place, letter))
    if not candidates:
        candidates = [(ANYWHERE, padded.rfind(letter), letter) for letter in letters if letter in padded]
    return max(candidates)[2] if candidates else ""


def realworldqa_score(text: str, answer: str) -> float:
    """1 if the text is right: the letter, if the answer is A to D; else the same text, ignoring case and full stops."""
    answer = answer.strip()
    if answer.upper() in ("A", "B", "C", "D"):
        return float(extract_letter(text) == answer.upper())
    return float(text.lower().strip().rstrip(".") == answer.lower())
