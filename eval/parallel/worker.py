"""A rank: what DeepSpeed's launcher runs on every accelerator.

    python -m eval.parallel.worker ADDRESS

The parent process at ADDRESS says which module to run with which arguments, so no shell on the way to another machine
can change them. eval/parallel/launch.py starts this, not the user.
"""

import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from torch.distributed import DistError

from eval.command import STOPS, terminate
from eval.parallel import ranks
from eval.parallel.ranks import ENDED, FAILED, FINISHED, LOADING, LOOPBACK, STOPPED, Control, Rank, free_port
from llava.errors import UserError, optional_imports

BEAT_SECONDS = 1


def main(words: Sequence[str]) -> int:
    """Take this process's place among the ranks, and run the command.

    Before that, SIGTERM ends the process at once without a report.

    Returns:
        The exit code for the launcher. It is 0 for a rank that has finished, whatever its command returned, because any
        other code makes the launcher end the ranks that have not finished yet.
    """
    try:
        control = Control.connect(words[0])
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    command = control.get("command")
    number, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    rank = Rank(number, world, command["size"], command["name"], control)
    ranks.become(rank)
    ended = threading.Event()
    follower = threading.Thread(target=follow, args=(rank, control, ended), daemon=True)
    follower.start()
    try:
        work(rank, command["module"], command["arguments"], command["processor"])
        return 0 if rank.phase == FINISHED else 1
    except DistError:
        if not control.answers():
            end_without_parent(rank)
        raise
    except KeyboardInterrupt:  # told to stop while it reported its end
        return 1
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the end is reported, so nothing is left to stop
        # A thread that talks to the store while Python exits would abort the process.
        ended.set()
        follower.join()


def work(rank: Rank, module: str, arguments: Sequence[str], processor: bool) -> None:
    """Run `main(arguments)` of a module and report how it ended; unexpected errors are printed with their traceback.

    Args:
        processor: do not use accelerators.
    """
    try:
        for number in STOPS:
            signal.signal(number, terminate)
        rank.report(LOADING)
        take_device(processor)
        if not rank.first:  # only the first rank prints results; the others still print warnings and errors
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if rank.size > 1:
            join_replica(rank)
        with optional_imports():
            code = import_module(module).main(arguments)
        if rank.size > 1:
            from llava.model.parallel import leave

            leave()
        rank.report(FINISHED, code=code)
    except KeyboardInterrupt:
        if rank.phase not in ENDED:
            rank.report(STOPPED)
    except UserError as error:
        rank.report(FAILED, reason=str(error), code=2)
    except Exception as error:
        rank.count("failed")  # raises DistError if the parent process is gone, which is then the real reason
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}".rstrip(".: ")
        rank.report(FAILED, reason=f"Rank {rank.number} of {rank.world} failed: {reason}.", code=1)


def take_device(processor: bool) -> None:
    """Make "cuda" mean this rank's accelerator, and limit its threads to its share of the processor's cores."""
    import torch

    if processor:  # in time, as torch has not looked for accelerators yet
        os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    elif torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if "OMP_NUM_THREADS" not in os.environ:  # on another machine than the parent process
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ["LOCAL_SIZE"])))


def join_replica(rank: Rank) -> None:
    """Join the ranks of this replica into a torch.distributed world of their own."""
    from llava.model.parallel import join

    key = f"replica{rank.replica}"
    if rank.leads:
        # The name of this machine may not resolve in a container.
        local = rank.control is not None and rank.control.address.startswith(LOOPBACK)
        rank.put(key, [LOOPBACK if local else socket.gethostname(), free_port()])
    host, port = rank.get(key)
    import torch

    join(rank.number % rank.size, rank.size, host, port, "cuda" if torch.cuda.is_available() else "cpu")


def follow(rank: Rank, control: Control, ended: threading.Event) -> None:
    """Give the parent process signs of life; stop when it says so, and end when it is gone.

    Without its parent this process could neither report nor be stopped.
    """
    stopped = False
    while not ended.wait(BEAT_SECONDS):
        try:
            control.count(f"beat{rank.number}")
            stop = control.count("stop", 0) > 0
        except Exception:
            end_without_parent(rank)
        if stop and not stopped:
            stopped = True
            os.kill(os.getpid(), signal.SIGTERM)


def end_without_parent(rank: Rank) -> NoReturn:
    """End this process at once, whatever its main thread is doing; the first rank prints why."""
    if rank.first:
        print("The process that started the ranks is gone, so they end; what was answered is kept.", file=sys.stderr)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
