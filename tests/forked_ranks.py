"""Evaluations with several ranks that are forked: importing torch in every rank would take most of a test's time.

The processes are those of a real run: the one that the user starts (tests/fake_evaluation.py), a launcher that does
what DeepSpeed's does (it starts the ranks, and ends all of them when one has failed), and the ranks.
tests/test_ranks.py starts DeepSpeed's own launcher.
"""

import base64
import contextlib
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, Self

from eval.parallel import launch, worker
from tests import fake_evaluation

PATIENCE = 120


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


class Evaluation:
    """A command that runs; all its processes end with the context."""

    def __init__(self, folder: Path, words: Sequence[str], ranks: int, fault: Mapping[str, Any] | None = None):
        """
        Args:
            folder: of the store; files beside it hold what the command prints and the numbers of its processes.
            words: flags.
            fault: see tests/fake_evaluation.py.
        """
        self.folder = folder
        self._processes = Path(f"{folder}.processes")
        for path in self._files():
            path.write_text("")
        # Every process inherits the end for writing: the other end is at its end once all of them have ended.
        self._end, inherited = os.pipe()
        self.process = os.fork()
        if self.process == 0:
            self._become_the_command(words, ranks, fault or {}, inherited)
        os.close(inherited)
        self._code: int | None = None

    def _files(self) -> list[Path]:
        return [self._processes, Path(f"{self.folder}.out"), Path(f"{self.folder}.err")]

    def _become_the_command(
        self, words: Sequence[str], ranks: int, fault: Mapping[str, Any], inherited: int
    ) -> NoReturn:
        code = 70
        try:
            os.setsid()
            for number, path in enumerate(self._files()[1:], start=1):
                os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
            # Line by line: what is still in a buffer would be printed again by every process that is forked later.
            sys.stdout = open(1, "w", 1, closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", 1, closefd=False)  # noqa: SIM115
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.environ.update({"RANKS": str(ranks), "FAULT": json.dumps(fault), "OMP_NUM_THREADS": "1"})
            launch.END_SECONDS = 4
            launch.subprocess = SimpleNamespace(Popen=lambda *a, **k: Launcher(self._note, inherited, *a, **k))
            code = fake_evaluation.main(words)
        except SystemExit as error:
            code = error.code
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _note(self, role: str) -> None:
        with open(self._processes, "a") as file:
            file.write(f"{role} {os.getpid()}\n")

    def pid(self, role: str) -> int | None:
        """Number of a process: "launcher" or "rank1"; None before it was started."""
        return dict(line.split() for line in self._processes.read_text().splitlines()).get(role)

    def until(self, ready: Callable[[], bool]) -> bool:
        """Wait for a moment of the run; False if the run ends before."""
        limit = time.monotonic() + PATIENCE
        while not ready():
            if self._ended():
                return ready()
            assert time.monotonic() < limit, "the moment did not come"
            time.sleep(0.002)
        return True

    def answered(self) -> int:
        """Answers on the disk."""
        paths = [self.folder / "answers.jsonl", *self.folder.glob("shards/*/answers.jsonl")]
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

    def end(self, wait: float = 10) -> Ended:
        """Wait for the command, and then for its other processes, at most `wait` seconds."""
        limit = time.monotonic() + PATIENCE
        while not self._ended():
            assert time.monotonic() < limit, "the command does not end"
            time.sleep(0.01)
        orphans = not self._gone(wait)
        out, err = (path.read_text() for path in self._files()[1:])
        return Ended(self._code, out, err, orphans)

    def _ended(self) -> bool:
        if self._code is None:
            number, status = os.waitpid(self.process, os.WNOHANG)
            if number:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code is not None

    def _gone(self, wait: float) -> bool:
        """Whether all processes end in time."""
        return bool(select.select([self._end], [], [], wait)[0])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill_all()
        os.close(self._end)


class Launcher:
    """In place of subprocess.Popen for DeepSpeed's launcher: forks the ranks."""

    def __init__(
        self,
        note: Callable[[str], None],
        inherited: int,
        command: Sequence[str],
        env: Mapping[str, str],
        start_new_session: bool,
    ):
        (world,) = [word.removeprefix("--world_info=") for word in command if word.startswith("--world_info=")]
        self._note, self._children, self._code = note, {}, None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            # The sockets of the command must close when it dies.
            os.closerange(3, inherited)
            os.closerange(inherited + 1, 4096)
            os.environ.update(env)
            (devices,) = json.loads(base64.urlsafe_b64decode(world)).values()
            self._start(len(devices), command[-1])

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
