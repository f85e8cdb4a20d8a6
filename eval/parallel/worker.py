"""A rank: what DeepSpeed's launcher runs on every accelerator.

    python -m eval.parallel.worker ADDRESS NAME SIZE MODULE [arguments of the module's main]

Users do not start it; eval/parallel/launch.py does.
"""

import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from importlib import import_module

from eval.command import terminate
from eval.parallel import ranks
from eval.parallel.control import Control, free_port
from eval.parallel.ranks import FAILED, FINISHED, LOADING, STOPPED, Rank

BEAT_SECONDS = 2


def work(words: Sequence[str]) -> int:
    """Take this process's place among the ranks, and run the command."""
    address, name, size, module, *arguments = words
    control = Control.connect(address)
    rank = Rank(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(size), name, control)
    ranks.become(rank)
    signal.signal(signal.SIGTERM, terminate)
    threading.Thread(target=follow, args=(control,), daemon=True).start()
    try:
        rank.report(LOADING)
        take_accelerator()
        if not rank.first:
            be_quiet()
        if rank.size > 1:
            join_replica(rank)
        code = import_module(module).main(arguments)
        if rank.size > 1:
            leave_replica()
    except KeyboardInterrupt:
        rank.report(STOPPED)
        code = 130
    except Exception as error:
        traceback.print_exc()
        rank.report(
            FAILED, reason=f"Rank {rank.number} of {rank.world} failed: {type(error).__name__}: {error}.", code=1
        )
        code = 1
    else:
        if not rank.ended:
            rank.report(FINISHED, code=code)
    return code


def take_accelerator() -> None:
    """The accelerator of this rank is the one that "cuda" means from now on."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def be_quiet() -> None:
    """Only the first rank prints results; warnings and errors of the others are still seen."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def join_replica(rank: Rank) -> None:
    """Make the ranks of this replica a torch.distributed world of their own."""
    from llava.model.parallel.group import join

    key = f"replica{rank.replica}"
    if rank.leads:
        rank.put(key, [socket.gethostname(), free_port()])
    host, port = rank.get(key)
    import torch

    join(rank.number % rank.size, rank.size, host, port, "cuda" if torch.cuda.is_available() else "cpu")


def leave_replica() -> None:
    from llava.model.parallel.group import leave

    leave()


def follow(control: Control) -> None:
    """End this process when the parent process is gone: nobody would read what it does, or stop it."""
    while True:
        try:
            control.count("beats", 0)
        except Exception:
            os._exit(1)
        time.sleep(BEAT_SECONDS)


if __name__ == "__main__":
    sys.exit(work(sys.argv[1:]))
