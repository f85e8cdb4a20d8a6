"""Count the code that one answer runs through: how much a reader has to follow.

    python -m eval.efficiency.code_path fastervlm 64

Counts, inside `llava.pipeline.generate.generate` for one question about one image in one tile, after one warm-up: the
project's functions (without lambdas and comprehensions), their files, and the calls that enter another file.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from eval.command import exit_on_user_error, make_parser, value
from eval.config import ROOT, count


@dataclass(frozen=True)
class CodePath:
    """What a call runs through.

    Attributes:
        functions: (file, qualified name) of every function of the project that was called.
        switches: calls into another file of the project than the one that was running.
    """

    functions: frozenset[tuple[str, str]]
    switches: int

    @property
    def files(self) -> frozenset[str]:
        return frozenset(file for file, _ in self.functions)


def trace(call: Callable[[], object], root: Path = ROOT) -> CodePath:
    """Run `call` and collect the functions of the files below `root` that it calls."""
    packages = f"{root}/"
    functions: set[tuple[str, str]] = set()
    running: list[str] = []
    switches = 0

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal switches
        file, name = frame.f_code.co_filename, frame.f_code.co_qualname
        if not file.startswith(packages) or "/site-packages/" in file:
            return
        if event == "return" and running:
            running.pop()
        elif event == "call":
            switches += bool(running) and running[-1] != file
            running.append(file)
            if "<" not in name.rpartition(".")[2]:
                functions.add((file.removeprefix(packages), name))

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return CodePath(frozenset(functions), switches)


def code_path(method: str, budget: int | None) -> CodePath:
    """The code path of one answer of the bundled toy model."""
    from PIL import Image

    from llava import load
    from llava.pipeline.generate import generate
    from llava.processing.sample import Sample
    from llava.reduction import registry

    model = load(device="cpu")
    reducer = registry.build(method, budget or model.visual_tokens)
    sample = Sample("q", "What color is the square?", "Answer with one word.", Image.new("RGB", (336, 336)))
    generate(model, [sample], reducer)
    return trace(lambda: generate(model, [sample], reducer))


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = make_parser("eval.efficiency.code_path", __doc__ or "")
    parser.add_argument("method")
    parser.add_argument("budget", nargs="?", type=value(count), help="visual tokens to keep; left out for all")
    parser.add_argument("--list", action="store_true", help="also list the functions by file")
    args = parser.parse_args(arguments)
    found = code_path(args.method, args.budget)
    if args.list:
        for file, name in sorted(found.functions):
            print(f"{file:60} {name}")
    print(f"{args.method}: {len(found.functions)} functions, {len(found.files)} files, {found.switches} switches")
    return 0


if __name__ == "__main__":
    sys.exit(main())
