"""Write the tables of methods in README.md, docs/methods.md and docs/models/families.md from the methods' metadata.

python -m lab.pages.methods
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path

from eval.command import exit_on_user_error, make_parser
from eval.tables import insert, left_aligned, markdown
from llava.budget import BLIND, WITHOUT_BUDGET
from llava.errors import UserError
from llava.hf.reduce import support
from llava.places import WORK, check_checkout
from llava.reduction import budget as crops
from llava.reduction import registry
from llava.reduction.reducer import options_of
from llava.reduction.token_layout import ModelSpec, PatchGrid

PAGE = WORK / "docs" / "methods.md"
FAMILIES = WORK / "docs" / "models" / "families.md"
README = WORK / "README.md"
LLAVA_15_7B = ModelSpec(576, 32, PatchGrid(24, 24), tower_blocks=24, has_text_tower=True)
BUDGETS = (192, 128, 64)
# The papers' convention: a base image and four tiles of 576 patches each, without unpadding and newline tokens.
CROP = PatchGrid(24, 24)
LLAVA_NEXT_7B = replace(LLAVA_15_7B, visual_tokens=2880, layout=replace(CROP, crops=5), crops=(CROP,) * 5)
NEXT_BUDGETS = (640, 320, 160)


def source_of(name: str) -> str:
    """The method's name as a link from docs/ to its file."""
    path = Path(*registry.method(name).__module__.split(".")).with_suffix(".py")
    return f"[`{name}`](../{path})"


def budget_cell(name: str, budget: int, facts: ModelSpec = LLAVA_15_7B) -> str:
    """Visual tokens per decoder layer at this budget and their mean: "576 ×2, 166 ×30 = 191.6"."""
    try:
        reducer = registry.build(name, budget)
        crops.require(reducer, facts)
        planned = crops.planned(reducer, facts)
    except UserError:
        return "n/a"
    if planned is None:
        least, most = crops.bounds(reducer, facts)
        return f"by image, {least:.4g} to {most:.4g}"
    if len(set(planned)) == 1:
        return f"{planned[0]}"
    parts = [(count, len(list(layers))) for count, layers in groupby(planned)]
    runs = ", ".join(f"{count} ×{layers}" for count, layers in parts)
    return f"{runs} = {sum(planned) / len(planned):.1f}"


def table() -> str:
    """One row per method, from its metadata."""
    rows = []
    for name in registry.names():
        about = registry.method(name).metadata
        positions = registry.build(name, None if name == BLIND else BUDGETS[0]).positions
        unusual = ([] if about.order == "raster" else [about.order]) + [positions] * (positions != "renumber")
        paper = f"[{about.paper}]({about.url})" if about.paper else "control"
        rest = "; ".join([about.rest, *unusual])
        row = [source_of(name), about.acts, about.score or "–", rest, about.needs or "–", paper, about.code or "–"]
        rows.append(row)
    head = ["method", "acts", "score", "other tokens; order and positions if unusual", "needs", "paper"]
    return left_aligned(markdown([*head, "official code read"], rows))


def budgets() -> str:
    """Tokens per layer on LLaVA-1.5-7B and LLaVA-NeXT-7B, of methods that do not have the budget in every layer."""
    rows = []
    for name in registry.names():
        if name in WITHOUT_BUDGET:
            continue
        cells = [budget_cell(name, budget) for budget in BUDGETS]
        cells += [budget_cell(name, budget, LLAVA_NEXT_7B) for budget in NEXT_BUDGETS]
        if cells != [f"{budget}" for budget in (*BUDGETS, *NEXT_BUDGETS)]:
            rows.append([f"`{name}`", *cells])
    return markdown(["method", *map(str, BUDGETS), *(f"{budget} (NeXT)" for budget in NEXT_BUDGETS)], rows)


def splits() -> str:
    """How methods split their budget over tiles: the default, in brackets the other choices, and the methods."""
    ways: dict[str, list[str]] = {}
    for name in registry.names():
        if name not in WITHOUT_BUDGET:
            known = options_of(registry.method(name))["tile_budget"]
            others = [choice for choice in known.metadata["choices"] if choice != known.default]
            way = f"`{known.default}`" + (f" ({', '.join(others)})" if others else "")
            ways.setdefault(way, []).append(f"`{name}`")
    return "\n".join(f"* {way}: {' '.join(names)}" for way, names in sorted(ways.items()))


def known_deviations() -> str:
    """Where methods depart from the contract tests, as their classes state."""
    lines = []
    for name in registry.names():
        parts = []
        for kind, reason in registry.method(name).known_deviations.items():
            kind, _, options = kind.partition(" with ")
            parts.append(f"{kind}{f' with `{options}`' if options else ''} ({reason})")
        lines += [f"* `{name}`: {'; '.join(parts)}"] if parts else []
    return "\n".join(lines)


def releases() -> str:
    """What the official code of each method leaves to chance, and what is done here instead."""
    lines = []
    for name in registry.names():
        release = registry.method(name).metadata.release
        stated = {} if release is None else asdict(release)
        stated.pop("licence", None)
        ours = stated.pop("ours", "")
        parts = [f"**{kind}** {clause}" for kind, clause in stated.items() if clause]
        if parts:
            lines.append(f"* `{name}`: {'; '.join(parts)}." + f" Here: {ours}." * bool(ours))
    return "\n".join(lines)


def licences() -> str:
    """The licences of the official code, and the methods whose code has each."""
    found: dict[str, list[str]] = {}
    for name in registry.names():
        if release := registry.method(name).metadata.release:
            found.setdefault(release.licence, []).append(f"`{name}`")
    return "\n".join(f"* {licence}: {' '.join(names)}" for licence, names in sorted(found.items()))


def families() -> str:
    """One row per method, one column per family: a letter if `llava.reduce` refuses, and what the letters mean."""
    table, reasons = support(), dict[str, str]()
    rows = []
    for name in registry.names():
        row = [f"`{name}`"]
        for family, methods in table.items():
            # Without names, so that the same reason has the same letter for all methods and families.
            why = methods[name].replace(name, "the method").replace(family, "the family")
            row.append(reasons.setdefault(why, chr(ord("a") + len(reasons))) if why else "")
        rows.append(row)
    notes = [f"* **{letter}**: {why[0].upper()}{why[1:]}" for why, letter in reasons.items()]
    return "\n".join([markdown(["method", *table], rows), "", *notes])


def readme_table() -> str:
    """One row per method, in short: name, where it acts and its paper; the controls come last."""
    rows = []
    for name in sorted(registry.names(), key=lambda name: not registry.method(name).metadata.paper):
        about = registry.method(name).metadata
        paper = f"[{about.paper}]({about.url})" if about.paper else "control"
        rows.append([source_of(name).replace("(../", "("), about.acts, paper])
    return left_aligned(markdown(["method", "acts", "paper"], rows))


def write_readme() -> None:
    """Write the number of methods and their table into README.md."""
    insert(README, "readme methods", readme_table())
    count = f"**{len(registry.names())} [methods]"
    README.write_text(re.sub(r"\*\*\d+ \[methods\]", count, README.read_text()))


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = make_parser("lab.pages.methods", __doc__)
    parser.parse_args(arguments)
    check_checkout(parser.prog)
    insert(PAGE, "methods", table())
    insert(PAGE, "budgets", budgets())
    insert(PAGE, "known deviations", known_deviations())
    insert(PAGE, "releases", releases())
    insert(PAGE, "licences", licences())
    insert(PAGE, "tile_budget", splits())
    insert(FAMILIES, "families", families())
    write_readme()
    print(f"Tables are in {PAGE.relative_to(WORK)}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
