"""Lines between a parent process and a worker that measures when it is told to.

    worker -> parent    {"ready": "what it runs", ...}              once, with whatever the result should record
    parent -> worker    measure
    worker -> parent    {"seconds": {"name": 1.23, ...}}            one measurement of each thing that it runs
    parent -> worker    end of input                                the worker ends

Lines go over the worker's standard input and output. Lines of a worker that do not begin with "{" are skipped: codes
print. A worker measures nothing between two requests, so at most one of two workers is busy.
"""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any, Self, TextIO

from llava.errors import UserError

REQUEST = "measure"


class Worker:
    """A worker process, as its parent sees it.

    Args:
        command: the worker's command line.
        threads: threads of its CPU operations (OMP_NUM_THREADS).

    Raises:
        UserError: the command cannot be started, the worker ended early, or its line is not one of the protocol.
    """

    def __init__(self, command: str, threads: int):
        self.command = command
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        try:
            self.process = subprocess.Popen(
                shlex.split(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
            )
        except (OSError, ValueError) as error:
            raise UserError(f"The worker {command!r} cannot be started: {error}.") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End the worker: it reads the end of its input; one that does not end by itself is killed."""
        assert self.process.stdin and self.process.stdout
        self.process.stdout.close()
        try:
            self.process.stdin.close()
            self.process.wait(timeout=10)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()

    def ready(self) -> dict[str, Any]:
        """What the worker says of itself, once its model is built."""
        return self._read("ready")

    def measure(self) -> dict[str, float]:
        """One measurement: seconds by name.

        Raises:
            UserError: also where there is no number, or one that is no positive time.
        """
        assert self.process.stdin
        try:
            self.process.stdin.write(f"{REQUEST}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        seconds = self._read("seconds")["seconds"]
        if not isinstance(seconds, dict) or not seconds or not all(_is_time(value) for value in seconds.values()):
            raise UserError(f"The worker {self.command!r} answered {seconds!r}, not seconds above 0 by name.")
        return {name: float(value) for name, value in seconds.items()}

    def _read(self, key: str) -> dict[str, Any]:
        """The worker's next line of the protocol, which must have `key`."""
        assert self.process.stdout
        for line in self.process.stdout:
            if not line.startswith("{"):
                continue
            try:
                found = json.loads(line)
            except ValueError:
                found = {}
            if key not in found:
                raise UserError(f"The worker {self.command!r} wrote {line.strip()[:200]!r}, not JSON with {key!r}.")
            return found
        raise self._ended()

    def _ended(self) -> UserError:
        code = self.process.wait()
        return UserError(f"The worker {self.command!r} ended with exit code {code}; its own words are above.")


def serve(ready: Mapping[str, Any], measure: Callable[[], Mapping[str, float]], output: TextIO | None = None) -> None:
    """Be a worker: say what is run, then measure once per request until the input ends.

    Args:
        ready: has the key "ready"; goes into the result.
        measure: seconds by name.
        output: where the lines go; standard output if left out.
    """
    output = output or sys.stdout
    print(json.dumps(ready), file=output, flush=True)
    for line in sys.stdin:
        if line.strip() == REQUEST:
            print(json.dumps({"seconds": dict(measure())}), file=output, flush=True)


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and 0 < value < float("inf")
