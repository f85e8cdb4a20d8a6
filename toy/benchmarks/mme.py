"""MME in its release layout: fourteen tasks, two questions about every image, one right and one wrong.

What a task asks is what scenes allow; the names only denote the layout.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from eval.benchmarks.prompts import SHORT
from toy.benchmarks.asking import generator
from toy.benchmarks.files import fresh, write_bytes, write_jsonl, write_text
from toy.benchmarks.pictures import Picture, copied
from toy.data.formats import claim, distractors, draw, pick
from toy.data.questions import Question, Retry

IMAGES_EACH, TRIES = 5, 400
INSTRUCTION = "Please answer yes or no."

Things = tuple
Pair = tuple[str, str]  # the question whose answer is yes, and the one whose answer is no


def _name(question: Question) -> str:
    return dict(question.program)["select"]


def _found(wanted: Callable[[Question], bool]) -> Callable[[Things, np.random.Generator], Pair]:
    """Whether a thing is there; `wanted` chooses among the questions."""

    def pair(things: Things, rng: np.random.Generator) -> Pair:
        texts: dict[str, str] = {}
        for _ in range(TRIES):
            try:
                question = draw(things, rng, "exist")
            except Retry:
                continue
            if wanted(question):
                texts.setdefault(question.answer, f"Is there a {_name(question)} in the image?")
            if len(texts) == 2:
                return texts["yes"], texts["no"]
        raise Retry

    return pair


def _claimed(family: str, wanted: Callable[[str], bool] = bool) -> Callable[[Things, np.random.Generator], Pair]:
    """A true and a false claim about the same thing, whose name is `wanted`."""

    def pair(things: Things, rng: np.random.Generator) -> Pair:
        question = draw(things, rng, family)
        if not wanted(_name(question)):
            raise Retry
        return claim(question, question.answer), claim(question, pick(distractors(question), rng))

    return pair


def _related(things: Things, rng: np.random.Generator) -> Pair:
    """Two relations, one of which holds."""
    texts: dict[str, str] = {}
    for _ in range(TRIES):
        question = draw(things, rng, "verify")
        texts.setdefault(question.answer, question.text)
        if len(texts) == 2:
            return texts["yes"], texts["no"]
    raise Retry


def _sized(name: str) -> bool:
    return name.split()[0] in ("small", "big")


def _colored(name: str) -> bool:
    return name.endswith(" objects")


# Task -> whether its scenes are dense, and what makes its pairs.
TASKS: dict[str, tuple[bool, Callable[[Things, np.random.Generator], Pair]]] = {
    "existence": (False, _found(lambda q: not _name(q).endswith("panel") and not _sized(_name(q)))),
    "count": (False, _claimed("count", lambda name: not _colored(name))),
    "position": (False, _related),
    "color": (False, _claimed("color", lambda name: not _sized(name))),
    "posters": (False, _found(lambda q: _name(q).endswith("panel"))),
    "celebrity": (False, _claimed("color", _sized)),
    "scene": (False, _found(lambda q: _sized(_name(q)))),
    "landmark": (False, _claimed("side")),
    "artwork": (True, _found(lambda q: not _name(q).endswith("panel") and not _sized(_name(q)))),
    "OCR": (False, _claimed("digit")),
    "commonsense_reasoning": (True, _related),
    "numerical_calculation": (True, _claimed("count", _colored)),
    "text_translation": (True, _claimed("digit")),
    "code_reasoning": (True, _claimed("side")),
}
IN_FOLDERS = ("artwork", "celebrity", "landmark", "posters", "scene")


def pairs(task: str, pictures: list[Picture]) -> list[tuple[Picture, Pair]]:
    """The first pictures of the task's kind that its questions can be asked about."""
    dense, make = TASKS[task]
    found = []
    for picture in pictures:
        if picture.dense != dense or len(found) == IMAGES_EACH:
            continue
        rng = generator("mme", task, picture.name)
        for _ in range(TRIES):
            try:
                found.append((picture, make(picture.things, rng)))
                break
            except Retry:
                continue
    return found


def write(root: Path) -> None:
    """Everything below ROOT/MME."""
    folder = fresh(root / "MME")
    release = folder / "MME_Benchmark_release_version"
    lines = []
    for number, task in enumerate(TASKS):
        for picture, texts in pairs(task, copied(120, first=3 * number)):
            pictures, answers = (
                (f"{task}/images", f"{task}/questions_answers_YN") if task in IN_FOLDERS else (task, task)
            )
            name = f"{pictures}/{picture.file}"
            write_bytes(release / name, picture.jpeg)
            listed = [f"{text} {INSTRUCTION}\t{answer}\n" for text, answer in zip(texts, ("Yes", "No"), strict=True)]
            write_text(release / answers / f"{picture.name}.txt", "".join(listed))
            lines += [
                {"question_id": name, "image": name, "text": f"{text}\n{SHORT}", "category": task} for text in texts
            ]
    write_jsonl(folder / "llava_mme.jsonl", lines)
