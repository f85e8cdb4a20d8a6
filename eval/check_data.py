"""Look at a data folder: which benchmarks are complete, which lack a file and where to get it, which are not there.

python -m eval.check_data playground/data/eval
python -m eval.check_data DATA pope textvqa --json report.json

A benchmark counts as complete when its own reader accepts the files and every image it names is there.
"""

import dataclasses
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from eval import benchmarks
from eval.answers.jsonl import write_json
from eval.benchmarks.base import Benchmark, Need
from eval.benchmarks.hub import local_copy
from eval.command import exit_on_user_error, make_parser
from eval.config import DEFAULT_DATA
from llava.errors import UserError

COMPLETE, INCOMPLETE, ABSENT = "complete", "incomplete", "absent"


@dataclass(frozen=True)
class Finding:
    """What a folder holds of one benchmark.

    Attributes:
        state: COMPLETE, INCOMPLETE or ABSENT.
        source: "official", or the id of the local copy of the mirror; "" if neither is there.
        details: one sentence per fact: counts, what is missing and where to get it.
    """

    name: str
    state: str
    source: str
    details: tuple[str, ...]
    licence: str


def check(data: Path, benchmark: Benchmark) -> Finding:
    """Official files first; a local copy of the mirror counts where there are none."""
    lost = [problem for need in benchmark.needs if (problem := missing(data, need))]
    there = [need for need in benchmark.needs if need.found(data)]
    copy = local_copy(data, benchmark.mirror)
    if benchmark.is_in(data):
        return read(data, benchmark, "official", lost)
    if copy is not None:
        return read(data, benchmark, "mirror", lost if there else [], copy[0])
    if there:
        return Finding(benchmark.name, INCOMPLETE, "official", tuple(lost), benchmark.licence)
    return Finding(benchmark.name, ABSENT, "", (where_to_get(benchmark),), benchmark.licence)


def read(data: Path, benchmark: Benchmark, source: str, lost: Iterable[str], copy: str = "") -> Finding:
    """What the benchmark's own reader says of the files."""
    try:
        split = benchmarks.check_split(benchmark, None, data)
        found = benchmark.load(data, split, benchmark.profiles[0], source)
        found.check_images(found.questions)
    except UserError as error:
        return Finding(benchmark.name, INCOMPLETE, copy or source, (str(error), *lost), benchmark.licence)
    pictures = {name for question in found.questions for name in question.images}
    facts = f"{found.title}: {len(found.questions):,} questions about {len(pictures):,} {found.pictures.noun}"
    return Finding(benchmark.name, COMPLETE, copy or source, (facts, *lost), benchmark.licence)


def missing(data: Path, need: Need) -> str | None:
    """What is wrong with a file or folder, and where it comes from."""
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


def where_to_get(benchmark: Benchmark) -> str:
    """The official files' places, or the mirror's."""
    places = [f"{need.path} from {need.source}" for need in benchmark.needs if not need.optional]
    if benchmark.mirror:
        name = benchmark.mirror[0]
        places.append(f"or hf download {name} --repo-type dataset --local-dir DATA/hub/{name}")
    return "; ".join(places) or "made by this repository only"


def lines(findings: Iterable[Finding]) -> list[str]:
    """One block per benchmark."""
    text = []
    for finding in findings:
        source = f" ({finding.source})" if finding.source and finding.source != "official" else ""
        text.append(f"{finding.name:14s} {finding.state}{source}")
        text += [f"    {detail}" for detail in finding.details]
        if finding.state != COMPLETE and finding.licence:
            text.append(f"    licence: {finding.licence}")
    return text


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: 1 if something is incomplete, or nothing, or not all that was asked for, is there; 2 for a
    wrong call; else 0."""
    p = make_parser("eval.check_data", __doc__)
    p.add_argument("data", nargs="?", default=str(DEFAULT_DATA), help="folder that holds the benchmarks")
    p.add_argument("benchmarks", nargs="*", help="look at these only")
    p.add_argument("--json", metavar="OUT", help="also write the findings to this file")
    args = p.parse_args(arguments)
    if not Path(args.data).is_dir():
        raise UserError(f"No folder at {args.data}; name the one that holds gqa/, pope/ and so on.")
    findings = []
    for name in args.benchmarks or benchmarks.names():
        findings.append(check(Path(args.data), benchmarks.get(name)))
        print("\n".join(lines(findings[-1:])), flush=True)
    counts = {state: sum(f.state == state for f in findings) for state in (COMPLETE, INCOMPLETE, ABSENT)}
    print(", ".join(f"{count} {state}" for state, count in counts.items()))
    if args.json:
        write_json(Path(args.json), [dataclasses.asdict(finding) for finding in findings])
    wanted = len(findings) if args.benchmarks else counts[INCOMPLETE] + max(1, counts[COMPLETE])
    return int(counts[COMPLETE] < wanted)


if __name__ == "__main__":
    sys.exit(main())
