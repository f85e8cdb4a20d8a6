"""The console command `vtr`, which runs every command line of the repository.

    vtr eval --method consensusdrop --budget 64
    vtr show methods

`pip install -e .` installs it; `python -m eval.cli` does the same. A command's module is imported only when the command
runs, so help and typing mistakes cost no time.
"""

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from llava.errors import UserError, optional_imports, suggestion
from llava.places import CHECKOUT

PROGRAM = "vtr"


@dataclass(frozen=True)
class Command:
    """A sub-command.

    Attributes:
        module: imported when the command runs.
        summary: the command's line in `vtr --help`.
        arguments: put before those of the user.
        function: function of the module that reads `sys.argv` and returns the exit code.
    """

    module: str
    summary: str
    arguments: tuple[str, ...] = ()
    function: str = "main"


TABLE, DASHBOARD = "eval.papers.table", "eval.tracking.dashboard"
# Heading in `vtr --help` -> the words after `vtr` -> command.
GROUPS = {
    "Use: questions, scores and pages": {
        "eval": Command("eval.__main__", "evaluate one method at one budget on one benchmark"),
        "score": Command("eval.score", "score a file of answers, without a model"),
        "compare": Command("eval.score", "paired test between two runs", function="compare_command"),
        "stats": Command("eval.statistics.command", "tokens needed, loyalty and hard questions of finished runs"),
        "recommend": Command("eval.recommend.command", "the cheapest method and budget for your own questions"),
        "report": Command("eval.pages.report", "write a page with all results: plots and a sortable table"),
        "leaderboard": Command(
            "eval.pages.leaderboard", "write a leaderboard of checked runs: ranks with ties, and CSV"
        ),
        "submit check": Command(
            "eval.submit", "say everything that keeps an entry off a leaderboard", (), "check_command"
        ),
        "submit replay": Command("eval.submit", "run the tokens that a kept-index file names", (), "replay_command"),
        "gallery": Command("eval.pages.command", "an HTML page of what every method keeps of an image", (), "gallery"),
        "demo": Command("eval.pages.command", "start a web page: ask about an image, a method beside full", (), "demo"),
        "run-vlmeval": Command("eval.vlmeval", "VLMEvalKit's run.py with its own models under a method"),
        "serve-client": Command("eval.serving", "ask a server of scripts/serve.sh with prompts as embeddings"),
        "export": Command("eval.serving", "write prompts as embeddings to a file", function="export_command"),
        "show": Command("eval.show", "list methods, benchmarks or models; vtr show methods NAME: its options"),
        "check-data": Command("eval.show", "say what a data folder holds and lacks", function="check_data_command"),
        "wandb sync": Command("eval.tracking.sync", "upload the offline W&B runs below a folder"),
        "wandb workspace": Command(DASHBOARD, "save a W&B workspace with plots of these runs", (), "workspace_command"),
        "wandb report": Command(DASHBOARD, "save a W&B report with the same panels", (), "report_command"),
    },
    "Papers: tables and costs": {
        "tables paper": Command(TABLE, "one table of a paper, or of a PATH.yaml: run, check, write"),
        "bench latency": Command("eval.efficiency.latency", "time, memory and operations of methods beside full"),
        "bench turns": Command("eval.efficiency.turns", "several questions about an image: choose tokens once"),
    },
    "Add something: a method, a benchmark, a table or a model family": {
        "new": Command("eval.new", "write its files: vtr new method NAME, benchmark, table or family", ("new",)),
        "check": Command("eval.new", "run every test that can fail for it: vtr check method NAME", ("check",)),
    },
}
LAB: dict[str, dict[str, tuple[Any, ...]]] = {}
if CHECKOUT is not None:
    sys.path.append(str(CHECKOUT))  # an editable installation finds no more packages than a wheel holds
    from lab.commands import LAB
GROUPS |= {heading: {name: Command(*line) for name, line in lines.items()} for heading, lines in LAB.items()}
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}
ELSEWHERE = "" if LAB else " here; those of lab/ need a checkout"
DEFAULTS = {"bench": "latency"}  # first words whose second word may be left out


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    try:
        with optional_imports():
            return dispatch(list(sys.argv[1:] if arguments is None else arguments))
    except UserError as error:  # an optional package is missing; commands print their own errors
        print(error, file=sys.stderr)
        return 2
    except BrokenPipeError:  # `vtr show methods | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:  # while a command is imported; a running command says more
        print("\nStopped.", file=sys.stderr)
        return 128 + signal.SIGINT


def dispatch(words: list[str]) -> int:
    """Run the command that the words begin with, such as `eval` or `tables methods`; returns the exit code."""
    if not words or words[0] in ("-h", "--help", "help"):
        head = f"Usage: {PROGRAM} COMMAND [arguments]\n\nVisual token reduction. `{PROGRAM} COMMAND --help` says more,"
        head += f" `{PROGRAM} --version` which code and libraries run."
        print("\n\n".join([head, *(listing(f"{title}:", group) for title, group in GROUPS.items())]))
        return 0 if words else 2
    if words[0] in ("--version", "-V"):
        print(import_module("eval.versions").summary())
        return 0
    for length in (1, 2):
        if (name := " ".join(words[:length])) in COMMANDS:
            return run(name, words[length:])
    first, second = words[0], (words[1:] or [""])[0]
    group = {
        name.removeprefix(f"{first} "): command for name, command in COMMANDS.items() if name.startswith(f"{first} ")
    }
    if not group:
        return refuse(
            f"{PROGRAM} has no command {first!r}{ELSEWHERE}.", first, [name.partition(" ")[0] for name in COMMANDS]
        )
    if second in ("-h", "--help"):
        print(listing(f"Usage: {PROGRAM} {first} COMMAND [arguments]; COMMAND --help says more.", group))
        return 0
    if second and not second.startswith("-"):
        return refuse(f"{PROGRAM} {first} has no command {second!r}{ELSEWHERE}.", second, list(group))
    if first in DEFAULTS:
        return run(f"{first} {DEFAULTS[first]}", words[1:])
    print(f"{PROGRAM} {first} needs one of: {', '.join(group)}.", file=sys.stderr)
    return 2


def run(name: str, arguments: list[str]) -> int:
    """Call a command's function as if its module had been started under the command's name."""
    command = COMMANDS[name]
    sys.argv = [f"{PROGRAM} {name}", *command.arguments, *arguments]
    return int(getattr(import_module(command.module), command.function)())


def refuse(sentence: str, word: str, known: list[str]) -> int:
    """Print an error with the most similar existing name; returns the exit code."""
    print(f"{sentence}{suggestion(word, known)} Available: {', '.join(dict.fromkeys(known))}.", file=sys.stderr)
    return 2


def listing(head: str, commands: dict[str, Command]) -> str:
    """Commands with their summaries in two columns."""
    width = max(map(len, COMMANDS))
    return "\n".join([head, *(f"  {name:{width}s}  {command.summary}" for name, command in commands.items())])


if __name__ == "__main__":
    sys.exit(main())
