"""ScienceQA as LLaVA's llava/eval/eval_science_qa.py (commit c121f04) counts it, and as lmms-eval does.

Written from a description of both and equal to the official script on the vectors in tests/data/scienceqa.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from eval.metrics import Score, ratio_terms
from eval.metrics.accuracy import grouped, percent

OPTIONS = "ABCDE"
FAILED = "FAILED"
# Any character may follow the letter: the official pattern's full stop is not escaped.
ANSWER_IS = re.compile(r"The answer is ([A-Z]).")


@dataclass(frozen=True)
class Problem:
    """What scoring needs of a question.

    Attributes:
        choices: how many there are.
        answer: index of the right one.
        subject: "natural science", ...; "" where the data does not say.
    """

    choices: int
    answer: int
    subject: str = ""


def parse(text: str) -> str:
    """The letter LLaVA's script reads, FAILED if it reads none; letters beyond E come from the sentence alone."""
    if len(text) == 1 and text in OPTIONS:
        return text
    if text[:1] and text[0] in OPTIONS and text[1:3] == ". ":
        return text[0]
    found = ANSWER_IS.findall(text)
    return found[0] if len(found) == 1 else FAILED


def parse_lmms(text: str) -> str:
    """lmms-eval's rule: a letter in either case and nothing else, or an upper-case letter and a full stop."""
    text = text.strip()
    if len(text) == 1:
        return text.upper()
    return text[0] if text[:1].isupper() and text[1:2] == "." else FAILED


def choice_index(letter: str, choices: int) -> int:
    """Index of the choice, -1 for FAILED and for letters that the question does not offer."""
    return OPTIONS[:choices].find(letter)


def sample_score(text: str, problem: Problem, read: Callable[[str], str] = parse) -> float:
    """1 if the letter in `text` is that of the right choice."""
    return float(choice_index(read(text), problem.choices) == problem.answer)


def score(
    problems: Mapping[str, Problem],
    texts: Mapping[str, str],
    with_image: Collection[str],
    read: Callable[[str], str] = parse,
) -> Score:
    """Accuracy over all questions and, the number that papers print, over those with an image.

    As officially, a question without a prediction counts as wrong in `accuracy`, but leaves the denominator of
    `img_accuracy`: that one looks at the prompts recorded with the answers.

    Args:
        problems: the questions that count.
        texts: question id -> the model's text.
        with_image: ids of the questions that show an image.
    """
    correct = {name: sample_score(texts.get(name, FAILED), problem, read) for name, problem in problems.items()}
    image = set(with_image) & texts.keys()
    shown = {name: value for name, value in correct.items() if name in image}
    values: dict[str, float | None] = {
        "img_accuracy": percent(shown.values()) if shown else None,
        "accuracy": percent(correct.values()),
        "failed": float(sum(read(texts.get(name, FAILED)) == FAILED for name in problems)),
    }
    subjects = {name: problem.subject for name, problem in problems.items() if problem.subject}
    groups = {}
    if subjects and shown:
        groups["subject"] = grouped({name: shown[name] for name in shown if name in subjects}, subjects)
    notes = ["failed: answers without a letter that the rule can read"]
    if missing := sum(name not in texts for name in problems):
        notes.append(f"questions without a prediction: {missing:,}, wrong in accuracy and left out of img_accuracy")
    if not shown:
        notes.append("no answer to a question with an image, so no img_accuracy")
    return Score(
        values,
        groups,
        correct,
        tuple(notes),
        main="img_accuracy",
        points=frozenset({"failed"}),
        terms=ratio_terms(shown, proportion=True),
    )
