"""Compare every recording with our methods and write the table of docs/parity.md.

python -m tests.parity.report
"""

import sys

from eval.config import ROOT
from eval.tables import insert
from tests.parity.harness import Agreement, check, recording, recordings

PAGE = ROOT / "docs" / "parity.md"
HEAD = (
    "recording",
    "official code",
    "options",
    "cases",
    "kept",
    "stable",
    "of these kept",
    "tokens in common, %",
    "logits",
)


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.0e}"


def row(path, found: Agreement) -> list[str]:
    meta = recording(path)[0]
    options = [f"{key}={value}" for key, value in meta["options"].items()] or ["defaults"]
    options += [meta["dtype"]] if "dtype" in meta else []
    if str(meta["budget"]) not in path.stem.split("-"):
        options.insert(0, f"budget {meta['budget']}")
    return [
        f"`{path.stem}`",
        f"{meta['repository']}@{meta['commit'][:7]}",
        ", ".join(options),
        *map(str, (found.cases, found.kept, found.stable, found.kept_stable)),
        f"{100 * found.overlap:.2f}",
        number(max((value for value in (found.logits, found.step) if value is not None), default=None)),
    ]


def main() -> int:
    rows = []
    for path in recordings():
        found = check(path)
        rows.append(row(path, found))
        print(path.stem, found, file=sys.stderr)
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    insert(PAGE, "parity", "\n".join([*lines, *("| " + " | ".join(cells) + " |" for cells in rows)]))
    print(f"The table is in {PAGE.relative_to(ROOT)}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
