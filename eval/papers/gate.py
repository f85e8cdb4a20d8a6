"""Compare our scores with published ones: which of these are like ours, and is the unreduced model the paper's?

The gate checks the unreduced model before any reduced number is believed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eval.papers.cells import Cell
from eval.papers.published import WORDS, Published, Value
from eval.papers.spec import Place
from eval.results.statistics import rounded

CAUSES: Mapping[str, str] = WORDS["causes"]
EVERYWHERE: Sequence[str] = WORDS["everywhere"]


@dataclass(frozen=True)
class Check:
    """The score of the unreduced model on one benchmark, and the published score that it is compared with.

    Attributes:
        nearest: of the published values that are like ours, the one nearest to it; None if there is none.
        why: why there is none.
    """

    cell: Cell
    nearest: Value | None
    why: str = ""

    @property
    def difference(self) -> float:
        """Ours minus the nearest published value; 0 if there is none."""
        return 0.0 if self.nearest is None else self.cell.value - self.nearest.value

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong: within the tolerance, or not compared."""
        return abs(self.difference) <= self.cell.column.tolerance

    @property
    def verdict(self) -> str:
        """Whether the benchmark passed, and how far it is from which source."""
        if self.nearest is None:
            return f"not compared: {self.why}"
        passed = "passed" if self.passed else "failed"
        return f"{passed}: {rounded(self.difference, sign='+')} to {self.nearest.value:g} ({self.nearest.title})"


def check(cells: Sequence[Cell], published: Published, place: Place) -> list[Check]:
    """Compare the unreduced model with the published baselines.

    A check passes if the value is within the column's tolerance of at least one source, because sources differ among
    themselves. Only sources that are like ours count (`comparable`).
    """
    found = []
    for cell in cells:
        values = published.values("full", place.tokens, cell.column.published) if cell.column.published else []
        likes, why = comparable(cell, values, place.convention)
        found.append(Check(cell, min(likes, key=lambda value: abs(cell.value - value.value), default=None), why))
    return found


def sentences(checks: Sequence[Check]) -> list[str]:
    """What the gate found, one line per benchmark that failed, with the likely causes."""
    return [
        f"{one.cell.column.title}: the unreduced model has {rounded(one.cell.value)}, the nearest published value is "
        f"{one.nearest.value:g} ({one.nearest.title}); that is outside the tolerance of {one.cell.column.tolerance:g}. "
        f"Look at: {'; '.join(filter(None, (CAUSES.get(one.cell.column.benchmark), *EVERYWHERE)))}."
        for one in checks
        if one.nearest is not None and not one.passed
    ]


def comparable(cell: Cell, values: Sequence[Value], convention: str) -> tuple[list[Value], str]:
    """The published values that are like ours; the gate and the column of differences take these.

    They have the same split, metric, judge, budget, variant and convention, and are neither disputed nor of low trust.

    Returns:
        (values, ""), or ([], why there is none).
    """
    line, column = cell.line, cell.column
    ours = {
        "no source": not values,
        "ours is of another split": bool(column.published_split),
        "not all questions were asked": cell.questions < cell.available,
        f"ours is {cell.metric}": cell.metric.endswith("_match") or column.metric not in ("", cell.metric),
        "another budget": bool(line.mark),
        cell.other_judge: bool(cell.other_judge),
        "the row is not the release": not line.row.runs_release,
    }
    if why := next((reason for reason, is_so in ours.items() if is_so), ""):
        return [], why
    obstacles = {value: value.obstacle(convention) for value in values}
    found = [value for value in values if not obstacles[value]]
    return found, "" if found else "; ".join(dict.fromkeys(obstacles.values()))
