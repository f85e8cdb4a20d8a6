"""List what can be named on a command line, and what a data folder holds.

    vtr show methods
    vtr show methods consensusdrop
    vtr show benchmarks
    vtr show models Qwen3-VL
    vtr show methods --json
    vtr check-data playground/data/eval
    vtr check-data DATA pope textvqa

A benchmark counts as complete if its own reader accepts the files and every image that they name is there.
"""

import contextlib
import dataclasses
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval import benchmarks
from eval.benchmarks.base import Benchmark, Need
from eval.benchmarks.hub import cached_copies, local_copy
from eval.command import STDOUT, exit_on_user_error, make_parser, print_record
from eval.config import DEFAULT_DATA
from llava.errors import UserError, unknown
from llava.places import ASSETS, check_bundled

KINDS = ("methods", "benchmarks", "models")
# Kind -> what --json prints of an entry; null if an entry lacks it.
SOURCES = (
    "paper",
    "reads",
    "without a CLS token",
    "the image decides how many tokens are kept",
    "official code read",
    "differs from the release",
    "determinism of the release",
)
KEYS = {
    "methods": ("name", "summary", *SOURCES, "options"),
    "benchmarks": ("name", "summary", "splits", "profiles"),
    "models": ("name", "summary", "works", "refused"),
}


def entries_of(kind: str, name: str | None = None) -> list[dict[str, Any]]:
    """List methods, benchmarks or models, sorted by name; each entry has at least "name".

    Args:
        name: describe only this method, which may be a composition; compositions are in no list.
    """
    if kind == "methods":
        from llava.reduction import registry

        return registry.describe(*([name] if name else []))
    if kind == "benchmarks":
        return benchmarks.describe()
    from llava.hf.reduce import support

    models = [path.parent for path in sorted(ASSETS.glob("*/config.json"))]
    entries: list[dict[str, Any]] = [{"name": folder.name, "summary": str(folder)} for folder in models]
    for family, methods in support().items():
        refused = {name: why for name, why in methods.items() if why}
        works = [name for name in methods if name not in refused]
        summary = f"llava.reduce runs {len(works)} of {len(methods)} methods"
        summary += f", not {', '.join(refused)}" if refused else ""
        entries.append({"name": family, "summary": summary, "works": works, "refused": refused})
    return entries


def json_key(name: str) -> str:
    return name.replace(" ", "_").lower()


def overview(kind: str, entries: Sequence[dict[str, Any]]) -> str:
    """One line for each entry."""
    width = max((len(entry["name"]) for entry in entries), default=0)
    lines = []
    for entry in entries:
        text = entry["summary"]
        if kind == "benchmarks":
            text += f" (splits: {', '.join(entry['splits'])}; profiles: {', '.join(entry['profiles'])})"
        lines.append(f"{entry['name']:{width}s}  {text}")
    return "\n".join(lines)


def details(entry: dict[str, Any]) -> str:
    """One entry with all its fields; options of a method with default, meaning and choices."""
    lines = [entry["name"]]
    for key, value in (entry | entry.get("refused", {})).items():
        if key == "options":
            lines.append("  options, set by --set NAME.OPTION=VALUE:")
            for option in value:
                choices = f"; one of {', '.join(option['choices'])}" if len(option["choices"] or ()) > 1 else ""
                text = f"{option['name']} = {option['default']!r}: {option['doc']}{choices}"
                lines.append(textwrap.fill(text, 110, initial_indent="    ", subsequent_indent="        "))
        elif isinstance(value, dict) and key != "refused":
            lines.append(f"  {key}:")
            for name, text in value.items():
                lines.append(textwrap.fill(f"{name}: {text}", 110, initial_indent="    ", subsequent_indent="        "))
        elif key not in ("name", "refused"):
            text = f"{key}: {', '.join(map(str, value)) if isinstance(value, list) else value}"
            lines.append(textwrap.fill(text, 110, initial_indent="  ", subsequent_indent="    "))
    return "\n".join(lines)


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    p = make_parser("eval.show", "List what can be named on a command line.")
    keys = "; ".join(f"{kind}: {', '.join(map(json_key, names))}" for kind, names in KEYS.items())
    about = "print JSON alone, a list, or with NAME one object; null where there is nothing. Keys of "
    p.add_argument("--json", action="store_true", help=about + keys)
    p.add_argument("kind", choices=KINDS)
    p.add_argument("name", nargs="?", help="only this one, with everything that is known about it")
    args = p.parse_args(arguments)
    with contextlib.redirect_stdout(sys.stderr):  # what libraries print
        entries = entries_of(args.kind, args.name)
    if args.name is not None:
        known = {entry["name"]: entry for entry in entries}
        if args.name not in known:
            raise unknown(args.kind.removesuffix("s"), args.name, known)
        entries = [known[args.name]]
    records = [{json_key(name): entry.get(name) for name in KEYS[args.kind]} for entry in entries]
    text = details(entries[0]) if args.name is not None else overview(args.kind, entries)
    print_record(records if args.name is None else records[0], [text], STDOUT if args.json else None)
    return 0


COMPLETE, INCOMPLETE, ABSENT = "complete", "incomplete", "absent"


@dataclass(frozen=True)
class Finding:
    """What a folder holds of one benchmark.

    Attributes:
        state: COMPLETE, INCOMPLETE or ABSENT.
        source: "official", or the id of the local copy of the mirror; "" if there is neither.
        details: one sentence per fact: counts, what is missing, where to get it.
    """

    name: str
    state: str
    source: str
    details: tuple[str, ...]
    licence: str


def check_folder(data: Path, benchmark: Benchmark) -> Finding:
    """Look for a benchmark's official files, or else for a local copy of its mirror."""
    lost = [problem for need in benchmark.needs if (problem := missing(data, need))]
    there = [need for need in benchmark.needs if need.found(data)]
    copy = local_copy(data, benchmark.mirror)
    if benchmark.is_in(data):
        return read(data, benchmark, "official", lost)
    if copy is not None:
        return read(data, benchmark, "mirror", lost if there else [], copy[0])
    if not benchmark.needs and (cached := cached_copies(benchmark.mirror)):
        return read(data, benchmark, "auto", [], f"{cached[0][0]} in the hub's cache")
    if there:
        return Finding(benchmark.name, INCOMPLETE, "official", tuple(lost), benchmark.licence)
    places = [f"{need.path} from {need.source}" for need in benchmark.needs if not need.optional]
    if benchmark.mirror:
        name = benchmark.mirror[0]
        places.append(f"or hf download {name} --repo-type dataset --local-dir DATA/hub/{name}")
    where = "; ".join(places) or "made by this repository only"
    return Finding(benchmark.name, ABSENT, "", (where,), benchmark.licence)


def read(data: Path, benchmark: Benchmark, source: str, lost: Iterable[str], copy: str = "") -> Finding:
    """Read a benchmark with its own reader: complete if it accepts the files and all images are there.

    Args:
        source: as for Benchmark.load.
        lost: sentences about missing files.
        copy: id of the local copy of the mirror, if that is read.
    """
    try:
        split = benchmarks.check_split(benchmark, None, data)
        found = benchmark.load(data, split, benchmark.profiles[0], source)
        found.check_images(found.questions)
    except UserError as error:
        return Finding(benchmark.name, INCOMPLETE, copy or source, (str(error), *lost), benchmark.licence)
    images = {name for question in found.questions for name in question.images}
    facts = f"{found.title}: {len(found.questions):,} questions about {len(images):,} {found.images.noun}"
    return Finding(benchmark.name, COMPLETE, copy or source, (facts, *lost), benchmark.licence)


def missing(data: Path, need: Need) -> str | None:
    """What is missing of a file or folder, and where it comes from; None if nothing is."""
    path = need.found(data)
    optional = " (optional)" if need.optional else ""
    if path is None:
        return f"{need.path} is missing{optional}: {need.source}"
    if need.count is None or not path.is_dir():
        return None
    count = sum(1 for entry in path.iterdir() if entry.is_file())
    if count < need.count:
        return f"{need.path} holds {count:,} of {need.count:,} files{optional}: {need.source}"
    return None


def finding_lines(findings: Iterable[Finding]) -> list[str]:
    """The findings as text, one block per benchmark."""
    text = []
    for finding in findings:
        source = f" ({finding.source})" if finding.source and finding.source != "official" else ""
        text.append(f"{finding.name:14s} {finding.state}{source}")
        text += [f"    {detail}" for detail in finding.details]
        if finding.state != COMPLETE and finding.licence:
            text.append(f"    licence: {finding.licence}")
    return text


@exit_on_user_error
def check_data_command(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code.

    It is 2 for a wrong call. It is 1 if a benchmark is incomplete, if one that was named is absent, or if none was
    named and all are absent. Otherwise it is 0.
    """
    p = make_parser("eval.cli check-data", "Look at a data folder: which benchmarks are complete, and what is missing.")
    p.add_argument("data", nargs="?", default=str(DEFAULT_DATA), help="folder that holds the benchmarks")
    p.add_argument("benchmarks", nargs="*", help="look at these only")
    keys = "data, benchmarks (of each: name, state, source, details, licence), complete, incomplete, absent"
    p.add_argument("--json", action="store_true", help=f"print JSON alone. Keys: {keys}")
    args = p.parse_args(arguments)
    check_bundled(args.data)
    if not Path(args.data).is_dir():
        raise UserError(f"No folder at {args.data}; name the one that holds gqa/, pope/ and so on.")
    findings = []
    for name in args.benchmarks or benchmarks.names():
        with contextlib.redirect_stdout(sys.stderr):  # what libraries print
            findings.append(check_folder(Path(args.data), benchmarks.get(name)))
        if not args.json:
            print("\n".join(finding_lines(findings[-1:])), flush=True)
    counts = {state: sum(f.state == state for f in findings) for state in (COMPLETE, INCOMPLETE, ABSENT)}
    record = {"data": args.data, "benchmarks": [dataclasses.asdict(one) for one in findings], **counts}
    total = ", ".join(f"{count} {state}" for state, count in counts.items())
    print_record(record, [total], STDOUT if args.json else None)
    wanted = len(findings) if args.benchmarks else counts[INCOMPLETE] + max(1, counts[COMPLETE])
    return int(counts[COMPLETE] < wanted)


if __name__ == "__main__":
    sys.exit(main())
