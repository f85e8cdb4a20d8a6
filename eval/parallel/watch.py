"""What the parent process sees of its ranks: whether each goes on, and how they ended."""

import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil

from eval.parallel.control import Control
from eval.parallel.ranks import ENDED, FAILED, FINISHED, STOPPED, WATCHED

POLL_SECONDS = 0.1
SHOWN = 3  # questions that a sentence names
# Importing torch from a file system that many ranks read at once takes minutes.
START_SECONDS = 600
# A rank shows every second that it lives. Where its machine's launcher cannot tell us, this much silence is its end.
LOST_SECONDS = 120


class Problem(Exception):
    """The ranks did not finish; the text is a sentence for the user.

    Attributes:
        code: exit code of the command.
    """

    def __init__(self, sentence: str, code: int = 1):
        super().__init__(sentence)
        self.code = code


@dataclass
class Seen:
    """What was last seen of a rank, and when, in seconds of the watch's own clock."""

    report: dict[str, Any] | None = None
    reported: float = 0.0
    beat: int = 0
    lived: float = 0.0


def watch(
    process: "subprocess.Popen[bytes]",
    control: Control,
    ranks: int,
    timeout: float,
    progress: Callable[[Control], None] = lambda control: None,
    remote: bool = False,
) -> None:
    """Wait until the launcher has ended, or a rank cannot go on.

    Args:
        timeout: seconds that a rank may take for one thing.
        remote: whether ranks are on other machines: pdsh goes on where one of several machines has failed.

    Raises:
        Problem: a rank hangs, or shows no sign of life.
    """
    clock, before = 0.0, time.monotonic()
    seen = [Seen() for _ in range(ranks)]
    while process.poll() is None:
        # Time in which this process was stopped (Ctrl-Z) does not count: the ranks waited for it.
        now = time.monotonic()
        clock, before = clock + min(1.0, now - before), now
        for number, rank in enumerate(seen):
            report, beat = control.peek(f"rank{number}"), control.count(f"beat{number}", 0)
            if report != rank.report:
                rank.report, rank.reported, rank.lived = report, clock, clock
            if beat != rank.beat:
                rank.beat, rank.lived = beat, clock
            check(rank, number, ranks, clock, timeout, remote)
            if not remote and died(control, number, report):
                raise Problem(f"{describe(number, ranks, report, 'died')}, so all ranks were stopped.")
        if any(rank.report and rank.report["phase"] in (FAILED, STOPPED) for rank in seen):
            return
        progress(control)
        time.sleep(max(POLL_SECONDS, ranks * POLL_SECONDS / 10))  # many ranks would keep this process busy


def check(rank: Seen, number: int, ranks: int, clock: float, timeout: float, remote: bool) -> None:
    """Raise Problem for a rank that does not go on."""
    silent = clock - rank.reported
    if rank.report is None:
        if silent > max(timeout, START_SECONDS):
            raise Problem(f"Rank {number} of {ranks} has not started within {silent:.0f} s, so all ranks were stopped.")
    elif rank.report["phase"] in WATCHED and silent > timeout:
        raise Problem(f"{describe(number, ranks, rank.report)} for {timeout:g} s, so all ranks were stopped.")
    elif remote and rank.report["phase"] != FINISHED and clock - rank.lived > LOST_SECONDS:
        raise Problem(f"{describe(number, ranks, rank.report, 'was lost')}, so all ranks were stopped.")


def died(control: Control, number: int, report: dict[str, Any] | None) -> bool:
    """Whether a rank of this machine is gone without a last word."""
    if report is None:
        return False
    try:
        if psutil.Process(report["process"]).status() != psutil.STATUS_ZOMBIE:
            return False
    except psutil.NoSuchProcess:
        pass
    last = control.peek(f"rank{number}")  # it may have come after `report`
    return last["phase"] not in ENDED


def outcome(control: Control, ranks: int) -> int:
    """The exit code of ranks that have ended.

    Raises:
        Problem: not all of them finished.
    """
    reports = [control.peek(f"rank{number}") for number in range(ranks)]
    phases = [report["phase"] if report else None for report in reports]
    if all(phase == FINISHED for phase in phases):
        return max(report["code"] for report in reports)
    failed = [report for report, phase in zip(reports, phases, strict=True) if phase == FAILED]
    if failed:
        first = min(failed, key=lambda report: report["number"])
        raise Problem(first["reason"], first["code"])
    if not any(phases):
        raise Problem(f"None of the {ranks} ranks has started.")
    # Ranks that were told to stop say so; one that died by itself could not.
    for number, (report, phase) in enumerate(zip(reports, phases, strict=True)):
        if phase not in (STOPPED, FINISHED):
            raise Problem(f"{describe(number, ranks, report, 'died')}, so all ranks were stopped.")
    raise Problem("The ranks were stopped from outside.")


def describe(number: int, ranks: int, report: dict[str, Any] | None, verb: str = "hung") -> str:
    """ "Rank 1 of 2 (node1, process 4711) hung while it was asking question 20151"."""
    if report is None:
        return f"Rank {number} of {ranks} {verb} before it had started"
    where = f"Rank {number} of {ranks} ({report['host']}, process {report['process']})"
    questions = report["questions"]
    if not questions:
        return f"{where} {verb} while it was {report['phase']}"
    more = f" and {len(questions) - SHOWN} more" if len(questions) > SHOWN else ""
    noun = "question" if len(questions) == 1 else "questions"
    return f"{where} {verb} while it was asking {noun} {', '.join(questions[:SHOWN])}{more}"
