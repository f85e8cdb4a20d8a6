"""Questions that need detail: the full model answers them right, and a smaller image at the same budget does not.

VTC-Bench (Liao et al. 2025, arXiv:2510.07143) divides the questions that the full model answers right into group A,
which plain downsampling of the image answers wrong, and group B, which it answers right. Accuracy on group A is where
a method can show more than downsampling.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from eval.results.statistics import Interval, accuracy_terms, interval
from llava.errors import UserError

# A sample score above this counts as right; benchmarks with partial credit (VQAv2, ANLS) have values in between.
RIGHT = 0.5


@dataclass(frozen=True)
class Groups:
    """Question ids by what the full model and downsampling make of them, in the order of the full model's scores.

    Attributes:
        a: full right, downsampling wrong.
        b: both right.
        full_wrong: left out of both groups.
    """

    a: tuple[str, ...]
    b: tuple[str, ...]
    full_wrong: tuple[str, ...]

    def named(self) -> dict[str, tuple[str, ...]]:
        """The two groups by name."""
        return {"group_a": self.a, "group_b": self.b}


def groups(full: Mapping[str, float], downsampled: Mapping[str, float]) -> Groups:
    """The groups of one budget.

    Args:
        full: question id -> sample score in [0, 1] without reduction; above 0.5 is right.
        downsampled: the same of the control `downsample` at the budget.
    """
    if full.keys() != downsampled.keys():
        raise UserError(
            f"Full and downsample must have answered the same questions; {len(full.keys() ^ downsampled.keys()):,} "
            "have an answer of one of them only."
        )
    right = [name for name, score in full.items() if score > RIGHT]
    return Groups(
        a=tuple(name for name in right if downsampled[name] <= RIGHT),
        b=tuple(name for name in right if downsampled[name] > RIGHT),
        full_wrong=tuple(name for name, score in full.items() if score <= RIGHT),
    )


def accuracy_on(scores: Mapping[str, float], ids: Collection[str], clusters: Mapping[str, str]) -> Interval:
    """Mean sample score of these questions in percent; an interval "n/a" with the mean NaN where there are none.

    Args:
        scores: question id -> sample score in [0, 1].
        clusters: question id -> label of what is drawn together, mostly the image.
    """
    if missing := [name for name in ids if name not in scores]:
        raise UserError(f"{len(missing):,} questions of the group have no score, the first is {missing[0]}.")
    if not ids:
        return Interval(math.nan, None, None, "n/a: no question is in the group")
    return interval(accuracy_terms({name: scores[name] for name in ids}, clusters))
