"""The Markdown pages: links lead somewhere, tables are whole, commands and files exist, and README's examples run."""

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

from eval import cli
from eval.config import ROOT
from eval.pages import inline_json
from lab.pages import methods
from llava.reduction import registry

TOY = ROOT / "assets" / "tinyllava"
IMAGE = ROOT / "assets" / "eval" / "pope" / "val2014" / "test00042d.jpg"  # of the first question of its POPE

PAGES = sorted(
    {
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "assets").glob("*/README.md"),
        *(ROOT / ".github").glob("*.md"),
    }
)


def test_json_inside_an_html_page_cannot_end_its_script():
    """The pages' own tests need a browser, so that a missing escape went unseen by the fast ones."""
    content = {"question": "</script><script>&<!--"}
    text = inline_json(json.dumps(content))
    assert not set("<>&") & set(text) and json.loads(text) == content


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


# -- README.md and the page of methods -------------------------------------------------------------------------------


def block(mark: str, page: str = "README.md") -> str:
    """The Python block of the page that contains `mark`."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    (found,) = [code for code in blocks if mark in code]
    return found


def test_the_reduce_example_runs_on_the_toy_model(capsys):
    """From disk, with AutoProcessor: the toy model once shipped no processor_config.json, and the example failed."""
    code, hub = block("from llava import reduce"), "llava-hf/llava-1.5-7b-hf"
    assert len(list(filter(None, code.splitlines()))) == 12 and hub in code and "What is this?" in code
    question = "Is there a pink square in the image?\\nAnswer the question using a single word or phrase."
    names = {}
    exec(code.replace(hub, str(TOY)).replace("What is this?", question).replace("dog.jpg", str(IMAGE)), names)
    (account,), output = names["reduced"].accounting, names["output"][0]
    said, counted = capsys.readouterr().out.rsplit("\n", 2)[:2]
    assert counted == str(account.tokens_per_layer)
    assert account.visual_tokens == 576 and account.mean == 64
    assert said == names["processor"].decode(output, skip_special_tokens=True)
    answer = said.rpartition("ASSISTANT:")[2]
    assert answer.strip().lower() in ("yes", "no")


def test_the_streaming_example_runs_on_the_toy_model(capsys):
    """The usual thread inside the block printed a refusal, and the loop over its streamer waited for ever."""
    names, code = {}, block("from llava import reduce").replace("dog.jpg", str(IMAGE))
    exec(code.replace("llava-hf/llava-1.5-7b-hf", str(TOY)), names)
    whole = names["processor"].decode(names["output"][0], skip_special_tokens=True).rpartition("ASSISTANT:")[2]
    capsys.readouterr()
    exec(block("TextIteratorStreamer", "docs/python.md"), names)
    assert capsys.readouterr().out.split() == whole.split() and whole.split()
    assert names["reduced"].accounting[0].mean == 64


@pytest.mark.lab
def test_methods_and_benchmarks_are_counted():
    """A new one left both numbers, and the list of methods, as they were."""
    text = (ROOT / "README.md").read_text()
    counted = re.search(r"\*\*(\d+) \[methods\]\(docs/methods\.md\)\*\*", text)
    assert counted and int(counted[1]) == len(registry.names())
    assert methods.readme_table() in text, "run `vtr tables methods`"
    counted = re.search(r"\*\*(\d+) \[benchmarks\]\(docs/benchmarks\.md\)\*\*", text)
    sections = (ROOT / "docs" / "benchmarks.md").read_text().partition("<!-- begin data -->")[2].count("\n### ")
    assert counted and int(counted[1]) == sections, "docs/benchmarks.md has a section per benchmark"


@pytest.mark.lab
def test_the_page_of_methods_is_up_to_date():
    """A method could be changed or added without its row."""
    text, hint = methods.PAGE.read_text(), "run `vtr tables methods`"
    generated = methods.table, methods.budgets, methods.known_deviations, methods.releases, methods.licences
    for part in (*generated, methods.splits):
        assert part() in text, hint
    assert methods.families() in methods.FAMILIES.read_text(), hint
