"""The MME score in points: per task 100 x accuracy + 100 x accuracy+, summed over perception and over cognition.

Accuracy+ is the share of images whose two questions are both answered right. Papers print perception, of at most 2,000,
or its sum with cognition, of at most 2,800. `score` is MME's eval_tool/calculation.py, which takes every two lines for
an image; `score_lmms` is lmms-eval @ 75571cf, which pairs by the question's id and reads some texts differently. Where
those stop, at a task that is missing or an image with one answer, these go on and say so.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from eval.metrics import Array, Score, SufficientStatistics, divide
from llava.errors import UserError, unknown

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
TASKS = (*PERCEPTION, *COGNITION)

# The answer is looked for in this many first characters.
PREFIX = 4
# Columns of the counts: right answers, questions, images with both answers right, images.
COLUMNS = 4

POINTS = frozenset({"perception", "cognition", "total", "task score"})


@dataclass(frozen=True)
class Line:
    """One question with its answer.

    Attributes:
        id: unique over all tasks.
        image: name of the image, unique over all tasks.
        truth: "yes" or "no" in any case.
        text: the model's raw text.
    """

    id: str
    image: str
    truth: str
    text: str


Lines = Mapping[str, Sequence[Line]]
Pairs = Mapping[str, Sequence[Sequence[Line]]]


def parse(text: str) -> str:
    """ "yes", "no" or "other" as calculation.py reads a text: by its first four characters in lower case.

    So "know" and "nope" are no, "eyes" is yes, "unknown" is other, and so is "yes" after two spaces.
    """
    start = text.lower()[:PREFIX]
    return next((word for word in ("yes", "no") if word in start), "other")


def parse_lmms(text: str) -> str:
    """The same in lmms-eval: spaces around the text and all full stops are removed first, "y" and "n" are known."""
    text = text.lower().strip().replace(".", "")
    return {"y": "yes", "n": "no"}.get(text) or parse(text)


def score(lines: Lines) -> Score:
    """The numbers of calculation.py.

    Args:
        lines: task -> its lines in file order. Two by two they are taken for the questions of one image; where they
            are not, the numbers with right pairs stand beside the official ones.
    """
    found = score_pairs({task: in_twos(there) for task, there in lines.items()}, parse)
    pairs = [pair for there in lines.values() for pair in in_twos(there)]
    mixed = sum(len({line.image for line in pair}) > 1 for pair in pairs)
    if not mixed:
        return found
    right = score_pairs({task: by_image(there) for task, there in lines.items()}, parse)
    by_name = {f"{name}_paired_by_image": value for name, value in right.values.items()}
    note = (
        f"the official script takes every two lines for one image, but {mixed:,} of its {len(pairs):,} pairs are of "
        "two images; the values ..._paired_by_image pair by image"
    )
    return dataclasses.replace(
        found, values=found.values | by_name, notes=(*found.notes, note), points=found.points | set(by_name)
    )


def score_lmms(lines: Lines) -> Score:
    """The numbers of lmms-eval: `lines` is task -> lines, those about an image together wherever they stand."""
    return score_pairs({task: by_image(there) for task, there in lines.items()}, parse_lmms)


def in_twos(lines: Sequence[Line]) -> list[Sequence[Line]]:
    """Lines 1 and 2, 3 and 4, ..."""
    return [lines[start : start + 2] for start in range(0, len(lines), 2)]


def by_image(lines: Iterable[Line]) -> list[Sequence[Line]]:
    """Lines about the same image."""
    images: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        images[line.image].append(line)
    return list(images.values())


def score_pairs(pairs: Pairs, read: Callable[[str], str]) -> Score:
    """The numbers for lines that are in pairs already."""
    for task in pairs:
        if task not in TASKS:
            raise unknown("MME task", task, TASKS)
    tasks = [task for task in TASKS if pairs.get(task)]
    lines = [line for task in tasks for pair in pairs[task] for line in pair]
    if odd := next((line for line in lines if line.truth.lower() not in ("yes", "no")), None):
        raise UserError(f"The answer to {odd.id} should be yes or no, got {odd.truth!r}.")
    said = {line.id: read(line.text) for line in lines}
    correct = {line.id: float(said[line.id] == line.truth.lower()) for line in lines}
    counts = {task: np.array([count(pair, correct) for pair in pairs[task]]) for task in tasks}
    sums = {task: counts[task].sum(0) for task in tasks}
    scores = {task: float(task_score(sums[task])) for task in tasks}
    values = {
        "perception": sum_of(scores, PERCEPTION),
        "cognition": sum_of(scores, COGNITION),
    }
    known = [value for value in values.values() if value is not None]
    values["total"] = sum(known) if len(known) == len(values) else None
    sizes = {task: int(sums[task][1]) for task in tasks}
    groups = {
        "task score": {task: (scores[task], sizes[task]) for task in tasks},
        "accuracy": {task: (float(100 * divide(sums[task][0], sums[task][1])), sizes[task]) for task in tasks},
        "accuracy+": {task: (float(100 * divide(sums[task][2], sums[task][3])), sizes[task]) for task in tasks},
    }
    notes = (*task_notes(tasks), *line_notes(pairs, said))
    terms = terms_of(pairs, counts, [task for task in PERCEPTION if task in tasks])
    total = terms_of(pairs, counts, tasks) if values["total"] is not None else None
    others = {"total": total} if total else {}
    return Score(values, groups, correct, notes, "perception", POINTS, terms, others)


def count(pair: Sequence[Line], correct: Mapping[str, float]) -> tuple[float, float, float, float]:
    """One row of the counts. Lines that are no pair count in the accuracy alone."""
    right = sum(correct[line.id] for line in pair)
    whole = len(pair) == 2
    return right, len(pair), float(whole and right == 2), float(whole)


def task_score(counts: Array) -> Array:
    """Points of counts [..., columns]."""
    return 100 * divide(counts[..., 0], counts[..., 1]) + 100 * divide(counts[..., 2], counts[..., 3])


def sum_of(scores: Mapping[str, float], tasks: Iterable[str]) -> float | None:
    """Over the tasks that are there; None if none is."""
    there = [scores[task] for task in tasks if task in scores]
    return sum(there) if there else None


def terms_of(pairs: Pairs, counts: Mapping[str, Array], tasks: Sequence[str]) -> SufficientStatistics | None:
    """The points of some tasks as a function of counts per image pair, the tasks side by side; None without a task."""
    if not tasks:
        return None
    names = [" + ".join(dict.fromkeys(line.image for line in pair)) for task in tasks for pair in pairs[task]]
    sums = np.zeros((len(names), len(tasks), COLUMNS))
    row = 0
    for column, task in enumerate(tasks):
        sums[row : row + len(counts[task]), column] = counts[task]
        row += len(counts[task])
    # By name, because the order of an answer file is not the same for every model.
    order = sorted(range(len(names)), key=names.__getitem__)
    ordered = tuple(names[row] for row in order)
    return SufficientStatistics("image pair", ordered, ordered, sums[order].reshape(len(names), -1), points)


def points(sums: Array) -> Array:
    """[..., tasks x columns] -> points."""
    return task_score(sums.reshape(*sums.shape[:-1], -1, COLUMNS)).sum(-1)


def task_notes(tasks: Sequence[str]) -> list[str]:
    """That a sum is not over all of its tasks."""
    notes = []
    for name, wanted in (("perception", PERCEPTION), ("cognition", COGNITION)):
        lost = [task for task in wanted if task not in tasks]
        if lost:
            notes.append(f"{name} is without {', '.join(lost)}: nothing was asked there")
    return notes


def line_notes(pairs: Pairs, said: Mapping[str, str]) -> list[str]:
    """Answers that are neither, and lines that are no pair."""
    notes = []
    if other := sum(word == "other" for word in said.values()):
        notes.append(f"{other:,} of {len(said):,} answers have no yes or no at their start and count as wrong")
    lone = sum(len(pair) != 2 for there in pairs.values() for pair in there)
    if lone:
        notes.append(f"{lone:,} images without exactly two answers are left out of accuracy+")
    return notes
