"""MMMU, questions of college exams in 30 subjects.

Read from DATA/hub/lmms-lab-encoder/MMMU or its older name lmms-lab/MMMU, which hold all subjects in one table: id,
question, options (a Python list as text), answer, question_type, image_1 to image_7.

Profile llava: prompt, image and parser of the authors' script for LLaVA (mmmu/run_llava.py). Answers are greedy, as
its configuration says, although its code samples from beams. It shows image_1 alone, before a text that still says
"<image 1>". Questions with several images among their options get none: the script has that rule, but looks for the
images letter by letter in the options' text, so that on this data set it never finds them; here the rule is applied
as meant, and `facts` says to how many questions.
Profile lmms: lmms-eval 0.7.3, with all images that the prompt names.

The parser and metric are those of the authors' scripts (mmmu/utils/eval_utils.py), with the letter forms of lmms-eval
in its profile. Equal to the scripts on tests/data/mmmu. Differs from them in one place: an answer without any letter or
option gets a random letter there, from one generator for the whole run; here from one seeded with the question's id, so
that a score does not depend on the order of the answers. How many were drawn is part of the score.
"""

import ast
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.benchmarks.base import PARTS, Dataset, Question, listed
from eval.benchmarks.hub import by_unique_id, check_answers, letters, open_table, option_lines, ungraded, with_version
from eval.benchmarks.llava_files import LETTER, SHORT
from eval.benchmarks.records import Filled, TypedDict
from eval.metrics import Score
from eval.metrics.accuracy import check_coverage, grouped, percent
from llava.errors import UserError

IDS = ("lmms-lab-encoder/MMMU", "lmms-lab/MMMU")
COLUMNS = ("id", "question", "options", "answer", "question_type")
IMAGES = tuple(f"image_{number}" for number in range(1, 8))
EXPECTED = {"validation": 900, "test": 10500}

IMAGE = re.compile(r"<image \d+>")
SUBJECT = re.compile(r"[^_]+_(.+)_\d+")

DOMAIN_OF: dict[str, str] = {subject: domain for domain, subjects in PARTS["mmmu"].items() for subject in subjects}

# How a letter may stand in an answer, tried in this order. lmms-eval also takes a letter that ends a
# word, as in "NASA is".
BRACKETS = "({})"
OFFICIAL_FORMS = (BRACKETS, " {} ")
LMMS_FORMS = (BRACKETS, "{} ", "{}.")


class MirrorRow(TypedDict):
    """A row of the table."""

    id: Filled
    question: Filled
    options: str | list[str]
    answer: str
    question_type: str


@dataclass(frozen=True)
class MmmuReference:
    """What the metric needs of a question.

    Attributes:
        answer: the letter, or the accepted answers of an open question.
        options: letter -> text; None for an open question.
    """

    answer: str | Sequence[str]
    subject: str
    options: Mapping[str, str] | None = None


def load(data: Path, split: str, profile: str = "llava", source: str = "auto") -> Dataset:
    """Read a split."""
    table = open_table(data, IDS, None, split, source)
    records = by_unique_id(table.records(MirrorRow), "id")
    lmms, graded = profile == "lmms", split != "test"
    items = {name: read_item(record, table.where, lmms) for name, record in records.items()}
    if graded:
        check_answers(table.where, {name: record["answer"] for name, record in records.items()})
    forms = LMMS_FORMS if lmms else OFFICIAL_FORMS
    images = table.images(IMAGES)
    questions = []
    for row, (name, record) in enumerate(records.items()):
        if lmms:  # every image that question or options name, in the order of their numbers
            text = "\n".join([record["question"], *(items[name].options or {}).values()])
            named = {f"{row}/{mark.strip('<>').replace(' ', '_')}" for mark in IMAGE.findall(text)}
            shown = tuple(sorted(named & images.names))
        else:
            # The first image, or none for questions whose options hold several.
            first = f"{row}/image_1"
            shown = () if several_in_options(items[name]) or first not in images.names else (first,)
        questions.append(ask(name, record, items[name], lmms, shown))
    file = f"total_{'val' if graded else split}_output.json"

    def score(asked: Sequence[str], texts: Mapping[str, str]) -> Score:
        scored = evaluate({name: items[name] for name in asked}, texts, forms)
        return with_version(scored, len(questions), EXPECTED[split])

    def sample_score(question: Question, text: str) -> float:
        return is_right(question.id, items[question.id], text, forms)

    def submission(texts: Mapping[str, str]) -> dict[str, Any]:
        """Answers as the authors' main_eval_only.py reads them: a letter, or the text of an open answer."""
        answers = {}
        for name, text in texts.items():
            choice = items[name].options is not None
            answers[records[name]["id"]] = letter_of(name, items[name], text, forms) if choice else text
        return {file: answers}

    facts: dict[str, Any] = {"questions": len(table), "expected_questions": EXPECTED[split]}
    if not lmms:
        facts["without_image_for_several_in_options"] = sum(map(several_in_options, items.values()))
    return table.contents(questions, items, COLUMNS, images).dataset(
        f"MMMU {split}",
        profile,
        score if graded else ungraded("accuracy", file, "the MMMU challenge on EvalAI"),
        sample_score if graded else None,
        submission,
        facts,
    )


def read_item(record: MirrorRow, where: str, lmms: bool) -> MmmuReference:
    """What the metric needs of a row."""
    parts = SUBJECT.fullmatch(record["id"])
    if not parts:
        raise UserError(f"Id {record['id']!r} in {where} should look like validation_Art_Theory_1.")
    choice = record["question_type"] == "multiple-choice"
    options = letters(as_list(record["options"], f"The options of {record['id']} in {where}")) if choice else None
    if options is not None and not options:
        raise UserError(f"Question {record['id']} in {where} is multiple choice but has no options.")
    answer: str | list[str] = record["answer"]
    if not choice and not lmms and record["answer"].startswith("["):
        # Several accepted answers. lmms-eval takes the list's text for the answer, which no model gives.
        answer = as_list(record["answer"], f"The answer of {record['id']} in {where}")
    return MmmuReference(answer, parts.group(1), options)


def as_list(value: Any, what: str) -> list[str]:
    """A list, which the data set writes as Python text."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError) as error:
            raise UserError(f"{what} should be a list, got {value[:60]!r}.") from error
    if not isinstance(value, list | tuple):
        raise UserError(f"{what} should be a list, got {type(value).__name__}.")
    return [str(part) for part in value]


def ask(name: str, record: MirrorRow, item: MmmuReference, lmms: bool, images: tuple[str, ...]) -> Question:
    """The question in the words of the profile.

    Blank lines as the programs print them: the authors' configuration shows one after the question too, but it is a
    folded YAML text, which loses one of two line breaks.
    """
    text = record["question"]
    if item.options is not None:
        # The newline at the end and the one before the suffix make the blank line.
        text = f"{text}\n{option_lines(item.options, '{}. {}' if lmms else '({}) {}')}\n"
    elif lmms:
        text += "\n"
    suffix = SHORT if item.options is None else LETTER
    return Question(name, text, suffix, images, record["answer"], record["id"])


def several_in_options(item: MmmuReference) -> bool:
    """Whether the options name more than one image."""
    return len(IMAGE.findall("\n".join((item.options or {}).values()))) > 1


# -- the metric ------------------------------------------------------------------------------------------------------

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


def letter_of(name: str, item: MmmuReference, text: str, forms: Sequence[str]) -> str:
    """The letter that the answer to a multiple-choice question names, or one that is drawn."""
    options = item.options or {}
    return find_letter(text, options, forms) or draw_letter(name, options)


def read_open(text: str) -> set[Value]:
    """What an open answer may mean: texts in lower case, and numbers rounded to two decimals."""
    parts = key_parts(text)
    parts += [number for part in parts for pattern in NUMBERS for number in pattern.findall(part)]
    return {value for part in parts for value in normalise(part)}


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
        shortest = ""
        for tail in tails:
            if not shortest or len(tail) < len(shortest):  # an empty one gives way to whatever comes after it
                shortest = tail
        if shortest and shortest not in TRIVIAL:
            parts.append(shortest)
    return parts or [text]


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


def is_right(name: str, item: MmmuReference, text: str, forms: Sequence[str] = OFFICIAL_FORMS) -> float:
    """1 if the answer of question `name` is right."""
    if item.options is None:
        return open_score(text, item.answer)
    return float(letter_of(name, item, text, forms) == item.answer)


def evaluate(
    items: Mapping[str, MmmuReference], texts: Mapping[str, str], forms: Sequence[str] = OFFICIAL_FORMS
) -> Score:
    """Percent right over all questions, which is the authors' mean of subjects weighted by their questions.

    Args:
        items: question id -> what was asked.
        texts: question id -> the model's text; one for every question.
        forms: OFFICIAL_FORMS or LMMS_FORMS.
    """
    check_coverage(items, texts, set(items))
    correct = {name: is_right(name, item, texts[name], forms) for name, item in items.items()}
    choice = {name: item.options for name, item in items.items() if item.options is not None}
    drawn = sum(find_letter(texts[name], options, forms) is None for name, options in choice.items())
    subjects = {name: item.subject for name, item in items.items()}
    kinds = {
        "domain": {name: DOMAIN_OF[one] for name, one in subjects.items() if one in DOMAIN_OF},
        "subject": subjects,
        "question type": {name: "multiple choice" if name in choice else "open" for name in items},
    }
    groups = {title: grouped(correct, kind) for title, kind in kinds.items()}
    notes = []
    if lost := [subject for subject in DOMAIN_OF if subject not in subjects.values()]:
        notes.append(f"{len(lost)} of {len(DOMAIN_OF)} subjects have no question here: {', '.join(lost)}")
    if drawn:
        notes.append(f"{drawn:,} answers name no option and were given a letter drawn from their question's id")
    values: dict[str, float | None] = {"accuracy": percent(correct.values()), "drawn_at_random": float(drawn)}
    return Score(values, groups, correct, tuple(notes), points=frozenset({"drawn_at_random"}), kinds=kinds)


BENCHMARK = listed("mmmu", load, tuple(EXPECTED), mirror=IDS)
