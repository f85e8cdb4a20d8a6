"""Video question answering as an LLM judge of the Video-ChatGPT protocol scores it: yes or no, and 0 to 5 points.

Source of the definitions: Video-LLaVA's eval_video_qa.py (984e65b). Differs from it: accuracy is in percent, and items
are joined by question id.
"""

import ast
from collections.abc import Mapping
from typing import Any

import numpy as np

from eval.metrics import Array, Score, SufficientStatistics, divide
from eval.metrics.accuracy import normalise
from eval.metrics.words import contains, words

BEST = 5


def parse(reply: str) -> Any:
    """The Python literal that a reply is; None if it is none. What it means is only looked at when scores are added."""
    try:
        found = ast.literal_eval(reply.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    # Everything JSON can hold is kept, as officially; sets, bytes and the like are asked for again.
    return found if isinstance(found, dict | list | str | int | float) else None


def points_and_verdict(judgement: Any) -> tuple[int, bool | None]:
    """Points, and yes or no, of one judgement; None where it says neither.

    Officially points are cut to whole numbers, and a string of a fraction ("4.8") is an error that costs an item its
    points and its verdict, though it still counts in the average. "yes" is looked for before "no".
    """
    try:
        points = int(judgement["score"])
    except (KeyError, IndexError, TypeError, ValueError, OverflowError):
        return 0, None
    said = judgement.get("pred") if isinstance(judgement, dict) else None
    if not isinstance(said, str):
        return points, None
    return points, True if "yes" in said.lower() else False if "no" in said.lower() else None


def accuracy(sums: Array) -> Array:
    """[..., (yes, yes or no)] -> percent."""
    return 100 * divide(sums[..., 0], sums[..., 1])


def score(
    judgements: Mapping[str, Any],
    types: Mapping[str, str],
    videos: Mapping[str, str],
    names: tuple[str, str] = ("accuracy", "score"),
    notes: tuple[str, ...] = (),
) -> Score:
    """Accuracy in percent and mean points.

    Args:
        judgements: question id -> what the judge said, as read from its reply; {} counts as malformed.
        types: question id -> its group in the breakdown, where there are any.
        videos: question id -> its video; questions about one are drawn together in intervals.
        names: of accuracy and points.
    """
    read = {name: points_and_verdict(judgement) for name, judgement in judgements.items()}
    rows = np.array([(found is True, found is not None) for _, found in read.values()], np.float64).reshape(-1, 2)
    neither = int((rows[:, 1] == 0).sum())
    if neither:
        notes = (*notes, f"{neither:,} verdicts say neither yes nor no: they count in {names[1]}, not in {names[0]}")
    values: dict[str, float | None] = {
        names[0]: float(accuracy(rows.sum(0))) if rows[:, 1].any() else None,
        names[1]: sum(points for points, _ in read.values()) / len(read) if read else None,
    }
    terms = SufficientStatistics(
        "video", tuple(read), tuple(videos[name] for name in read), rows, accuracy, proportion=True
    )
    correct = {name: float(found is True) for name, (_, found) in read.items()}
    groups = {"type": by_type(read, types)} if types else {}
    return Score(values, groups, correct, notes, names[0], frozenset({names[1]}), terms)


def by_type(read: Mapping[str, tuple[int, bool | None]], types: Mapping[str, str]) -> dict[str, tuple[float, int]]:
    """Accuracy per question type, over those with a yes or no."""
    found: dict[str, list[bool]] = {}
    for name, (_, verdict) in read.items():
        if verdict is not None and name in types:
            found.setdefault(types[name], []).append(verdict)
    return {kind: (100 * sum(hits) / len(hits), len(hits)) for kind, hits in sorted(found.items())}


def match(text: str, answer: str) -> dict[str, Any]:
    """A judgement by words alone: yes if the text is the answer, or holds its words one after the other."""
    same = normalise(text.strip()) == normalise(answer.strip()) or contains(words(text), words(answer))
    return {"pred": "yes", "score": BEST} if same else {"pred": "no", "score": 0}
