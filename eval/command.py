"""What all command lines share: one-sentence errors, signals, output as JSON, and the flags that choose questions."""

import argparse
import contextlib
import functools
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn, ParamSpec
from unittest import mock

from tqdm import tqdm

from eval import benchmarks
from eval.answers.jsonl import write_json
from eval.benchmarks.base import PROFILES, SOURCES, Dataset
from eval.config import DEFAULT_DATA, path_name
from eval.judging.choice import HELP as JUDGE_HELP
from eval.parallel import ranks
from llava.errors import UserError

P = ParamSpec("P")
# argparse's message after an error in a function made by `value`.
VALUE_ERROR = re.compile(r"argument (?P<flag>\S+): (?P<problem>should .*)", re.DOTALL)


class Parser(argparse.ArgumentParser):
    """A parser that reports wrong flags as UserError, in one sentence."""

    def error(self, message: str) -> NoReturn:
        if found := VALUE_ERROR.fullmatch(message):
            raise UserError(f"{found['flag']} {found['problem']}.")
        raise UserError(f"{message[:1].upper()}{message[1:]}; see --help.")


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a flag's default only if there is one, because "(default: None)" says nothing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default else action.help


def make_parser(module: str, documentation: str | None) -> Parser:
    """The parser of `python -m MODULE`, described by the first line of its documentation.

    The usage line names the `vtr` command, if that started the module.
    """
    return Parser(
        prog=sys.argv[0] if sys.argv[0].startswith("vtr ") else f"python -m {module}",
        description=(documentation or "").partition("\n")[0],
        formatter_class=Help,
        allow_abbrev=False,
    )


def value(read: Callable[..., Any], **limits: Any) -> Callable[[str], Any]:
    """Make a reader of eval.config an argparse `type`; its ValueError is printed after the flag's name."""

    def checked(text: str) -> Any:
        try:
            return read(text, **limits)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return checked


class Terminated(KeyboardInterrupt):
    """Raised for SIGTERM, which ends a command like Ctrl-C."""


STOPS = (signal.SIGINT, signal.SIGTERM)


def ignore(number: int, frame: object) -> None:
    """A handler that does nothing; with SIG_IGN Python would print an error for a signal that has already come."""


def terminate(number: int, frame: object) -> NoReturn:
    """A handler of STOPS: the first signal ends the command in order, and further ones are ignored."""
    for one in STOPS:
        signal.signal(one, ignore)
    sys.unraisablehook = send_again
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def send_again(lost: "sys.UnraisableHookArgs") -> None:
    """A hook for exceptions that Python drops, in `__del__` and in callbacks of weak references.

    The exception of a signal that comes just then is dropped too, and the command could not be stopped any more. The
    signal is therefore sent once more after the callback.
    """
    if not isinstance(lost.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(lost)
        return
    number = signal.SIGTERM if isinstance(lost.exc_value, Terminated) else signal.SIGINT
    again = threading.Timer(0.05, os.kill, (os.getpid(), number))
    again.daemon = True
    again.start()
    signal.signal(number, terminate)


@contextlib.contextmanager
def stopping_once() -> Iterator[None]:
    """Handle STOPS by `terminate`, so that a second Ctrl-C does not interrupt what the first one has begun."""
    main_thread = threading.current_thread() is threading.main_thread()
    # Signals stay as they are if this is done already, or if SIGINT is ignored, as in a shell's background jobs.
    others = (signal.SIG_IGN, terminate, ignore)
    taken = [number for number in STOPS if main_thread and signal.getsignal(number) not in others]
    before, hook = {number: signal.signal(number, terminate) for number in taken}, sys.unraisablehook
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            if signal.getsignal(number) in (terminate, ignore):
                signal.signal(number, handler)


def exit_on_user_error(main: Callable[P, int]) -> Callable[P, int]:
    """Decorate a command line so that a user error or signal prints one sentence; exit code 2, or 130 and 143."""

    @functools.wraps(main)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> int:
        with stopping_once():
            try:
                return main(*args, **kwargs)
            except (UserError, KeyboardInterrupt) as error:
                if not ranks.current().alone:
                    raise  # eval.parallel.worker reports it to the parent process, which prints it once
                if isinstance(error, UserError):
                    print(error, file=sys.stderr)
                    return 2
                print(f"\n{str(error) or 'Stopped; run the same command again.'}", file=sys.stderr)
                return 143 if isinstance(error.__cause__ or error, Terminated) else 130

    return guarded


def add_data_flags(p: argparse.ArgumentParser) -> None:
    """Add --data, --split, --profile and --source, as `open_dataset` reads them, and --judge."""
    p.add_argument(
        "--data",
        type=value(path_name),
        default=str(DEFAULT_DATA),
        help="folder that holds the benchmarks, one folder each",
    )
    p.add_argument("--split", help="split of the benchmark; by default the first that is there")
    p.add_argument(
        "--profile", choices=PROFILES, help="ask and score as LLaVA's scripts or as lmms-eval; default: llava"
    )
    p.add_argument(
        "--source", default="auto", choices=SOURCES, help="official files, or the mirror on the hub (or its local copy)"
    )
    p.add_argument("--judge", default="auto", metavar="JUDGE", help=JUDGE_HELP)


STDOUT = "-"  # value of --json without a file name


def add_json_flag(p: argparse.ArgumentParser, keys: str) -> None:
    """Add --json [OUT], as `print_record` reads it.

    Args:
        keys: keys of the record, for the help.
    """
    p.add_argument(
        "--json",
        nargs="?",
        const=STDOUT,
        type=value(path_name),
        metavar="OUT",
        help="write the numbers as JSON to the file OUT as well; as the last word, without OUT, print JSON alone. "
        f"Keys: {keys}",
    )


def print_record(record: Any, lines: Iterable[str], place: str | None) -> None:
    """Print a result as lines of text, or as JSON alone.

    Args:
        place: the value of --json: a file to which the record is also written, STDOUT for JSON alone, or None.
    """
    if place == STDOUT:
        print(json.dumps(record, indent=1, allow_nan=False))
        return
    if place and Path(place).is_dir():
        raise UserError(f"--json {place} is a folder; name a file, or put --json at the end to print the JSON alone.")
    print("\n".join(lines))
    if place:
        write_json(Path(place), record)


def without_bars() -> contextlib.AbstractContextManager[Any]:
    """A context without progress bars, neither ours nor those of libraries that use tqdm."""
    return mock.patch.object(tqdm, "__init__", functools.partialmethod(tqdm.__init__, disable=True))


def open_dataset(name: str, data: str, split: str | None, profile: str | None, source: str) -> Dataset:
    """The data set that the flags of `add_data_flags` name."""
    benchmark, folder = benchmarks.get(name), Path(data)
    return benchmark.load(
        folder, benchmarks.check_split(benchmark, split, folder), benchmarks.check_profile(benchmark, profile), source
    )
