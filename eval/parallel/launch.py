"""Start the ranks of a command with DeepSpeed's launcher, watch them, and end all of them together.

The process that the user started asks no questions itself: it serves the store that the ranks share (control.py), so
it sees what each of them does, also when one is killed or hangs. Nothing of this is needed for a single process.
"""

import base64
import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import psutil

from eval.command import Terminated, terminate
from eval.config import ROOT
from eval.parallel.control import LOOPBACK, Control, free_port
from eval.parallel.placement import Placement
from eval.parallel.watch import Problem, outcome, watch
from llava.errors import UserError

WORKER = "eval.parallel.worker"
# One launcher per node; srun sets the number of the node.
ON_EACH_NODE = 'exec "$0" -u -m deepspeed.launcher.launch --node_rank="$SLURM_NODEID" "$@"'
END_SECONDS = 10  # for the ranks to end by themselves once they are told to


def launch(
    module: str,
    arguments: Sequence[str],
    placement: Placement,
    timeout: float,
    progress: Callable[[Control], None] = lambda control: None,
) -> int:
    """Run `main(arguments)` of a module on every rank.

    Args:
        timeout: seconds that a rank may take for one thing (loading, one batch, merging) before it counts as hung.
        progress: called a few times a second while the ranks work.

    Returns:
        The exit code: the first rank's own, 1 where a rank died or hung, 2 for a user error, 130 or 143 after a signal.
    """
    control = Control.serve(LOOPBACK if placement.launcher == "local" else socket.gethostname())
    control.put("command began", psutil.Process().create_time())
    worker = [WORKER, control.address, secrets.token_hex(4), str(placement.size), module, *arguments]
    command = launcher_command(placement, worker)
    try:
        # A session of its own: a Ctrl-C at the terminal comes to this process alone, which ends the ranks in order.
        process = subprocess.Popen(command, env=rank_environment(placement, os.environ), start_new_session=True)
    except OSError as error:
        raise UserError(f"Cannot start the ranks with {command[0]}: {error.strerror}.") from error
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        watch(process, control, placement.ranks, timeout, progress)
        end(process)
        return outcome(control, placement.ranks)
    except KeyboardInterrupt as stopped:
        end(process)
        print(f"\nStopped. {kept(control) or 'No question was asked yet.'}", file=sys.stderr)
        return 143 if isinstance(stopped, Terminated) else 130
    except Problem as problem:
        end(process)
        print(f"{problem} {kept(control)}".rstrip(), file=sys.stderr)
        return problem.code
    finally:
        end(process)
        signal.signal(signal.SIGTERM, before)


def kept(control: Control) -> str:
    """What a user needs to know after a run that did not finish; nothing before it has begun."""
    run = control.peek("run")
    if run is None:
        return ""
    answers = run["before"] + control.count("answered", 0)
    return (
        f"{answers:,} of {run['planned']:,} answers are kept in {run['output']}; run the same command again to go on."
    )


def launcher_command(placement: Placement, worker: Sequence[str]) -> list[str]:
    """DeepSpeed's launcher for the placement, with the module and the arguments of every rank."""
    python, quiet = sys.executable, "--log_level=critical"
    options = [f"--master_port={free_port()}", quiet, "--no_local_rank", "--module"]
    if placement.launcher == "hostfile":
        # DeepSpeed's runner reaches the machines by pdsh, or by what DeepSpeed calls a launcher.
        how = ["--launcher", os.environ.get("DS_LAUNCHER", "pdsh"), "--force_multi"]
        first = placement.hosts[0][0]
        runner = [python, "-m", "deepspeed.launcher.runner", f"--hostfile={placement.hostfile}", *how]
        return [*runner, f"--master_addr={first}", *options, *worker]
    world = base64.urlsafe_b64encode(json.dumps(dict(placement.hosts)).encode()).decode()
    if placement.launcher == "slurm":
        first = placement.hosts[0][0]
        srun = ["srun", f"--nodes={len(placement.hosts)}", f"--ntasks={len(placement.hosts)}", "--ntasks-per-node=1"]
        options = [f"--world_info={world}", f"--master_addr={first}", *options]
        return [*srun, "bash", "-c", ON_EACH_NODE, python, *options, *worker]
    options = [f"--world_info={world}", f"--master_addr={LOOPBACK}", *options]
    return [python, "-u", "-m", "deepspeed.launcher.launch", *options, *worker]


def rank_environment(placement: Placement, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of the ranks: they share the processor's cores, and find this repository."""
    own = dict(environment)
    local = len(placement.hosts[0][1])
    own.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // local)))
    own.setdefault("TOKENIZERS_PARALLELISM", "false")
    # torch prints a stack of C++ frames when the parent process is gone; the rank says it in a sentence.
    own.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    own["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [own.get("PYTHONPATH")])])
    return own


def end(process: "subprocess.Popen[bytes]") -> None:
    """End the launcher and every rank of this machine; those of other machines end when the store is gone."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if not alive(process):
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        limit = time.monotonic() + END_SECONDS
        while alive(process) and time.monotonic() < limit:
            time.sleep(0.05)


def alive(process: "subprocess.Popen[bytes]") -> bool:
    """Whether any process of the launcher's group runs."""
    process.poll()
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True
