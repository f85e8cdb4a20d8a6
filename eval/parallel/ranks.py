"""The place of this process among the ranks of one command; alone unless eval.parallel.worker says otherwise.

Needs no torch: every command line imports it.
"""

import itertools
import os
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eval.parallel.control import Control

# What a rank does; the parent process reads it.
LOADING, ASKING, MERGING = "loading", "asking", "merging"
WAITING, SCORING, TRAINING = "waiting", "scoring", "training"
FINISHED, FAILED, STOPPED = "finished", "failed", "stopped"
# A rank must not be in one of these for longer than the time-out.
WATCHED = (LOADING, ASKING, MERGING)
# Nothing more comes from a rank in one of these.
ENDED = (FINISHED, FAILED, STOPPED)


@dataclass(frozen=True)
class Rank:
    """One process among several.

    Attributes:
        number: of this rank, from 0.
        world: ranks in all.
        size: ranks of a replica.
        name: a random word for this start of the ranks.
        control: None for a process that is alone.
    """

    number: int = 0
    world: int = 1
    size: int = 1
    name: str = ""
    control: "Control | None" = None
    _rounds: Iterator[int] = field(default_factory=itertools.count, repr=False, compare=False)
    _counts: Counter[str] = field(default_factory=Counter, repr=False, compare=False)

    @property
    def alone(self) -> bool:
        return self.control is None

    @property
    def first(self) -> bool:
        """Whether this rank merges, scores and logs."""
        return self.number == 0

    @property
    def replica(self) -> int:
        return self.number // self.size

    @property
    def replicas(self) -> int:
        return self.world // self.size

    @property
    def leads(self) -> bool:
        """Whether this rank writes the answers of its replica."""
        return self.number % self.size == 0

    def claim(self, what: str) -> int:
        """The next number that no other replica has: 0, 1, 2 ... of questions' batches or of table cells.

        The ranks of a replica get the same number; they must call this equally often.
        """
        turn = next(self._rounds)
        if self.control is None:
            return turn
        key = f"{what}/replica{self.replica}/{turn}"
        if not self.leads:
            return self.control.get(key)
        number = self.control.count(what) - 1
        if self.size > 1:
            self.control.put(key, number)
        return number

    def count(self, what: str, amount: int = 1) -> int:
        """Add to a counter of all ranks; returns its new value."""
        if self.control is not None:
            return self.control.count(what, amount)
        self._counts[what] += amount
        return self._counts[what]

    def put(self, key: str, value: Any) -> None:
        """Publish a value to the other ranks."""
        if self.control is not None:
            self.control.put(key, value)

    def get(self, key: str) -> Any:
        """What another rank has published, once it has."""
        assert self.control is not None
        return self.control.get(key)

    def report(self, phase: str, questions: Sequence[str] = (), **more: Any) -> None:
        """Tell the parent process what this rank does from now on.

        Args:
            questions: ids of those that are asked.
        """
        if self.control is not None:
            # The counter makes every report a new value: the parent waits for change.
            report = {"phase": phase, "questions": list(questions), "number": self.control.count("reports")}
            place = {"host": socket.gethostname(), "process": os.getpid()}
            self.control.put(f"rank{self.number}", report | place | more)

    @property
    def phase(self) -> str | None:
        """What this rank has reported last."""
        report = None if self.control is None else self.control.peek(f"rank{self.number}")
        return None if report is None else report["phase"]

    @property
    def ended(self) -> bool:
        """Whether the last report was the last word."""
        return self.phase in ENDED


_current = Rank()


def current() -> Rank:
    """The place of this process."""
    return _current


def become(rank: Rank) -> None:
    """Take a place; once, when the process starts."""
    global _current
    _current = rank
