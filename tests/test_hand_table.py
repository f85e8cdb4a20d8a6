"""Every section of a paper's table, and the four files that hold it, beside numbers that were computed apart.

tests/data/hand_table has the answers, which were written by hand, and what follows from them by the definitions of
docs/statistics.md. A wrong sign, value, row or column anywhere between the answers and the page is seen here.
"""

import csv
import dataclasses
import io
import itertools
import json
import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import pytest

from eval import score
from eval.benchmarks import mme, pope
from eval.config import ROOT, RunConfig
from eval.metrics.accuracy import mean_score, normalise
from eval.papers import cells, gate, published, render, spec, table
from eval.papers.cells import Cell, MeasuredTable
from eval.papers.document import blocks, difference_to, entries, notes_of, ours_text, published_text
from eval.papers.published import Published
from eval.papers.runs import RowAtBudget, RunTarget, Time
from eval.papers.sections import clear_differences, pair_rows, pairs_of, releases, row_pairs, sections_of
from eval.results.statistics import compare, holm, interval, terms_of
from eval.statistics.answers import plain
from eval.statistics.command import main as stats_command
from eval.statistics.relative import p_value, pair
from eval.yaml_files import read_yaml
from lab.pages import reproduce
from llava.errors import UserError
from tests.test_statistics_command import write_run

FOLDER = ROOT / "tests" / "data" / "hand_table"
BY_KEPT = ("FastV", 64)


@cache
def data(name: str):
    return json.loads((FOLDER / f"{name}.json").read_text())


def key(line: RowAtBudget) -> str:
    return f"{line.title}@{line.budget or ''}"


def scored(benchmark: str, texts: dict[str, str]):
    """The benchmark's own score of some answers, and its own form of an answer."""
    asked = {name: data("labels")[benchmark][name] for name in texts}
    if benchmark == "gqa":
        answers = {name: one["answer"] for name, one in asked.items()}
        return mean_score(answers, texts, lambda text, answer: normalise(text) == answer), normalise
    if benchmark == "pope":
        items = {name: pope.PopeReference("random", one["image"], one["answer"]) for name, one in asked.items()}
        return pope.official_score(items, texts), pope.parse
    items = {name: mme.MmeReference(one["task"], one["image"], "", "", one["answer"]) for name, one in asked.items()}
    return mme.evaluate(items, texts), plain


@cache
def made(kind: str = "scores", only: str = "", ours: str = "consensusdrop"):
    """(table, cells, seconds to the first token by line) from the answers; on one benchmark if named."""
    found = spec.read(FOLDER / "table.yaml")
    columns = tuple(column for column in found.columns if only in ("", column.benchmark))
    found = found.model_copy(update={"kind": kind, "columns": columns, "ours": ours})
    lines = [RowAtBudget(spec.TableRow(method="full"), None, RunConfig("full"))]
    for budget in found.budgets:
        for row in found.rows:
            by_kept = (row.title, budget) == BY_KEPT
            lines.append(RowAtBudget(row, budget, RunConfig(row.method, budget, options=dict(row.options)), by_kept))
    known = {}
    for index, line in enumerate(lines):
        for column in columns:
            texts = data("answers")[line.title][str(line.budget or "")].get(column.benchmark)
            if texts is None:
                continue
            result, normal = scored(column.benchmark, texts)
            clusters = {name: data("labels")[column.benchmark][name]["image"] for name in texts}
            terms, cost = terms_of(result, clusters), data("costs")[key(line)]
            sure = interval(terms)
            known[index, column.benchmark] = Cell(
                line=line,
                column=column,
                value=float(result.values[result.main]),
                low=sure.low,
                high=sure.high,
                metric=result.main,
                whole=column.benchmark == "mme",
                questions=len(texts),
                available=len(texts),
                tokens=cost["tokens"],
                merged=cost["merged"],
                kv_bytes=cost["kv_bytes"],
                flops=cost["flops"],
                folder=Path("run"),
                command=f"bash <{line.title}>",
                commit="c0ffee",
                finished="2026-01-02",
                terms=terms,
                normalise=normal,
                texts=texts,
                sample_scores=result.correct,
                clusters=clusters,
            )
    times = {index: Time(data("costs")[key(line)]["ttft"], "TTFT.") for index, line in enumerate(lines)}
    return found, MeasuredTable(lines, columns, known), times


def target(place: spec.Place, is_toy: bool = False) -> RunTarget:
    """The model and data of the page."""
    return RunTarget(place, is_toy, RunConfig("full", model=place.model, data=FOLDER))


@cache
def pairs(only: str):
    return pairs_of(made("overview", only)[1])


@cache
def sources() -> Published:
    return Published.model_validate({"name": "by hand", **read_yaml(FOLDER / "published.yaml")})


@cache
def document():
    """The table of scores with everything that its files say, beside published values."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(published, "load", lambda name: sources())
        found, measured, times = made()
        found = found.model_copy(update={"published": "by hand"})
        checks = gate.check(list(measured.row(0).values()), sources(), found.real)
        return table.document_of(found, target(found.real), measured, checks, times, "bash x.sh")


def found_sections(kind: str, only: str = "", ours: str = "consensusdrop") -> dict[str, list[list[str]]]:
    """Title -> rows of every section of a table without a wide one."""
    found, measured, times = made(kind, only, ours)
    compared = pairs(only) if kind == "overview" else {}
    return {one.title: [list(row) for row in one.rows] for one in sections_of(found, measured, times, {}, compared)}


# -- values -------------------------------------------------------------------------------------------------------


def test_scores_intervals_and_averages():
    """Averages over rows in which a benchmark is missing went unseen by the fast tests."""
    _, found, _ = made()
    for (index, benchmark), cell in found.cells.items():
        wanted = data("expected")["score"][f"{key(found.lines[index])}@{benchmark}"]
        assert [cell.value, cell.low, cell.high] == pytest.approx([wanted[name] for name in ("value", "low", "high")])
    averages = {key(line): found.of_full(index) for index, line in enumerate(found.lines)}
    assert averages == {name: value and pytest.approx(value) for name, value in data("expected")["average"].items()}


def test_every_section_of_a_table_of_scores():
    """A difference with the wrong sign, or groups exchanged, went unseen by the fast tests; differences and averages
    were drawn 5,000 and 2,000 times where the page said 10,000."""
    assert {one.title: [list(row) for row in one.rows] for one in document().sections} == data("expected")["sections"]


def test_p_values_of_differences_and_of_99_percent():
    """Tables round them to "significant" or not, which hides a wrong number of draws or a wrong family of tests."""
    _, found, _ = made()
    index = {(line.title, str(line.budget)): place for place, line in enumerate(found.lines)}
    families = {}
    for name, wanted in data("expected")["p"].items():
        test, title, budget, benchmark = name.split("@")
        terms, full = (found.cells[place, benchmark].terms for place in (index[title, budget], 0))
        if test == "99 %":
            assert p_value(pair(terms, full), 0.99) == pytest.approx(wanted, abs=1e-12), name
        elif test == "ours":
            p = compare(found.cells[index["ConsensusDrop", budget], benchmark].terms, terms).p
            assert p == pytest.approx(wanted, abs=1e-12), name
            families.setdefault((title, budget), {})[benchmark] = p
    for (title, budget), values in families.items():
        for benchmark, p in zip(values, holm(list(values.values())), strict=True):
            assert p == pytest.approx(data("expected")["p"][f"holm@{title}@{budget}@{benchmark}"]), (title, budget)


@pytest.mark.parametrize("benchmark", ["gqa", "mme"])
def test_every_section_of_an_overview_and_its_file_of_pairs(benchmark):
    """Rows marked ‡ won and lost against others ("14 / 4") under a sentence that compares them with none; pairs were
    drawn 50,000 times where the page said 10,000."""
    assert found_sections("overview", benchmark) == data("expected")["overview"][benchmark]
    _, found, _ = made("overview", benchmark)
    assert pair_rows(found, pairs(benchmark)) == data("expected")["pairs"][benchmark]


def test_every_difference_of_an_ablation_and_the_scores_beside_costs():
    assert found_sections("ablation", ours="visiondrop")["One choice at a time"] == data("expected")["ablation"]
    costs = [row for row in found_sections("efficiency")["Costs"] if len(row) == 12]
    assert costs == data("expected")["scored costs"]


def test_the_gate_and_the_differences_compare_with_the_same_sources():
    """A source of low trust was not compared by the gate and was the reference of a difference."""
    assert {one.cell.column.benchmark: one.verdict for one in document().checks} == data("expected")["gate"]
    assert [one.passed for one in document().checks] == [False, True, True]
    assert len(gate.sentences(document().checks)) == 1
    found, measured, _ = made()
    for entry in entries(measured, sources(), found.real):
        wanted = data("expected")["published"].get(f"{key(entry.cell.line)}@{entry.cell.column.benchmark}")
        said = [published_text(entry.published, entry.convention), difference_to(entry)]
        assert said == (wanted[:2] if wanted else ["n/a", "n/a"])
        assert (entry.compared.source if entry.compared else "") == (wanted[3] if wanted else "")


def test_points_of_the_figure():
    _, found, times = made()
    points = table.points_of(document().table, found, times)
    for line, point in zip(found.lines, points, strict=True):
        cost, average = data("costs")[key(line)], data("expected")["average"][key(line)]
        assert (point["method"], point["budget"], point["tokens"]) == (line.title, line.budget, cost["tokens"])
        assert (point["ttft_ms"], point["score"]) == pytest.approx((1000 * cost["ttft"], average))


# -- the files ------------------------------------------------------------------------------------------------------


def expected_wide(style: dict[str, str]) -> list[list[str]]:
    """The rows of the wide table without their budgets: "best: 87.5" in the style of a format."""
    rows = [row for block in data("expected")["wide"].values() for row in block]
    return [[rows_name, *(styled(cell, style) for cell in cells)] for rows_name, *cells in rows]


def styled(cell: str, style: dict[str, str]) -> str:
    name, _, value = cell.rpartition(": ")
    return style[name].format(value)


# The most trusted published row at each budget, and of full: no ranking, no average where a benchmark is missing.
REPORTED = [
    ["full", "84.2", "96.0", "n/a", "n/a"],
    ["VisionDrop", "96.3", "n/a", "n/a", "n/a"],
    ["FastV", "99.0", "n/a", "n/a", "n/a"],
]


def markdown_rows(text: str) -> list[list[str]]:
    """The cells of the tables of a page, headers and rules left out."""
    rows = []
    for part in re.findall(r"^\|.*\n\|---.*\n((?:\|.*\n)*)", text, re.MULTILINE):
        for line in part.splitlines():
            cells = re.split(r"(?<!\\)\|", line)[1:-1]
            rows.append([cell.strip().replace(r"\|", "|") for cell in cells])
    return rows


def test_markdown_has_every_value_in_its_row_and_column():
    page = render.markdown_page(document())
    top, *parts = page.split("\n## ")
    rows = [row for row in markdown_rows(top + "\n") if not row[0].startswith("***")]
    told = [row for row in rows if "as reported" in row[0]]
    assert told == [[f"{name}, as reported [High & <i>]", *row] for name, *row in REPORTED]
    rows = [row for row in rows if row not in told]
    assert rows == expected_wide({"best": "**{}**", "second": "<u>{}</u>", "": "{}"})
    assert "| method | GQA | POPE | MME perception | average |" in top
    for title, wanted in data("expected")["sections"].items():
        (part,) = [part for part in parts if part.startswith(title)]
        assert markdown_rows(part + "\n") == wanted, title
    for benchmark, verdict in data("expected")["gate"].items():
        assert f"* {'MME perception' if benchmark == 'mme' else benchmark.upper()} {verdict}\n" in top


def test_csv_has_every_number():
    rows = list(csv.DictReader(io.StringIO(render.csv_file(document()))))
    told, rows = [[row for row in rows if bool(row["reported"]) == wanted] for wanted in (True, False)]
    assert [(row["method"], row["budget"], row["benchmark"], row["published"], row["score"]) for row in told] == [
        ("full", "", "gqa", "84.2", ""), ("full", "", "pope", "96", ""),
        ("VisionDrop", "192", "gqa", "96.3", ""), ("FastV", "64", "gqa", "99", ""),
    ]  # fmt: skip
    assert {(row["source"], row["cite"], row["reported"]) for row in told} == {("High & <i>", "high", "as reported")}
    found, expected = made()[1], data("expected")
    cells = [(found.lines[i], column.benchmark) for i in range(len(found.lines)) for column in found.columns]
    cells = [(line, name) for line, name in cells if f"{key(line)}@{name}" in expected["score"]]
    for row, (line, benchmark) in zip(rows, cells, strict=True):
        wanted, cost = expected["score"][f"{key(line)}@{benchmark}"], data("costs")[key(line)]
        # A name that begins with = would be a formula.
        assert row["method"] == ("'" * line.title.startswith("=")) + line.title
        assert (row["budget"], row["benchmark"]) == (str(line.budget or ""), benchmark)
        assert row["counts_kept_tokens"] == ("true" if (line.title, line.budget) == BY_KEPT else "false")
        for name in ("value", "low", "high"):
            said = row["score" if name == "value" else name]
            assert said == "" if wanted[name] is None else float(said) == pytest.approx(wanted[name], abs=0.00501)
        assert row["gate"] == expected["gate"][benchmark]
        told = expected["published"].get(f"{key(line)}@{benchmark}", ["", "", "", ""])
        assert (row["difference"], row["compared_with"]) == tuple(told[2:])
        assert row["published"].split(";") == re.findall(r"([\d.]+) \[", told[0]) or row["published"] == told[0] == ""
        assert (float(row["tokens_per_layer"]), float(row["kv_bytes"])) == (cost["tokens"], cost["kv_bytes"])
        assert row["flops"] == ("" if cost["flops"] is None else f"{cost['flops']:.0f}")
        assert float(row["merged_tokens"]) == cost["merged"]
        count = str(len(data("answers")[line.title][str(line.budget or "")][benchmark]))
        assert (row["questions"], row["available"], row["run"]) == (count, count, "run")
        assert (row["command"], row["commit"], row["finished"]) == (f"bash <{line.title}>", "c0ffee", "2026-01-02")
        assert list(row) == list(render.HEADER), "a value too many or too few"


UNESCAPED = {
    r"$<$": "<", r"$>$": ">", r"$|$": "|", r"\&": "&", r"\_": "_", r"\{": "{", r"\}": "}", r"\%": "%",
    r"$^\ddagger$": "‡",
}  # fmt: skip


def latex_rows(text: str) -> list[list[str]]:
    """The cells of the body, unescaped: letters of LaTeX stand nowhere but in their escapes."""
    rows = []
    for line in re.findall(r"^(.*) \\\\$", text.partition(r"\midrule")[2], re.MULTILINE):
        if "multicolumn" in line or line.startswith(r"\reported"):
            continue
        cells = re.split(r"(?<!\\) ?& ", line)
        name = cells[0].removeprefix(r"\textbf{")
        for written in UNESCAPED:
            name = name.replace(written, "")
        assert not set(name) & set("<>|&_{%‡$"), name
        for written, letter in UNESCAPED.items():
            cells = [cell.replace(written, letter) for cell in cells]
        rows.append([cell.strip() for cell in cells])
    return rows


def test_latex_has_every_value_in_its_row_and_column():
    rows = latex_rows(render.latex_file(document()))
    told = re.findall(r"^\\reported\{(\w+)~\\cite\{high\}\}(.*) \\\\$", render.latex_file(document()), re.MULTILINE)
    told = [[name, *re.findall(r"reported\{(.*?)\}", row)] for name, row in told]
    assert told == [[cell.replace("n/a", "--") for cell in row] for row in REPORTED]
    style = {"best": r"\textbf{{{}}}", "second": r"\underline{{{}}}", "": "{}"}
    wanted = [
        [name, *(styled(cell, style) for cell in cells), styled(average.replace("n/a", "--"), style)]
        for name, *cells, average in (row for block in data("expected")["wide"].values() for row in block)
    ]
    plain_rows = [[cell.replace("%", "") if place else cell for place, cell in enumerate(row)] for row in rows]
    assert plain_rows == [[cell.replace("n/a", "--") for cell in row] for row in wanted]
    assert all(row[-1].rstrip("}").endswith("%") or row[-1] == "--" for row in rows)
    with_intervals = latex_rows(render.latex_file(document(), intervals=True))
    _, found, _ = made()
    for line, row in zip(found.lines, with_intervals, strict=True):
        for cell, column in zip(row[1:], found.columns, strict=False):
            score = data("expected")["score"].get(f"{key(line)}@{column.benchmark}")
            ends = [float(end) for end in re.findall(r"-?\d+\.\d", cell.partition("scriptsize")[2])]
            known = score is not None and score["low"] is not None
            assert ends == (pytest.approx([score["low"], score["high"]], abs=0.0501) if known else [])
    marked = {(row[0], place) for row in with_intervals for place, cell in enumerate(row) if r"$^\ast$" in cell}
    listed = data("expected")["sections"]["ConsensusDrop against each method"]
    titles = ["GQA", "POPE", "MME perception"]
    assert marked == {(row[0], 1 + titles.index(title)) for row in listed for title in titles if title in row[4]}


class Cells(HTMLParser):
    """The tables of a page: rows of (text, class of the cell)."""

    def __init__(self, page: str):
        super().__init__()
        self.tables: list[list[list[tuple[str, str]]]] = []
        self.in_cell = False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.in_cell = self.in_cell or tag == "td"
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag == "td":
            self.tables[-1][-1].append(("", dict(attributes).get("class", "") or ""))
        elif tag in ("b", "i", "chance"):
            raise AssertionError(f"<{tag}> of a name is a tag of the page")

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag != "td"

    def handle_data(self, text):
        if self.in_cell:
            said, style = self.tables[-1][-1].pop()
            self.tables[-1][-1].append((said + text, style))


def test_html_has_every_value_in_its_row_and_column_and_escapes_names():
    """Names with letters of HTML went unescaped unseen by the fast tests."""
    wide, *others = Cells(render.html_page(document())).tables
    others, cells = others[: len(data("expected")["sections"])], others[len(data("expected")["sections"]) :]
    rows = [row for row in wide if len(row) > 1]
    told = [[text for text, _ in row] for row in rows if "as reported" in row[0][0]]
    assert told == [[f"{name}as reported [High & <i>]", *row] for name, *row in REPORTED]
    rows = [row for row in rows if "as reported" not in row[0][0]]
    said = [[row[0][0], *(f"{style}: {text}" if style else text for text, style in row[1:])] for row in rows]
    assert said == [row for block in data("expected")["wide"].values() for row in block]
    for part, wanted in zip(others, data("expected")["sections"].values(), strict=True):
        assert [[text for text, _ in row] for row in part if row] == wanted
    found, expected = made()[1], data("expected")
    by_line = {(line.title, str(line.budget or "all")): key(line) for line in found.lines}
    rows = [(name, row) for name, part in zip(("gqa", "pope", "mme"), cells, strict=True) for row in part if row]
    assert len(rows) == len(expected["score"])
    for benchmark, row in rows:
        name, budget, ours, difference, tokens, details = (text for text, _ in row)
        line = by_line[name, budget]
        told = expected["published"].get(f"{line}@{benchmark}", ["n/a", "n/a"])
        assert difference == told[1] and f"published{told[0]}\n" in details and f"commandbash <{name}>\n" in details
        (merged,) = re.findall(r"merged tokens([\d.]+)\n", details)
        assert "padding" not in details, "results without it"
        value = expected["score"][f"{line}@{benchmark}"]["value"]
        assert float(ours.partition(" ")[0]) == pytest.approx(value, abs=0.501 if benchmark == "mme" else 0.0501)
        cost = data("costs")[line]
        assert (float(tokens), float(merged)) == (cost["tokens"], cost["merged"])


def test_the_files_of_an_overview_and_of_an_ablation(tmp_path, monkeypatch):
    """The first section is the LaTeX table of kinds without a wide one, and an overview has a file of pairs."""
    monkeypatch.setattr("eval.papers.figure.draw", lambda *given: False)
    for kind, only, ours in (("overview", "gqa", "consensusdrop"), ("ablation", "", "visiondrop")):
        found, measured, times = made(kind, only, ours)
        monkeypatch.setattr("eval.papers.sections.pairs_of", lambda measured: pairs("gqa"))
        where = target(found.real, True)
        whole = table.document_of(found, where, measured, [], times, "bash x.sh")
        table.write(whole, tmp_path / kind)
        rows = latex_rows((tmp_path / kind / "table.tex").read_text())
        wanted = data("expected")[kind]["gqa"]["Overview"] if only else data("expected")[kind]
        assert rows == [[re.sub(r"^\*\*(.*)\*\*$", r"\\textbf{\1}", cell) for cell in row] for row in wanted]
    rows = list(csv.reader((tmp_path / "overview" / "table_pairs.csv").open()))
    assert rows == [["budget", "a", "b", "a_minus_b", "low", "high", "p_holm"], *data("expected")["pairs"]["gqa"]]
    assert not (tmp_path / "ablation" / "table_pairs.csv").exists()


def test_blocks_rank_no_row_that_counts_its_budget_otherwise():
    """FastV ‡ has the highest score of every column of its block."""
    found, measured, _ = made()
    block = blocks(measured, clear_differences(found, measured))[2]
    place = [name for name, _ in block.rows].index("FastV ‡ (128)")
    assert all(place not in rows for rows in (*block.best, *block.second))
    assert not {column for row, column in block.clear if row == place}


@pytest.mark.parametrize(("scores", "texts"), [((150.0, 50.0), ("150", "50")), ((100.0, 50.0), ("100.0", "50.0"))])
def test_a_column_of_points_has_whole_numbers_or_decimals(monkeypatch, scores, texts):
    """Points were whole from 100 on, so that 150 stood above 50.0 in one column."""
    _, found, _ = made()
    lines, columns = found.lines[:2], [column for column in found.columns if column.benchmark == "mme"]
    given = [dataclasses.replace(found.cells[i, "mme"], value=value, whole=True) for i, value in enumerate(scores)]
    monkeypatch.setattr(cells, "read_cell", lambda line, *rest: given[lines.index(line)])
    read = cells.read_cells(lines, columns, {(index, "mme"): None for index in (0, 1)})
    assert [block.text(0, 0) for block in blocks(read, {})] == list(texts)
    assert [ours_text(read.first(index)).partition(" ")[0] for index in (0, 1)] == list(texts)


# -- `vtr compare` and `vtr stats` ------------------------------------------------------------------------------------


@pytest.fixture
def stores(tmp_path):
    """The answers to gqa as folders of finished runs, and the data that they were asked about."""
    gqa = tmp_path / "data" / "gqa"
    (gqa / "data" / "images").mkdir(parents=True)
    records, lines = {}, []
    for name, one in data("labels")["gqa"].items():
        records[name] = {
            "question": f"What colour is {name}?",
            "answer": one["answer"],
            "imageId": one["image"],
            "isBalanced": True,
            "types": {"structural": "query", "semantic": "obj", "detailed": "x"},
            "semantic": [{"operation": "select", "argument": "thing (1)"}],
            "groups": {"global": None},
            "entailed": [],
        }
        text = f"{records[name]['question']}\nAnswer the question using a single word or phrase."
        lines.append({"question_id": name, "image": f"{one['image']}.jpg", "text": text, "category": "default"})
    (gqa / "data" / "testdev_balanced_questions.json").write_text(json.dumps(records))
    (gqa / "llava_gqa_testdev_balanced.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def store(title: str, budget: str, method: str, **options) -> str:
        texts = data("answers")[title][budget]["gqa"]
        settings = {"config": {"budget": int(budget or 576), **options}}
        folder = tmp_path / f"{method}-{budget}-{len(title)}"
        return write_run(folder, gqa.parent, method, int(budget or 576), texts=texts, settings=settings)

    return gqa.parent, store


def test_compare_has_the_sign_and_the_numbers_of_a_minus_b(stores, tmp_path):
    where, store = stores
    a, b = store("ConsensusDrop", "64", "consensusdrop"), store("VisionDrop", "64", "visiondrop", official=True)
    out = tmp_path / "out.json"
    assert score.compare_command([a, b, "--data", str(where), "--json", str(out)]) == 0
    record = json.loads(out.read_text())
    assert {name: record[name] for name in data("expected")["compare"]} == pytest.approx(data("expected")["compare"])


def test_stats_has_the_numbers_of_every_group(stores, tmp_path):
    """Groups A and B, and answers where full is right and where it is wrong, were exchanged unseen."""
    where, store = stores
    runs = [store("full", "", "full"), store("VisionDrop", "64", "visiondrop", official=True)]
    runs.append(store("VisionDrop, mean merge", "64", "visiondrop", official=False))
    runs.append(store("Downsample", "64", "downsample"))
    out = tmp_path / "out.json"
    assert stats_command([*runs, "--data", str(where), "--json", str(out)]) == 0
    record = json.loads(out.read_text())
    rows = {row["method"]: row for row in record["rows"]}
    for title, official in (("VisionDrop", True), ("VisionDrop, mean merge", False)):
        row, wanted = rows[f"visiondrop official={official}"], data("expected")["stats"][title]
        for name in ("score", "loyalty", "loyalty_right", "loyalty_wrong", "group_a"):
            assert [row[name][part] for part in ("mean", "low", "high")] == pytest.approx(wanted[name]), name
        assert (row["in_group_a"], row["in_group_b"]) == (wanted["in_group_a"], wanted["in_group_b"])
        assert (row["test"]["of_full"], row["test"]["p"]) == pytest.approx((wanted["of_full"], wanted["p"]))


def test_a_variant_with_another_budget_is_not_put_beside_its_release():
    """A row marked ‡ stands in no comparison, whichever of the two it is."""
    _, found, _ = made()
    pair = [i for i, line in enumerate(found.lines) if line.row.method == "visiondrop" and line.budget == 64]
    rows = releases(found).rows
    assert len(pair) == len(rows) == 2
    for marked in pair:
        lines = [dataclasses.replace(line, by_kept=i == marked) for i, line in enumerate(found.lines)]
        assert releases(dataclasses.replace(found, lines=lines)).rows == [row for row in rows if row[2] != "64"]


def test_a_row_that_is_set_against_another_is_subtracted_at_its_budget():
    """The same two rows as a variant and its release, named by the table; exchanged, the sign changes."""
    _, found, _ = made()
    wanted = [row[2:] for row in releases(found).rows]
    assert row_pairs(found).rows == [] and len(wanted) == 2

    def pairs(title, against):
        """The section where only this row is set against another."""
        lines = []
        for line in found.lines:
            row = line.row.model_copy(update={"against": against if line.title == title else ""})
            lines.append(dataclasses.replace(line, row=row))
        return row_pairs(dataclasses.replace(found, lines=lines)).rows

    assert pairs("VisionDrop, mean merge", "VisionDrop") == [
        ["VisionDrop, mean merge", "VisionDrop", *row] for row in wanted
    ]
    turned = [text.split(" ")[0] for text in pairs("VisionDrop", "VisionDrop, mean merge")[0][3:]]
    assert [float(text) for text in turned] == [-float(text.split(" ")[0]) for text in wanted[0][1:]]


def test_a_row_whose_images_decide_is_marked_and_compared_with_none(monkeypatch):
    """Its mean of 61.3 stood as "64" in a block of 64; now every format says mean, asked and the ends."""
    definition, whole, _ = made()
    index = next(i for i, line in enumerate(whole.lines) if line.row.method == "fastv" and not line.by_kept)
    spread = "mean 61.3 of 64 asked, 40 to 96"

    def read_cell(line: RowAtBudget, column: spec.Column, job: object) -> Cell | str:
        place = whole.lines.index(line), column.benchmark
        off = place == (index, "pope")  # on one benchmark alone
        if place not in whole.cells:
            return "no result"
        cell = dataclasses.replace(whole.cells[place], stored=None)
        line = dataclasses.replace(line, off=off)
        return dataclasses.replace(cell, line=line, tokens=61.3, spread=spread, ends=(40, 96)) if off else cell

    monkeypatch.setattr(cells, "read_cell", read_cell)
    names = [column.benchmark for column in whole.columns]
    found = cells.read_cells(
        whole.lines, whole.columns, dict.fromkeys(itertools.product(range(len(whole.lines)), names))
    )
    line = found.lines[index]
    assert line.mark == "§" and {cell.line.mark for cell in found.row(index).values()} == {"§"}
    assert [one.mark for one in found.lines].count("§") == 1
    block = next(one for one in blocks(found, {}) if f"{line.budget} tokens" == one.title)
    place = [name.startswith(f"{line.title} § (") for name, _ in block.rows].index(True)
    assert not any(place in ranked for ranked in (*block.best, *block.second))
    assert index not in clear_differences(definition, found)
    notes = notes_of(definition, found, entries(found, None, definition.real))
    assert any(note.endswith(f"POPE {spread} (fewest to most of an image).") for note in notes)
    assert any(note.startswith("§ the image decides") for note in notes)


@pytest.mark.lab
def test_the_page_of_a_table_shows_the_published_rows_and_the_baselines_that_the_gate_takes():
    """Neither the source of low trust nor that of tiles is a baseline of images padded to a square."""
    definition, found, _ = made()
    assert markdown_rows(reproduce.cause_table(found.columns, sources(), "square") + "\n") == [
        ["GQA", "84.2", "0.3", ""],
        ["POPE", "96.0", "0.5", reproduce.CAUSES["pope"]],
        ["MME perception", "n/a", "15", reproduce.CAUSES["mme"]],
    ]
    text = reproduce.Sources(definition, found.columns, sources()).table
    assert text.startswith("| method | tokens | source | trust | GQA | POPE | MME perception | average |\n")
    assert markdown_rows(text + "\n") == [
        ["full", "576", "Low", "low", "83.4", "", "370", ""],
        ["full", "576", "High & <i>", "high", "84.2", "96.0", "", ""],
        ["full", "576", "Tiles", "high", "83.3", "", "", ""],
        ["FastV", "64", "High & <i>", "high", "99.0", "", "", ""],
        ["VisionDrop", "192", "Low", "low", "95.8", "", "", ""],
        ["VisionDrop", "191", "High & <i>", "high", "96.3", "", "", ""],
    ]


def test_a_row_without_results_is_named_and_moves_no_column(monkeypatch):
    """The columns are those of the unreduced model, whose results must all be there; another row may lack its own."""
    _, whole, _ = made()

    def read_cell(line: RowAtBudget, column: spec.Column, job: object) -> Cell | str:
        index = whole.lines.index(line)
        lost = index == lost_row or (index, column.benchmark) not in whole.cells
        return f"{line.title} has no {column.title}" if lost else whole.cells[index, column.benchmark]

    monkeypatch.setattr(cells, "read_cell", read_cell)
    lost_row, jobs = 1, dict.fromkeys((i, c.benchmark) for i in range(len(whole.lines)) for c in whole.columns)
    found = cells.read_cells(whole.lines, whole.columns, jobs)
    assert tuple(found.columns) == whole.columns and not found.row(1) and found.row(2).keys() == whole.row(2).keys()
    assert sum(reason.startswith(whole.lines[1].title) for reason in found.failed) >= len(whole.columns)
    lost_row = 0
    with pytest.raises(UserError, match="full has no GQA"):
        cells.read_cells(whole.lines, whole.columns, jobs)
