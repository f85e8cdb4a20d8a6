"""Break the code on purpose, twenty times, and see whether the fast tests notice.

    python scripts/dev/mutants.py 7 --list                       # the mutants that seed 7 draws, as differences
    python scripts/dev/mutants.py 7 /tmp/mutants                 # run the fast tests on each, in a copy
    python scripts/dev/mutants.py 7 /tmp/mutants --redraw 3 11   # mutants 3 and 11 are equivalent: draw two more

A mutant changes one place: an operator, a sign, a constant, a dropped line or two swapped arguments. Eight come from
eval/papers, and four each from eval/answers, llava/pipeline and the methods. A mutant that computes the same as the
original is called equivalent. Only a person can tell that, so the numbers of such mutants are given to --redraw. Texts
of errors, annotations and docstrings are not mutated. FOLDER/seen.json keeps the results, so an interrupted run can
continue.
"""

import argparse
import ast
import difflib
import json
import os
import random
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parents[2]
STRATA = (
    (("eval/papers",), 8),
    (("eval/answers",), 4),
    (("llava/pipeline",), 4),
    (("consensusdrop", "visiondrop", "attnmix", "baselines"), 4),
)
OPERATORS: dict[type, str] = {
    **{ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==", ast.In: "not in"},
    **{ast.NotIn: "in", ast.Is: "is not", ast.IsNot: "is", ast.And: "or", ast.Or: "and", ast.Add: "-", ast.Mult: "/"},
    **{ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "*"},
}
MARKED = "not (process or table or java or training or browser or slow)"
Change = tuple[str, int, int, str]  # kind, first and last byte of the changed place, and the new text


@dataclass(frozen=True)
class Mutant:
    """One change of one file.

    Attributes:
        text: the whole changed file.
        change: the lines of a unified difference.
    """

    number: int
    file: str
    kind: str
    text: str
    change: str


def changes(text: str) -> Iterator[Change]:
    """All changes of a module that can be drawn, one at a time."""
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line.encode()))
    raw = text.encode()

    def place(first: ast.expr | ast.stmt, last: ast.expr | ast.stmt | None = None) -> tuple[int, int]:
        last = last or first
        ends = starts[(last.end_lineno or 1) - 1] + (last.end_col_offset or 0)
        return starts[first.lineno - 1] + first.col_offset, ends

    def source(node: ast.expr) -> str:
        return raw[slice(*place(node))].decode()

    def visit(node: ast.AST) -> Iterator[Change]:
        match node:
            case ast.Raise() | ast.Import() | ast.ImportFrom() | ast.JoinedStr():
                return
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in OPERATORS:
                yield "operator", *place(node), f"({source(left)} {OPERATORS[type(op)]} {source(right)})"
            case ast.BoolOp(op=op, values=[left, right]):
                yield "operator", *place(node), f"({source(left)} {OPERATORS[type(op)]} {source(right)})"
            case ast.BinOp(left=left, op=ast.Sub(), right=right):
                yield "sign", *place(node), f"({source(right)} - {source(left)})"
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
                if not isinstance(left, ast.Constant | ast.JoinedStr):
                    yield "operator", *place(node), f"({source(left)} {OPERATORS[type(op)]} {source(right)})"
            case ast.UnaryOp(op=ast.USub() | ast.Not(), operand=operand):
                yield "sign", *place(node), f"({source(operand)})"
            case ast.Constant(value=bool(value)):
                yield "constant", *place(node), repr(not value)
            case ast.Constant(value=int(value) | float(value)):
                yield "constant", *place(node), repr(value + 1)
            case ast.AugAssign() | ast.Continue() | ast.Expr(value=ast.Call()) | ast.If(body=[ast.Raise()], orelse=[]):
                yield "dropped line", *place(node), "pass"
        if isinstance(node, ast.Call) and len(node.args) > 1:
            first, second = node.args[:2]
            if source(first) != source(second) and not any(isinstance(one, ast.Starred) for one in node.args[:2]):
                between = raw[place(first)[1] : place(second)[0]].decode()
                yield "swapped argument", *place(first, second), source(second) + between + source(first)
        for name, value in ast.iter_fields(node):
            if name not in ("annotation", "returns", "decorator_list", "type_params"):
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        yield from visit(child)

    return visit(ast.parse(text))


def draw(root: Path, seed: int, redraw: set[int]) -> list[Mutant]:
    """The mutants of a seed. For each number in `redraw`, one more mutant is drawn from the same folders."""
    drawn: list[Mutant] = []
    for folders, count in STRATA:
        chance = random.Random(f"{seed} {folders}")
        by_kind: dict[str, list[tuple[str, Change]]] = defaultdict(list)
        for file in sorted(file for folder in folders for file in (root / folder).rglob("*.py")):
            for change in changes(file.read_text(encoding="utf-8")):
                by_kind[change[0]].append((file.relative_to(root).as_posix(), change))
        kinds = sorted(by_kind)
        for places in by_kind.values():
            chance.shuffle(places)
        chance.shuffle(kinds)
        kept = turn = 0
        while kept < count:
            file, (kind, start, end, new) = by_kind[kinds[turn % len(kinds)]].pop()
            turn += 1
            text = (root / file).read_text(encoding="utf-8")
            mutated = (text.encode()[:start] + new.encode() + text.encode()[end:]).decode()
            lines = difflib.unified_diff(text.splitlines(), mutated.splitlines(), n=0, lineterm="")
            drawn.append(Mutant(len(drawn) + 1, file, kind, mutated, "\n".join(f"    {x}" for x in list(lines)[2:])))
            kept += len(drawn) not in redraw
    return drawn


def fast_tests(copy: Path, file: str, all_of_them: bool) -> str | None:
    """Run the fast tests; returns the first one that fails, or None.

    Args:
        all_of_them: run all of them, not only those that import the module.
    """
    package, _, module = file.removesuffix(".py").replace("/", ".").rpartition(".")
    named = re.compile(rf"{package}(\.| import [^)\n]*|\s+import \([^)]*)\b{module}\b")
    tests = sorted((copy / "tests").rglob("test_*.py"))
    chosen = [str(test) for test in tests if all_of_them or named.search(test.read_text(encoding="utf-8"))]
    command = [sys.executable, "-m", "pytest", "-x", "-n", "2", "-p", "no:cacheprovider", "-m", MARKED, *chosen]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, env=environment) if chosen else None
    if done is None or done.returncode in (0, 5):
        return None
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0][:200] if failed else f"{done.stdout[-200:]}{done.stderr[-200:]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seed", type=int)
    parser.add_argument("folder", type=Path, nargs="?", help="where the copy that is mutated and the results are kept")
    parser.add_argument("--list", action="store_true", help="only show what is drawn")
    parser.add_argument("--redraw", type=int, nargs="*", default=[], metavar="NUMBER", help="equivalent mutants")
    args = parser.parse_args()
    if not args.list and args.folder is None:
        parser.error("give a folder for the copy that is mutated, or --list")
    root, redraw, seen = ROOT, set(args.redraw), {}
    if args.folder is not None:
        root, results = args.folder / "copy", args.folder / "seen.json"
        if not root.is_dir():
            subprocess.run(["git", "clone", "--quiet", str(ROOT), str(root)], check=True)
        seen = json.loads(results.read_text()) if results.is_file() else {}
    mutants = draw(root, args.seed, redraw)
    # The tests that import a module see most of its mutants in seconds; all of them take minutes.
    tries = (
        [] if args.list else [(one, every) for every in (False, True) for one in mutants if one.number not in redraw]
    )
    for one, every in tqdm(tries, unit="try"):
        if one.change not in seen:
            original = (root / one.file).read_bytes()
            try:
                (root / one.file).write_text(one.text, encoding="utf-8")
                failed = fast_tests(root, one.file, every)
            finally:
                (root / one.file).write_bytes(original)
            if failed or every:
                seen[one.change] = failed
                results.write_text(json.dumps(seen, indent=1))
    for one in mutants:
        result = seen.get(one.change, "not tried") or "SURVIVED"
        print(
            f"{one.number:2} {one.file}, {one.kind}: {'equivalent' if one.number in redraw else result}\n{one.change}"
        )
    counted = [seen[one.change] for one in mutants if one.number not in redraw and one.change in seen]
    print(f"{sum(map(bool, counted))} of {len(counted)} mutants were seen.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
