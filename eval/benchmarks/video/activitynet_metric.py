"""ActivityNet-QA's own metric: exact equality with the answer, per question and answer type.

Source of the definitions: evaluation/eval.py (https://github.com/MILVLG/activitynet-qa, 2cf80ae). Its "Free" divides
the right answers of types 3 to 8 by the sizes of the types that come fourth and later in the answer file, whichever
those are; both that number and the true one are given.
"""

from collections.abc import Mapping

from eval.metrics import Score

# The first three are kinds of questions; the others, together "free", are kinds of answers.
TYPES = ("motion", "spatial relation", "temporal relation", "yes/no", "color", "object", "location", "number", "other")
FREE = range(3, len(TYPES))


def score(answers: Mapping[str, str], types: Mapping[str, int], texts: Mapping[str, str]) -> Score:
    """Percent of texts that are the answer to the letter.

    Args:
        answers: question id -> answer, in the order of the official file, which decides about the printed "Free".
        types: question id -> number of its type.
        texts: question id -> the model's text, compared as it is.
    """
    sizes: dict[int, int] = {}
    right = dict.fromkeys(range(len(TYPES)), 0)
    for name, answer in answers.items():
        kind = types[name]
        sizes[kind] = sizes.get(kind, 0) + 1
        right[kind] += texts[name] == answer
    free = sum(right[kind] for kind in FREE)
    values: dict[str, float | None] = {
        "exact": share(sum(right.values()), len(answers)),
        "exact_free_official": share(free, sum(list(sizes.values())[3:])),
        "exact_free": share(free, sum(sizes.get(kind, 0) for kind in FREE)),
    }
    table = {TYPES[kind]: (100 * right[kind] / size, size) for kind, size in sorted(sizes.items())}
    note = (
        "exact_free_official is what ActivityNet-QA's script prints as Free, which divides by the types that come "
        "fourth and later in the answer file; exact_free divides by the free questions"
    )
    correct = {name: float(texts[name] == answer) for name, answer in answers.items()}
    return Score(values, {"exact by type": table}, correct, (note,), "exact")


def share(right: int, all_there_are: int) -> float | None:
    """Percent; None of nothing."""
    return 100 * right / all_there_are if all_there_are else None
