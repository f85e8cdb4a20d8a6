"""Rows of a paper's table that were not measured here: published ones and an author's own (`--add`), in every format.

Beside the table that tests/test_hand_table.py computes by hand.
"""

import csv
import dataclasses
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from eval.config import ROOT
from eval.papers import published, render, reported, runs, spec, table
from eval.papers.document import lost_values, reported_document, with_reported
from eval.papers.reported import MEASURED_BASE, OWN_BASE, Reported, published_rows, read_added
from llava.errors import UserError
from tests.browser import DESKTOP, PHONE, needs_browser, opened, overflow
from tests.test_hand_table import made, sources, target

FLAGSHIP = "consensusdrop/llava15_7b"


def added(tmp_path: Path, text: str, suffix: str = "csv") -> list[Reported]:
    path = tmp_path / f"mine.{suffix}"
    path.write_text(text)
    return read_added(path, made()[0])


@pytest.mark.parametrize(
    ("suffix", "text", "sentence"),
    [
        ("csv", "label,budget,GQAA\nA,64,1\n", r"line 1 has an unknown column 'GQAA'\. Did you mean 'GQA'\? Allowed: "),
        ("csv", "label,budget,GQA\nA,64,601\n", "line 2: GQA should be 0 to 100, got 601"),
        ("csv", "label,budget,MME perception\nA,64,2001\n", "line 2: MME perception should be 0 to 2000, got 2001"),
        ("csv", "label,budget,GQA\n\nA,64,sixty\n", "line 3: GQA should be a number such as 61.9, got 'sixty'"),
        ("csv", "label,budget,GQA\nA,64,nan\n", "got nan"),
        ("csv", "label,budget,GQA\nA,65,1\n", "line 2 has the budget '65', which .*; write one of 192, 64"),
        ("csv", "label,budget,GQA\nA,,1\n", "line 2 has no budget for A"),
        ("csv", "label,budget,GQA\nfull,64,1\n", "line 2 gives full, .* the budget 64"),
        ("csv", "label,budget,GQA\nA,64,1\nA,64,2\n", "line 3 gives A .* after .* line 2"),
        ("csv", "label,budget,GQA,GQA\nA,64,1,2\n", "line 1 has the column 'GQA' twice"),
        ("csv", "label,budget,GQA,gqa\nA,64,1,2\n", "line 1 has the column 'gqa' twice, once by another name"),
        ("csv", "label,budget,GQA\nA,64\n", "line 2 has 2 cells and the header 3"),
        ("csv", "label;budget;GQA\nA;64;1\n", "line 1 separates its columns by semicolons"),
        ("csv", "label,budget,GQA\n,64,1\n", "line 2 has no label"),
        ("csv", "label,budget,GQA\nA,64,\n", "line 2 has no score for A"),
        ("csv", "label,budget,GQA,cite\nA,64,1,a}b\n", "cite should be one BibTeX key, .* got 'a}b'"),
        ("csv", 'label,budget,GQA\n"A,64,1\n', "no CSV file"),
        ("csv", "", "has no rows"),
        ("csv", "label,budget,GQA\n", "has no rows"),
        ("yaml", "", "has no rows"),
        ("yaml", "rows: []", "should hold a list of rows"),
        ("yaml", "- {label: A, budget: 64, GQA: 1}\n- 5\n", "line 2 .* got 5"),
        ("yaml", "- {label: A, budget: 64, GQA: 1}\n- {label: B, pop: 1}\n", "line 2 .*'pop'"),
        ("yaml", "- {label: A, budget: 64, GQA: [1]}\n", r"line 1: GQA .* got '\[1\]'"),
        ("yaml", "- {label: A, label: B}\n", "line 1 gives 'label' "),
        ("txt", "x", r"a \.csv or \.yaml file, got "),
    ],
)
def test_a_wrong_file_of_rows_is_one_sentence_with_its_line(tmp_path, suffix, text, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        added(tmp_path, text, suffix)
    assert f"mine.{suffix}" in str(error.value) and "\n" not in str(error.value)


ROWS = """label,budget,gqa,POPE,MME perception,cite,note
full,,80,90,1000,,
Mine_1 <i>,64,60,45,500,key:1,A note.
FastV,192,50,,,,
"""


def with_added(rows, is_toy: bool = False):
    """The table by hand with an author's rows."""
    found, measured, times = made()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(published, "load", lambda name: sources())
        found = found.model_copy(update={"published": "by hand"})
        return table.document_of(found, target(found.real, is_toy), measured, [], times, "bash x.sh", rows)


def test_csv_and_yaml_say_the_same(tmp_path):
    rows = added(tmp_path, "\ufeff" + ROWS)
    assert [(row.label, row.budget, dict(row.scores)) for row in rows] == [
        ("full", None, {"gqa": 80.0, "pope": 90.0, "mme": 1000.0}),
        ("Mine_1 <i>", 64, {"gqa": 60.0, "pope": 45.0, "mme": 500.0}),
        ("FastV", 192, {"gqa": 50.0}),
    ]
    text = """
- {label: full, GQA: 80, POPE: 90, MME perception: 1000, budget: }
- {label: Mine_1 <i>, budget: 64, gqa: 60.0, pope: 45, mme: 500, cite: "key:1", note: A note.}
- {label: FastV, budget: 192, GQA: 50}
"""
    assert added(tmp_path, text, "yaml") == rows


def test_own_rows_are_in_every_format_and_in_no_ranking(tmp_path):
    """Own and foreign rows could not be shown at all: methods without code here were impossible."""
    rows = added(tmp_path, ROWS)
    plain, whole = with_added([]), with_added(rows)
    page = render.markdown_page(whole)
    assert "| Mine_1 <i>, as reported [key:1] | 60.0 | 45.0 | 500 | 58.3 |" in page  # (75 + 50 + 50) / 3
    assert "| FastV, as reported | 50.0 | n/a | n/a | n/a |" in page, "no average over fewer benchmarks"
    assert f"Averages as reported of Mine_1 <i> are in percent {OWN_BASE}." in page and "as reported: A note." in page
    assert re.search(r"^\| VisionDrop, mean merge .*\n(.*\n)*?\| Mine_1", page, re.MULTILINE), "below the measured rows"
    text = render.latex_file(whole)
    assert r"\reported{Mine\_1 $<$i$>$~\cite{key:1}} & \reported{60.0} & \reported{45.0} & \reported{500}" in text
    assert (
        "Cites high, key:1." in text
        and "@misc{high," in render.bib_file(whole)
        and "key:1" not in render.bib_file(whole)
    )
    html = render.html_page(whole)
    assert 'class="reported"><td>Mine_1 &lt;i&gt;<span class="source">as reported [key:1]</span></td>' in html
    lines = list(csv.DictReader(render.csv_file(whole).splitlines()))
    mine = [line for line in lines if line["method"] == "Mine_1 <i>"]
    assert [(line["benchmark"], line["published"], line["score"]) for line in mine] == [
        ("gqa", "60", ""), ("pope", "45", ""), ("mme", "500", ""), ("average", "58.33", ""),
    ]  # fmt: skip
    assert {(line["reported"], line["cite"], line["note"]) for line in mine} == {("as reported", "key:1", "A note.")}
    for one, other in zip(plain.blocks, whole.blocks, strict=True):
        assert (one.rows, one.best, one.second, one.clear) == (other.rows, other.best, other.second, other.clear)
    assert plain.sections == whole.sections and plain.points == whole.points


def test_the_base_of_an_average_is_said_and_never_a_toy(tmp_path):
    """A paper's score in percent of a toy's is no number; unlike values are not divided by ours either."""
    text = "label,budget,gqa,pope,mme\nMine,64,60,45,500\n"
    page = render.markdown_page(with_added(added(tmp_path, text)))
    full = made()[1].row(0)
    mean = sum(100 * value / full[name].value for name, value in (("gqa", 60), ("pope", 45), ("mme", 500))) / 3
    assert f"| Mine, as reported | 60.0 | 45.0 | 500 | {mean:.1f} |" in page
    assert f"of Mine are in percent {MEASURED_BASE}." in page
    toy = with_added(added(tmp_path, text), is_toy=True)
    page = render.markdown_page(toy)
    assert "| Mine, as reported | 60.0 | 45.0 | 500 | n/a |" in page and "High & <i>" not in page
    assert "with the toy's" in toy.banner
    (row,) = reported.with_averages(
        [Reported("A", 64, {"gqa": 50.0}, "s", marks={"gqa": "≠"})], ["gqa"], {"gqa": 100.0}
    )
    assert row.average is None


def test_a_value_of_another_metric_than_the_column_shows_is_left_out_with_a_note(tmp_path):
    """ "MME total" stood in a column that shows perception."""
    found = made()[0]
    columns = [*found.columns[:2], found.columns[2].model_copy(update={"title": "MME (other)"})]
    rows = added(tmp_path, ROWS)
    blocks = with_reported([], rows, found, columns, None)
    assert [block.reported_texts(row)[2] for block in blocks for row in block.reported] == ["n/a"] * 3
    (note,) = lost_values(rows, found, columns)
    assert "MME perception are left out" in note
    assert lost_values(rows, found, found.columns) == []


def test_published_rows_are_undisputed_then_trusted_and_those_without_code_are_named():
    found = spec.read(spec.find(FLAGSHIP))
    rows = {(row.label, row.budget): row for row in published_rows(found, published.load("llava15_7b"))}
    assert rows["PyramidDrop", 128].source.startswith("TRIO"), "RESTORE's row is disputed"
    assert rows["FastV", 64].source == "RESTORE, Table 1" and rows["FastV", 64].scores["mme"] == 1284
    assert rows["FastV", 64].marks == {"vqav2": "≠"} and rows["full", None].marks["scienceqa"] == "?"
    assert rows["FSR", 64].cite == "fsr" and ("TRIM", 64) in rows, "no row of the table"
    narrow = found.model_copy(update={"budgets": (58,), "others": ("fitprune",)})
    assert "FitPrune" in {row.label for row in published_rows(narrow, published.load("llava15_7b"))}


def test_every_source_has_a_key_and_what_bibtex_needs():
    for name in published.models():
        file = published.load(name)
        for key, source in file.sources.items():
            assert reported.KEY.fullmatch(key) and source.title and source.where
    row = Reported("A", 64, {}, "RESTORE, Table 1", "restore", "arXiv 2606.01711 (ICML 2026)")
    assert reported.bibliography([row]) == {
        "restore": {
            "title": "RESTORE",
            "howpublished": "arXiv 2606.01711 (ICML 2026)",
            "url": "https://arxiv.org/abs/2606.01711",
        }
    }


def test_a_method_that_the_table_does_not_list_is_added_by_its_name():
    """An author's own registered method was refused: "The table has no method"."""
    found = spec.read(spec.find(FLAGSHIP))
    listed = {row.method for row in found.rows}
    assert "trim" not in listed
    args = table.parser().parse_args([FLAGSHIP, "--methods", "fastv,trim,fitprune"])
    part = table.narrowed(found, args)
    assert [row.method for row in part.rows] == ["fastv", "trim"] and part.others == ("fastv", "trim", "fitprune")
    with pytest.raises(UserError, match="'fastvv'"):
        table.narrowed(found, table.parser().parse_args([FLAGSHIP, "--methods", "trim,fastvv"]))


# -- without a model --------------------------------------------------------------------------------------------------


def documented(language: str) -> str:
    """The block of the recipe in docs/paper_tables.md."""
    page = (
        (ROOT / "docs" / "paper_tables.md").read_text().partition("## Published beside mine")[2].partition("\n## ")[0]
    )
    (found,) = re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)
    return found.replace("\\\n", "")


@pytest.fixture
def recipe(monkeypatch, tmp_path) -> Path:
    """The documented example, made in an empty folder where no model can be opened."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "open_model", None)
    monkeypatch.setattr(table, "where_of", None)
    Path("mine.csv").write_text(documented("csv"))
    words = shlex.split(documented("bash"))
    assert words[:3] == ["vtr", "tables", "paper"] and table.main(words[3:]) == 0
    return tmp_path / "mine"


def test_the_documented_recipe_needs_no_model_and_no_data(recipe):
    assert sorted(path.suffix for path in recipe.iterdir()) == [".bib", ".csv", ".html", ".md", ".tex"]
    text = (recipe / "llava15_7b.md").read_text()
    assert text.startswith("# ConsensusDrop on LLaVA-1.5-7B, published values\n\n**NOTHING WAS MEASURED")
    assert "| FastV, as reported [RESTORE, Table 1] | 46.4 | 51.6 | 36.1 | 51.4 | " in text
    assert "| MyMethod, as reported | 58.4 | 56.1 | 86.0 | 62.3 | 96.8 |" in text and "--published-only" in text
    assert "FSR" not in text and "Bold" not in text, "other methods were not asked for"


@pytest.mark.skipif(not (shutil.which("pdflatex") and shutil.which("bibtex")), reason="pdflatex is not installed")
@pytest.mark.parametrize("packages", ["booktabs,graphicx", "booktabs,graphicx,xcolor"])
def test_the_recipe_compiles_with_its_sources_and_fits_the_page(recipe, packages):
    head = rf"\documentclass{{article}}\usepackage{{{packages}}}\begin{{document}}\nocite{{*}}\input{{llava15_7b}}"
    (recipe / "page.tex").write_text(head + r"\bibliographystyle{plain}\bibliography{llava15_7b}\end{document}")
    (recipe / "llava15_7b.bib").write_text(
        (recipe / "llava15_7b.bib").read_text() + "@misc{ye2025fitprune, key={F}, title={FitPrune}}\n"
    )
    tex = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page.tex"]
    for words in (tex, ["bibtex", "page"], tex, tex):
        done = subprocess.run(words, cwd=recipe, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and "Warning--" not in done.stdout, done.stdout[-2000:]
    log = (recipe / "page.log").read_text()
    assert "undefined" not in log and "Overfull" not in log and "(1 page" in log


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([FLAGSHIP, "--published-only", "--data", "x", "--limit", "3"], "leave --data, --limit out"),
        (["consensusdrop/ablation", "--published-only"], "consensusdrop/ablation is of kind"),
        ([FLAGSHIP, "--published-only", "--methods", "random", "--budgets", "32"], f"part of {FLAGSHIP}"),
    ],
)
def test_flags_that_do_not_go_together_are_one_sentence(capsys, words, sentence):
    assert table.main(words) == 2
    assert sentence in capsys.readouterr().err


def test_the_command_says_which_rows_were_added():
    args = table.parser().parse_args([FLAGSHIP, "--add", "my rows.csv", "--add", "b.yaml", "--published-only"])
    line = table.command_line(spec.read(spec.find(FLAGSHIP)), args)
    assert line.endswith(" --add 'my rows.csv' --add b.yaml --published-only")


# -- the files --------------------------------------------------------------------------------------------------------


def test_a_long_table_is_divided_between_budgets():
    """93 rows were made so small that nobody could read them."""
    found = spec.read(spec.find(FLAGSHIP))
    rows = [Reported(f"M{n}", budget, {"gqa": 50.0}, "") for budget in found.budgets for n in range(40)]
    text = render.latex_file(reported_document(found, rows, "bash x.sh"))
    assert text.count(r"\begin{table*}") == text.count(r"\toprule") == 4 and text.count(r"\label") == 1
    assert (
        text.count(r"\ref{tab:consensusdrop/llava15-7b}, continued") == 3 and text.count(r"\textit{as reported}") == 4
    )
    assert render.latex_file(reported_document(found, rows[:30], "bash x.sh")).count(r"\begin{table*}") == 1


def test_tokens_on_padding_are_in_the_csv_and_the_details():
    whole = with_added([])
    first, *rest = whole.entries
    cell = dataclasses.replace(first.cell, padding=12.5)
    whole = dataclasses.replace(whole, entries=[dataclasses.replace(first, cell=cell), *rest])
    lines = list(csv.DictReader(render.csv_file(whole).splitlines()))
    assert [line["tokens_on_padding"] for line in lines[:2]] == ["12.50", ""]
    assert render.html_page(whole).count("<dt>tokens on padding</dt><dd>12.5</dd>") == 1


@needs_browser
@pytest.mark.parametrize("size", [PHONE, (1024, 900), DESKTOP])
def test_every_table_of_the_page_can_be_read(tmp_path, size):
    """ "Every cell" was 4,749 pixels wide in 1,214; on a phone only "method" was to be seen."""
    whole = with_added(added(tmp_path, ROWS))
    command = "DATA=/a/long/path/to/the/data bash scripts/eval/gqa.sh consensusdrop 64 --set " + "x" * 300
    entries = [dataclasses.replace(one, cell=dataclasses.replace(one.cell, command=command)) for one in whole.entries]
    (tmp_path / "page.html").write_text(render.html_page(dataclasses.replace(whole, entries=entries)))
    with opened(tmp_path / "page.html", size) as page:
        assert overflow(page) == 0 and page.errors == []
        widths = page.evaluate(
            "[...document.querySelectorAll('table')].map(t => [t.scrollWidth, t.parentElement.clientWidth])"
        )
        assert size == PHONE or all(table <= room for table, room in widths)
        assert page.locator(".hint").is_visible() == (size[0] <= 900)
        page.locator("#cells details details summary").first.click()  # what a cell says besides, on demand
        assert page.locator("#cells dd", has_text="DATA=/a/long").first.is_visible() and overflow(page) == 0
        for place in ("#wide", "#cells table"):
            box = page.locator(place).first.locator("xpath=..")
            box.evaluate("box => { box.scrollLeft = 10000 }")
            edge, inside = box.bounding_box(), box.locator("tbody tr:first-child td")
            names, last = inside.first.bounding_box(), inside.last.bounding_box()
            assert abs(names["x"] - edge["x"]) <= 2 and names["width"] < 0.6 * edge["width"], "the methods stay in view"
            assert last["x"] + 40 <= edge["x"] + edge["width"], "the last column can be reached"
