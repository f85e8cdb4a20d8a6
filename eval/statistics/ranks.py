"""Ranks of several methods on the same questions, as intervals: what the paired tests can tell apart, and no more."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from eval.metrics import SufficientStatistics
from eval.results.statistics import LEVEL, all_pairs

Name = TypeVar("Name")


@dataclass(frozen=True)
class RankInterval:
    """The ranks that a method may have among n, rank 1 being the best.

    Attributes:
        best: 1 + the number of methods that are significantly better.
        worst: n - the number of methods that are significantly worse.
    """

    best: int
    worst: int

    @property
    def text(self) -> str:
        """ "2", or "2–4"."""
        return f"{self.best}" if self.best == self.worst else f"{self.best}–{self.worst}"


def rank_intervals(scores: Mapping[Name, SufficientStatistics]) -> dict[Name, RankInterval]:
    """The rank interval of every method, from paired permutation tests of all pairs with Holm's correction.

    Args:
        scores: name -> score of the same questions, higher is better.
    """
    better = dict.fromkeys(scores, 0)
    worse = dict.fromkeys(scores, 0)
    for (a, b), found in all_pairs(scores).items():
        if found.p <= 1 - LEVEL:
            above, below = (a, b) if found.difference > 0 else (b, a)
            worse[above] += 1
            better[below] += 1
    return {name: RankInterval(1 + better[name], len(scores) - worse[name]) for name in scores}
