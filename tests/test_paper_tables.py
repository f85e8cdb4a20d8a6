"""Tables of the papers: the specs, the runner on a tiny model, the gate, and what each format says."""

import csv
import dataclasses
import hashlib
import io
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from PIL import Image

from eval import ask, benchmarks, sweep
from eval.answers.jsonl import read_json
from eval.config import ROOT, TOY_BANNER, RunConfig, is_toy
from eval.papers import figure, gate, render, runs, spec, table
from eval.papers.cells import MeasuredTable, command_of, other_judge, read_cells, shown
from eval.papers.document import Block, Document, Entry, difference_to, notes_of, places, published_text
from eval.papers.gate import comparable
from eval.papers.published import Published, PublishedRow, Source, load
from eval.papers.sections import needed_text, pooled_loyalty, relative_text
from eval.parallel import placement
from eval.results.statistics import accuracy_terms
from eval.tables import csv_text
from lab.pages.expense import expense
from llava.errors import UserError
from llava.pipeline.generate import generate
from llava.reduction import registry
from llava.reduction.budget import planned
from tests.browser import PHONE, needs_browser, opened, overflow
from tests.eval_fakes import write_gqa
from tests.read_wandb import find_runs, read_run, without_wandb


@pytest.mark.parametrize("path", spec.paths(), ids=spec.short)
def test_every_spec_is_valid_and_has_its_script(path):
    found = spec.read(path)
    script = ROOT / found.script
    assert script.is_file() and f'table.sh" {found.identity} ' in script.read_text()
    assert found.ours in {row.method for row in found.rows}
    # The paper's model and the toy model are both described completely.
    assert found.real.model and (ROOT / found.toy.model / "config.json").is_file() and (ROOT / found.toy.data).is_dir()
    assert not found.published or load(found.published).rows


def written(tmp_path: Path, **changes) -> Path:
    """A small table on a tiny model; `changes` replace keys, None removes them."""
    content = {
        "title": "A small table",
        "about": "For tests.",
        "paper": "consensusdrop",
        "ours": "consensusdrop",
        "model_title": "LLaVA-1.5-7B",
        "real": {"model": "some/model", "tokens": 576, "convention": "square"},
        "toy": {"model": "assets/tinyllava", "data": "assets/eval"},
        "published": "llava15_7b",
        "columns": [{"benchmark": "gqa", "title": "GQA", "published": "gqa", "tolerance": 0.3}],
        "budgets": [8, 4],
        "rows": [
            {"method": "random", "label": "Random"},
            {"method": "downsample", "label": "Downsample"},
            {"method": "fastv", "label": "FastV"},
            {"method": "consensusdrop", "label": "Consensus_Drop"},
        ],
    } | changes
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    return path


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"colums": []}, "Unknown key 'colums'. Did you mean 'columns'"),
        ({"published": "llava15_7"}, "'llava15_7'. Did you mean 'llava15_7b'"),
        ({"rows": [{"method": "fastv", "published": "hallusse"}]}, "published values 'hallusse'"),
        ({"columns": [{"benchmark": "gqa", "title": "a", "published": "gqua"}]}, "published: .* Did you mean 'gqa'"),
        ({"columns": [{"benchmark": "gqa", "title": "a", "split": "vall"}]}, "Unknown split of gqa 'vall'"),
        ({"toy": {"model": "m", "bach_size": 4}}, "toy: Unknown key 'bach_size'. Did you mean 'batch_size'"),
        ({"rows": [{"method": "fastvv"}]}, r"rows\.0\.method: .*'fastvv'\. Did you mean 'fastv'"),
        ({"rows": [{"method": "fastv", "options": {"layr": "2"}}]}, "layr"),
        ({"rows": [{"method": "full"}]}, "full is always the first row"),
        ({"rows": [{"method": "fastv"}, {"method": "fastv"}]}, "listed twice under rows"),
        ({"rows": [{"method": "fastv", "against": "fastv"}]}, "Unknown row that fastv is set against 'fastv'"),
        ({"rows": [{"method": "fastv"}, {"method": "random", "against": "fastvv"}]}, "Did you mean 'fastv'"),
        ({"kind": "overview", "rows": [{"method": "random", "against": "x"}]}, "is for tables of the kind scores"),
        ({"columns": [{"benchmark": "gqua", "title": "GQA"}]}, "Unknown benchmark 'gqua'"),
        (
            {"columns": [{"benchmark": "gqa", "title": "a"}, {"benchmark": "gqa", "title": "b"}]},
            "listed twice under columns",
        ),
        ({"budgets": ["1/0"]}, "or a ratio of each image"),
        ({"budgets": [0]}, r"1 or more \(64\)"),
        ({"toy": {"model": "m", "benchmarks": ["pope"]}}, "no column: pope"),
        ({"ours": "consensus"}, "Did you mean 'consensusdrop'"),
        ({"rows": ["../../../etc/passwd"]}, r"\.\./\.\./\.\./etc/passwd, which is no .yaml file"),
        ({"real": {"model": "m", "convention": "square tiles"}}, "convention: Input should be"),
        ({"title": None}, "title: Field required"),
    ],
)
def test_a_wrong_spec_is_one_sentence(tmp_path, changes, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        spec.read(written(tmp_path, **changes))
    assert "small.yaml" in str(error.value) and "\n" not in str(error.value)


def test_the_folder_of_an_own_paper_is_checked_as_the_others(tmp_path, monkeypatch):
    """A folder beside those of this project's papers was listed nowhere and checked by nothing."""
    own = tmp_path / "specs" / "mypaper"
    own.mkdir(parents=True)
    written(own)
    monkeypatch.setattr(spec, "SPECS", tmp_path / "specs")
    assert [spec.short(path) for path in spec.paths()] == ["mypaper/small"]
    assert spec.read(spec.find("mypaper/small")).columns[0].benchmark == "gqa"
    with pytest.raises(UserError, match="Did you mean 'small'"):
        spec.read(spec.find("mypaper/smal"))


def let_full_be_right(model, data: Path) -> None:
    """Make the answers of the random model to every question but two the right ones."""
    found = benchmarks.get("gqa").load(data, "testdev")
    path = data / "gqa" / "data" / "testdev_balanced_questions.json"
    records = json.loads(path.read_text())
    for question in found.questions[2:]:
        answer = generate(model, [found.sample(question)], registry.build("full", model.visual_tokens), 128).answers[0]
        records[question.id]["answer"] = answer.text.rstrip(".").lower()
    path.write_text(json.dumps(records))


@pytest.fixture(scope="module")
def made(tiny, tiny_path, tmp_path_factory):
    """The small table in all formats, of a model that plays the paper's: gate, published columns."""
    folder = tmp_path_factory.mktemp("tables")
    data = write_gqa(folder / "data", count=12, images=4)
    let_full_be_right(tiny, data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "SWEEPS", folder / "sweep")
        path = written(folder)
        words = [str(path), "--model", str(tiny_path), "--data", str(data), "--dtype", "float32", "--times", "1"]
        assert table.main([*words, "--output", str(folder / "out"), "--wandb", "disabled"]) == 0
        yield folder, words


@pytest.mark.table
def test_markdown_holds_scores_statistics_and_costs_and_names_the_file_of_all_cells(made):
    text = (made[0] / "out" / "small.md").read_text()
    assert "| method | GQA | average |" in text and "***8 tokens***" in text
    assert "## Every cell\n\nsmall.csv has the 9 cells: " in text and "n/a: " not in text
    for heading in ("Averages, loyalty and hard questions", "Tokens needed for 99 % of full", "Costs"):
        assert f"## {heading}" in text
    assert "TTFT: median of 1 prefills" in text
    assert "No interval, [n/a], on GQA: 4 images, an interval needs 20." in text


@pytest.mark.table
def test_the_gate_marks_a_wrong_baseline_and_names_causes(made, capsys):
    folder, words = made
    text = (folder / "out" / "small.md").read_text()
    assert "**Marked: " in text
    assert "tolerance of 0.3. Look at: " in text
    assert "MARKED" in (folder / "out" / "small.tex").read_text()
    # exit_on_user_error turns the error into exit code 2
    assert table.main([*words, "--gate", "stop", "--output", str(folder / "stop"), "--wandb", "disabled"]) == 2
    assert "--gate mark goes on" in capsys.readouterr().err and not (folder / "stop" / "small.md").exists()


@pytest.mark.table
def test_csv_has_every_number_and_a_hash_of_the_answers(made):
    folder, _ = made
    assert sorted(path.name for path in (folder / "out").iterdir()) == [
        "small.bib", "small.csv", "small.html", "small.md", "small.png", "small.tex", "small.times.jsonl",
    ]  # fmt: skip
    rows = list(csv.DictReader(io.StringIO((folder / "out" / "small.csv").read_text())))
    rows, told = rows[:9], rows[9:]
    assert [(row["method"], row["published"], row["reported"], row["score"]) for row in told] == [
        ("full", "62", "as reported", ""), ("full", "100.00", "as reported", ""),
    ], "nothing is published about budgets of 8 and 4"  # fmt: skip
    assert len(rows) == 1 + 2 * 4 and not any(row["reported"] for row in rows)
    full = rows[0]
    assert full["method"] == "full" and "61.9" in full["published"].split(";") and full["questions"] == "12"
    stored = folder / full["run"].split("tables0/")[-1] / "answers.jsonl"
    answers = {line["question_id"]: line["text"] for line in map(json.loads, stored.read_text().splitlines())}
    text = "".join(f"{name}\t{answers[name]}\n" for name in sorted(answers))
    assert full["answers_sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert {row["gate"] for row in rows} == {full["gate"]} and full["gate"].startswith("failed: ")
    assert full["compared_with"] in full["source"].split(";") and full["warning"] == ""
    assert "bash scripts/eval/gqa.sh full" in full["command"] and "sweep/" in full["run"]
    ours = next(row for row in rows if (row["method"], row["budget"]) == ("Consensus_Drop", "4"))
    assert ours["published"] == "", "nothing is published about ConsensusDrop, nor about 4 tokens"
    kept = [row for row in rows if row["counts_kept_tokens"] == "true"]
    assert [(row["method"], row["budget"]) for row in kept] == [("FastV", "4")]
    # Such a row has more tokens than its block: it says how many, and is never marked best.
    assert float(kept[0]["tokens_per_layer"]) > 4
    page = (folder / "out" / "small.md").read_text()
    assert re.search(r"^\| FastV ‡ \(\d+\) \| \d+\.\d \| \d+\.\d \|$", page, re.MULTILINE)


@pytest.mark.table
def test_latex_is_booktabs_with_balanced_braces_and_escapes(made):
    text = (made[0] / "out" / "small.tex").read_text()
    assert r"\toprule" in text and r"\bottomrule" in text and r"Consensus\_Drop" in text and r"\%" in text
    assert r"\textbf{" in text
    rows = [line for line in text.splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
    assert {line.replace(r"\&", "").count("&") for line in rows} == {2}
    plain = re.sub(r"\\[{}]", "", text)
    assert plain.count("{") == plain.count("}")
    assert render.escaped("50 % & a_b # $ ‡") == r"50 \% \& a\_b \# \$ $^\ddagger$"


@pytest.mark.table
def test_a_table_of_costs_shows_the_score_beside_them_and_is_latex_too(made, monkeypatch, tmp_path, capsys):
    """Tables of costs and ablations were written without a LaTeX file."""
    folder, words = made
    path = written(tmp_path, kind="efficiency")
    assert table.main([str(path), *words[1:], "--tex-intervals"]) == 2
    assert "--tex-intervals is for " in capsys.readouterr().err
    monkeypatch.setattr(runs, "SWEEPS", folder / "sweep")
    again = [str(path), *words[1:], "--times", "1", "--output", str(tmp_path / "out"), "--wandb", "disabled"]
    assert table.main(again) == 0
    page = (tmp_path / "out" / "small.md").read_text()
    assert "| TTFT faster | GQA |" in page and re.search(
        r"^\| full \| all \| .*x \| \d+\.\d \[.*\] \|$", page, re.MULTILINE
    )
    text = (tmp_path / "out" / "small.tex").read_text()
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 10 and {line.count("&") for line in rows} == {9}
    assert r"1.00$\times$" in text and r"\toprule" in text and r"\end{tabular}" in text
    assert render.latex_text("**81.0**") == r"\textbf{81.0}" and render.latex_text("fix") == "fix"


@pytest.mark.table
@needs_browser
def test_the_html_page_sorts_and_needs_no_network(made):
    with opened(made[0] / "out" / "small.html") as page:
        page.click("#cells th:nth-child(2) button")
        assert page.locator("#cells tbody tr:first-child td:nth-child(2)").inner_text() == "4"
        page.click("#cells th:nth-child(2) button")
        assert page.locator("#cells tbody tr:first-child td:nth-child(2)").inner_text() == "8"
        assert page.errors == []
    with opened(made[0] / "out" / "small.html", PHONE, dark=True) as page:
        assert overflow(page) == 0 and page.errors == []


@pytest.mark.table
def test_a_finished_table_asks_nothing_and_a_part_does_not_replace_it(made, monkeypatch, tiny_path):
    folder, words = made
    monkeypatch.setattr("eval.ask.generate", None)
    again = [*words, "--output", str(folder / "again"), "--wandb", "disabled"]
    assert table.main(again) == 0
    assert (folder / "again" / "small.csv").read_text() == (folder / "out" / "small.csv").read_text()
    assert table.main([*again, "--render", "--methods", "random", "--budgets", "8"]) == 0
    assert (folder / "again" / "small.csv").read_text().count("Random") == 1
    args = table.parser().parse_args([*words, "--methods", "random", "--limit", "3"])
    found = spec.read(Path(words[0]))
    model = table.where_of(found, args).run.model
    assert table.default_folder(found, model, args).name.endswith("-limit3-part")


@pytest.mark.table
def test_a_table_is_not_rendered_from_answers_that_are_not_of_today(made, monkeypatch, capsys):
    """--render printed the old scores after labels or images had changed, and float32 answers under "bfloat16"."""
    folder, words = made
    monkeypatch.setattr("eval.ask.generate", None)
    part = ["--methods", "random", "--budgets", "8", "--times", "0", "--wandb", "disabled"]
    one = [*words, *part, "--output", str(folder / "labels")]
    assert table.main([*one, "--render", "--dtype", "bfloat16"]) == 2
    assert "(dtype: float32, now bfloat16)" in capsys.readouterr().err
    labels = folder / "data" / "gqa" / "data" / "testdev_balanced_questions.json"
    right = labels.read_text()
    try:
        labels.write_text(right.replace('"answer": "', '"answer": "not '))
        sweep.dataset.cache_clear()
        assert table.main([*one, "--render"]) == 2
        assert "other labels" in capsys.readouterr().err
        assert table.main(one) == 0, "nothing is asked, the stored answers are scored anew"
        lines = (folder / "labels" / "small.csv").read_text().splitlines()[1:]
        scores = [line.split(",")[5] for line in lines if "as reported" not in line]
        assert set(scores) == {"0.00"}
    finally:
        labels.write_text(right)
        sweep.dataset.cache_clear()
        assert table.main(one) == 0
    image = next((folder / "data" / "gqa").rglob("*.jpg"))
    right = image.read_bytes()
    try:
        Image.new("RGB", (64, 64), "red").save(image)
        assert table.main([*one, "--render"]) == 2
        assert "other images (" in capsys.readouterr().err
    finally:
        image.write_bytes(right)


def test_a_cell_has_every_number_of_its_run_in_its_place(tiny_path, monkeypatch, tmp_path):
    """A cell takes twenty values of a result by their position; no fast test saw two of them exchanged."""
    monkeypatch.setattr(runs, "SWEEPS", tmp_path / "sweep")
    data, column = write_gqa(tmp_path / "data", count=6, images=2), spec.Column(benchmark="gqa", title="GQA")
    run = RunConfig("full", model=str(tiny_path), data=data, limit=4, failed="again", wandb="disabled")
    model = runs.open_model(run, None)
    rows = (spec.TableRow(method="consensusdrop", label="Ours"),)
    lines = runs.lines_of(SimpleNamespace(budgets=(8,), rows=rows), run, model)
    jobs = runs.jobs_of(lines, [column], run, model)
    runs.fill_cells(jobs, model, None, "cells")
    found = read_cells(lines, [column], jobs)
    for index, tokens in enumerate((16, 8)):
        cell = found.first(index)
        (path,) = cell.folder.rglob("result.json")
        result = read_json(path)
        assert cell.line is lines[index] and cell.column is column and not cell.whole
        assert (cell.value, cell.metric) == (result["metrics"]["accuracy"], "accuracy")
        assert (cell.low, cell.high) == (None, None) and cell.no_interval.startswith("2 images")
        assert (cell.questions, cell.available) == (4, 6) and len(cell.texts) == len(cell.sample_scores) == 4
        assert cell.tokens == result["accounting"]["mean_tokens_per_layer"] == tokens
        assert cell.merged == result["accounting"]["merged_tokens"] and (cell.merged > 0) == bool(index)
        assert cell.kv_bytes == result["accounting"]["kv_bytes_per_sample"]
        assert cell.flops == result["flops"]["per_question"] > cell.kv_bytes
        assert (cell.commit, cell.finished) == (result["commit"] or "", result["finished"])
        assert set(cell.clusters.values()) == {"n0.jpg", "n1.jpg"} and "--limit 4" in cell.command


def full_on_gqa(model, data: Path) -> runs.Jobs:
    """The only job of a table of the unreduced model on GQA."""
    run, column = RunConfig("full", data=data), spec.Column(benchmark="gqa", title="GQA")
    lines = runs.lines_of(SimpleNamespace(budgets=(), rows=()), run, model)
    return runs.jobs_of(lines, [column], run, model)


def test_times_of_another_image_or_model_are_measured_anew(tiny, tmp_path):
    """Only the question's id was compared: times of another data folder, image or checkpoint were kept."""
    data, path, other = write_gqa(tmp_path / "data", count=2, images=1), tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    other.write_text("{}\n")
    first = runs.times_of(full_on_gqa(tiny, data), tiny, 1, path)
    kept = path.read_text()
    assert first[0].ttft > 0 and runs.times_of(full_on_gqa(tiny, data), tiny, 1, path) == first
    assert path.read_text() == kept, "nothing is measured twice"
    shutil.copytree(data, tmp_path / "copy")
    for image in (tmp_path / "copy" / "gqa").rglob("*.jpg"):
        Image.new("RGB", (64, 64), "red").save(image)
    runs.times_of(full_on_gqa(tiny, tmp_path / "copy"), tiny, 1, path)
    assert path.read_text() != kept and len(path.read_text().splitlines()) == len(kept.splitlines())
    assert other.read_text() == "{}\n", "another table's times stay"


def test_the_list_for_the_ranks_is_deleted_and_no_other_one(monkeypatch, tmp_path):
    """Two tables may spread their cells at once, each with a list of its own in one folder."""
    other, seen = tmp_path / "sweep-1.json", []
    other.write_text("{}")

    def launch(module, words, *rest):
        seen.append(read_json(Path(words[0])))
        return 3

    monkeypatch.setattr(sweep, "launch", launch)
    monkeypatch.setenv("RANKS", "2")
    with pytest.raises(SystemExit):
        sweep.fill_on_ranks([RunConfig("full", None, "gqa")], {"path": "m"}, tmp_path, placement.here())
    assert [len(one["runs"]) for one in seen] == [1] and list(tmp_path.iterdir()) == [other]


@pytest.mark.table
def test_the_table_is_one_offline_wandb_run_with_its_files_and_images(made, monkeypatch, tmp_path):
    without_wandb(monkeypatch, tmp_path)
    folder, words = made
    # It was decided twice, so the sentence about the ranks' GPUs was printed twice.
    decided, decide = [], table.repeats_of
    monkeypatch.setattr(table, "repeats_of", lambda *given: decided.append(decide(*given)) or decided[-1])
    assert table.main([*words, "--output", str(folder / "logged"), "--wandb", "offline"]) == 0
    assert decided == [1]
    runs = [read_run(path) for path in find_runs(folder / "logged")]
    (run,) = [run for run in runs if run.job_type == "table"]
    assert run.group == "consensusdrop/small" and run.exit_code == 0
    assert len(run.table("table")["data"]) == 9
    (files,) = [files for name, files in run.artifacts.items() if name.startswith("table-")]
    assert {"small.md", "small.csv", "small.tex", "small.html"} <= set(files)
    assert len(run.last("kept tokens")["captions"]) == 5
    assert run.last("accuracy against tokens") and run.last("accuracy against TTFT")


@pytest.mark.process
def test_cells_are_spread_over_ranks_and_are_those_of_one_process(made, monkeypatch):
    folder, words = made
    monkeypatch.setenv("RANKS", "2")
    monkeypatch.setattr(runs, "SWEEPS", folder / "spread")
    assert table.main([*words, "--output", str(folder / "two"), "--wandb", "disabled"]) == 0
    rows = [list(csv.DictReader((folder / name / "small.csv").open())) for name in ("out", "two")]
    for alone, spread in zip(*rows, strict=True):
        for key in ("method", "budget", "score", "low", "high", "tokens_per_layer", "answers_sha256"):
            assert spread[key] == alone[key]
    assert not list((folder / "spread").glob("sweep-*.json"))


@pytest.mark.table
def test_a_method_that_fails_on_some_questions_has_no_score_and_the_table_goes_on(made, monkeypatch):
    """DART refused the 11 shortest prompts of MM-Vet, and the table of 800 cells ended there."""
    folder, words = made
    monkeypatch.setattr(runs, "SWEEPS", folder / "failing")
    real = ask.generate

    def failing(model, batch, reducer, *rest, **more):
        if reducer.name == "random" and any(sample.id == "1003" for sample in batch):
            raise UserError("random does not like this question")
        return real(model, batch, reducer, *rest, **more)

    monkeypatch.setattr(ask, "generate", failing)
    one = ["--methods", "random,consensusdrop", "--budgets", "8", "--times", "0", "--wandb", "disabled"]
    assert table.main([*words, *one, "--output", str(folder / "failed")]) == 0
    text = (folder / "failed" / "small.md").read_text()
    assert "| Random | n/a | n/a |" in text and "| Consensus_Drop | " in text
    assert "n/a: Random at 8 on GQA: 1 of 12 questions failed, the first (1003)" in text
    monkeypatch.setattr(ask, "generate", real)  # the next call asks it again
    assert table.main([*words, *one, "--output", str(folder / "failed")]) == 0
    assert "questions failed" not in (folder / "failed" / "small.md").read_text()
    # A run whose mean is off its plan is no cell at that budget either.
    results = (folder / "failing").rglob("result.json")
    (path,) = (path for path in results if read_json(path)["method"] == "random")
    path.write_text(json.dumps(read_json(path) | {"off_budget": {"remark": "The accounting counts 9.00."}}))
    assert table.main([*words, *one, "--render", "--output", str(folder / "failed")]) == 0
    assert "n/a: Random at 8 on GQA: The accounting counts 9.00." in (folder / "failed" / "small.md").read_text()
    # Nor are operations of some questions those of all: they stood beside the others without a word.
    for path in (folder / "failing").rglob("result.json"):
        result = read_json(path)
        if result["method"] in ("full", "consensusdrop"):
            path.write_text(json.dumps(result | {"timing": result["timing"] | {"questions": 8}}))
    assert table.main([*words, *one, "--render", "--output", str(folder / "failed")]) == 0
    text = (folder / "failed" / "small.md").read_text()
    counted = re.findall("operations of (.*) on GQA, counted for 8 of 12 questions", text)
    assert counted == ["full at all of the tokens", "Consensus_Drop at 8 tokens"]


@pytest.mark.table
def test_an_ablation_compares_every_choice_with_the_defaults(made, monkeypatch, tmp_path):
    """The first ablation ended in a TypeError: its rows, which hold options, were keys of a dictionary."""
    folder, words = made
    path = written(
        tmp_path,
        kind="ablation",
        budgets=[8, 4],
        rows=None,
        factors={"weight": {"alpha": ["0", "0.5", "1"]}, "both": [{"alpha": "0", "merged_share": "0"}]},
    )
    monkeypatch.setattr(runs, "SWEEPS", folder / "sweep")
    again = [str(path), *words[1:], "--times", "0", "--output", str(tmp_path / "out"), "--wandb", "disabled"]
    assert table.main(again) == 0
    text = (tmp_path / "out" / "small.md").read_text()
    assert "| choice | GQA, 8 tokens | against the default [95 % CI] | GQA, 4 tokens |" in text
    rows = [line for line in text.splitlines() if line.startswith(("| weight: ", "| both: ", "| defaults"))][:5]
    # alpha 0.5 is the default; "both" is first by name
    assert [line.count("| default |") for line in rows] == [2, 0, 0, 2, 0]


@pytest.mark.table
def test_an_overview_has_methods_by_budgets_claims_all_pairs_and_costs_and_writes_its_page(made, monkeypatch, tmp_path):
    folder, words = made
    rows = [{"method": "fastv"}, {"method": "consensusdrop"}]
    rows += [{"method": "consensusdrop", "label": "one score", "options": {"alpha": "0"}, "claim": "two beat one"}]
    path = written(tmp_path, kind="overview", published="", page=str(tmp_path / "page.md"), rows=rows)
    monkeypatch.setattr(runs, "SWEEPS", folder / "sweep")
    monkeypatch.setattr(table, "is_toy", lambda model: True)
    markers = "<!-- begin small {0} -->\n<!-- end small {0} -->\n"
    (tmp_path / "page.md").write_text("before\n" + markers.format("overview") + markers.format("costs at 4 tokens"))
    again = [str(path), *words[1:], "--page", "--output", str(tmp_path / "out"), "--wandb", "disabled"]
    assert table.main(again) == 0
    text = (tmp_path / "out" / "small.md").read_text()
    overview = text.partition("## Overview")[2].partition("\n\n## ")[0]
    assert "GQA with 95 % intervals, 12 of 12 questions about 4 images" in overview
    assert re.search(r"^\| fastv \| \d+\.\d \[n/a\] \| \d+\.\d \[n/a\] ‡ \|$", overview, re.MULTILINE)
    assert re.search(r"^\| two beat one \| [+-]\d+\.\d \[.*\] (open|holds|fails) \| ", text, re.MULTILINE)
    assert re.search(r"^\| 8 tokens \| \d of 3 \| .*consensusdrop", text, re.MULTILINE)
    assert re.search(r"^\| 4 tokens \| \d of 1 \| ", text, re.MULTILINE)
    assert re.search(r"^\| fastv ‡ .*\|  \|$", text, re.MULTILINE)
    assert text.index("## Costs at 8 tokens") < text.index("## Costs at 4 tokens")
    pairs = list(csv.DictReader((tmp_path / "out" / "small_pairs.csv").open()))
    assert [(row["budget"], row["a"], row["b"]) for row in pairs[:2]] == [
        ("8", "fastv", "consensusdrop"), ("8", "fastv", "one score"),
    ]  # fmt: skip
    # At 4 fastv counts its budget otherwise, and is compared with no other row.
    assert len(pairs) == 4 and (tmp_path / "out" / "small.png").is_file()
    page = (tmp_path / "page.md").read_text()
    assert overview.strip() in page and "| beats / loses to |" in page and page.startswith("before\n<!-- begin")


@pytest.mark.process
def test_a_single_missing_cell_runs_on_a_rank_too(made, monkeypatch):
    """It ran in the parent process, whose model is on the CPU where the ranks have the GPUs."""
    folder, words = made
    monkeypatch.setenv("RANKS", "2")
    given = []
    monkeypatch.setattr("eval.papers.runs.is_complete", lambda *_: False)
    monkeypatch.setattr("eval.papers.runs.fill_on_ranks", lambda configs, *rest, **more: given.append(len(configs)))
    monkeypatch.setattr("eval.papers.runs.fill", None)
    one = ["--methods", "random", "--budgets", "8", "--times", "0", "--wandb", "disabled"]
    assert table.main([*words, *one, "--output", str(folder / "single")]) == 0
    assert given == [1, 2]  # full alone, then both rows


def test_a_benchmark_that_the_toy_data_lack_is_refused(capsys):
    """The toy tiles have GQA only; an empty choice was read as all."""
    assert table.main(["consensusdrop/llava_next_7b", "--benchmarks", "pope", "--wandb", "disabled"]) == 2
    assert "--benchmarks" in capsys.readouterr().err


@pytest.mark.table
@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--methods", "randm"], "'randm'. Did you mean 'random'"),
        (["--limit", "0"], "--limit should be 1 or more"),
        (["--data", "/nowhere"], "folder /nowhere"),
        (["--render", "--limit", "7"], "holds no result of 7 questions"),
        (["--page"], "--page writes toy results"),
    ],
)
def test_wrong_flags_are_one_sentence(made, capsys, flags, sentence):
    _, words = made
    assert table.main([*words, *flags, "--wandb", "disabled"]) == 2
    assert sentence in capsys.readouterr().err


def test_best_and_second_share_places_where_they_print_alike():
    assert places([90.04, 89.96, None, 80.0]) == (frozenset({0, 1}), frozenset({3}))
    assert places([None, None]) == (frozenset(), frozenset())
    assert places([1.0]) == (frozenset({0}), frozenset())


def cell(value: float, questions: int = 100, available: int = 100, line: runs.RowAtBudget | None = None, **changes):
    """What the gate reads of a cell."""
    column = spec.Column(**{"benchmark": "pope", "title": "POPE", "published": "pope", "tolerance": 0.5} | changes)
    return SimpleNamespace(
        column=column,
        value=value,
        questions=questions,
        available=available,
        other_judge="",
        no_flops="",
        spread="",
        metric=column.metric or "f1",
        line=line or runs.RowAtBudget(FULL, None, None),
    )


def known(**sources) -> Published:
    """Published values of full on POPE, one source each: name -> (value, what differs from a plain source)."""
    plain = {"where": "", "kind": "copied", "trust": "medium", "convention": "square", "split": "usual"}
    rows = []
    for key, (value, changes) in sources.items():
        disputed = {"disputed": changes.pop("disputed")} if "disputed" in changes else {}
        rows.append(PublishedRow(method="full", tokens=576, source=key, pope=value, **disputed))
    made = {key: Source(title=key, **plain | changes) for key, (_, changes) in sources.items()}
    return Published(name="x", model="x", sources=made, rows=tuple(rows))


PLACE = spec.Place(model="m", tokens=576, convention="square")
FULL = spec.TableRow(method="full")


def test_the_gate_accepts_any_source_within_its_tolerance():
    sources = known(a=(85.9, {}), b=(86.8, {}))
    (one,) = gate.check([cell(86.5)], sources, PLACE)
    assert one.passed and one.verdict == "passed: -0.3 to 86.8 (b)", "which source passed is said"
    assert not gate.check([cell(86.31 + 1)], sources, PLACE)[0].passed
    (failed,) = gate.check([cell(84.0)], sources, PLACE)
    assert not failed.passed and failed.verdict == "failed: -1.9 to 85.9 (a)"
    # A few questions say nothing about a baseline.
    assert gate.check([cell(10.0, 5)], sources, PLACE)[0].verdict == "not compared: not all questions were asked"
    (sentence,) = gate.sentences([failed])
    assert "2,910 or 3,000 questions" in sentence


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"disputed": "re-runs differ"}, "disputed"),
        ({"split": {"pope": "adversarial questions"}}, "of adversarial questions, ours of random"),
        ({"split": "unknown"}, "of a split that the source does not name"),
        ({"convention": "lmms-eval"}, "another convention (asked and scored by lmms-eval)"),
        ({"kind": "ours"}, "a user's own number"),
        ({"trust": "low", "kind": "secondary"}, "a source of low trust"),
    ],
)
def test_the_gate_and_differences_use_only_values_like_ours(changes, why):
    """SQA 66.8, which its own file disputes, MMBench's test split and TextVQA without OCR tokens passed the gate, and
    differences were to sources whose trust is too low for the gate."""
    lone = known(a=(50.0, dict(changes)))
    (one,) = gate.check([cell(50.0)], lone, PLACE)
    assert one.nearest is None and one.why.startswith(why)
    values = known(a=(50.0, dict(changes)), b=(60.0, {"kind": "secondary"})).full("pope")
    entry = Entry(cell(50.0), values, "square")
    shown = published_text(values, "square")
    assert "50 [a]" in shown and "60 [b]" in shown, "what is not compared with is shown"
    assert difference_to(entry) == "-10.0 to 60 [b]" and re.search(r"50 \[a\][?≠]", shown)


def test_a_row_that_is_not_the_release_or_counts_another_budget_is_not_compared():
    """Release-made numbers stood beside our corrected variants, and rows marked ‡ were compared all the same."""
    values = known(a=(50.0, {})).full("pope")
    rows = {official: spec.TableRow(method="attnmix", options={"official": official}) for official in ("true", "false")}
    lines = {name: runs.RowAtBudget(row, 64, None) for name, row in rows.items()}
    assert comparable(cell(50.0, line=lines["true"]), values, "square")[0]
    assert comparable(cell(50.0, line=lines["false"]), values, "square")[1] == "the row is not the release"
    kept = runs.RowAtBudget(spec.TableRow(method="fastv"), 4, None, by_kept=True)
    assert comparable(cell(50.0, line=kept), values, "square")[1] == "another budget"
    assert comparable(cell(50.0, published_split="test"), values, "square")[1] == "ours is of another split"
    assert comparable(cell(50.0, metric="accuracy_match"), values, "square")[1] == "ours is accuracy_match"


def test_a_score_of_another_judge_is_not_compared():
    """Another model than the official judge passed the gate beside numbers that GPT graded."""
    assert other_judge({}) == other_judge({"name": "match"}) == ""
    assert other_judge({"name": "gpt-3.5-turbo-0125", "official": "gpt-3.5-turbo"}) == ""
    assert other_judge({"name": "gpt-4", "official": "gpt-4-0613"}) == ""
    for name in ("gpt-4o", "my-model", "gpt-4-0613, my-model", "unknown"):
        why = other_judge({"name": name, "official": "gpt-4-0613"})
        assert why == f"judged by {name}, published: gpt-4-0613"
    graded = cell(50.0)
    graded.other_judge = why
    values = known(a=(50.0, {}))
    assert comparable(graded, values.full("pope"), "square") == ([], why)
    (one,) = gate.check([graded], values, PLACE)
    assert one.verdict == f"not compared: {why}"


RELEASES = {"attnmix", "visiondrop", "visionzip", "holov", "cdpruner"}


@pytest.mark.parametrize("path", spec.paths(), ids=spec.short)
def test_rows_beside_numbers_of_a_release_run_the_release(path):
    found = spec.read(path)
    rows = [row for row in found.rows if found.published and row.method in RELEASES and found.kind != "ablation"]
    for row in rows:
        assert row.runs_release == bool(row.published_name), f"{row.title}: published numbers are of the release"
    if found.kind == "scores":
        for method in {row.method for row in rows}:
            assert len([row for row in rows if row.method == method]) == 2, f"{method}: the release and our variant"


@pytest.mark.lab
@pytest.mark.parametrize("name", ["consensusdrop/video_llava_7b", "visiondrop/video_llava_7b"])
def test_visiondrop_on_videos_has_the_schedule_of_its_page(name):
    """The tables gave videos the schedule of images: 384/280/208/152 at 256 tokens."""
    table_of = spec.read(spec.find(name))
    model = expense(table_of).model
    page = (ROOT / "docs" / "visiondrop.md").read_text()
    (line,) = [line for line in page.splitlines() if line.startswith("| 256, `start=3`")]
    documented = [int(number) for number in re.findall(r"= (\d+) \|", line)]
    rows = [row for row in table_of.rows if row.method == "visiondrop"]
    assert len(rows) == 2
    for row in rows:
        reducer = registry.build("visiondrop", 256, dict(row.options), model.visual_tokens)
        assert list(planned(reducer, model.spec)[::8]) == documented == [768, 192, 48, 16]


def test_two_rows_of_one_method_have_an_image_each(tiny, tmp_path):
    """A release and our variant of it are one method; their images had one name."""
    data = benchmarks.get("gqa").load(write_gqa(tmp_path / "data", count=2, images=1), "testdev")
    rows = [
        spec.TableRow(method="attnmix", label="A"),
        spec.TableRow(method="attnmix", label="B, b", options={"official": "true"}),
    ]
    lines = [runs.line_of(row, 8, RunConfig("full"), tiny) for row in rows]
    found = figure.draw_kept(lines, data, tiny, tmp_path / "kept")
    assert sorted(path.name for path in found.values()) == ["A.jpg", "B-b.jpg"]


def test_tokens_needed_and_averages_are_na_where_full_scores_nothing():
    terms = accuracy_terms({"a": 0.0, "b": 0.0}, {"a": "a", "b": "b"})
    found = SimpleNamespace(cells={(0, "gqa"): SimpleNamespace(terms=terms), (1, "gqa"): SimpleNamespace(terms=terms)})
    assert needed_text(found, {8: 1}, "gqa") == "n/a"
    # A few questions, on which full scores 0, made an average n/a without a word.
    assert relative_text({"pope": (terms, terms)}, 1).startswith("n/a: pope: ")
    assert relative_text({"pope": (terms, terms)}, 3) == "n/a: a result on 2 of 3 benchmarks is missing"


def blank_document(**changes):
    """A document of twelve columns with letters that LaTeX, spreadsheets and HTML take for their own."""
    found = spec.read(spec.find("consensusdrop/llava15_7b"))
    columns = [f"Benchmark {number}" for number in range(11)] + ["average"]
    rows = [("=Method <a> | b_c & 50 % of x^2 ~ {d} \\e #1 $ ‡ §", [1862.0, 150.0, *[90.04] * 9, 99.5])] * 30
    none = [frozenset()] * 12
    points = [True, True, *[False] * 10]
    facts = [("Questions", "GQA 12,578"), ("Command", "`bash x.sh`"), ("Commit", "1a2b3c4d5e")]
    known = {"columns": columns, "blocks": [Block("64 tokens", rows, [frozenset({0}), *none[1:]], none, points)]}
    known |= {"entries": (), "sections": (), "facts": facts, "model": "tinyllava_instruct", "is_toy": True}
    return Document(**{"table": found} | known | changes)


@pytest.mark.table
def test_every_format_says_first_that_a_toy_ran(made, monkeypatch, tmp_path):
    """A page of toy numbers was titled "ConsensusDrop on LLaVA-1.5-7B", and its LaTeX file had no word of it."""
    toy = blank_document()
    title = "ConsensusDrop on LLaVA-1.5-7B, run on the TOY MODEL tinyllava_instruct"
    text = render.markdown_page(toy)
    assert text.startswith(f"# {title}\n\n**{TOY_BANNER}")
    assert TOY_BANNER in render.html_page(toy) and f"<h1>{title}</h1>" in render.html_page(toy)
    assert rf"\caption{{\footnotesize \textbf{{{TOY_BANNER}" in render.latex_file(toy)
    assert TOY_BANNER in table.summary(toy)
    # 150 points of MME were 150.0 in one table and 150 in the next.
    assert "| 1862 | 150 | 90.0 |" in text.replace("**", "") and "& 150 &" in render.latex_file(toy)
    assert ">150</td>" in render.html_page(toy) and "150.0" not in render.html_page(toy)
    # A row with | in its name had a cell more than the table.
    line = next(line for line in text.splitlines() if "b_c" in line)
    assert len(re.findall(r"(?<!\\)\|", line)) == 14 and r"<a> \| b_c" in line
    real = dataclasses.replace(toy, is_toy=False, model="llava-v1.5-7b")
    for write in (render.markdown_page, render.html_page, render.latex_file, render.csv_file):
        assert "TOY" not in write(real)
    assert is_toy(str(ROOT / "assets" / "tinyllava_next")) and not is_toy("liuhaotian/llava-v1.5-7b")
    # Behind a link, or as ".", its numbers stood under the paper's title.
    (tmp_path / "llava-v1.5-7b").symlink_to(ROOT / "assets" / "tinyllava")
    monkeypatch.chdir(ROOT / "assets" / "tinyllava_next")
    assert is_toy(str(tmp_path / "llava-v1.5-7b")) and is_toy(".")
    # A toy that the user names is a toy too.
    folder, words = made
    args = table.parser().parse_args(
        [words[0], "--model", str(ROOT / "assets/tinyllava"), "--data", str(folder / "data")]
    )
    assert table.where_of(spec.read(Path(words[0])), args).is_toy


def with_intervals():
    """The document of twelve columns, with an interval beside each score but one, and rows that LaTeX trips over."""
    document = blank_document()
    (block,) = document.blocks
    rows = [("[a] $ row", block.rows[0][1]), ("* row", block.rows[0][1]), *block.rows]
    texts = [["", *["[60.1, 63.6]"] * 10]] * len(rows)
    marked = dataclasses.replace(block, rows=rows, intervals=texts, clear=frozenset({(1, 2), (2, 3)}))
    return dataclasses.replace(document, blocks=[marked])


def test_the_latex_file_has_intervals_and_significance_marks_if_asked():
    """Asked for with LaTeX tables, and not built."""
    document = with_intervals()
    plain, text = render.latex_file(document), render.latex_file(document, intervals=True)
    assert "scriptsize" not in plain and r"$^\ast$" not in plain and "intervals" not in plain
    rows = [line for line in text.splitlines() if line.endswith(r"99.5\% \\")]
    assert rows[0].startswith(
        r"{}[a] \$ row & \textbf{1862} & 150 {\scriptsize [60.1, 63.6]} & 90.0 {\scriptsize [60.1"
    )
    assert rows[1].count(r"$^\ast$") == rows[2].count(r"$^\ast$") == 1 and r"$^\ast$" not in rows[0] + rows[3]
    assert r"& 90.0$^\ast$ {\scriptsize [60.1, 63.6]} &" in rows[1] and rows[1].startswith("{}* row")
    (caption,) = [line for line in text.splitlines() if line.startswith(r"\caption")]
    assert "95 \\% intervals" in caption and r"$^\ast$ differs significantly from ConsensusDrop" in caption


def test_the_caption_says_which_metric_stands_in_for_the_papers():
    """A few questions give MME's perception; the column "MME total" of the file showed it without a word, and later
    under its old head."""
    note = "These data do not give the paper's metric; shown instead: MME perception (not total)."
    text = render.latex_file(dataclasses.replace(blank_document(), notes=["Another note.", note]))
    assert note in text and "Another note" not in text
    # It is the page's own sentence.
    total = spec.Column(benchmark="mme", title="MME total", metric="total")
    column = shown(total, "perception")
    assert column.title == "MME perception" and shown(total, "total") is total
    assert shown(total.model_copy(update={"title": "MME"}), "perception").title == "MME (perception)"
    graded = cell(150.0, metric="total")
    graded.metric, graded.column, graded.no_interval, graded.stored = "perception", column, "", None
    line = runs.RowAtBudget(FULL, None, None)
    found = MeasuredTable([line], [column], {(0, "mme"): graded})
    assert note in notes_of(blank_document().table, found, ())


def test_a_page_says_that_its_cells_were_made_with_other_libraries():
    """Versions were stored and never compared."""
    cells = {}
    for index, version in enumerate(("2.1", "2.1", "2.2")):
        cells[index, "pope"] = one = cell(80.0)
        one.line, one.no_interval = runs.RowAtBudget(FULL, index, None), ""
        one.stored = SimpleNamespace(result={"versions": {"torch": version}})
    found = MeasuredTable([one.line for one in cells.values()], [one.column], cells)
    (note,) = (note for note in notes_of(blank_document().table, found, ()) if "torch" in note)
    assert "2.1 (full at all, POPE, full at 1, POPE); 2.2 (full at 2, POPE)." in note


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
@pytest.mark.parametrize("intervals", [False, True])
def test_the_latex_file_compiles_and_fits_the_page(tmp_path, intervals):
    """Twelve columns ran off the page of an article; < > | printed as other letters; a row that begins with [ was an
    error, and one that begins with * lost it."""
    (tmp_path / "table.tex").write_text(render.latex_file(with_intervals(), intervals))
    head = r"\documentclass{article}\usepackage{booktabs,graphicx}\begin{document}\input{table}\end{document}"
    (tmp_path / "page.tex").write_text(head)
    words = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page.tex"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:]
    log = (tmp_path / "page.log").read_text()
    assert "Overfull" not in log and "too large" not in log and "(1 page" in log
    assert render.escaped("<a> | =") == "$<$a$>$ $|$ ="


def test_csv_cells_are_no_formulas_and_numbers_stay_numbers():
    assert [csv_text(text) for text in ("=1+1", "+x", "-y", "@z", "\tq")] == ["'=1+1", "'+x", "'-y", "'@z", "'\tq"]
    assert [csv_text(text) for text in ("-1.20", "+3", "FastV", "")] == ["-1.20", "+3", "FastV", ""]


@pytest.mark.table
def test_rows_of_another_budget_are_marked_and_compared_with_none(made):
    """Their footnote said so, but they were tested against the paper's method, and unmarked in the costs."""
    text = (made[0] / "out" / "small.md").read_text()
    tested = text.partition("## Consensus_Drop against each method")[2].partition("\n## ")[0]
    assert "| FastV | 8 |" in tested and "| FastV | 4 |" not in tested
    costs = text.partition("## Costs")[2].partition("\n## ")[0]
    assert re.search(r"^\| FastV ‡ \(\d+\) \| 4 \|", costs, re.MULTILINE) and "‡ the budget counts" in costs


@pytest.mark.table
def test_printed_commands_have_every_flag_that_is_not_a_default(made):
    """The judge and the batch size were left out, so a command gave other numbers."""
    _, words = made
    args = table.parser().parse_args([*words, "--judge", "match", "--batch-size", "3"])
    found = spec.read(Path(words[0]))
    line = table.command_line(found, args)
    # `MODEL=... DATA=... vtr tables paper` ran on the toy: only scripts read these.
    assert line.startswith(f"vtr tables paper {words[0]} --model {args.model} --data {args.data}")
    assert "--dtype float32 --batch-size 3 --judge match" in line
    run = table.where_of(found, args).run
    told = command_of(runs.RowAtBudget(FULL, None, run), found.columns[0], run)
    assert "--batch-size 3" in told and "--judge match" in told


def test_the_command_of_a_script_has_its_variables_before_it_and_flags_behind():
    for words, told in (
        (["--data", "/my data"], "DATA='/my data' bash scripts/visiondrop/controls.sh"),
        (["--model", "m", "--limit", "5"], "MODEL=m bash scripts/visiondrop/controls.sh --limit 5"),
        (["--tex-intervals"], "bash scripts/visiondrop/controls.sh --tex-intervals"),
    ):
        args = table.parser().parse_args(["visiondrop/controls", *words])
        assert table.command_line(spec.read(spec.find(args.table)), args) == told


def test_loyalty_takes_the_benchmarks_own_form_of_an_answer():
    """Tables compared plain texts, so "Yes." and "yes, it is" were different answers on MME."""

    def answered(text):
        return SimpleNamespace(texts={"q": text}, normalise=lambda text: text[:3].lower(), clusters={"q": "i"})

    assert pooled_loyalty({"mme": answered("Yes.")}, {"mme": answered("yes, it is")}).mean == 100


def test_loyalty_leaves_questions_without_an_image_out():
    """No method changes their answers: ScienceQA's loyalty was 82.5 where it was 65.0 over those with an image."""

    def answered(text):
        return SimpleNamespace(texts={"q": text, "prose": "A"}, normalise=str, clusters={"q": "i"})

    assert pooled_loyalty({"scienceqa": answered("B")}, {"scienceqa": answered("C")}).mean == 0


# -- a table of one's own -------------------------------------------------------------------------------------


def documented(language: str) -> str:
    """The example of docs/paper_tables.md."""
    page = (ROOT / "docs" / "paper_tables.md").read_text()
    (found,) = [
        text
        for text in re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)
        if "mine.yaml" in text or language != "bash"
    ]
    return found


@pytest.mark.table
def test_the_documented_table_runs_in_an_empty_folder(monkeypatch, tmp_path):
    """`vtr tables paper PATH.yaml` wanted a folder with a paper's name, and `../lists` beside its folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "SWEEPS", tmp_path / "sweep")
    Path("mine.yaml").write_text(documented("yaml"))
    words = shlex.split(documented("bash"))
    assert words[:4] == ["vtr", "tables", "paper", "mine.yaml"]
    assert table.main([*words[3:], "--wandb", "disabled"]) == 0
    text = Path("mine/mine.md").read_text()
    assert text.startswith("# My table, run on the TOY MODEL tinyllava_instruct\n\n**TOY MODEL: ")
    rows = list(csv.DictReader(io.StringIO(Path("mine/mine.csv").read_text())))
    assert {row["warning"] for row in rows} == {"TOY MODEL"}
    wide, averages = {}, {}
    top, _, below = text.partition("## Averages, loyalty")
    for found, part, place in ((wide, top, 3), (averages, below.partition("\n## ")[0], 2)):
        rows = [[cell.strip("*<>u/ ") for cell in line.strip("|").split("|")] for line in part.splitlines()]
        found |= {row[0]: row[place].partition(" [")[0] for row in rows if row[0] in ("FasterVLM", "ConsensusDrop")}
    assert len(wide) == 2 and averages == wide, "an average has one meaning on the page"
