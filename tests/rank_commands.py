"""Commands for real ranks in tests/test_ranks.py: each does what its first argument says."""

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from eval.command import exit_on_user_error
from eval.parallel import ranks
from eval.parallel.ranks import ASKING
from llava.errors import UserError


@exit_on_user_error
def main(words: Sequence[str]) -> int:
    """Returns the exit code."""
    what, folder = words[0], Path(words[1])
    rank = ranks.current()
    if rank.first:
        rank.put("run", {"output": str(folder), "before": 0, "planned": 40})
    rank.report(ASKING, [f"q{rank.number}"])
    (folder / f"{rank.number}.pid").write_text(str(os.getpid()))
    if what == "claim":
        mine = []
        while (number := rank.claim("batches")) < 40:
            mine.append(number)
            rank.count("answered")
            time.sleep(0.01)
        (folder / f"{rank.number}.json").write_text(json.dumps(mine))
        print(f"hello from rank {rank.number}")
        return 3 if rank.first else 0
    if what == "refuse" and rank.number == 1:
        raise UserError("The budget is wrong; choose another.")
    if what == "crash" and rank.number == 1:
        raise ValueError("seven is no colour")
    if what == "die" and rank.number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "freeze" and rank.number == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    if what in ("refuse", "crash", "die", "freeze", "wait"):
        rank.count("answered", 3)
        for _ in range(600):
            time.sleep(0.1)
            if rank.first:
                rank.report(ASKING, ["q0"])
    return 0


if __name__ == "__main__":  # as the command that a user types
    from eval.parallel.launch import launch
    from eval.parallel.placement import Placement

    place = Placement((("localhost", (0, 1)),), size=1)
    sys.exit(launch("tests.rank_commands", sys.argv[2:], place, timeout=float(sys.argv[1])))
