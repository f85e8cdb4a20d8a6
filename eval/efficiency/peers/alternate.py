"""Two workers take turns, so that a machine that slows down or is busy slows both."""

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from tqdm import tqdm

from eval.efficiency.peers.protocol import Worker
from eval.results.provenance import commit, hardware
from llava.errors import UserError

EQUAL = ("layers", "distinct_layers", "dtype", "threads")  # of all workers that say these of themselves


def compare(name: str, commands: Sequence[str], rounds: int, threads: int) -> dict[str, Any]:
    """Measure the workers in turns, forwards in one round and backwards in the next.

    A drift of the machine within rounds cancels over two rounds. Each worker measures once before the first round,
    which is thrown away.

    Args:
        name: of the comparison.
        commands: command lines of the workers; the first name that the first one measures is the reference.

    Returns:
        What a result file holds: name, settings, what the workers say of themselves, and seconds by name per round.

    Raises:
        UserError: a worker fails, workers say that they run models of different size, or two measure something under
            the same name.
    """
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(command, threads)) for command in commands]
        ready = [worker.ready() for worker in workers]
        refuse_unequal(ready)
        names = [name for worker in workers for name in worker.measure()]
        if len(set(names)) != len(names):
            raise UserError(f"The workers measure {', '.join(names)}; a name may occur once.")
        began, load = time.time(), [os.getloadavg()[0]]
        rows = []
        for turn in tqdm(range(rounds), desc=name, unit="round", disable=None):
            row: dict[str, float] = {}
            for worker in workers if turn % 2 == 0 else reversed(workers):
                row |= worker.measure()
            rows.append({name: row[name] for name in names})
            load.append(os.getloadavg()[0])
    return {
        "name": name,
        "commands": list(commands),
        "threads": threads,
        "hardware": hardware("cpu"),
        "commit": commit(),
        "began": began,
        "load": load,
        "workers": ready,
        "rounds": rows,
    }


def refuse_unequal(ready: Sequence[dict[str, Any]]) -> None:
    """Raise UserError where two workers that say how deep or how precise they are do not say the same."""
    for key in EQUAL:
        said = [worker[key] for worker in ready if key in worker]
        if any(one != said[0] for one in said):
            raise UserError(f"The workers say {key} {', '.join(map(str, said))}; give all of them the same model.")
