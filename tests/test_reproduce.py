"""The pages of `vtr tables reproduce` say what the specs, the published values and the estimates say."""

import re
from dataclasses import replace

import pytest

from eval import benchmarks
from eval.benchmarks import textvqa, vizwiz, vqav2
from eval.benchmarks.mmvet import COUNT as MMVET
from eval.config import ROOT
from eval.papers import expense, published, reproduce
from eval.papers.spec import find, read
from eval.tables.memory import expected

FLAGSHIP = "consensusdrop/llava15_7b"
TOY = ROOT / "assets" / "eval"
CLOSE = 0.03  # of a size: configuration files and rounding


@pytest.fixture(scope="module")
def costs():
    return reproduce.all_costs()


@pytest.fixture(scope="module")
def cost(costs):
    return next(cost for cost in costs if cost.table.identity == FLAGSHIP)


@pytest.fixture(scope="module")
def flagship(cost):
    return reproduce.page(cost)


@pytest.mark.table
def test_the_costs_of_all_tables_are_those_of_the_page(costs):
    """`vtr tables reproduce` writes them again."""
    assert reproduce.index(costs) in reproduce.INDEX.read_text()


def test_sizes_from_shapes_are_those_of_the_modules():
    checked = 0
    for name, entry in expense.downloads().checkpoints.items():
        if entry.shapes:
            size = expected(entry.shapes).weights.total / 1e9
            tower = 0.6 if name.startswith("liuhaotian/llava-v1.5") else 0.0  # in a repository of its own
            assert entry.gb == pytest.approx(size - tower, rel=CLOSE), name
            checked += 1
    assert checked == 7


def test_every_table_has_the_sizes_that_it_needs(costs):
    for table in (cost.table for cost in costs):
        assert expense.checkpoint_of(table).gb > 0
        assert {column.benchmark for column in table.columns} <= set(expense.downloads().benchmarks), table.identity


def test_numbers_of_questions_are_those_of_the_benchmarks():
    loads = expense.downloads().benchmarks
    assert set(loads) <= set(benchmarks.names())
    assert loads["vqav2"].questions == vqav2.PUBLISHED_SIZES["testdev"]
    assert loads["vizwiz"].questions == vizwiz.PUBLISHED_SIZES["test"]
    assert loads["textvqa"].questions == textvqa.PUBLISHED_SIZE
    assert loads["mmvet"].questions == MMVET


@pytest.mark.table
def test_a_table_takes_the_sum_of_its_runs_and_none_where_the_model_does_not_fit(cost):
    gpu, seconds = expense.GPUS[1], 0.0
    for load in cost.loads.values():
        batches = -(-load.questions // cost.table.real.batch_size)
        estimates = (cost.estimate(line, load.text, load.steps) for line in cost.runnable)
        seconds += sum(batches * replace(one, rates=gpu.rates).seconds["batch"] for one in estimates)
    assert cost.gpu_hours(gpu) == pytest.approx(seconds / 3600)
    assert cost.cells == len(cost.runnable) * len(cost.table.columns)
    assert reproduce.hours(cost, replace(gpu, memory=1e9)) == ("n/a", "n/a")


def test_judged_and_server_graded_benchmarks_are_named(costs):
    """A table without a judge, or on a split of a server, holds no published metric."""
    for name in sorted({name for cost in costs for name in cost.loads}):
        benchmark = benchmarks.get(name)
        assert (name in reproduce.SERVER) == ("from a server" in benchmark.summary), name
        data = benchmark.load(TOY, benchmarks.check_split(benchmark, None, TOY))
        assert (name in reproduce.JUDGED) == (data.judging is not None), name


@pytest.mark.table
def test_the_page_holds_every_published_number_of_its_rows(flagship):
    """Found in the tables by method, source and value; disputed ones are marked."""
    table, file = read(find(FLAGSHIP)), published.load("llava15_7b")
    labels = {row.published_name: row.title for row in table.rows} | {"full": "full"}
    heads = [column.published for column in table.columns]
    lines = [line.split(" | ") for line in flagship.splitlines() if line.startswith("| ")]
    for row in file.rows:
        if row.method in labels and any(head in row.scores for head in (*heads, published.AVERAGE)):
            title = file.sources[row.source].title
            cells = [line for line in lines if line[0] == f"| {labels[row.method]}" and title in line]
            numbers = {re.sub(r"[ |]", "", cell) for line in cells for cell in line}
            for head in heads:
                if head in row.scores:
                    text = f"{row.scores[head]:.6g}"
                    text += "" if "." in text or head in published.POINTS else ".0"
                    assert text + "?" * bool(row.reason(head)) in numbers, f"{row.method} {row.tokens} {title} {head}"


@pytest.mark.table
def test_the_page_names_sources_and_disputes(flagship):
    assert "github.com/Theia-4869/FasterVLM at f5d5f12" in flagship
    assert "re-runs with FastV's code score far higher" in flagship
    assert "ConsensusDrop | " not in flagship.partition("## 4")[2].partition("## 5")[0]
    for script in re.findall(r"bash (scripts/\S+\.sh)", flagship):
        assert (ROOT / script).is_file(), script


@pytest.mark.table
def test_a_table_without_published_values_says_so(cost):
    text = reproduce.page(replace(cost, table=cost.table.model_copy(update={"published": ""})))
    assert "No source has numbers of this model." in text and "| full, published |" in text
