"""MMMU: the parser and metric of its authors' scripts (mmmu/utils/eval_utils.py), and the letter forms of lmms-eval.

Equal to the scripts on tests/data/mmmu. Differs from them in one place: an answer without any letter or option gets a
random letter there, from one generator for the whole run; here from one seeded with the question's id, so that a score
does not depend on the order of the answers. How many were drawn is part of the score.
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eval.metrics import Score
from eval.metrics.accuracy import check_coverage, grouped, percent

DOMAINS = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science",
        "Clinical_Medicine",
        "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture",
        "Architecture_and_Engineering",
        "Computer_Science",
        "Electronics",
        "Energy_and_Power",
        "Materials",
        "Mechanical_Engineering",
    ),
}
DOMAIN_OF = {subject: domain for domain, subjects in DOMAINS.items() for subject in subjects}

# How a letter may stand in an answer, tried in this order. lmms-eval also takes a letter that ends a
# word, as in "NASA is".
BRACKETS = "({})"
OFFICIAL_FORMS = (BRACKETS, " {} ")
LMMS_FORMS = (BRACKETS, "{} ", "{}.")

# Words after which an open answer's result is looked for; "=" as well in its last line.
MARKERS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
TRIVIAL = frozenset(":,.!?;'")

_EXPONENT = r"[eE][+-]?\d+"
NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d\d\d)+\b"),  # 1,234
    re.compile(rf"-?\d+(?:\.\d+)?{_EXPONENT}"),  # 1.2e3
    re.compile(rf"-?(?:\d*\.\d+|\d+\b)(?!{_EXPONENT}|[,\d])"),  # 12, 1.2, .5, and the last digits of 1,234
)

Value = str | float


@dataclass(frozen=True)
class Item:
    """What the metric needs of a question.

    Attributes:
        answer: the letter, or the accepted answers of an open question.
        options: letter -> text; None for an open question.
    """

    answer: str | Sequence[str]
    subject: str
    options: Mapping[str, str] | None = None


def find_letter(text: str, options: Mapping[str, str], forms: Sequence[str] = OFFICIAL_FORMS) -> str | None:
    """The letter that an answer names last, or the option whose text it names last; None for neither.

    Option texts are looked for in answers of more than five words only.
    """
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    for form in forms:
        if named := [letter for letter in options if form.format(letter) in text]:
            # lmms-eval finds letters in looser forms than it orders them by: the first option wins what is not found.
            place = form if form == BRACKETS else " {} "
            return max(named, key=lambda letter: text.rfind(place.format(letter)))
    lowered = text.lower()
    named = [letter for letter, option in options.items() if option.lower() in lowered]
    if named and len(text.split()) > 5:
        return max(named, key=lambda letter: lowered.rfind(options[letter].lower()))
    return None


def draw_letter(name: str, options: Mapping[str, str]) -> str:
    """A letter for a question whose answer names none: any, but always the same for the same question."""
    return random.Random(name).choice(list(options))


def read_open(text: str) -> set[Value]:
    """What an open answer may mean: texts in lower case, and numbers rounded to two decimals."""
    found = key_parts(text)
    found += [number for part in found for pattern in NUMBERS for number in pattern.findall(part)]
    return {value for part in found for value in normalise(part)}


def key_parts(text: str) -> list[str]:
    """Per line the shortest text after a marker; the whole answer if no line has one.

    The script also means to split sentences, at a full stop before a capital, but only after lower-casing.
    """
    text = text.strip().strip(".").lower()
    lines = text.split("\n")
    parts = []
    for number, line in enumerate(lines, start=1):
        markers = (*MARKERS, "=") if number == len(lines) else MARKERS
        tails = [line.split(marker)[-1].strip() for marker in markers if marker in line]
        shortest = shortest_tail(tails)
        if shortest and shortest not in TRIVIAL:
            parts.append(shortest)
    return parts or [text]


def shortest_tail(tails: Sequence[str]) -> str:
    """The shortest; an empty one gives way to whatever comes after it."""
    best = ""
    for tail in tails:
        if not best or len(tail) < len(best):
            best = tail
    return best


def normalise(text: str) -> list[Value]:
    """A number rounded to two decimals, else the lower-cased text; one character only counts at a word's end."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def open_score(text: str, answer: str | Sequence[str]) -> float:
    """1 if an accepted text stands inside one of the answer's, or an accepted number is among its numbers."""
    accepted = [value for gold in ([answer] if isinstance(answer, str) else answer) for value in normalise(gold)]
    for said in read_open(text):
        if isinstance(said, str):
            if any(isinstance(gold, str) and gold in said for gold in accepted):
                return 1.0
        elif said in accepted:
            return 1.0
    return 0.0


def sample_score(name: str, item: Item, text: str, forms: Sequence[str] = OFFICIAL_FORMS) -> float:
    """1 if the answer of question `name` is right."""
    if item.options is None:
        return open_score(text, item.answer)
    letter = find_letter(text, item.options, forms) or draw_letter(name, item.options)
    return float(letter == item.answer)


def score(items: Mapping[str, Item], texts: Mapping[str, str], forms: Sequence[str] = OFFICIAL_FORMS) -> Score:
    """Percent right over all questions, which is the authors' mean of subjects weighted by their questions.

    Args:
        items: question id -> what was asked.
        texts: question id -> the model's text; one for every question.
        forms: OFFICIAL_FORMS or LMMS_FORMS.
    """
    check_coverage(items, texts, set(items))
    correct = {name: sample_score(name, item, texts[name], forms) for name, item in items.items()}
    choice = {name: item for name, item in items.items() if item.options is not None}
    drawn = sum(find_letter(texts[name], item.options or {}, forms) is None for name, item in choice.items())
    values: dict[str, float | None] = {"accuracy": percent(correct.values()), "drawn_at_random": float(drawn)}
    kinds = {name: "multiple choice" if name in choice else "open" for name in items}
    domains = {name: DOMAIN_OF[item.subject] for name, item in items.items() if item.subject in DOMAIN_OF}
    groups = {
        "domain": grouped({name: correct[name] for name in domains}, domains),
        "subject": grouped(correct, {name: item.subject for name, item in items.items()}),
        "question type": grouped(correct, kinds),
    }
    return Score(values, groups, correct, tuple(absent(items, drawn)), points=frozenset({"drawn_at_random"}))


def absent(items: Mapping[str, Item], drawn: int) -> list[str]:
    """Sentences about subjects that are not in the score and letters that are not the model's."""
    there = {item.subject for item in items.values()}
    lost = [subject for subject in DOMAIN_OF if subject not in there]
    notes = [f"{len(lost)} of {len(DOMAIN_OF)} subjects have no question here: {', '.join(lost)}"] if lost else []
    if drawn:
        notes.append(f"{drawn:,} answers name no option and were given a letter drawn from their question's id")
    return notes
