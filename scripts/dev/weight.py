"""Count what there is to read: files, lines, code lines, functions and tests by package, and the words of the docs.

    python scripts/dev/weight.py [FOLDER]

Code lines are all lines except blank lines, comments, docstrings and imports. Only files that git tracks are counted.
"""

import ast
import subprocess
import sys
import tokenize
from collections import Counter, defaultdict
from pathlib import Path

DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING}


def code_lines(file: Path, tree: ast.Module) -> int:
    """The number of code lines of a Python file."""
    with tokenize.open(file) as source:
        tokens = [t for t in tokenize.generate_tokens(source.readline) if t.type not in LAYOUT and t.string]
    lines = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(tree):
        left_out: ast.stmt | None = None
        if isinstance(node, ast.Import | ast.ImportFrom):
            left_out = node
        elif isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            left_out = node.body[0]
        if left_out is not None:
            lines -= set(range(left_out.lineno, (left_out.end_lineno or left_out.lineno) + 1))
    return len(lines)


def package(file: Path) -> str:
    """The package that a file counts for: its top folder, or for `eval` the folder below that."""
    folders = file.parts[:-1]
    return "/".join(folders[: 2 if folders[:1] == ("eval",) else 1]) or "."


def python_weight(files: list[Path], root: Path) -> dict[str, Counter[str]]:
    """The counts of each package."""
    weight: dict[str, Counter[str]] = defaultdict(Counter)
    for file in files:
        text = (root / file).read_text(encoding="utf-8")
        tree = ast.parse(text)
        functions = [node for node in ast.walk(tree) if isinstance(node, FUNCTION)]
        weight[package(file)].update(
            files=1, lines=len(text.splitlines()), code=code_lines(root / file, tree), functions=len(functions),
            tests=sum(f.name.startswith("test_") for f in functions),
        )  # fmt: skip
    return weight


def print_rows(weight: dict[str, Counter[str]], total: str) -> None:
    """Print one row per package, and their sum."""
    rows = [*sorted(weight.items()), (total, sum(weight.values(), Counter()))]
    for name, count in rows:
        counts = "".join(f"{count[key]:11,}" for key in ("files", "lines", "code", "functions", "tests"))
        print(f"{name:20}{counts}")


def main() -> None:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    listed = subprocess.check_output(["git", "ls-files"], cwd=root, text=True).split("\n")
    files = [Path(name) for name in listed if name and (root / name).is_file()]
    weight = python_weight([file for file in files if file.suffix == ".py"], root)
    tests = {name: weight.pop(name) for name in list(weight) if name == "tests"}
    print(f"{'package':20}{'files':>11}{'lines':>11}{'code':>11}{'functions':>11}{'tests':>11}")
    print_rows(weight, "all without tests")
    print_rows(tests, "tests")
    for name, chosen in (
        ("docs/*.md", lambda file: file.parent == Path("docs")),
        ("docs/*/**.md", lambda file: file.parts[0] == "docs" and file.parent != Path("docs")),
        ("other pages", lambda file: file.parts[0] != "docs"),
    ):
        pages = [file for file in files if file.suffix == ".md" and chosen(file)]
        words = sum(len((root / page).read_text(encoding="utf-8").split()) for page in pages)
        print(f"{name:20}{len(pages):11,} pages{words:11,} words")


if __name__ == "__main__":
    main()
