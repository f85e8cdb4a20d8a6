"""MMBench: letters read from answers, and circular accuracy over groups of rotated questions.

Source of the definitions: VLMEvalKit's vlmeval/utils/matching_util.py and vlmeval/dataset/utils/multiple_choice.py
(commit e8e78f0) and lmms-eval's tasks/mmbench/mmbench_evals.py (commit 75571cf). Written from a description, equal to
both on the vectors in tests/data/mmbench.

Differs from them: both ask GPT about an answer that their rules cannot read. Here it counts as wrong, which is what
VLMEvalKit does too when it runs without an LLM judge ("exact_matching").
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from eval.metrics import Score, ratio_terms
from eval.metrics.accuracy import grouped, percent

# Index of a question in its first pass; every further pass adds this much.
PASS = 1_000_000
# What a refusal is read as; no option has this letter.
REFUSED = "Z"
UNREAD = ""

NO_ANSWER = "Failed to obtain answer via API"
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
# Case is ignored in the letter as well: "the answer is a dog" is read as option A.
ANSWER_IS = re.compile(r"answer\s+is\s+\**([ABCD])", re.IGNORECASE)
# lmms-eval reads five letters whatever the question offers, bare or in one of these forms, tried in this order.
LETTERS_LMMS = "ABCDE"
FORMS_LMMS = ("{}.", "{},", "{}:", "{})", "{}).", "({})", "({}).", ":{}", ":{},", ":{}.", ":{})", ":{}).")

Choices = Mapping[str, str]
Rule = Callable[[str, Choices], str]


@dataclass(frozen=True)
class Item:
    """What scoring needs of a row.

    Attributes:
        index: of the row; its group is the index modulo PASS.
        choices: letter -> option text, of the options there are.
        category, l2: the row's place in both levels of abilities; "" where the data does not say.
    """

    index: int
    answer: str
    choices: Choices
    category: str = ""
    l2: str = ""


def infer(text: str, choices: Choices) -> str:
    """The option VLMEvalKit's rules read: its letter, REFUSED, or UNREAD."""
    return infer_letter(text, choices) or infer_text(text, choices, longest=2)


def infer_letter(text: str, choices: Choices) -> str:
    """A letter that stands alone within the last four words, or after "answer is"."""
    if NO_ANSWER in text:
        return UNREAD
    if any(refusal in text for refusal in REFUSALS):
        return REFUSED
    words = text.translate(MARKS).split()
    named = [letter for letter in choices if letter in words]
    # Where a letter occurs first is what counts: "A ... A" with a long way between them is not read.
    if len(named) == 1 and words.index(named[0]) > len(words) - 5:
        return named[0]
    if not named and REFUSED in words:
        return REFUSED
    found = ANSWER_IS.search(text)
    letter = found.group(1).upper() if found else UNREAD
    return letter if letter in choices else UNREAD


def infer_text(text: str, choices: Choices, longest: float = float("inf")) -> str:
    """The only option whose words occur in the answer.

    Args:
        longest: answers with more characters than this many times all options together are not read.
    """
    text = text.lower()
    if len(text) > longest * sum(len(option) for option in choices.values()):
        return UNREAD
    named = [letter for letter, option in choices.items() if option.lower() in text]
    return named[0] if len(named) == 1 else UNREAD


def infer_lmms(text: str, choices: Choices) -> str:
    """The option lmms-eval's rules read, or UNREAD; E is a letter even of a question with four options."""
    return infer_letter_lmms(text) or infer_text(text, choices)


def infer_letter_lmms(text: str) -> str:
    """A letter that is a word of its own, bare or with the marks that lmms-eval knows."""
    if NO_ANSWER in text:
        return UNREAD
    words = text.split()
    bare = [letter for letter in LETTERS_LMMS if letter in words]
    # In a longer sentence "A" may be the article, so that a bare letter counts only without it.
    if len(bare) == 1 and not ("A" in words and len(words) > 3):
        return bare[0]
    for form in FORMS_LMMS:
        marked = [letter for letter in LETTERS_LMMS if form.format(letter) in words]
        if len(marked) == 1:
            return marked[0]
    return UNREAD


def score(items: Mapping[str, Item], texts: Mapping[str, str], rule: Rule = infer) -> Score:
    """CircularEval: a group counts if every pass of it is right.

    Groups whose first pass was not asked are left out, as officially. Passes that were not asked cannot fail a group.

    Args:
        items: the rows that count.
        texts: id -> the model's text, one for every row.
    """
    read = {name: rule(texts[name], item.choices) for name, item in items.items()}
    correct = {name: float(read[name] == item.answer) for name, item in items.items()}
    firsts = {item.index: name for name, item in items.items() if item.index < PASS}
    members: dict[int, list[str]] = {index: [] for index in firsts}
    for name, item in items.items():
        if item.index % PASS in members:
            members[item.index % PASS].append(name)
    hits = {str(index): min(correct[name] for name in names) for index, names in members.items()}
    vanilla = [correct[name] for name in firsts.values()]
    unread = sum(not letter for letter in read.values())
    values: dict[str, float | None] = {
        "accuracy": percent(hits.values()) if hits else None,
        "vanilla_accuracy": percent(vanilla) if vanilla else None,
        "unmatched": float(unread),
    }
    heads = {str(index): items[name] for index, name in firsts.items()}
    notes = [
        "accuracy: groups in which every rotation of the options is answered right; vanilla_accuracy: their first pass "
        "alone",
        *unread_notes(unread, undecided(members.values(), read, items)),
    ]
    if left_out := len(items) - sum(map(len, members.values())):
        notes.append(f"rows of groups whose first pass was not asked, left out: {left_out:,}")
    return Score(
        values,
        breakdowns(hits, heads),
        correct,
        tuple(notes),
        points=frozenset({"unmatched"}),
        terms=ratio_terms(hits, unit="group", proportion=True),
    )


def undecided(groups: Iterable[Sequence[str]], read: Mapping[str, str], items: Mapping[str, Item]) -> int:
    """Groups that the official scorers would ask GPT about: something unread and nothing read wrong."""
    letters = ([(read[name], items[name].answer) for name in names] for names in groups)
    return sum(
        any(not letter for letter, _ in group) and all(letter in (UNREAD, answer) for letter, answer in group)
        for group in letters
    )


def unread_notes(unread: int, groups: int) -> list[str]:
    """What replaces the official scorers' GPT."""
    if not unread:
        return []
    return [
        f"answers that no rule reads (unmatched): {unread:,}, counted as wrong; the official scorers ask GPT about "
        f"them and draw an option at random after three failures; groups that this could change: {groups:,} at most"
    ]


def breakdowns(hits: Mapping[str, float], heads: Mapping[str, Item]) -> dict[str, dict[str, tuple[float, int]]]:
    """Percent of groups and their number for each ability, by the first pass of each group."""
    tables = {}
    for title, labels in (
        ("category", {name: item.category for name, item in heads.items() if item.category}),
        ("l2-category", {name: item.l2 for name, item in heads.items() if item.l2}),
    ):
        if labels:
            tables[title] = grouped({name: hit for name, hit in hits.items() if name in labels}, labels)
    return tables
