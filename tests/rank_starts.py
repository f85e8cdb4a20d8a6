"""Start commands with several ranks in tests, disturb them, and see that no process of theirs is left."""

import contextlib
import inspect
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil

from eval.config import ROOT

MARK = "TEST_OF_RANKS"
# A start takes seconds on an idle machine; a busy one may be ten times slower.
PATIENCE = 300


@dataclass
class Start:
    """A command that starts ranks.

    Every process of it inherits a mark in its environment, by which it is found wherever it is.
    """

    process: "subprocess.Popen[bytes]"
    mark: str
    folder: Path

    def living(self) -> list[psutil.Process]:
        """Every process of the command, the first one too."""
        return [process for process in psutil.process_iter() if belongs(process, self.mark)]

    def rank(self, number: int) -> psutil.Process:
        """A rank that runs."""
        (found,) = [
            process
            for process in self.living()
            if words(process)[2:4] == ["-m", "eval.parallel.worker"] and process.environ()["RANK"] == str(number)
        ]
        return found

    def until(self, ready: Callable[[], bool]) -> bool:
        """Wait for a moment of the command; False if it has ended before."""
        limit = time.monotonic() + PATIENCE
        while not ready():
            if self.process.poll() is not None:
                return ready()
            assert time.monotonic() < limit, (
                f"after {PATIENCE} s still waiting for: {inspect.getsource(ready).strip()}; "
                f"it said: {Path(f'{self.folder}.err').read_text()[-2000:]}"
            )
            time.sleep(0.005)
        return True

    def kill_all(self) -> None:
        """SIGKILL to every process, again until none is left: one may have started another meanwhile."""
        while living := self.living():
            for process in living:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(0.02)

    def end(self, wait: float = 60) -> "Ended":
        """Wait for the command and then for its last process, at most `wait` seconds."""
        code = self.process.wait(PATIENCE)
        ended = time.monotonic()
        while (left := self.living()) and time.monotonic() < ended + wait:
            time.sleep(0.05)
        texts = [" ".join(words(process)) for process in left]
        self.kill_all()
        out, err = (Path(f"{self.folder}.{name}").read_text() for name in ("out", "err"))
        return Ended(code, out, err, texts, self.folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill_all()
        self.process.wait()


@dataclass(frozen=True)
class Ended:
    """A command that has ended.

    Attributes:
        left: command lines of its processes that have not ended.
    """

    code: int
    out: str
    err: str
    left: list[str]
    folder: Path


def start(
    folder: Path, *arguments: str, environment: Mapping[str, str] | None = None, before: Sequence[str] = ()
) -> Start:
    """Start `python -m ARGUMENTS`, behind the words of another program, with its output in files beside the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex
    own = {**os.environ, MARK: mark, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", **(environment or {})}
    command = [*before, sys.executable, "-m", *arguments]
    with open(f"{folder}.out", "w") as out, open(f"{folder}.err", "w") as err:
        process = subprocess.Popen(command, cwd=ROOT, env=own, stdout=out, stderr=err, start_new_session=True)
    return Start(process, mark, folder)


def belongs(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, OSError):
        return False


def words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


# Stand-ins for pdsh, srun and scontrol that run the commands of all machines on this one. As with the real programs,
# processes on the "machines" outlive pdsh: they run in sessions of their own.
PDSH = """
import subprocess, sys
words = sys.argv[1:]
hosts = words[words.index("-w") + 1].split(",")
assert words[:5] == ["-S", "-N", "-R", "ssh", "-f"], words
commands = [words[-1].replace("%n", str(number)).replace("%h", host) for number, host in enumerate(hosts)]
started = [subprocess.Popen(["bash", "-c", command], start_new_session=True) for command in commands]
sys.exit(max(abs(process.wait()) for process in started))
"""
SRUN = """
import os, signal, subprocess, sys, time
words = sys.argv[1:]
flags = [word for word in words if word.startswith("--")][:4]
count = int(flags[0].removeprefix("--nodes="))
assert flags[1:] == [f"--ntasks={count}", "--ntasks-per-node=1", "--kill-on-bad-exit=1"], flags
command = words[4:]
started = [subprocess.Popen(command, env={**os.environ, "SLURM_NODEID": str(number)}, start_new_session=True)
           for number in range(count)]
def end(number, frame):
    for process in started:
        process.terminate()
signal.signal(signal.SIGTERM, end)
worst = 0
while any(process.poll() is None for process in started):
    if not worst and any(process.poll() for process in started):
        end(None, None)
    worst = max([worst, *(abs(process.poll() or 0) for process in started)])
    time.sleep(0.05)
sys.exit(max(abs(process.poll()) for process in started))
"""
SCONTROL = """
import sys
assert sys.argv[1:] == ["show", "hostnames", "fake[1-2]"], sys.argv
print("fake1\\nfake2")
"""


def write_programs(folder: Path) -> dict[str, str]:
    """Write the programs; returns the environment in which they are found."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, code in (("pdsh", PDSH), ("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(f"#!{sys.executable}\n{code}")
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
