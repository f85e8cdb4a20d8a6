"""Evaluations with several ranks that are forked: importing torch in every rank would take most of a test's time.

The processes are those of a real run: the one that the user starts (tests/fake_evaluation.py), a launcher that does
what DeepSpeed's does (it starts the ranks, and ends all of them when one has failed), and the ranks.
tests/test_ranks.py starts DeepSpeed's own launcher.

They are forked by a process of its own, `python -m tests.forked_ranks`, that has imported everything and runs no
threads: a process with threads cannot be forked safely. Every fork has a tqdm lock of its own: tqdm's is one of
multiprocessing, which siblings share, and a rank that is killed while it holds it would block all others for ever.
"""

import base64
import contextlib
import inspect
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, Self

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 300  # seconds; a busy machine may be ten times slower than an idle one


@dataclass(frozen=True)
class Ended:
    """A command that has ended.

    Attributes:
        orphans: whether a process of it was left.
    """

    code: int
    out: str
    err: str
    orphans: bool


class ForkServer:
    """The process that forks evaluations."""

    def __init__(self) -> None:
        own = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        command = [sys.executable, "-m", "tests.forked_ranks"]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, cwd=ROOT, env=own, **pipes)

    def ask(self, **request: Any) -> Any:
        """Send a request of `serve` and return its answer."""
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        ready = select.select([self._process.stdout], [], [], PATIENCE)[0]
        assert ready, f"no answer of the fork server after {PATIENCE} s to {request}"
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


class Evaluation:
    """A command that runs; all its processes end with the context."""

    def __init__(
        self, server: ForkServer, folder: Path, words: Sequence[str], ranks: int, fault: Mapping[str, Any] | None = None
    ):
        """
        Args:
            folder: of the store; files beside it hold what the command prints and the numbers of its processes.
            words: flags.
            fault: see tests/fake_evaluation.py.
        """
        self.folder = folder
        for name in FILES:
            Path(f"{folder}.{name}").write_text("")
        # Every process inherits the end for writing: the other end is at its end once all of them have ended.
        fifo = Path(f"{folder}.end")
        fifo.unlink(missing_ok=True)
        os.mkfifo(fifo)
        self._end = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        self._server, self._code = server, None
        self.process: int = server.ask(start=list(words), folder=str(folder), ranks=ranks, fault=dict(fault or {}))

    def pid(self, role: str) -> int | None:
        """Number of a process: "launcher" or "rank1"; None before it was started."""
        return dict(line.split() for line in Path(f"{self.folder}.processes").read_text().splitlines()).get(role)

    def until(self, ready: Callable[[], bool]) -> bool:
        """Wait for a moment of the run; False if the run ends before."""
        limit = time.monotonic() + PATIENCE
        while not ready():
            if self._ended():
                return ready()
            assert time.monotonic() < limit, self._late(inspect.getsource(ready).strip())
            time.sleep(0.002)
        return True

    def _late(self, moment: str) -> str:
        """What was waited for, for how long, and what the run was doing."""
        state = f"{self.answered()} answers, processes {Path(f'{self.folder}.processes').read_text().split()}"
        said = Path(f"{self.folder}.err").read_text()[-2000:]
        return f"after {PATIENCE} s still waiting for: {moment}; {state}; it said: {said}"

    def answered(self) -> int:
        """Answers on the disk."""
        paths = [self.folder / "answers.jsonl"]
        with contextlib.suppress(FileNotFoundError):  # the folder goes with its last shard
            paths += self.folder.glob("shards/*/answers.jsonl")
        count = 0
        for path in paths:
            with contextlib.suppress(FileNotFoundError):  # a merge may end meanwhile
                count += path.read_bytes().count(b"\n")
        return count

    def kill(self, role: str) -> None:
        """SIGKILL to a process."""
        self.send(signal.SIGKILL, role)

    def send(self, number: signal.Signals, role: str = "command") -> None:
        pid = self.process if role == "command" else self.pid(role)
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), number)

    def kill_all(self) -> None:
        """SIGKILL to every process."""
        if not self._ended():
            self.send(signal.SIGKILL)
        while not self._gone(0.05):
            for role in ("launcher", "rank0", "rank1", "rank2", "rank3"):
                if self.pid(role):
                    self.kill(role)

    def end(self, wait: float = 60) -> Ended:
        """Wait for the command, and then for its other processes, at most `wait` seconds."""
        limit = time.monotonic() + PATIENCE
        while not self._ended():
            assert time.monotonic() < limit, self._late("the end of the command")
            time.sleep(0.01)
        orphans = not self._gone(wait)
        out, err = (Path(f"{self.folder}.{name}").read_text() for name in ("out", "err"))
        return Ended(self._code, out, err, orphans)

    def _ended(self) -> bool:
        if self._code is None:
            self._code = self._server.ask(poll=self.process)
        return self._code is not None

    def _gone(self, wait: float) -> bool:
        """Whether all processes end in time."""
        return bool(select.select([self._end], [], [], wait)[0])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill_all()
        os.close(self._end)


# What stands beside the folder of a store: numbers of processes, and what the command prints.
FILES = ("processes", "out", "err")


def serve() -> None:
    """Answer requests, one JSON object a line, until the input ends.

    here    flags: run an evaluation in this process, so that all is imported; answers its exit code
    start   flags, with folder, ranks and fault: fork an evaluation; answers its process number
    poll    process number: answers its exit code, null while it runs
    """
    os.register_at_fork(after_in_child=lambda: tqdm.set_lock(threading.RLock()))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        if "here" in request:
            answer = evaluate(request["here"], 1, {})
        elif "poll" in request:
            number, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if number else None
        else:
            inherited = os.open(f"{request['folder']}.end", os.O_WRONLY)
            answer = os.fork()
            if answer == 0:
                become_the_command(request, inherited)
            os.close(inherited)
        print(json.dumps(answer), file=answers, flush=True)


def evaluate(words: Sequence[str], ranks: int, fault: Mapping[str, Any]) -> int:
    """Run the command line in this process; returns the exit code."""
    from tests import fake_evaluation

    os.environ.update({"RANKS": str(ranks), "FAULT": json.dumps(fault)})
    return fake_evaluation.main(words)


def become_the_command(request: dict[str, Any], inherited: int) -> NoReturn:
    from eval.parallel import launch

    code, folder = 70, request["folder"]
    try:
        os.setsid()
        for number, name in enumerate(("out", "err"), start=1):
            os.dup2(os.open(f"{folder}.{name}", os.O_WRONLY | os.O_APPEND), number)
        # Line by line: what is still in a buffer would be printed again by every process that is forked later.
        sys.stdout = open(1, "w", 1, closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", 1, closefd=False)  # noqa: SIM115
        signal.signal(signal.SIGINT, signal.default_int_handler)
        launch.END_SECONDS = 4
        fork = SimpleNamespace(Popen=lambda *a, **k: Launcher(Path(f"{folder}.processes"), inherited, *a, **k))
        launch.subprocess = fork
        code = evaluate(request["start"], request["ranks"], request["fault"])
    except SystemExit as error:
        code = error.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Launcher:
    """In place of subprocess.Popen for DeepSpeed's launcher: forks the ranks."""

    def __init__(
        self, processes: Path, inherited: int, command: Sequence[str], env: Mapping[str, str], start_new_session: bool
    ):
        (world,) = [word.removeprefix("--world_info=") for word in command if word.startswith("--world_info=")]
        self._processes, self._children, self._code = processes, {}, None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            # The sockets of the command must close when it dies.
            os.closerange(3, inherited)
            os.closerange(inherited + 1, 4096)
            os.environ.update(env)
            (devices,) = json.loads(base64.urlsafe_b64decode(world)).values()
            self._start(len(devices), command[-1])

    def _note(self, role: str) -> None:
        with open(self._processes, "a") as file:
            file.write(f"{role} {os.getpid()}\n")

    def _start(self, world: int, address: str) -> NoReturn:
        self._note("launcher")
        signal.signal(signal.SIGTERM, self._stop)
        for number in range(world):
            child = os.fork()
            if child == 0:
                self._become_a_rank(number, world, address)
            self._children[child] = number
        while self._children:
            child, status = os.waitpid(-1, os.WNOHANG)
            if child == 0:
                time.sleep(0.05)
                continue
            del self._children[child]
            if status:
                self._stop()
        os._exit(0)

    def _stop(self, *signal_and_frame: object) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for child in self._children:
            os.kill(child, signal.SIGTERM)
        for child in self._children:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child, 0)
        os._exit(1)

    def _become_a_rank(self, number: int, world: int, address: str) -> NoReturn:
        from eval.parallel import worker

        code = 70
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            own = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": world, "LOCAL_SIZE": world}
            os.environ.update({name: str(value) for name, value in own.items()})
            self._note(f"rank{number}")
            code = worker.main([address])
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def poll(self) -> int | None:
        if self._code is None:
            number, status = os.waitpid(self.pid, os.WNOHANG)
            if number:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code


if __name__ == "__main__":
    serve()
