"""Published scores: the files are sound, values are found by trust, and `vtr tables reproduce` shows them."""

import re
from collections import Counter
from dataclasses import replace

import pytest
import yaml

from eval import benchmarks
from eval.benchmarks import textvqa, vizwiz, vqav2
from eval.benchmarks.mmvet import COUNT as MMVET
from eval.config import ROOT
from eval.papers import published
from eval.papers.published import AVERAGE, BENCHMARKS, POINTS, load, models
from eval.papers.reported import title_of
from eval.papers.spec import find, read
from lab.pages import expense, reproduce
from lab.pages.memory import expected
from llava.errors import UserError
from llava.reduction.registry import names

RANGES = {"mme": (500, 2000), "mme_sum": (900, 2800), AVERAGE: (45, 105), "tflops": (0.1, 60), "latency_ms": (50, 1000)}
FLAGSHIP = "consensusdrop/llava15_7b"
TOY = ROOT / "assets" / "eval"


def rows():
    return [(load(name), row) for name in models() for row in load(name).rows]


def computed_average(file, row):
    """The average in percent that follows from a row's benchmarks and from the full model in the same source; None
    where the source does not have all benchmarks of its average, or no full model."""
    rule = file.sources[row.source].average_of
    full = next((other for other in file.rows if other.method == "full" and other.source == row.source), None)
    if rule is None or full is None:
        return None
    columns = [column for column in BENCHMARKS if column in row.scores]
    if rule == "ratios":
        return sum(100 * row.scores[column] / full.scores[column] for column in columns) / len(columns)
    # FSR adds MME's points to percentages as points / 20; every row of its four tables follows from that.
    sums = [sum(one.scores[c] / (20 if c in POINTS else 1) for c in columns) for one in (row, full)]
    return 100 * sums[0] / sums[1]


def refused(tmp_path, monkeypatch, text):
    """The message with which a file of this text is refused."""
    (tmp_path / "model.yaml").write_text(text)
    monkeypatch.setattr(published, "FOLDER", tmp_path)
    load.cache_clear()
    with pytest.raises(UserError) as error:
        load("model")
    load.cache_clear()
    return str(error.value)


def test_every_file_is_read():
    """Its methods are registered or listed; ConsensusDrop's tables are not available, as the comment of a file says."""
    assert len(models()) == 7 and all(load(name).rows for name in models())
    methods = {part for _, row in rows() for part in row.method.split("+")}  # of compositions, both
    known = {*names(), *published.OTHER_METHODS} - {"consensusdrop"}
    assert set(published.OTHER_METHODS) <= methods <= known
    assert not set(published.OTHER_METHODS) & set(names())
    for name in models():
        assert {row.source for row in load(name).rows} == set(load(name).sources)
        assert "ConsensusDrop's paper are not available" in (published.FOLDER / f"{name}.yaml").read_text()


def test_values_are_in_range_and_notes_of_others_never_trusted():
    for file, row in rows():
        for column, value in row.scores.items():
            low, high = RANGES.get(column, (1, 100))
            assert low <= value <= high, f"{file.name} {row.method} {row.tokens} {row.source} {column} {value}"
        about = file.value(row, next(iter(row.scores)))
        assert about.trust == "low" or about.kind != "secondary"
        assert about.trust != "high" or about.kind in ("authors", "rerun")


def test_printed_averages_follow_from_the_columns():
    """A misread digit of one benchmark moves the average of its row. A source that is added changes no other count."""
    agree: Counter[str] = Counter()
    for file, row in rows():
        computed = computed_average(file, row)
        if computed is None or AVERAGE not in row.scores or row.method == "full":
            continue
        fits = abs(computed - row.scores[AVERAGE]) <= 0.1
        assert fits or row.reason(AVERAGE), f"{file.name} {row.method} {row.tokens} {row.source} {computed:.2f}"
        agree[row.source] += fits
    known = {"adav": 25, "fastervlm": 46, "fsr": 71, "trio": 26}
    assert {source: agree[source] for source in known} == known


def test_values_are_sorted_by_trust_then_by_file():
    values = load("llava15_7b").values("fastv", 192, "gqa")
    assert [(value.source, value.trust, value.value) for value in values] == [
        ("restore", "high", 57.1),
        ("trio", "medium", 52.7),
        ("fsr", "medium", 52.7),
        ("sparsevlm", "medium", 52.7),
        ("visiondrop_notes", "low", 52.62),
    ]
    assert "re-runs" in values[1].disputed and values[0].disputed is None


def test_budgets_within_one_percent_are_one_budget_and_shares_those_of_qwen():
    file = load("llava_next_7b")
    assert file.values("fastervlm", 288, "gqa") == file.values("fastervlm", 290, "gqa") != []
    assert file.values("fastervlm", 300, "gqa") == []
    file = load("qwen25_vl_7b")
    assert [value.value for value in file.values("fastv", "1/10", AVERAGE)] == [78.3, 68.07]
    assert file.values("fastv", "10/100", AVERAGE) == file.values("fastv", "1/10", AVERAGE)
    assert "80 %" in file.values("fastv", "1/2", "gqa")[0].disputed


def test_errors_name_what_is_there():
    with pytest.raises(UserError, match="llava15_7b"):
        load("llava15")
    with pytest.raises(UserError, match="gqa"):
        load("llava15_7b").values("fastv", 64, "gqaa")
    with pytest.raises(UserError, match="1/5"):
        load("llava15_7b").values("fastv", "some", "gqa")


@pytest.mark.parametrize(
    ("name", "column", "value", "why"),
    [
        ("llava15_7b", "scienceqa", 66.8, "disputed"),
        ("llava15_7b", "mmbench", 66.31, "of test, graded by a server, ours of dev"),
        ("llava_next_7b", "textvqa", 64.9, "disputed"),
        ("llava_next_34b", "textvqa", 69.5, "of val, no OCR tokens in the prompt"),
        ("video_llava_7b", "tgif_qa", 19.8, "disputed"),
        ("video_llava_7b", "tgif_qa", 70.0, "disputed"),
        ("video_llava_7b", "msvd_qa", 70.5, "of the first 1,000 questions"),
        ("llava_next_7b", "gqa", 64.2, "another convention (tiles as LLaVA-NeXT was released"),
    ],
)
def test_values_of_another_split_or_convention_are_known_as_such(name, column, value, why):
    """The gate passed a baseline that was near any of these."""
    convention = {"llava_next_34b": "tiles", "video_llava_7b": "frames", "llava15_7b": "square"}.get(name, "2880")
    found = [one for one in load(name).full(column) if one.value == value]
    assert found and all(one.obstacle(convention).startswith(why) for one in found)


def test_a_users_own_source_changes_nothing_but_what_is_shown(tmp_path, monkeypatch):
    """A source of one's own became the reference where it stood first."""
    own = {**SOURCE["a"], "kind": "ours", "trust": "high"}
    content = {"model": "M", "sources": {"mine": own, **SOURCE}, "rows": [{**ROW, "source": "mine", "gqa": 99.0}, ROW]}
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.setattr(published, "FOLDER", tmp_path)
    load.cache_clear()
    found = load("model")
    load.cache_clear()
    assert [value.source for value in found.values("fastv", 64, "gqa")] == ["a", "mine"], "shown last, trusted or not"
    assert [value.obstacle("square") for value in found.values("fastv", 64, "gqa")] == ["", "a user's own number"]


SOURCE = {
    "a": {"title": "A", "where": "there", "kind": "copied", "trust": "medium", "convention": "square", "split": "usual"}
}
ROW = {"method": "fastv", "tokens": 64, "source": "a", "gqa": 50.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": [{**ROW, "gqq": 1.0}]}, "Unknown key or column 'gqq'. Did you mean 'gqa'? Available: activitynet_qa"),
        ({"rows": [ROW, {**ROW, "gqa": 601.0}]}, "row 2, fastv at 64 tokens of a: gqa must be 0 to 100, got 601"),
        ({"rows": [{**ROW, "mme": 2001.0}]}, "mme must be 0 to 2000, got 2001"),
        ({"rows": [{**ROW, "gqa": float("nan")}]}, "gqa must be 0 to 100, got nan"),
        ({"rows": [{**ROW, "method": "maxmi"}]}, "Unknown method of row 1 'maxmi'"),
        ({"rows": [{**ROW, "method": "fastvv"}]}, "Did you mean 'fastv'"),
        ({"rows": [{**ROW, "source": "b"}]}, "source b, which is not listed"),
        ({"rows": [ROW, ROW]}, "two rows of fastv at 64 tokens"),
        ({"rows": [{**ROW, "gqa": "50"}]}, "should be a valid number"),
        ({"rows": [{**ROW, "gqa": True}]}, "should be a valid number"),
        ({"rows": [{**ROW, "tokens": "few"}]}, "fraction"),
        ({"rows": [{key: ROW[key] for key in ("method", "tokens", "source")}]}, "has no column"),
        ({"rows": [{**ROW, "disputed": {"pope": "why"}}]}, "pope, which the row does not have"),
        ({"sources": {"a": {**SOURCE["a"], "trust": "some"}}}, "trust"),
        ({"sources": {"a": {k: v for k, v in SOURCE["a"].items() if k != "convention"}}}, "convention"),
        ({"sources": {"a": {k: v for k, v in SOURCE["a"].items() if k != "split"}}}, "split"),
        ({"sources": {"a": {**SOURCE["a"], "split": {"popee": "all"}}}}, "popee, which is no benchmark's column"),
        ({"extra": 1}, "extra"),
    ],
)
def test_bad_files_are_refused(tmp_path, monkeypatch, change, message):
    content = {"model": "M", "sources": SOURCE, "rows": [ROW]} | change
    assert message in refused(tmp_path, monkeypatch, yaml.safe_dump(content))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model: [", "is no YAML file that can be read"),
        ("[" * 5000, "nested deeper"),  # was a RecursionError
        # The last one won, without a word: a table's numbers were those of the second row of a copied pair.
        ("model: M\nrows:\n- method: fastv\n  gqa: 50.0\n  gqa: 51.0\n", "line 5 gives 'gqa' a second time; leave one"),
    ],
)
def test_files_that_cannot_be_read_are_refused_with_the_place(tmp_path, monkeypatch, text, sentence):
    said = refused(tmp_path, monkeypatch, text)
    assert said.startswith(f"{tmp_path / 'model.yaml'} ") and sentence in said


def test_every_yaml_file_is_read_by_the_one_that_refuses_double_keys():
    """Other readers of YAML in the project keep the last value of a key."""
    files = [path for folder in ("eval", "llava", "toy") for path in (ROOT / folder).rglob("*.py")]
    assert [path.name for path in files if re.search(r"\byaml\.\w*load", path.read_text())] == ["yaml_files.py"]


# -- vtr tables reproduce --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def costs():
    return reproduce.all_costs()


@pytest.fixture(scope="module")
def cost(costs):
    return next(cost for cost in costs if cost.table.identity == FLAGSHIP)


@pytest.fixture(scope="module")
def flagship(cost):
    return reproduce.page(cost)


@pytest.mark.lab
@pytest.mark.table
def test_costs_of_tables_are_those_of_the_page(costs, cost):
    """`vtr tables reproduce` writes them again; all tables take a minute."""
    lines = reproduce.index([cost, next(one for one in costs if "next" in one.table.name)]).splitlines()
    assert set(lines) <= set(reproduce.INDEX.read_text().splitlines())


@pytest.mark.lab
@pytest.mark.table
def test_the_page_links_to_files_that_exist(flagship):
    """It named a file that had moved; the pages are generated, so tests/test_pages.py sees none of them."""
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", flagship)
    assert links and not [link for link in links if not (reproduce.FOLDER / link).resolve().exists()]


@pytest.mark.lab
def test_sizes_from_shapes_are_those_of_the_modules():
    checked = 0
    for name, entry in expense.downloads().checkpoints.items():
        if entry.shapes:
            size = expected(entry.shapes).weights.total / 1e9
            tower = 0.6 if name.startswith("liuhaotian/llava-v1.5") else 0.0  # in a repository of its own
            assert entry.gb == pytest.approx(size - tower, rel=0.03), name  # configuration files and rounding
            checked += 1
    assert checked == 7


@pytest.mark.lab
def test_numbers_of_questions_are_those_of_the_benchmarks():
    loads = expense.downloads().benchmarks
    assert set(loads) <= set(benchmarks.names())
    assert loads["vqav2"].questions == vqav2.PUBLISHED_SIZES["testdev"]
    assert loads["vizwiz"].questions == vizwiz.PUBLISHED_SIZES["test"]
    assert loads["textvqa"].questions == textvqa.PUBLISHED_SIZE
    assert loads["mmvet"].questions == MMVET


@pytest.mark.lab
@pytest.mark.table
def test_a_table_takes_the_sum_of_its_runs_and_none_where_the_model_does_not_fit(cost):
    gpu, seconds = expense.GPUS[1], 0.0
    for one in cost.loads.values():
        batches = -(-one.questions // cost.table.real.batch_size)
        estimates = (cost.estimate(line, one.text, one.steps) for line in cost.runnable)
        seconds += sum(batches * replace(batch, rates=gpu.rates).seconds["batch"] for batch in estimates)
    assert cost.gpu_hours(gpu) == pytest.approx(seconds / 3600)
    assert cost.cells == len(cost.runnable) * len(cost.table.columns)
    assert reproduce.hours(cost, replace(gpu, memory=1e9)) == ("n/a", "n/a")


@pytest.mark.lab
def test_published_numbers_are_printed_as_in_papers():
    """With a decimal, but for MME's points."""
    told = [(61.9, "gqa"), (62.0, "gqa"), (1862.0, "mme"), (1862.5, "mme"), (100.0, "relative_mean")]
    assert [reproduce.number(*one) for one in told] == ["61.9", "62.0", "1862", "1862.5", "100.0"]


@pytest.mark.lab
def test_judged_and_server_graded_benchmarks_are_named(costs):
    """A table without a judge, or on a split of a server, holds no published metric."""
    for name in sorted({name for cost in costs for name in cost.loads}):
        benchmark = benchmarks.get(name)
        assert (name in reproduce.SERVER) == ("from a server" in benchmark.summary), name
        data = benchmark.load(TOY, benchmarks.check_split(benchmark, None, TOY))
        assert (name in reproduce.JUDGED) == (data.judging is not None), name


@pytest.mark.lab
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


@pytest.mark.lab
@pytest.mark.table
def test_the_page_names_sources_and_disputes(flagship):
    assert "github.com/Theia-4869/FasterVLM at f5d5f12" in flagship
    assert "re-runs with FastV's code score far higher" in flagship
    assert "ConsensusDrop | " not in flagship.partition("## 4")[2].partition("## 5")[0]
    for script in re.findall(r"bash (scripts/\S+\.sh)", flagship):
        assert (ROOT / script).is_file(), script


def test_rows_of_a_composition_have_both_names(tmp_path, monkeypatch):
    """RESTORE's rows are of other methods with its merging behind them."""
    assert title_of("holov+restore").startswith("HoloV+RESTORE")
    found = load("llava15_7b").values("holov+restore", 64, "gqa")
    assert [(one.value, one.kind, one.trust) for one in found] == [(59.0, "authors", "high")]
    content = {"model": "M", "sources": SOURCE, "rows": [{**ROW, "method": "fastv+maxmi"}]}
    assert "Unknown method of row 1 'fastv+maxmi'" in refused(tmp_path, monkeypatch, yaml.safe_dump(content))
