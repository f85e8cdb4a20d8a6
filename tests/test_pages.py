"""The Markdown pages: links lead somewhere, tables are whole, commands and files exist."""

import re
from itertools import pairwise
from pathlib import Path

import pytest

from eval import cli
from eval.config import ROOT

PAGES = sorted(
    {
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "assets").glob("*/README.md"),
        *(ROOT / ".github").glob("*.md"),
    }
)


@pytest.fixture(params=PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def page(request) -> Path:
    return request.param


def prose(page: Path) -> str:
    """The page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The fragments that GitHub gives to the page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, fragment = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{target} does not exist"
        assert not fragment or fragment in anchors(found), f"{target}: no such heading"


def test_tables_have_as_many_cells_in_every_row(page):
    """A row with another number of cells is cut off or swallows its neighbour when the page is rendered."""
    for table in re.findall(r"(?:^\|.*\n)+", prose(page) + "\n", re.MULTILINE):
        rows = table.splitlines()
        assert len(rows) > 2 and re.fullmatch(r"\|(\s*:?-+:?\s*\|)+", rows[1]), f"no table: {rows[0]}"
        counts = {len(re.findall(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", row))) for row in rows}
        assert len(counts) == 1, f"rows of {counts} cells: {rows[0]}"


def test_a_table_follows_an_empty_line(page):
    """Otherwise GitHub renders it as text. Comments around generated tables are no text."""
    lines = prose(page).splitlines()
    for before, line in pairwise(lines):
        if line.startswith("|") and not before.startswith("|"):
            assert not before.strip() or before.startswith("<!--"), line


def test_one_title_and_no_skipped_level(page):
    if page.name == "PULL_REQUEST_TEMPLATE.md":
        return
    levels = [len(marks) for marks in re.findall(r"^(#+) ", prose(page), re.MULTILINE)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_commands_and_scripts_exist(page):
    text = page.read_text()
    made = {f"scripts/eval/{name}.sh" for name in re.findall(r"vtr new benchmark (\w+)", text)}
    former = set(re.findall(r"`bash (\S+\.sh)[^`]*` \(a script of commit", text))
    for script in set(re.findall(r"\bscripts/[a-z0-9_/]+\.sh\b", text)) - former:
        assert script in made or (ROOT / script).is_file(), script
    for first, second in re.findall(r"\bvtr ([a-z][\w-]*)(?: ([a-z][\w-]*))?", text):
        assert {first, f"{first} {second}"} & {*cli.COMMANDS, *cli.DEFAULTS}, f"vtr {first} {second}"


def test_the_files_of_the_design_exist():
    """The way of one question named files that had been merged into others."""
    text = (ROOT / "docs" / "design.md").read_text()
    named = set(re.findall(r"\b(?:llava|eval|scripts|consensusdrop|tests)/[\w/]+\.(?:py|sh)\b", text))
    assert named and not [name for name in sorted(named) if not (ROOT / name).is_file()]
