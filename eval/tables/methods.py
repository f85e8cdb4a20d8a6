"""Write the tables of methods in docs/methods.md and docs/models.md from the metadata of the methods.

python -m eval.tables.methods
"""

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from textwrap import fill

from eval.config import ROOT
from eval.tables.page import insert
from llava.errors import UserError
from llava.reduction import crop_budget as crops
from llava.reduction import registry
from llava.reduction.model_spec import ModelSpec
from llava.reduction.options import options_of
from llava.reduction.reducer import Reducer
from llava.reduction.token_layout import PatchGrid

PAGE = ROOT / "docs" / "methods.md"
MODELS = ROOT / "docs" / "models.md"
README = ROOT / "README.md"
LLAVA_15_7B = ModelSpec(576, 32, PatchGrid(24, 24), tower_blocks=24, has_text_tower=True)
BUDGETS = (192, 128, 64)
# The papers' convention: a base image and four tiles of 576 patches each, neither unpadding nor newline tokens.
CROP = PatchGrid(24, 24)
LLAVA_NEXT_7B = replace(LLAVA_15_7B, visual_tokens=2880, layout=replace(CROP, crops=5), crops=(CROP,) * 5)
NEXT_BUDGETS = (640, 320, 160)


def source_of(cls: type[Reducer]) -> str:
    """A link to the method's file."""
    path = Path(*cls.__module__.split(".")).with_suffix(".py")
    return f"[{path.name}](../{path})"


def in_groups(tokens_per_layer: tuple[int, ...]) -> str:
    """Equal neighbouring layers together: "576 ×2, 166 ×30"."""
    parts = [(count, len(list(group))) for count, group in groupby(tokens_per_layer)]
    return ", ".join(f"{count} ×{layers}" for count, layers in parts)


def budget_cell(name: str, budget: int, facts: ModelSpec = LLAVA_15_7B) -> str:
    """Visual tokens per decoder layer at this budget, and their mean."""
    try:
        reducer = registry.build(name, budget)
        crops.require(reducer, facts)
        planned = crops.planned(reducer, facts)
    except UserError:
        return "n/a"
    if planned is None:
        return "by image"
    mean = sum(planned) / len(planned)
    return f"{mean:g}" if len(set(planned)) == 1 else f"{in_groups(planned)} = {mean:.1f}"


def table() -> str:
    """One row per method, from its metadata."""
    head = ["method", "acts", "score", "other tokens", "order; positions", "needs", "paper", "official code read"]
    lines = ["| " + " | ".join([*head, "source"]) + " |", "|" + "---|" * (len(head) + 1)]
    for name in registry.names():
        cls = registry.method(name)
        about = cls.metadata
        positions = registry.build(name, BUDGETS[0]).positions
        paper = f"[{about.paper}]({about.url})" if about.paper else "control"
        cells = [
            f"`{name}`",
            about.acts,
            about.score or "–",
            about.rest,
            f"{about.order}; {positions}",
            about.needs or "–",
        ]
        lines.append("| " + " | ".join([*cells, paper, about.code or "–", source_of(cls)]) + " |")
    return "\n".join(lines)


def budgets() -> str:
    """Tokens per layer on LLaVA-1.5-7B at the standard budgets."""
    lines = ["| method | " + " | ".join(map(str, BUDGETS)) + " |", "|---|" + "---|" * len(BUDGETS)]
    for name in registry.names():
        if name != "full":
            lines.append(f"| `{name}` | " + " | ".join(budget_cell(name, budget) for budget in BUDGETS) + " |")
    return "\n".join(lines)


def splits() -> str:
    """How every method splits its budget over tiles, and tokens per layer on LLaVA-NeXT-7B."""
    lines = [
        "| method | split over tiles | " + " | ".join(map(str, NEXT_BUDGETS)) + " |",
        "|---|---|" + "---|" * len(NEXT_BUDGETS),
    ]
    for name in registry.names():
        if name == "full":
            continue
        known = options_of(registry.method(name))["crops"]
        others = [choice for choice in known.metadata["choices"] if choice != known.default]
        how = f"{known.default}" + (f" ({', '.join(others)})" if others else "")
        cells = [budget_cell(name, budget, LLAVA_NEXT_7B) for budget in NEXT_BUDGETS]
        lines.append(f"| `{name}` | {how} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def known_deviations() -> str:
    """Where a method departs from the contract tests, as its class says."""
    lines = []
    for name in registry.names():
        for kind, reason in registry.method(name).known_deviations.items():
            kind, _, options = kind.partition(" with ")
            lines.append(f"* `{name}`{f' with `{options}`' if options else ''}, {kind}: {reason}")
    return "\n".join(lines)


def write_readme() -> None:
    """The number of methods and their names in README.md."""
    names = registry.names()
    controls = [name for name in names if not registry.method(name).metadata.paper]
    listed = [f"`{name}`" for name in names if name not in controls]
    text = f"{' '.join(listed)}, and the controls {' '.join(f'`{name}`' for name in controls)}."
    start = rf"**{len(names)} [methods](docs/methods.md)** (where each acts, its score, what it needs, paper, "
    paragraph = fill(f"{start}official code, tokens per layer): {text}", 175, break_on_hyphens=False)
    page = README.read_text()
    README.write_text(re.sub(r"^\*\*\d+ \[methods\].*?\n\n", paragraph + "\n\n", page, flags=re.DOTALL | re.MULTILINE))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args(arguments)
    insert(PAGE, "methods", table())
    insert(PAGE, "budgets", budgets())
    insert(PAGE, "known deviations", known_deviations())
    insert(MODELS, "crops", splits())
    write_readme()
    print(f"Tables are in {MODELS.relative_to(ROOT)} and {PAGE.relative_to(ROOT)}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
