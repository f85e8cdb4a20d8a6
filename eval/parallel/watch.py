"""What the parent process sees of its ranks: whether each goes on, and how they ended."""

import subprocess
import time
from collections.abc import Callable
from typing import Any

from eval.parallel.control import Control
from eval.parallel.ranks import FAILED, FINISHED, STOPPED, WATCHED

POLL_SECONDS = 0.1
SHOWN = 3  # questions that a sentence names


class Problem(Exception):
    """The ranks did not finish; the text is a sentence for the user.

    Attributes:
        code: exit code of the command.
    """

    def __init__(self, sentence: str, code: int = 1):
        super().__init__(sentence)
        self.code = code


def watch(
    process: "subprocess.Popen[bytes]",
    control: Control,
    ranks: int,
    timeout: float,
    progress: Callable[[Control], None] = lambda control: None,
) -> None:
    """Wait until the launcher has ended.

    Raises:
        Problem: a rank has reported nothing new for `timeout` seconds.
    """
    began = time.monotonic()
    seen: list[tuple[dict[str, Any] | None, float]] = [(None, began)] * ranks
    while process.poll() is None:
        for number in range(ranks):
            report, now = control.peek(f"rank{number}"), time.monotonic()
            if report != seen[number][0]:
                seen[number] = report, now
            elif now - seen[number][1] > timeout and (report is None or report["phase"] in WATCHED):
                raise Problem(f"{describe(number, ranks, report)} for {timeout:g} s, so all ranks were stopped.")
        progress(control)
        time.sleep(POLL_SECONDS)


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
    # Ranks that were told to stop say so; one that died by itself could not.
    for number, (report, phase) in enumerate(zip(reports, phases, strict=True)):
        if phase not in (STOPPED, FINISHED):
            raise Problem(f"{describe(number, ranks, report, 'died')}, so all ranks were stopped.")
    raise Problem("The ranks were stopped from outside.")


def describe(number: int, ranks: int, report: dict[str, Any] | None, verb: str = "hung") -> str:
    """ "Rank 1 of 2 (node1, process 4711) hung while it asked question 20151"."""
    if report is None:
        return f"Rank {number} of {ranks} {verb} before it had started"
    where = f"Rank {number} of {ranks} ({report['host']}, process {report['process']})"
    questions = report["questions"]
    if not questions:
        return f"{where} {verb} while it was {report['phase']}"
    more = f" and {len(questions) - SHOWN} more" if len(questions) > SHOWN else ""
    noun = "question" if len(questions) == 1 else "questions"
    return f"{where} {verb} while it was asking {noun} {', '.join(questions[:SHOWN])}{more}"
