"""Count the code that one answer runs through, as a measure of how much a reader has to follow.

    python scripts/dev/code_path.py fastervlm 64 [--list]

It counts the project's functions (without lambdas and comprehensions), their files, and the calls that enter another
file, inside `llava.pipeline.generate.generate` for one question about one image in one tile, after one warm-up.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from eval.command import exit_on_user_error, value
from eval.config import count
from llava.places import PACKAGES


@dataclass(frozen=True)
class CodePath:
    """The code that a call ran through.

    Attributes:
        functions: (file, qualified name) of every function of the project that was called.
        crossings: number of calls from one file of the project into another.
    """

    functions: frozenset[tuple[str, str]]
    crossings: int

    @property
    def files(self) -> frozenset[str]:
        return frozenset(file for file, _ in self.functions)


def trace(call: Callable[[], object], root: Path = PACKAGES) -> CodePath:
    """Run `call` and collect the functions below `root` that it calls."""
    packages = f"{root}/"
    functions: set[tuple[str, str]] = set()
    running: list[str] = []
    crossings = 0

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal crossings
        file, name = frame.f_code.co_filename, frame.f_code.co_qualname
        if not file.startswith(packages) or "/site-packages/" in file:
            return
        if event == "return" and running:
            running.pop()
        elif event == "call":
            crossings += bool(running) and running[-1] != file
            running.append(file)
            if "<" not in name.rpartition(".")[2]:
                functions.add((file.removeprefix(packages), name))

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return CodePath(frozenset(functions), crossings)


def code_path(method: str, budget: int | None) -> CodePath:
    """The code path of one answer of the bundled toy model."""
    from PIL import Image

    from llava import load
    from llava.pipeline.generate import generate
    from llava.processing.prompt import Sample
    from llava.reduction import registry

    model = load(device="cpu")
    reducer = registry.build(method, budget or model.visual_tokens)
    sample = Sample("q", "What color is the square?", "Answer with one word.", Image.new("RGB", (336, 336)))
    generate(model, [sample], reducer)
    return trace(lambda: generate(model, [sample], reducer))


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("method")
    parser.add_argument("budget", nargs="?", type=value(count), help="visual tokens to keep; left out for all")
    parser.add_argument("--list", action="store_true", help="also list the functions by file")
    args = parser.parse_args(arguments)
    path = code_path(args.method, args.budget)
    if args.list:
        for file, name in sorted(path.functions):
            print(f"{file:60} {name}")
    counted = f"{len(path.functions)} functions, {len(path.files)} files"
    print(f"{args.method}: {counted}, {path.crossings} calls into another file")
    return 0


if __name__ == "__main__":
    sys.exit(main())
