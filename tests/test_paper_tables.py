"""Tables of the papers: the specs, the runner on a tiny model, the gate, and what each format says."""

import csv
import dataclasses
import io
import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from eval import benchmarks, outcomes
from eval.answers.jsonl import read_json
from eval.config import ROOT
from eval.papers import figure, gate, plan, spec, table
from eval.papers.published import Published, Source
from eval.papers.published import Row as PublishedRow
from eval.papers.render import latex
from eval.papers.rows import places
from eval.papers.sections import needed_text
from llava.errors import UserError
from llava.pipeline.generate import generate
from llava.reduction import registry
from tests.browser import PHONE, needs_browser, opened, overflow
from tests.eval_fakes import write_gqa
from tests.read_wandb import find_runs, read_run, without_wandb


@pytest.mark.parametrize("path", spec.paths(), ids=spec.short)
def test_every_spec_is_valid_and_has_its_script(path):
    found = spec.read(path)
    script = path.with_suffix(".sh")
    assert script.is_file() and f'table.sh" {found.identity} ' in script.read_text()
    assert found.ours in {row.method for row in found.rows}
    # The paper's model and the toy model are both described completely.
    assert found.real.model and (ROOT / found.toy.model / "config.json").is_file() and (ROOT / found.toy.data).is_dir()
    if found.published:
        from eval.papers import published

        assert published.load(found.published).rows


def test_every_script_has_its_spec():
    own = {"claims.sh", "alignment.sh", "misalignment.sh", "fusion_gain.sh"}  # figures and claims, without a spec
    for paper in spec.PAPERS:
        for script in (ROOT / "scripts" / paper).glob("*.sh"):
            assert script.name in own or script.with_suffix(".yaml").is_file(), script


def written(tmp_path: Path, **changes) -> Path:
    """A small table on a tiny model; `changes` replace keys, None removes them."""
    content = {
        "title": "A small table",
        "about": "For tests.",
        "paper": "consensusdrop",
        "ours": "consensusdrop",
        "model_title": "LLaVA-1.5-7B",
        "real": {"model": "some/model", "tokens": 576},
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
        ({"colums": []}, "colums: Extra inputs are not permitted"),
        ({"rows": [{"method": "fastvv"}]}, r"rows\.0\.method: Unknown method 'fastvv'\. Did you mean 'fastv'\?"),
        ({"rows": [{"method": "fastv", "options": {"layr": "2"}}]}, "layr"),
        ({"rows": [{"method": "full"}]}, "full is always the first row"),
        ({"rows": [{"method": "fastv"}, {"method": "fastv"}]}, "listed twice under rows"),
        ({"columns": [{"benchmark": "gqua", "title": "GQA"}]}, "Unknown benchmark 'gqua'"),
        (
            {"columns": [{"benchmark": "gqa", "title": "a"}, {"benchmark": "gqa", "title": "b"}]},
            "listed twice under columns",
        ),
        ({"budgets": ["1/0"]}, "should be a ratio"),
        ({"budgets": [0]}, "a budget is 1 or more"),
        ({"budgets": [8], "toy_budgets": [4, 2]}, "toy_budgets has another number"),
        ({"toy": {"model": "m", "benchmarks": ["pope"]}}, "benchmarks that are no column: pope"),
        ({"ours": "consensus"}, "Did you mean 'consensusdrop'"),
        ({"rows": ["../../../etc/passwd"]}, "not in scripts/"),
        ({"title": None}, "title: Field required"),
    ],
)
def test_a_wrong_spec_is_one_sentence(tmp_path, changes, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        spec.read(written(tmp_path, **changes))
    assert "small.yaml" in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_table_is_named_with_its_neighbour():
    with pytest.raises(UserError, match=r"Did you mean llava15_7b\?.*visiondrop/llava15_7b"):
        spec.read(spec.find("consensusdrop/llava15_7"))


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
        patch.setattr(plan, "SWEEPS", folder / "sweep")
        patch.setattr("eval.papers.fill.SWEEPS", folder / "sweep")
        path = written(folder)
        words = [str(path), "--model", str(tiny_path), "--data", str(data), "--dtype", "float32", "--times", "1"]
        assert table.main([*words, "--output", str(folder / "out"), "--wandb", "disabled"]) == 0
        yield folder, words


def test_the_table_is_written_in_every_format(made):
    folder, _ = made
    assert sorted(path.name for path in (folder / "out").iterdir()) == [
        "small.csv", "small.html", "small.md", "small.png", "small.tex", "small.times.jsonl",
    ]  # fmt: skip


def test_markdown_holds_published_ours_difference_tokens_command_run_commit(made):
    text = (made[0] / "out" / "small.md").read_text()
    assert "| method | GQA | average |" in text and "***8 tokens***" in text
    header = (
        "| method | budget | benchmark | published | ours [95 % interval] | difference | tokens | merged | command |"
    )
    assert header in text
    full = next(line for line in text.splitlines() if line.startswith("| full | all | GQA |"))
    assert "61.9 [" in full and "bash scripts/eval/gqa.sh full" in full and "sweep/" in full
    ours = next(line for line in text.splitlines() if line.startswith("| Consensus_Drop | 4 | GQA |"))
    assert "| n/a |" in ours  # nothing is published about ConsensusDrop, nor about 4 tokens
    assert "n/a: " not in text
    for heading in ("Averages, loyalty and hard questions", "Tokens needed for 99 % of full", "Costs"):
        assert f"## {heading}" in text
    assert "TTFT: median of 1 prefills" in text


def test_the_gate_marks_a_wrong_baseline_and_names_causes(made, capsys):
    folder, words = made
    text = (folder / "out" / "small.md").read_text()
    assert "**Marked: the unreduced model is not the published one.**" in text
    assert "outside the tolerance of 0.3. Look at: the conversation template" in text
    assert "MARKED" in (folder / "out" / "small.tex").read_text()
    # exit_on_user_error turns the error into exit code 2
    assert table.main([*words, "--gate", "stop", "--output", str(folder / "stop"), "--wandb", "disabled"]) == 2
    assert "--gate mark goes on" in capsys.readouterr().err and not (folder / "stop" / "small.md").exists()


def test_csv_has_every_number_and_a_hash_of_the_answers(made):
    folder, _ = made
    rows = list(csv.DictReader(io.StringIO((folder / "out" / "small.csv").read_text())))
    assert len(rows) == 1 + 2 * 4
    full = rows[0]
    assert full["method"] == "full" and "61.9" in full["published"].split(";") and full["questions"] == "12"
    answers = {line["question_id"]: line["text"] for line in read_answers(folder / full["run"].split("tables0/")[-1])}
    import hashlib

    text = "".join(f"{name}\t{answers[name]}\n" for name in sorted(answers))
    assert full["answers_sha256"] == hashlib.sha256(text.encode()).hexdigest()
    kept = [row for row in rows if row["counts_kept_tokens"] == "true"]
    assert [(row["method"], row["budget"]) for row in kept] == [("FastV", "4")]
    # Such a row has more tokens than its block: it says how many, and is never marked best.
    assert float(kept[0]["tokens_per_layer"]) > 4
    page = (folder / "out" / "small.md").read_text()
    assert re.search(r"^\| FastV ‡ \(\d+\) \| \d+\.\d \| \d+\.\d \|$", page, re.MULTILINE)


def read_answers(folder: Path):
    path = folder if folder.is_absolute() else Path("/") / folder
    return [json.loads(line) for line in (path / "answers.jsonl").read_text().splitlines()]


def test_latex_is_booktabs_with_balanced_braces_and_escapes(made):
    text = (made[0] / "out" / "small.tex").read_text()
    assert r"\toprule" in text and r"\bottomrule" in text and r"Consensus\_Drop" in text and r"\%" in text
    assert r"\textbf{" in text
    rows = [line for line in text.splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
    assert {line.replace(r"\&", "").count("&") for line in rows} == {2}
    plain = re.sub(r"\\[{}]", "", text)
    assert plain.count("{") == plain.count("}")
    assert latex.escaped("50 % & a_b # $ ‡") == r"50 \% \& a\_b \# \$ $^\ddagger$"


def test_a_table_of_costs_shows_the_score_beside_them_and_is_latex_too(made, monkeypatch, tmp_path):
    """Tables of costs and ablations were written without a LaTeX file."""
    folder, words = made
    path = written(tmp_path, kind="efficiency")
    monkeypatch.setattr(plan, "SWEEPS", folder / "sweep")
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
    assert latex.styled("**81.0**") == r"\textbf{81.0}" and latex.styled("fix") == "fix"


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


def test_a_finished_table_asks_nothing_and_a_part_does_not_replace_it(made, monkeypatch, tiny_path):
    folder, words = made
    monkeypatch.setattr("eval.outcomes.generate", None)
    again = [*words, "--output", str(folder / "again"), "--wandb", "disabled"]
    assert table.main(again) == 0
    assert (folder / "again" / "small.csv").read_text() == (folder / "out" / "small.csv").read_text()
    assert table.main([*again, "--render", "--methods", "random", "--budgets", "8"]) == 0
    assert (folder / "again" / "small.csv").read_text().count("Random") == 1
    args = table.parser().parse_args([*words, "--methods", "random", "--limit", "3"])
    found = spec.read(Path(words[0]))
    assert table.default_folder(found, table.where_of(found, args), args).name.endswith("-limit3-part")


def test_the_table_is_one_offline_wandb_run_with_its_files_and_pictures(made, monkeypatch, tmp_path):
    without_wandb(monkeypatch, tmp_path)
    folder, words = made
    assert table.main([*words, "--output", str(folder / "logged"), "--wandb", "offline"]) == 0
    runs = [read_run(path) for path in find_runs(folder / "logged")]
    (run,) = [run for run in runs if run.job_type == "table"]
    assert run.group == "consensusdrop/small" and run.exit_code == 0
    assert len(run.table("table")["data"]) == 9
    (files,) = [files for name, files in run.artifacts.items() if name.startswith("table-")]
    assert {"small.md", "small.csv", "small.tex", "small.html"} <= set(files)
    assert len(run.last("kept tokens")["captions"]) == 5
    assert run.last("accuracy against tokens") and run.last("accuracy against TTFT")


def test_why_times_are_not_measured_is_said_once(made, monkeypatch, tmp_path):
    """It was decided twice, so the sentence about the ranks' GPUs was printed twice."""
    without_wandb(monkeypatch, tmp_path)
    folder, words = made
    decided: list[int] = []
    monkeypatch.setattr(table, "repeats_of", lambda *_: decided.append(1) or 1)
    assert table.main([*words, "--output", str(folder / "once"), "--wandb", "offline"]) == 0
    assert decided == [1]


def test_cells_are_spread_over_ranks_and_are_those_of_one_process(made, monkeypatch):
    folder, words = made
    monkeypatch.setenv("RANKS", "2")
    monkeypatch.setattr(plan, "SWEEPS", folder / "spread")
    monkeypatch.setattr("eval.papers.fill.SWEEPS", folder / "spread")
    assert table.main([*words, "--output", str(folder / "two"), "--wandb", "disabled"]) == 0
    rows = [list(csv.DictReader((folder / name / "small.csv").open())) for name in ("out", "two")]
    for alone, spread in zip(*rows, strict=True):
        for key in ("method", "budget", "score", "low", "high", "tokens_per_layer", "answers_sha256"):
            assert spread[key] == alone[key]
    assert not list((folder / "spread").glob("sweep-*.json"))


def test_a_method_that_fails_on_some_questions_has_no_score_and_the_table_goes_on(made, monkeypatch):
    """DART refused the 11 shortest prompts of MM-Vet, and the table of 800 cells ended there."""
    folder, words = made
    monkeypatch.setattr(plan, "SWEEPS", folder / "failing")
    monkeypatch.setattr("eval.papers.fill.SWEEPS", folder / "failing")
    real = outcomes.generate

    def failing(model, batch, reducer, *rest, **more):
        if reducer.name == "random" and any(sample.id == "1003" for sample in batch):
            raise UserError("random does not like this question")
        return real(model, batch, reducer, *rest, **more)

    monkeypatch.setattr(outcomes, "generate", failing)
    one = ["--methods", "random,consensusdrop", "--budgets", "8", "--times", "0", "--wandb", "disabled"]
    assert table.main([*words, *one, "--output", str(folder / "failed")]) == 0
    text = (folder / "failed" / "small.md").read_text()
    assert "| Random | n/a | n/a |" in text and "| Consensus_Drop | " in text
    assert "n/a: Random at 8 on GQA: 1 of 12 questions failed, the first (1003) with: random does not like" in text
    monkeypatch.setattr(outcomes, "generate", real)  # the next call asks it again
    assert table.main([*words, *one, "--output", str(folder / "failed")]) == 0
    assert "questions failed" not in (folder / "failed" / "small.md").read_text()
    # A run whose mean is off its plan is no cell at that budget either.
    results = (folder / "failing").rglob("result.json")
    (path,) = (path for path in results if read_json(path)["method"] == "random")
    path.write_text(json.dumps(read_json(path) | {"off_budget": {"remark": "The audit counts 9.00."}}))
    assert table.main([*words, *one, "--render", "--output", str(folder / "failed")]) == 0
    assert "n/a: Random at 8 on GQA: The audit counts 9.00." in (folder / "failed" / "small.md").read_text()


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
    monkeypatch.setattr(plan, "SWEEPS", folder / "sweep")
    again = [str(path), *words[1:], "--times", "0", "--output", str(tmp_path / "out"), "--wandb", "disabled"]
    assert table.main(again) == 0
    text = (tmp_path / "out" / "small.md").read_text()
    assert "| choice | GQA, 8 tokens | against the default [95 % CI] | GQA, 4 tokens |" in text
    rows = [line for line in text.splitlines() if line.startswith(("| weight: ", "| both: ", "| defaults"))][:5]
    assert [line.count("| default |") for line in rows] == [
        2,
        0,
        0,
        2,
        0,
    ]  # alpha 0.5 is the default; "both" is first by name


def test_a_single_missing_cell_runs_on_a_rank_too(made, monkeypatch):
    """It ran in the parent process, whose model is on the CPU where the ranks have the GPUs."""
    folder, words = made
    monkeypatch.setenv("RANKS", "2")
    given = []
    monkeypatch.setattr("eval.papers.fill.is_finished", lambda *_: False)
    monkeypatch.setattr("eval.papers.fill.fill_on_ranks", lambda configs, *rest, **more: given.append(len(configs)))
    monkeypatch.setattr("eval.papers.fill.fill", None)
    one = ["--methods", "random", "--budgets", "8", "--times", "0", "--wandb", "disabled"]
    assert table.main([*words, *one, "--output", str(folder / "single")]) == 0
    assert given == [1, 2]  # full alone, then both rows


def test_a_benchmark_that_the_toy_data_lack_is_refused(capsys):
    """The toy tiles have GQA only; an empty choice was read as all."""
    assert table.main(["consensusdrop/llava_next_7b", "--benchmarks", "pope", "--wandb", "disabled"]) == 2
    assert "can fill none of the chosen benchmarks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--methods", "randm"], "The table has no method 'randm'. Did you mean 'random'"),
        (["--budgets", "16"], "The table has no budget '16'"),
        (["--benchmarks", "pope"], "The table has no benchmark 'pope'"),
        (["--limit", "0"], "--limit should be 1 or more"),
        (["--data", "/nowhere"], "The data folder /nowhere does not exist"),
        (["--render", "--limit", "7"], "holds no result of 7 questions"),
    ],
)
def test_wrong_flags_are_one_sentence(made, capsys, flags, sentence):
    _, words = made
    assert table.main([*words, *flags, "--wandb", "disabled"]) == 2
    assert sentence in capsys.readouterr().err


def test_without_data_the_toy_model_stands_in_and_nothing_published_is_shown(tmp_path):
    found = spec.read(written(tmp_path))
    args = table.parser().parse_args([str(tmp_path / "small.yaml")])
    where = table.where_of(found, args)
    assert where.is_toy and Path(where.place.model).name == "tinyllava"
    assert table.gate_of(found, where, None, stop=True) == []


def test_best_and_second_share_places_where_they_print_alike():
    assert places([90.04, 89.96, None, 80.0]) == (frozenset({0, 1}), frozenset({3}))
    assert places([None, None]) == (frozenset(), frozenset())
    assert places([1.0]) == (frozenset({0}), frozenset())


def cell(value: float, questions: int = 100, available: int = 100):
    """What the gate reads of a cell."""
    column = spec.Column(benchmark="pope", title="POPE", published="pope", tolerance=0.5)
    names = ("column", "value", "questions", "available")
    return dataclasses.make_dataclass("Cell", names)(column, value, questions, available)


def test_the_gate_accepts_any_source_within_its_tolerance():
    sources = {key: Source(title=key, where="", kind="copied", trust="medium") for key in "ab"}
    rows = tuple(
        PublishedRow(method="full", tokens=576, source=key, pope=value) for key, value in {"a": 85.9, "b": 86.8}.items()
    )
    known = Published("x", "x", sources, rows)
    place = spec.Place(model="m", tokens=576)
    assert [one.passed for one in gate.check([cell(86.3)], known, place)] == [True]
    assert [one.passed for one in gate.check([cell(86.31 + 1)], known, place)] == [False]
    assert [one.passed for one in gate.check([cell(84.0)], known, place)] == [False]
    # A few questions say nothing about a baseline.
    assert [one.difference for one in gate.check([cell(10.0, 5)], known, place)] == [None]
    (sentence,) = gate.sentences(gate.check([cell(84.0)], known, place))
    assert "2,910 or 3,000 questions" in sentence


def test_the_legend_has_other_methods_only_where_there_are_some(tmp_path, monkeypatch):
    """Tables of few methods had a grey entry that stood for no line."""
    from matplotlib import pyplot

    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    for count, expected in ((3, False), (12, True)):
        points = [
            {"method": f"m{i}", "budget": 64, "tokens": 64, "ttft_ms": None, "score": 90 - i} for i in range(count)
        ]
        assert figure.draw(tmp_path / "plot.png", points, "title", "m0")
        texts = [text.get_text() for text in pyplot.gcf().axes[0].get_legend().get_texts()]
        assert ("other methods" in texts) == expected
    monkeypatch.undo()
    pyplot.close("all")


def test_tokens_needed_is_na_where_full_scores_nothing():
    from types import SimpleNamespace

    from eval.results.statistics import accuracy_terms

    terms = accuracy_terms({"a": 0.0, "b": 0.0}, {"a": "a", "b": "b"})
    found = SimpleNamespace(cells={(0, "gqa"): SimpleNamespace(terms=terms), (1, "gqa"): SimpleNamespace(terms=terms)})
    assert needed_text(found, {8: 1}, "gqa") == "n/a"


def test_the_shell_script_makes_its_table(tmp_path):
    """bash scripts/<paper>/<table>.sh, as the README gives it, with paths relative to where it is called."""
    script = ROOT / "scripts" / "attnmix" / "llava15_7b.sh"
    words = ["bash", str(script), "--help"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "consensusdrop/llava15_7b" in done.stdout, done.stderr
