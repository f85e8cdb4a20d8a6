"""Whether the answers of a file were given to the questions that they are about to be scored with.

Ids alone do not say it: English and Chinese MMBench share theirs, and rows of lmms-eval's data sets are numbers.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.answers.jsonl import Row, is_file, read_json
from eval.benchmarks.base import Dataset, Question
from eval.benchmarks.prompts import split_suffix
from eval.metrics import first_names
from llava.errors import UserError

# Share of recorded prompts without their question from which a file counts as answers to other questions.
REFUSED = 0.5


def plain(text: str) -> str:
    """A text without the differences that profiles make: case, white space and the place of an image."""
    return " ".join(text.replace("<image>", " ").lower().split())


def holds(prompt: str, question: Question) -> bool:
    """Whether a recorded prompt asks a question.

    One of the two texts holds the other, or the prompt holds half the lines of the question: other programs join lines,
    and add or leave out hints.
    """
    asked, wanted = plain(split_suffix(prompt.strip())[0]), plain(question.question)
    if not asked or asked in wanted or wanted in asked:
        return True
    lines = [line for line in map(plain, question.question.split("\n")) if line]
    return 2 * sum(line in asked for line in lines) >= len(lines)


def check_prompts(path: Path, answered: Sequence[tuple[Question, Row]], data: Dataset) -> list[str]:
    """Notes about prompts that do not hold their question; a file with more than half of those is refused."""
    recorded = [(question, row.prompt or row.asked) for question, row in answered]
    known = [(question, prompt) for question, prompt in recorded if prompt is not None]
    wrong = [question.id for question, prompt in known if not holds(prompt, question)]
    if len(wrong) > REFUSED * len(known):
        question, prompt = next(pair for pair in known if pair[0].id == wrong[0])
        raise UserError(
            f"{path} answers other questions than those of {data.title}: {len(wrong):,} of {len(known):,} recorded "
            f"prompts do not hold the question with their id; {question.id} was asked {shorten(prompt)!r}, and the "
            f"question is {shorten(question.question)!r}. Check the benchmark's name, split and profile."
        )
    # Where all questions have the same words, prompts prove nothing.
    if not known or len({question.question for question in data.questions}) == 1:
        check_store(path, data)
    if not wrong:
        return []
    return [f"{len(wrong):,} of {len(known):,} recorded prompts do not hold their question ({first_names(wrong)})"]


def check_store(path: Path, data: Dataset) -> None:
    """Refuse the answers of one of our runs on another benchmark, which its settings name."""
    settings_file = path.with_name("settings.json")
    if path.name != "answers.jsonl" or not is_file(settings_file):
        return
    settings: Any = read_json(settings_file)
    benchmark = settings.get("benchmark") if isinstance(settings, Mapping) else None
    if data.benchmark and isinstance(benchmark, str) and benchmark != data.benchmark:
        raise UserError(f"{path} holds answers to {benchmark}, as {settings_file} says, not to {data.benchmark}.")


def shorten(text: str, length: int = 60) -> str:
    """The start of a text, for an error."""
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[:length]}..."
