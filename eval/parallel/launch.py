"""Start the ranks of a command with DeepSpeed's launcher, watch them, and end all of them together.

The process that the user started answers no questions itself. It serves the store that the ranks share (ranks.py), so
it sees what each of them does, even if one is killed or hangs. A command in a single process needs nothing of this.
"""

import base64
import contextlib
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from eval.command import Terminated, ignore, stopping_once
from eval.parallel.placement import Placement, accelerators
from eval.parallel.ranks import ENDED, FAILED, FINISHED, LOOPBACK, STOPPED, WATCHED, Control, free_port
from llava.errors import UserError
from llava.places import PACKAGES

WORKER = "eval.parallel.worker"
# One launcher per node; srun sets the number of the node.
ON_EACH_NODE = 'exec "$0" -u -m deepspeed.launcher.launch --node_rank="$SLURM_NODEID" "$@"'
END_SECONDS = 10  # time for the ranks to end by themselves after they were told to
# Variables whose names start like this are passed on to ranks that pdsh starts on other machines. Keys and tokens are
# not passed on, because everybody on those machines can read command lines.
FORWARDED = (
    "DS_",
    "HF_",
    "HUGGINGFACE_",
    "OMP_NUM_THREADS",
    "TORCH_",
    "TRANSFORMERS_",
    "TOKENIZERS_",
    "WANDB_",
    "NCCL_",
    "JUDGE_",
    "PYTHONPATH",
)
SECRET = re.compile("KEY|TOKEN|SECRET|PASSWORD")
POLL_SECONDS = 0.1
SHOWN = 3  # questions named in a sentence
# Time for a rank to start: importing torch from a file system that many ranks read at once takes minutes.
START_SECONDS = 600
# A rank on another machine counts as lost after this much silence; ranks give a sign of life every second.
LOST_SECONDS = 120


class Problem(Exception):
    """The ranks did not finish; the text is a sentence for the user.

    Attributes:
        code: exit code of the command.
    """

    def __init__(self, sentence: str, code: int = 1):
        super().__init__(sentence)
        self.code = code


@stopping_once()
def launch(
    module: str,
    arguments: Sequence[str],
    placement: Placement,
    timeout: float,
    progress: Callable[[Control], None] = lambda control: None,
) -> int:
    """Run `main(arguments)` of a module on every rank.

    Args:
        timeout: seconds that a rank may take for one step (loading, one batch, merging) before it counts as hung.
        progress: called a few times a second while the ranks work.

    Returns:
        The exit code: the ranks' own, 1 if a rank died or hung, 2 for a user error, 130 or 143 after a signal.
    """
    control = Control.serve(LOOPBACK if placement.launcher == "local" else socket.gethostname())
    own = {"module": module, "arguments": list(arguments), "size": placement.size}
    own |= {"name": secrets.token_hex(4), "processor": placement.processor}
    control.put("command", own)
    environment = rank_environment(placement, os.environ)
    command = launcher_command(placement, [WORKER, control.address], environment)
    remote = placement.launcher != "local"
    process = None
    try:
        try:
            # In a session of its own, so that Ctrl-C reaches only this process, which then ends the ranks in order.
            process = subprocess.Popen(command, env=environment, start_new_session=True)
        except OSError as error:
            raise UserError(f"Cannot start the ranks with {command[0]}: {error.strerror}.") from error
        watch(process, control, placement.ranks, timeout, progress, remote)
        end(process, control, remote)
        return outcome(control, placement.ranks, placement.launcher == "hostfile")
    except KeyboardInterrupt as stopped:
        end(process, control, remote)
        print(f"\nStopped. {kept(control) or 'No question was asked yet.'}", file=sys.stderr)
        return 143 if isinstance(stopped, Terminated) else 130
    except Problem as problem:
        end(process, control, remote)
        # The sentence of a user error says itself what to do next.
        sentence = kept(control, advice=problem.code == 1)
        # The newline ends the progress bar of a rank that was killed.
        print(f"\n{problem} {sentence}" if sentence else problem, file=sys.stderr)
        return problem.code
    finally:
        end(process, control, remote)


def kept(control: Control, advice: bool = True) -> str:
    """A sentence on what is kept of a run that did not finish; "" if no question was asked yet.

    Args:
        advice: also say how to go on.
    """
    if (runs := control.peek("runs")) is not None:
        found = f"{control.count('finished', 0):,} of {runs:,} runs are finished, and answers of the others are kept"
    elif (run := control.peek("run")) is not None:
        answers = run["before"] + control.count("answered", 0)
        found = f"{answers:,} of {run['planned']:,} answers are kept in {run['output']}"
    else:
        return ""
    return f"{found}; run the same command again to go on." if advice else f"{found}."


def launcher_command(placement: Placement, worker: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """The command that starts DeepSpeed's launcher on every machine of the placement.

    Args:
        worker: module and arguments of every rank.
        environment: of this process; what ranks on other machines need of it goes on pdsh's command line.
    """
    python, count = sys.executable, len(placement.hosts)
    world = base64.urlsafe_b64encode(json.dumps(dict(placement.hosts)).encode()).decode()
    # The launcher requires this address, but ranks find each other through the store.
    first = LOOPBACK if placement.launcher == "local" else placement.hosts[0][0]
    options = [f"--world_info={world}", f"--master_addr={first}", f"--master_port={free_port()}"]
    options += ["--log_level=critical", "--no_local_rank", "--module", *worker]
    if placement.launcher == "slurm":
        srun = ["srun", f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
        if cores := environment.get("SLURM_CPUS_PER_TASK"):  # which srun has not inherited since Slurm 22.05
            srun.append(f"--cpus-per-task={cores}")
        return [*srun, "bash", "-c", ON_EACH_NODE, python, *options]
    launcher = [python, "-u", "-m", "deepspeed.launcher.launch"]
    if placement.launcher == "local":
        return [*launcher, *options]
    # As DeepSpeed's own runner starts it, with three differences: lines that ranks print are not changed, the launchers
    # log nothing, and Ctrl-C does not end the launchers of other commands, which the runner's `pkill -f` does.
    if shutil.which("pdsh") is None:
        raise UserError("HOSTFILE needs pdsh to reach the machines; install it (apt-get install pdsh).")
    settings = [
        f"{name}={value}"
        for name, value in environment.items()
        if name.startswith(FORWARDED) and not SECRET.search(name)
    ]
    there = f"cd {shlex.quote(os.getcwd())} && exec env {shlex.join([*settings, *launcher])} --node_rank=%n "
    to_all = ["pdsh", "-S", "-N", "-R", "ssh", "-f", str(count), "-w", ",".join(dict(placement.hosts))]
    return [*to_all, there + shlex.join(options)]


def rank_environment(placement: Placement, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of the ranks: each gets its share of the processor's cores, and finds this repository."""
    own = dict(environment)
    local = len(placement.hosts[0][1])
    own.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // local)))
    own.setdefault("TOKENIZERS_PARALLELISM", "false")
    # When the parent process is gone, torch would print a stack of C++ frames; the rank prints a sentence.
    own.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if placement.launcher == "local" and not accelerators():
        own.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed prints that it has chosen it
    own["PYTHONPATH"] = os.pathsep.join([str(PACKAGES), *filter(None, [own.get("PYTHONPATH")])])
    return own


def end(process: "subprocess.Popen[bytes] | None", control: Control, remote: bool) -> None:
    """End the launchers and every rank. Ranks on other machines that cannot be told end when the store is gone."""
    if process is None or not alive(process):
        return
    before = signal.signal(signal.SIGINT, ignore)  # ending takes seconds, and a second Ctrl-C must not interrupt it
    try:
        control.count("stop")
        # The store tells the ranks to stop first, as pdsh and srun may lose the machines when they are ended.
        if remote:
            wait_for_end(process)
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            if wait_for_end(process):
                return
    finally:
        signal.signal(signal.SIGINT, before)


def wait_for_end(process: "subprocess.Popen[bytes]") -> bool:
    """Wait up to END_SECONDS for the launcher's process group to end; returns whether it did."""
    limit = time.monotonic() + END_SECONDS
    while alive(process) and time.monotonic() < limit:
        time.sleep(0.05)
    return not alive(process)


def alive(process: "subprocess.Popen[bytes]") -> bool:
    """Whether any process of the launcher's group still runs."""
    process.poll()
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    # In a container a process whose parent is gone may stay a zombie for ever; zombies do not count.
    for number in psutil.pids():
        with contextlib.suppress(ProcessLookupError, psutil.Error):
            if os.getpgid(number) == process.pid and psutil.Process(number).status() != psutil.STATUS_ZOMBIE:
                return True
    return False


# -- watching -------------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """The last report and sign of life of a rank, with their times in seconds of the watch's own clock."""

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
    """Wait until the launcher has ended or a rank cannot go on.

    Args:
        timeout: seconds that a rank may take for one step.
        remote: whether ranks are on other machines, where pdsh keeps running if one of several machines fails.

    Raises:
        Problem: a rank hangs, died, or gives no sign of life.
    """
    clock, before = 0.0, time.monotonic()
    seen = [Seen() for _ in range(ranks)]
    while process.poll() is None:
        # Time in which this process was stopped (Ctrl-Z) does not count, because the ranks waited for it.
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
        time.sleep(max(POLL_SECONDS, ranks * POLL_SECONDS / 10))  # longer for many ranks, to save work


def check(rank: Seen, number: int, ranks: int, clock: float, timeout: float, remote: bool) -> None:
    """Raise Problem if a rank has not started, hangs, or is lost."""
    silent = clock - rank.reported
    if rank.report is None:
        if silent > max(timeout, START_SECONDS):
            raise Problem(f"Rank {number} of {ranks} has not started within {silent:.0f} s, so all ranks were stopped.")
    elif rank.report["phase"] in WATCHED and silent > timeout:
        raise Problem(f"{describe(number, ranks, rank.report)} for {timeout:g} s, so all ranks were stopped.")
    elif remote and rank.report["phase"] != FINISHED and clock - rank.lived > LOST_SECONDS:
        raise Problem(f"{describe(number, ranks, rank.report, 'was lost')}, so all ranks were stopped.")


def died(control: Control, number: int, report: dict[str, Any] | None) -> bool:
    """Whether a rank on this machine ended without reporting its end."""
    if report is None:
        return False
    try:
        if psutil.Process(report["process"]).status() != psutil.STATUS_ZOMBIE:
            return False
    except psutil.NoSuchProcess:
        pass
    last = control.peek(f"rank{number}")  # may be newer than `report`
    return last["phase"] not in ENDED


def outcome(control: Control, ranks: int, by_ssh: bool = False) -> int:
    """The exit code of ranks that have ended.

    Args:
        by_ssh: whether pdsh started them on the machines of a hostfile.

    Raises:
        Problem: not all of them finished.
    """
    reports = [control.peek(f"rank{number}") for number in range(ranks)]
    phases = [report["phase"] if report else None for report in reports]
    if all(phase == FINISHED for phase in phases):
        return int(max(report["code"] for report in reports))
    failed = [report for report, phase in zip(reports, phases, strict=True) if phase == FAILED]
    if failed:
        first = min(failed, key=lambda report: report["number"])
        raise Problem(first["reason"], first["code"])
    if not any(phases):
        advice = "; see that `ssh HOST true` works without a password for every machine of HOSTFILE" if by_ssh else ""
        raise Problem(f"None of the {ranks} ranks has started{advice}.")
    # Ranks that were told to stop have reported it; a rank that died could not.
    for number, (report, phase) in enumerate(zip(reports, phases, strict=True)):
        if phase not in (STOPPED, FINISHED):
            raise Problem(f"{describe(number, ranks, report, 'died')}, so all ranks were stopped.")
    raise Problem("The ranks were stopped from outside.")


def describe(number: int, ranks: int, report: dict[str, Any] | None, verb: str = "hung") -> str:
    """What happened to a rank: "Rank 1 of 2 (node1, process 4711) hung while it was asking question 20151"."""
    if report is None:
        return f"Rank {number} of {ranks} {verb} before it had started"
    where = f"Rank {number} of {ranks} ({report['host']}, process {report['process']})"
    questions = report["questions"]
    if not questions:
        return f"{where} {verb} while it was {report['phase']}"
    more = f" and {len(questions) - SHOWN} more" if len(questions) > SHOWN else ""
    noun = "question" if len(questions) == 1 else "questions"
    return f"{where} {verb} while it was asking {noun} {', '.join(questions[:SHOWN])}{more}"
