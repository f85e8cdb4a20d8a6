"""Write the files of a new method, benchmark, table or model family, and check one.

    vtr new method NAME            # a complete method that passes its tests: edit it from there
    vtr check method NAME --write  # its tests; where they pass, what belongs to it (golden indices, limit, pages)
    vtr check method NAME          # every test that can fail for it
    vtr new benchmark NAME         # reader, script, toy set and test; check as above
    vtr new benchmark NAME --yaml  # the same for a plain set, which is a file of YAML in place of a reader
    vtr new table PAPER/NAME       # specification and script of a table; check also takes a PATH.yaml anywhere
    vtr new family CLASS           # a row of llava/hf/families.py and a tiny model, for a class of transformers

The templates are in eval/templates/, one text per kind, in which each file follows a line "==== PATH".
"""

import keyword
import re
import subprocess
import sys
from collections.abc import Sequence

import torch
import transformers

from eval import benchmarks
from eval.command import exit_on_user_error, make_parser
from eval.papers import published, spec
from llava.errors import UserError, suggestion, unknown
from llava.hf.families import FAMILIES as FAMILY_ROWS
from llava.places import CHECKOUT, PACKAGES, WORK, check_checkout
from llava.reduction import registry

CONTAINER = "ForConditionalGeneration"
TOY_SETS = WORK / "assets" / "eval" / "README.md"
# Kind -> commands that write the data which its tests read; and, after these pass, the generated files that name it.
DATA_WRITERS = {"benchmark": ("-m lab.toy.benchmarks --output assets/eval --only {}",)}
WRITERS = {
    "method": ("-m tests.golden {}", "-m eval.cli tables methods"),
    "benchmark": ("-m eval.cli tables benchmarks pages",),
    "family": ("-m eval.cli tables methods",),
}
# Kind -> tests over all names of the kind; and tests that read generated files or the whole repository.
FAMILIES = ("selection_methods", "merging_methods", "decoder_methods", "tile_methods")
OVER_ALL = {
    "method": ("every_method", "next", *FAMILIES),
    "benchmark": ("every_benchmark",),
    "family": ("stock_families", "family_pipeline", "serving_families"),
    "table": ("paper_tables",),
}
GENERATED = {
    "method": ("golden", "dispatched", "structure"),
    "benchmark": ("benchmark_pages", "structure", "toy_benchmarks"),
    "family": ("structure",),
}
EXAMPLE = {
    "method": "bash scripts/eval/gqa.sh {} 64 --limit 100",
    "benchmark": "bash scripts/eval/{}.sh full",
    "table": "bash scripts/{}.sh --limit 20",
    "family": "vtr show models",
}
WHOLE = ("structure", "benchmark_pages", "toy_benchmarks")  # tests of GENERATED that run whole, not for one name
KINDS = tuple(EXAMPLE)
ROW_OF_FAMILY = WORK / "llava" / "hf" / "families.py", "}\n\n\ndef declared("
TINY_FAMILY = WORK / "tests" / "stock_families.py", "}\n# 5.20's SmolVLM"


def known(kind: str) -> list[str]:
    """The existing names of a kind."""
    if kind == "family":
        return [name.removesuffix(CONTAINER) for name in FAMILY_ROWS]
    if kind == "table":
        return [spec.short(path) for path in spec.paths()]
    return registry.names() if kind == "method" else benchmarks.names()


def new(kind: str, name: str, plain: bool = False) -> list[str]:
    """Write the files of a new name; nothing is overwritten.

    Args:
        plain: of a benchmark: a file of YAML in place of a reader.

    Returns:
        The paths of the files in the repository.

    Raises:
        UserError: the name is not an identifier in lower case, or taken; for a family, transformers has no such class.
    """
    if kind == "family":
        return new_family(name.removesuffix(CONTAINER))
    paper, slash, own = name.rpartition("/")
    if bool(slash) != (kind == "table"):
        raise UserError(f"A {kind}'s name is {'PAPER/NAME' if kind == 'table' else 'one word'}, got {name!r}.")
    for part in (paper, own) if slash else (own,):
        if not re.fullmatch(r"[a-z][a-z0-9_]*", part) or keyword.iskeyword(part):
            raise UserError(
                f"A {kind}'s name has lower-case letters, digits and _, and starts with a letter; got {part!r}."
            )
    template = f"{kind}_yaml.txt" if plain else f"{kind}.txt"
    text = (PACKAGES / "eval" / "templates" / template).read_text().replace("template_name", own)
    text = text.replace("template_paper", paper).replace("TemplateName", own.title().replace("_", ""))
    _, *parts = re.split(r"^==== (.+)\n", text, flags=re.MULTILINE)
    files = dict(zip(parts[::2], parts[1::2], strict=True))
    taken = [path for path in files if (WORK / path).exists()]
    if taken or name in known(kind):
        where = f" ({', '.join(taken)})" if taken else ""
        raise UserError(f"The name {name} is taken{where}; choose another, or edit what is there.")
    for path, content in files.items():
        (WORK / path).parent.mkdir(exist_ok=True)
        (WORK / path).write_text(content)
        (WORK / path).chmod(0o755 if path.endswith(".sh") else 0o644)
    if kind == "benchmark":  # a row in the list of toy sets, before the mirrors
        row, last = f"| `{name}/` | {name} | 33 | of GQA's |\n", "| `hub/` |"
        if plain:
            row = f"| `hub/my-name/{name}` | {name} | 34 | copies, inside the table |\n"
        TOY_SETS.write_text(TOY_SETS.read_text().replace(last, row + last, 1))
    return list(files)


def new_family(name: str) -> list[str]:
    """Add a row to the declared families and one to their tiny models; the tower's path is found or guessed."""
    if name in known("family"):
        raise UserError(f"The family {name} is declared already, in {ROW_OF_FAMILY[0].relative_to(WORK)}.")
    container = getattr(transformers, f"{name}{CONTAINER}", None)
    if container is None:
        there = [one.removesuffix(CONTAINER) for one in dir(transformers) if one.endswith(CONTAINER)]
        raise UserError(f"transformers {transformers.__version__} has no {name}{CONTAINER}.{suggestion(name, there)}")
    with torch.device("meta"):
        inner = container(container.config_class()).model
    lists = [path for path, part in inner.named_modules() if isinstance(part, torch.nn.ModuleList)]
    tower = next((path for path in lists if "vis" in path or "image" in path), "vision_tower.encoder.layers")
    rows = (
        (*ROW_OF_FAMILY, f'    "{name}{CONTAINER}": Family("{name}", "{tower}"),\n'),
        (
            *TINY_FAMILY,
            f'    "{name.lower()}": ("{name}", {{"vision_config": SIGLIP, "text_config": text("llama"), **LAST}}),\n',
        ),
    )
    for path, end, row in rows:
        path.write_text(path.read_text().replace(end, row + end, 1))
    return [f"a row of {path.relative_to(WORK)}" for path, _, _ in rows]


def tests_of(kind: str, name: str, stems: Sequence[str]) -> list[str]:
    """Arguments of pytest that select the tests in these files that can fail for a name; [] if no file exists."""
    files = [f"tests/test_{stem}.py" for stem in stems if (WORK / "tests" / f"test_{stem}.py").is_file()]
    names = [name]
    if kind == "family":  # tests of families are named after their tiny models
        names = re.findall(rf'"(\w+)": \(\s*"{name}",', TINY_FAMILY[0].read_text())
    whole = [f"test_{stem}.py" for stem in (*WHOLE, name) if stem in stems]
    return [*files, "-k", " or ".join([*names, *whole])] if files else []


def run(*commands: Sequence[str], quiet: bool = False) -> int:
    """Run Python commands one after another until one fails; returns the last exit code."""
    for command in commands:
        if not quiet:
            print("+ python", *command, flush=True)
        if code := subprocess.run([sys.executable, *command], cwd=WORK).returncode:
            return code
    return 0


def check(kind: str, name: str, write: bool) -> int:
    """Run the tests of a name; returns the exit code of the first that fail.

    Its own tests run first, then those over all names, then those of generated files (golden indices, pages). With
    `write` the generated files are written before their tests, if all tests before have passed.
    """
    if kind == "table":
        table = spec.read(spec.find(name))  # may be a user's own file, which has no tests
        if table.published:
            published.load(table.published)
        print(f"{name}: {len(table.rows)} rows, {len(table.columns)} columns, {len(table.budgets)} budgets are valid.")
        name = table.identity
        if CHECKOUT is None or name not in known(kind):
            return 0
    elif kind == "family":
        name = name.removesuffix(CONTAINER)
        if name not in known(kind):
            raise unknown("declared family", name, known(kind))
    elif name not in known(kind):
        (registry.method if kind == "method" else benchmarks.get)(name)  # raises, unless it is a composition
        raise UserError(f"{name} is a composition; check its parts: {name.replace('+', ', ')}.")
    pytest = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors")
    selected = (tests_of(kind, name, stems) for stems in ([name], OVER_ALL[kind]))
    before = [[*pytest, *tests] for tests in selected if tests]
    generated = tests_of(kind, name, GENERATED.get(kind, ()))
    after = [[*pytest, *generated]] if generated else []
    writers = [command.format(name).split() for command in WRITERS.get(kind, ()) if write]
    data = [command.format(name).split() for command in DATA_WRITERS.get(kind, ()) if write]
    code = run(*data) or run(*before, quiet=True) or run(*writers) or run(*after, quiet=True)
    if code and kind in WRITERS and not write:
        print(
            f"Missing or old golden rows, limits and pages are written by `vtr check {kind} {name} --write`, that is: "
            + "; ".join(f"python {command.format(name)}" for command in (*DATA_WRITERS.get(kind, ()), *WRITERS[kind])),
            file=sys.stderr,
        )
    return code


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = make_parser("eval.new", __doc__)
    parser.add_argument("step", choices=("new", "check"))
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("name")
    parser.add_argument("--write", action="store_true", help="check: write its generated rows and pages anew")
    parser.add_argument("--yaml", action="store_true", help="new benchmark: a file of YAML in place of a reader")
    args = parser.parse_args(arguments)
    if args.yaml and (args.step, args.kind) != ("new", "benchmark"):
        raise UserError("--yaml is for `vtr new benchmark` only; leave it out.")
    if (args.step, args.kind) != ("check", "table"):
        check_checkout(f"{parser.prog} {args.kind}")
    if args.step == "check":
        return check(args.kind, args.name, args.write)
    written, write = new(args.kind, args.name, args.yaml), " --write" * (args.kind in WRITERS)
    print(f"Wrote {', '.join(written)}. Make them yours, then:")
    print(f"  vtr check {args.kind} {args.name}{write}\n  {EXAMPLE[args.kind].format(args.name)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
