"""The results page: what is found below a folder, what the rows say, and the page in a browser."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest

from eval import cli
from eval.config import TOY_BANNER, RunConfig
from eval.pages import report
from eval.pages.report import main
from eval.results import report as baseline
from eval.run import run
from tests.browser import DESKTOP, PHONE, needs_browser, opened, overflow
from tests.eval_fakes import FakeLlava, FakeReducer, write_gqa

EVIL = "<img src=x onerror=\"console.error('run')\">"


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> dict[str, Any]:
    """result.json as a run writes it."""
    folder = tmp_path_factory.mktemp("real")
    data = write_gqa(folder / "data")
    config = RunConfig("first", 16, data=data, output=folder / "out", batch_size=4, wandb="disabled")
    run(config, FakeLlava(), FakeReducer())
    return json.loads((folder / "out" / "result.json").read_text())


def write(folder: Path, record: dict[str, Any], method: str, budget: int, score: float | None, **changes: Any) -> Path:
    """A result of a method at a budget; `changes` go to its settings."""
    record = copy.deepcopy(record)
    record |= {"method": method, "budget": budget}
    record["metrics"]["accuracy"] = score
    record["confidence"]["accuracy"] |= {"low": None if score is None else score - 2, "high": score and score + 2}
    record["accounting"]["mean_tokens_per_layer"] = float(budget)
    record["timing"]["ttft"] = {"median_ms": 10.0 + budget, "questions": 4, "batches": 12}
    record["flops"]["per_question"] = 1e9 * budget
    record["settings"] |= {"method": method, **changes}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def folder(real, tmp_path) -> Path:
    """Three methods, one of them with a wrong name on purpose, and one result of the first questions only."""
    runs = tmp_path / "results" / "gqa-testdev" / "fake"
    write(runs / "full-64", real, "full", 64, 80.0)
    for budget, score in ((16, 60.0), (32, 70.0)):
        write(runs / f"random-{budget}", real, "random", budget, score)
        write(runs / f"evil-{budget}", real, EVIL, budget, score - 5)
    write(runs / "random-16" / "limit8", real | {"asked": 8, "partial": True}, "random", 16, 90.0)
    return tmp_path / "results"


def rows_of(folder: Path) -> dict[str, report.ResultRow]:
    return {row.folder: row for row in report.collect(folder).rows}


# -- reading -------------------------------------------------------------------------------------------------------


def test_a_row_holds_what_the_run_wrote(real, tmp_path):
    (tmp_path / "result.json").write_text(json.dumps(real))
    (row,) = report.collect(tmp_path).rows
    assert (row.method, row.budget, row.benchmark, row.model) == ("first", 16, "GQA testdev", "fake")
    assert (row.metric, row.unit, row.score) == ("accuracy", "%", real["metrics"]["accuracy"])
    assert (row.low, row.high) == tuple(real["confidence"]["accuracy"][end] for end in ("low", "high"))
    assert (row.tokens, row.kv, row.questions, row.available, row.partial) == (16, 0.016, 40, 40, False)
    assert row.ttft == pytest.approx(4 * 3.5) and row.batch == 4 and "batches of 4" in row.timed
    assert row.gflop == pytest.approx(1.0) and row.commit == real["commit"] and row.date == real["finished"]
    assert row.percent is None, "there is no result of full"


def test_toy_models_and_missed_budgets_are_marked(real, tmp_path):
    """The page said "tinyllava" in a column, and a run off its budget looked like one on it."""
    write(tmp_path / "a", real, "random", 16, 50.0, model="vicuna")
    assert report.banner(report.collect(tmp_path).rows) == ""
    off = real | {"off_budget": {"planned": 640.0, "counted": 608.0, "remark": "it counts 608"}}
    write(tmp_path / "b", off, "random", 608, 50.0, model="tinyllava_next")
    found = report.collect(tmp_path)
    assert report.banner(found.rows) == f"{TOY_BANNER} Here: tinyllava_next."
    assert report.banner([row for row in found.rows if row.asked]) == TOY_BANNER
    text = report.page(found, tmp_path, tmp_path / "report.html", "vtr report")
    assert text.count(TOY_BANNER) == 1 and text.count("asked 640.0") == 1


def test_percent_of_full_is_that_of_the_run(real, tmp_path):
    """The page looks at all results at once; `baseline.percent_of_full` looks for full beside one run."""
    random.seed(3)
    for number in range(40):
        method = random.choice(["full", "a", "b"])
        score = random.choice([None, 0.0, random.uniform(1, 100)])
        record = real | {"asked": random.choice([8, 40])}
        settings = {"dtype": random.choice(["float32", "float16"]), "seed": random.choice([0, 1])}
        if method == "full":  # the same task has one score
            score = 40 + record["asked"] + (7 if settings["dtype"] == "float16" else 0)
        place = tmp_path / (f"full-{number}" if method == "full" else f"{method}-{number}")
        write(place / "limit8" if record["asked"] == 8 else place, record, method, 16, score, **settings)
    found = rows_of(tmp_path)
    for name, row in found.items():
        record = json.loads((tmp_path / name / "result.json").read_text())
        expected = baseline.percent_of_full(record, tmp_path / name)
        assert row.percent == (None if expected is None else pytest.approx(expected))
    assert len({row.percent for row in found.values()}) > 5


def test_the_nearest_full_is_the_reference(real, tmp_path):
    """Two machines may hold a result of the same task, from two versions of the code."""
    for name, score in (("old", 50.0), ("new", 80.0)):
        write(tmp_path / name / "full-64", real, "full", 64, score)
        write(tmp_path / name / "a-16", real, "a", 16, 40.0)
    found = rows_of(tmp_path)
    assert found["old/a-16"].percent == pytest.approx(80) and found["new/a-16"].percent == pytest.approx(50)


def test_groups_alike_are_told_apart_and_options_are_shown(real, tmp_path):
    write(tmp_path / "a", real, "consensusdrop", 16, 40.0, config={"budget": 16, "alpha": 1.0, "fusion": "rank"})
    write(tmp_path / "b", real, "mine", 16, 40.0, dtype="bfloat16", config={"budget": 16, "x": 3})
    found = report.collect(tmp_path)
    assert [name.rpartition(" · ")[2] for name in found.groups] == ["dtype bfloat16", "dtype float32"]
    assert {row.series for row in found.rows} == {"consensusdrop (alpha=1.0)", "mine (x=3)"}


def test_a_ratio_is_shown_as_it_was_asked_for(real, tmp_path):
    """A method was called "divprune retention_ratio=0.1111111111111111", and every ratio was a line of its own."""
    for budget, ratio in ((64, 1 / 9), (128, 2 / 9)):
        write(
            tmp_path / str(budget), real, "divprune", budget, 40.0, config={"budget": budget, "retention_ratio": ratio}
        )
    found = report.collect(tmp_path)
    assert [(row.size, row.budget, row.series) for row in found.rows] == [
        ("1/9", 64, "divprune"),
        ("2/9", 128, "divprune"),
    ]
    text = report.page(found, tmp_path, tmp_path / "report.html", "vtr report")
    table = text[text.index("<tbody>") : text.index("</tbody>")]
    assert ">1/9</td>" in table and "retention" not in table


def test_damaged_files_are_named_and_the_others_stay(real, folder, capsys):
    runs = folder / "gqa-testdev" / "fake"
    texts = {"half": '{"method": "ran', "empty": "", "list": "[]", "other": '{"method": "a"}', "binary": "\xff\xfe"}
    texts["nan"] = json.dumps(real).replace('"accuracy": 50.0', '"accuracy": NaN')
    assert "NaN" in texts["nan"]
    texts["text"] = json.dumps(real | {"asked": "many"})
    for name, text in texts.items():
        (runs / name).mkdir()
        (runs / name / "result.json").write_text(text, encoding="latin-1")
    (runs / "folder" / "result.json").mkdir(parents=True)
    found = report.collect(folder)
    assert len(found.rows) == 6 and len(found.damaged) == len(texts) + 1
    for name in (*texts, "folder"):
        assert sum(str(runs / name) in sentence for sentence in found.damaged) == 1
    output = folder.parent / "report.html"
    assert main([str(folder), "--output", str(output)]) == 0
    assert capsys.readouterr().err.count("left out: ") == len(texts) + 1
    assert "8 files are left out" in output.read_text()


def test_results_moved_aside_are_not_shown(real, folder):
    write(folder / "gqa-testdev" / "fake" / "random-16" / "replaced-1", real, "random", 16, 1.0)
    write(folder / "gqa-testdev" / "fake" / "random-16" / "replaced-1" / "limit8", real, "random", 16, 1.0)
    assert len(report.collect(folder).rows) == 6


@pytest.mark.parametrize("make", ["nothing", "empty", "damaged", "output"])
def test_a_folder_without_results_is_one_sentence(make, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["vtr"])
    place = tmp_path / "none"
    if make != "nothing":
        place.mkdir()
    if make == "damaged":
        (place / "result.json").write_text("{")
    output = place if make == "output" else tmp_path / "page.html"
    assert cli.main(["report", str(place), "--output", str(output)]) == 2
    printed = capsys.readouterr()
    assert not printed.out and len(printed.err.splitlines()) == 1 and str(place) in printed.err
    assert not output.is_file()


# -- in a browser --------------------------------------------------------------------------------------------------


@pytest.fixture
def page_file(folder) -> Path:
    output = folder.parent / "pages" / "report.html"
    assert main([str(folder), "--output", str(output)]) == 0
    return output


def shown(page, column: int = 0) -> list[str]:
    """Texts of a column, of the rows that the filters leave."""
    script = "column => [...document.querySelectorAll('#results tr[data-row]:not([hidden])')]"
    return page.evaluate(f"{script}.map(row => row.cells[column].textContent.trim())", column)


def points(page, plot: str) -> list[tuple[float, float]]:
    """All points that a plot holds."""
    script = "id => document.getElementById(id).data.flatMap(trace => trace.x.map((x, i) => [x, trace.y[i]]))"
    return [tuple(pair) for pair in page.evaluate(script, plot)]


@needs_browser
def test_the_page_loads_without_errors_fits_and_follows_the_colour_scheme(page_file):
    with opened(page_file) as page:
        page.wait_for_selector("#plot-flops .main-svg")
        assert len(shown(page)) == 6 and page.inner_text("#shown") == "6 of 6 results shown."
        titles = page.evaluate("[...document.querySelectorAll('#plot-time .modebar-btn')].map(b => b.dataset.title)")
        assert len(titles) == 4 and not [title for title in titles if "cloud" in title.lower()]
        for size in (DESKTOP, PHONE):
            page.set_viewport_size({"width": size[0], "height": size[1]})
            for scheme, colour in (("dark", "#e6e9ec"), ("light", "#1c2024")):
                page.emulate_media(color_scheme=scheme)
                page.wait_for_function(
                    "colour => document.getElementById('plot-tokens').layout.font.color === colour", arg=colour
                )
                assert overflow(page) == 0, (size, scheme)
        assert not page.errors


@needs_browser
def test_table_sorts_and_plots_and_rows_obey_the_filters(page_file, folder):
    with opened(page_file) as page:
        page.click("#results th:nth-child(5) button")
        scores = [float(text.split()[0]) for text in shown(page, 4)]
        assert scores == sorted(scores) and len(scores) == 6
        page.click("#results th:nth-child(5) button")
        assert [float(text.split()[0]) for text in shown(page, 4)] == scores[::-1]

        assert set(points(page, "plot-tokens")) == {(64, 80), (16, 60), (32, 70), (16, 55), (32, 65)}
        assert set(points(page, "plot-time")) == {(74, 80), (26, 60), (42, 70), (26, 55), (42, 65)}
        assert set(points(page, "plot-flops")) == {(64, 100), (16, 75), (32, 87.5), (16, 68.75), (32, 81.25)}
        bars = page.evaluate("document.getElementById('plot-tokens').data.map(trace => trace.error_y.arrayminus[0])")
        assert bars == [2, 2, 2]
        symbols = page.evaluate("document.getElementById('plot-tokens').data.map(trace => trace.marker.symbol)")
        assert symbols[0] == "star" and len(set(symbols)) == 3, "only full is a star, and neighbours differ"

        page.uncheck("[data-series='1']")  # the method with the evil name
        assert set(points(page, "plot-tokens")) == {(64, 80), (16, 60), (32, 70)}
        assert sorted(text.split()[0] for text in shown(page)) == ["full", "random", "random", "random"]
        page.fill("#words", "RANDOM partial")
        assert shown(page) == ["random alpha=0.5"] and points(page, "plot-tokens") == [(16, 90)]
        assert points(page, "plot-flops") == []
        page.fill("#words", "")
        page.select_option("#extent", "whole")
        assert len(shown(page)) == 3
        page.click("#none")
        assert shown(page) == [] and points(page, "plot-time") == []
        page.click("#every")
        assert len(shown(page)) == 5
        href = page.get_attribute("#results tbody tr:first-child a", "href")
        assert (page_file.parent / href).resolve().is_file()
        assert not page.errors, "also no script of a method's name"


@needs_browser
def test_a_point_shows_its_run_and_a_click_its_row(page_file):
    with opened(page_file) as page:
        page.wait_for_selector("#plot-tokens .points path")
        # The last trace is random, its last point the larger budget.
        box = page.locator("#plot-tokens .points path").last.bounding_box()
        middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.mouse.move(middle[0] - 40, middle[1])
        page.mouse.move(*middle)
        page.wait_for_selector("#plot-tokens .hoverlayer .hovertext")
        words = page.text_content("#plot-tokens .hoverlayer")
        assert "random" in words and "70.0 % [68.0, 72.0]" in words and "gqa-testdev/fake/random-32" in words
        page.mouse.click(*middle)
        page.wait_for_selector("tr.found")
        assert "random-32" in page.inner_text("tr.found + tr.details")
        assert not page.errors


@needs_browser
@pytest.mark.parametrize("width", [390, 1024, 1440])
def test_no_column_lies_outside_the_window(real, folder, tmp_path, width):
    """The table had 2,149 px in 1,374 of a wide window, and a phone saw the column "Method" alone."""
    long = {"budget": 64, "alpha": 1.0, "fusion": "cross_first", "anchors": "stride", "weights": "none"}
    write(folder / "gqa-testdev" / "fake" / "c", real, "consensusdrop", 64, 50.0, model="llava-v1.6-34b", config=long)
    assert main([str(folder), "--output", str(tmp_path / "page.html")]) == 0
    with opened(tmp_path / "page.html", (width, 900)) as page:
        page.wait_for_selector("#plot-flops .main-svg")
        page.locator("#results tbody button").first.press("Enter")
        assert page.get_attribute("#results tbody button", "aria-expanded") == "true"
        wide = "e => [...document.querySelectorAll(e)].filter(one => one.scrollWidth > one.clientWidth).length"
        assert page.evaluate(wide, ".scroll, .plot, figure") == 0 == overflow(page)
        heads = page.evaluate("[...document.querySelectorAll('#results th')].map(head => head.textContent)")
        visible = page.locator("#results th:visible").all_inner_texts()
        assert len(heads) == 15 and {"Method", "Budget", "Score", "% of full"} <= set(visible)
        details = page.locator("tr.details")
        assert details.locator("dt").all_inner_texts() == heads[1:], "an opened row has every column"
        assert "full-64" in page.inner_text("tr.details")
        page.locator("#results thead button").first.click()  # sorting moves rows, so what is below them closes
        assert details.count() == 0
        page.locator("#results td:first-child").first.click()
        assert details.count() == 1 and not page.errors
        page.fill("#words", "no such words")
        assert details.count() == 0


@needs_browser
def test_times_under_other_conditions_are_drawn_apart(real, tmp_path):
    other = real["conditions"] | {"hardware": "H200"}
    for budget in (16, 32):
        write(tmp_path / "r" / f"a-{budget}", real, "a", budget, 50.0)
    write(tmp_path / "r" / "b-16", real | {"conditions": other}, "b", 16, 60.0)
    assert main([str(tmp_path / "r"), "--output", str(tmp_path / "page.html")]) == 0
    with opened(tmp_path / "page.html") as page:
        assert len(points(page, "plot-tokens")) == 3 and points(page, "plot-time") == [(26, 50), (42, 50)]
        assert "1 result left out" in page.inner_text("#caption-time")
        page.select_option("#timed", index=1)
        assert points(page, "plot-time") == [(26, 60)]
