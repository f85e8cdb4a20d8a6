"""List what can be named on a command line: methods with their options, benchmarks, models.

vtr show methods
vtr show methods consensusdrop
vtr show benchmarks --json
"""

import argparse
import json
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from eval import benchmarks
from eval.__main__ import models
from eval.command import exit_on_user_error
from llava.errors import UserError, unknown

KINDS = ("methods", "benchmarks", "models")


def entries_of(kind: str) -> list[dict[str, Any]]:
    """What there is of one kind, sorted by name; each entry has at least "name"."""
    if kind == "methods":
        from llava.reduction import registry

        return registry.describe()
    found = benchmarks.describe() if kind == "benchmarks" else models()
    if not found:
        raise UserError(
            f"No {kind} are here: the bundled toy models are in the repository, not in its wheel. Clone it."
        )
    return found


def overview(kind: str, entries: Sequence[dict[str, Any]]) -> str:
    """One line for each entry."""
    width = max(len(entry["name"]) for entry in entries)
    lines = []
    for entry in entries:
        text = entry["path"] if kind == "models" else entry["summary"]
        if kind == "benchmarks":
            text += f" (splits: {', '.join(entry['splits'])}; profiles: {', '.join(entry['profiles'])})"
        lines.append(f"{entry['name']:{width}s}  {text}")
    return "\n".join(lines)


def details(entry: dict[str, Any]) -> str:
    """One entry with all its fields; options of a method with type, default and meaning."""
    lines = [entry["name"]]
    for key, value in entry.items():
        if key == "options":
            lines.append("  options, set by --set NAME.OPTION=VALUE:")
            lines += [option_line(option) for option in value]
        elif key != "name":
            text = f"{key}: {', '.join(map(str, value)) if isinstance(value, list) else value}"
            lines.append(textwrap.fill(text, 110, initial_indent="  ", subsequent_indent="    "))
    return "\n".join(lines)


def option_line(option: dict[str, Any]) -> str:
    several = len(option["choices"] or ()) > 1
    choices = f"; one of {', '.join(option['choices'])}" if several else ""
    text = f"{option['name']} = {option['default']!r}: {option['doc']}{choices}"
    return textwrap.fill(text, 110, initial_indent="    ", subsequent_indent="        ")


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    p = argparse.ArgumentParser(prog="vtr show", description=(__doc__ or "").partition("\n")[0])
    p.add_argument("kind", choices=KINDS)
    p.add_argument("name", nargs="?", help="only this one, with everything that is known about it")
    p.add_argument("--json", action="store_true", help="print JSON")
    args = p.parse_args(arguments)
    entries = entries_of(args.kind)
    if args.name is not None:
        known = {entry["name"]: entry for entry in entries}
        if args.name not in known:
            if args.kind == "methods":
                from llava.reduction import registry

                registry.method(args.name)  # says which file of it is broken
            raise unknown(args.kind.removesuffix("s"), args.name, known)
        entries = [known[args.name]]
    if args.json:
        print(json.dumps(entries, indent=1, default=str))
    else:
        print(details(entries[0]) if args.name is not None else overview(args.kind, entries))
    return 0


if __name__ == "__main__":
    sys.exit(main())
