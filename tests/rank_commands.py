"""Commands for real ranks in tests/test_ranks.py: each does what its first argument says.

python -m tests.rank_commands WHAT FOLDER [WORDS]    starts two ranks, or those that the environment asks for
"""

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from eval.answers.jsonl import write_file
from eval.command import exit_on_user_error
from eval.parallel import ranks
from eval.parallel.ranks import ASKING, WAITING
from llava.errors import UserError


@exit_on_user_error
def main(words: Sequence[str]) -> int:
    """Returns the exit code."""
    what, folder = words[0], Path(words[1])
    rank = ranks.current()
    if rank.first:
        rank.count("answered", 3)
        rank.put("run", {"output": str(folder), "before": 0, "planned": 40})
    rank.get("run")
    if what == "claim":
        return claim(folder, words)
    rank.report(ASKING, [f"q{rank.number}"])
    write_file(folder / f"{rank.number}.pid", str(os.getpid()))  # whole once it is there
    if what == "refuse":
        raise UserError("The budget is wrong; choose another.")
    if what == "crash" and rank.number == 1:
        raise ValueError("seven is no colour.")
    for _ in range(1200):
        time.sleep(0.1)
        rank.report(ASKING, [f"q{rank.number}"])
    return 0


def claim(folder: Path, words: Sequence[str]) -> int:
    """Take numbers until there are none; rank 0 ends before the other one does."""
    rank = ranks.current()
    mine = []
    rank.report(WAITING)
    rank.count("here")
    while rank.count("here", 0) < 2:
        time.sleep(0.01)
    while (number := rank.claim("batches")) < 40:
        mine.append(number)
        time.sleep(0.01)
    seen = {
        "claimed": mine,
        "words": list(words),
        "mode": os.environ.get("WANDB_MODE"),
        "lines": [" ".join(process.cmdline()) for process in psutil.Process().parents()],
        "device": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }
    (folder / f"{rank.number}.json").write_text(json.dumps(seen))
    print(f"hello from rank {rank.number}")
    if not rank.first:
        time.sleep(3)
    return 3 if rank.first else 0


if __name__ == "__main__":  # as the command that a user types
    from eval.parallel import launch
    from eval.parallel.placement import Placement, detect

    # A shell ignores Ctrl-C for what it starts in the background, and so would everything below it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    launch.END_SECONDS = 4
    launch.LOST_SECONDS = 8
    place = detect(os.environ, lambda: 0) or Placement((("localhost", (0, 1)),))
    sys.exit(launch.launch("tests.rank_commands", sys.argv[1:], place, timeout=100))
