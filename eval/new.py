"""Write the files of a new method or benchmark, and check one.

    vtr new method NAME            # a complete method that passes its tests: edit it from there
    vtr check method NAME --write  # generate what belongs to it (golden indices, limit, pages), then run its tests
    vtr check method NAME          # every test that can fail for it
    vtr new benchmark NAME         # reader, script, toy set and test; check as above

The files stand in eval/templates/, those of a kind in one text, each below a line "==== PATH".
"""

import keyword
import re
import subprocess
import sys
from collections.abc import Sequence

from eval import benchmarks
from eval.command import exit_on_user_error, make_parser
from eval.config import ROOT
from llava.errors import UserError
from llava.reduction import registry

TOY_SETS = ROOT / "assets" / "eval" / "README.md"
# Kind -> what writes the generated files that a new name belongs to.
WRITERS = {
    "method": ("-m tests.golden {}", "-m eval.cli tables methods"),
    "benchmark": ("-m toy.benchmarks --output assets/eval --only {}", "-m eval.cli tables benchmarks pages"),
}
# Kind -> tests over all of its names, and those that look at the pages and at the whole repository.
FAMILIES = ("selection_methods", "merging_methods", "decoder_methods", "tile_methods")
OVER_ALL = {
    "method": ("every_method", "next", "golden", "oracle", "dispatched", *FAMILIES),
    "benchmark": ("every_benchmark", "benchmark_pages"),
}
WHOLE = {"method": ("structure", "readme"), "benchmark": ("benchmark_pages", "structure", "readme", "toy_benchmarks")}
EXAMPLE = {"method": "bash scripts/eval/gqa.sh {} 64 --limit 100", "benchmark": "bash scripts/eval/{}.sh full"}


def known(kind: str) -> list[str]:
    """The names that there are."""
    return registry.names() if kind == "method" else benchmarks.names()


def new(kind: str, name: str) -> list[str]:
    """Write the files of a new name; nothing is overwritten.

    Returns:
        Their paths in the repository.

    Raises:
        UserError: the name is no identifier in lower case, or taken.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise UserError(
            f"A {kind}'s name has lower-case letters, digits and _, and starts with a letter; got {name!r}."
        )
    text = (ROOT / "eval" / "templates" / f"{kind}.txt").read_text().replace("template_name", name)
    text = text.replace("TemplateName", name.title().replace("_", ""))
    _, *parts = re.split(r"^==== (.+)\n", text, flags=re.MULTILINE)
    files = dict(zip(parts[::2], parts[1::2], strict=True))
    taken = [path for path in files if (ROOT / path).exists()]
    if taken or name in known(kind):
        where = f" ({', '.join(taken)})" if taken else ""
        raise UserError(f"The name {name} is taken{where}; choose another, or edit what is there.")
    for path, content in files.items():
        (ROOT / path).write_text(content)
        (ROOT / path).chmod(0o755 if path.endswith(".sh") else 0o644)
    if kind == "benchmark":  # the list of toy sets, in front of the mirrors
        row, last = f"| `{name}/` | {name} | 33 | of GQA's |\n", "| `hub/` |"
        TOY_SETS.write_text(TOY_SETS.read_text().replace(last, row + last, 1))
    return list(files)


def selection(kind: str, name: str) -> list[str]:
    """Arguments of pytest: the tests that can fail for one name."""
    stems = dict.fromkeys([*OVER_ALL[kind], *WHOLE[kind], name])
    files = [path for stem in stems if (path := ROOT / "tests" / f"test_{stem}.py").is_file()]
    whole = " or ".join(f"test_{stem}.py" for stem in (*WHOLE[kind], name))
    return [*(str(path.relative_to(ROOT)) for path in files), "-k", f"{name} or {whole}"]


def check(kind: str, name: str, write: bool) -> int:
    """Generate what belongs to a name if asked to, and run its tests; returns the exit code."""
    if name not in known(kind):
        (registry.method if kind == "method" else benchmarks.get)(name)  # the sentence for it
        raise UserError(f"{name} is a composition; check its parts: {name.replace('+', ', ')}.")
    commands = [["python", *command.format(name).split()] for command in WRITERS[kind] if write]
    for command in commands:
        print("+", *command, flush=True)
        if code := subprocess.run([sys.executable, *command[1:]], cwd=ROOT).returncode:
            return code
    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *selection(kind, name)]
    code = subprocess.run([sys.executable, *tests], cwd=ROOT).returncode
    if code:
        print(
            f"Missing or old golden rows, limits and pages are written by `vtr check {kind} {name} --write`, that is: "
            + "; ".join(f"python {command.format(name)}" for command in WRITERS[kind]),
            file=sys.stderr,
        )
    return code


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = make_parser("eval.new", __doc__)
    parser.add_argument("step", choices=("new", "check"))
    parser.add_argument("kind", choices=tuple(WRITERS))
    parser.add_argument("name")
    parser.add_argument("--write", action="store_true", help="check: first write its generated rows and pages anew")
    args = parser.parse_args(arguments)
    if args.step == "check":
        return check(args.kind, args.name, args.write)
    written = new(args.kind, args.name)
    print(f"Wrote {', '.join(written)}. Make them yours, then:")
    print(f"  vtr check {args.kind} {args.name} --write\n  {EXAMPLE[args.kind].format(args.name)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
