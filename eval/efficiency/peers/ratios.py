"""Ratios of times that were measured in the same round, their median and its interval."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from statistics import median
from typing import Any

from llava.errors import UserError

Rounds = Sequence[dict[str, float]]  # seconds by name, one dictionary per round

CONFIDENCE = 0.95
FEWEST = 6  # rounds whose whole range covers the median so often


@dataclass(frozen=True)
class Ratio:
    """How many times the reference's time something takes: the median over rounds, and an interval for it."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def paired(rounds: Rounds, name: str, reference: str) -> Ratio:
    """The ratio of two times in each round; what slows both in a round cancels."""
    return over_rounds([row[name] / row[reference] for row in rounds])


def over_rounds(ratios: Sequence[float]) -> Ratio:
    """The median of the ratios of all rounds, and its interval.

    Source:
        The interval is that of the sign test: order statistics of the ratios, without an assumption on how they are
        distributed (Conover, Practical Nonparametric Statistics, 1999, section 3.2).
    """
    ordered = sorted(ratios)
    outer = interval_rank(len(ordered))
    return Ratio(median(ordered), ordered[outer], ordered[-1 - outer])


def interval_rank(rounds: int) -> int:
    """How many values may be left out at either end, so that the rest spans the median with 95 % confidence.

    0, the whole range, also where that is too few rounds: below FEWEST it covers the median less often.
    """
    rank, tail = 0, 0.0
    while rank < rounds // 2:
        tail += comb(rounds, rank) / 2**rounds
        if 2 * tail > 1 - CONFIDENCE:
            break
        rank += 1
    return max(0, rank - 1)


def table(results: Sequence[dict[str, Any]], beside: str | None = None) -> str:
    """Results of several comparisons as a Markdown table: a row for all but the reference of each.

    Args:
        results: what `alternate.compare` returned. The first name of a comparison's rounds is its reference.
        beside: another reference.

    Raises:
        UserError: a comparison did not measure `beside`.
    """
    lines = ["| comparison | seconds | beside it | seconds | ratio | rounds |", "|---|---|---|---|---|---|"]
    for result in results:
        rounds: Rounds = result["rounds"]
        names = list(rounds[0])
        if beside is not None and beside not in names:
            raise UserError(f"{result['name']} measured {', '.join(names)}, not {beside!r}; choose one of these.")
        reference = beside or names[0]
        title = result["name"] if beside is None else f"{result['name']}: {beside}"
        ours = median(row[reference] for row in rounds)
        for name in names:
            if name == reference:
                continue
            theirs = median(row[name] for row in rounds)
            cells = [title, f"{ours:.2f}", name, f"{theirs:.2f}", str(paired(rounds, name, reference))]
            lines.append(f"| {' | '.join(cells)} | {len(rounds)} |")
    return "\n".join(lines)
