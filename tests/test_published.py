"""Published scores: the files are sound, and values are found by trust."""

import re
from collections import Counter

import pytest
import yaml

from eval import benchmarks
from eval.config import ROOT
from eval.papers import published
from eval.papers.published import AVERAGE, BENCHMARKS, POINTS, load, models
from llava.errors import UserError
from llava.reduction.registry import names

RANGES = {"mme": (500, 2000), "mme_sum": (900, 2800), AVERAGE: (45, 105), "tflops": (0.1, 60), "latency_ms": (50, 1000)}
ROUNDING = 0.1


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
    methods = {row.method for _, row in rows()}
    assert set(published.OTHER_METHODS) <= methods <= {*names(), *published.OTHER_METHODS} - {"consensusdrop"}
    assert not set(published.OTHER_METHODS) & set(names())
    for name in models():
        assert "ConsensusDrop's paper are not available" in (published.FOLDER / f"{name}.yaml").read_text()


def test_values_are_in_range():
    for file, row in rows():
        for column, value in row.scores.items():
            low, high = RANGES.get(column, (1, 100))
            assert low <= value <= high, f"{file.name} {row.method} {row.tokens} {row.source} {column} {value}"


def test_every_source_is_used_and_says_where():
    for name in models():
        file = load(name)
        assert {row.source for row in file.rows} == set(file.sources)
        assert all(source.where for source in file.sources.values())


def test_notes_of_others_are_never_trusted():
    for file, row in rows():
        value = file.value(row, next(iter(row.scores)))
        assert value.trust == "low" or value.kind != "secondary"
        assert value.trust != "high" or value.kind in ("authors", "rerun")


def test_printed_averages_follow_from_the_columns():
    """A misread digit of one benchmark moves the average of its row. A source that is added changes no other count."""
    agree: Counter[str] = Counter()
    for file, row in rows():
        computed = computed_average(file, row)
        if computed is None or AVERAGE not in row.scores or row.method == "full":
            continue
        fits = abs(computed - row.scores[AVERAGE]) <= ROUNDING
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


def test_budgets_within_one_percent_are_one_budget():
    file = load("llava_next_7b")
    assert file.values("fastervlm", 288, "gqa") == file.values("fastervlm", 290, "gqa") != []
    assert file.values("fastervlm", 300, "gqa") == []


def test_shares_are_budgets_of_qwen():
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


def test_no_benchmark_quotes_a_number_from_memory():
    """Ten did; what no source was found for is gone."""
    for name in benchmarks.names():
        benchmark = benchmarks.get(name)
        assert "memory" not in benchmark.published_by and "†" not in benchmark.published, name
        assert bool(benchmark.published) == bool(benchmark.published_by), name


SOURCE = {
    "a": {"title": "A", "where": "there", "kind": "copied", "trust": "low", "convention": "square", "split": "usual"}
}
ROW = {"method": "fastv", "tokens": 64, "source": "a", "gqa": 50.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": [{**ROW, "gqq": 1.0}]}, "gqq"),
        ({"rows": [{**ROW, "source": "b"}]}, "which is not listed"),
        ({"rows": [ROW, ROW]}, "two rows of fastv at 64 tokens"),
        ({"rows": [{**ROW, "gqa": "50"}]}, "expected a number"),
        ({"rows": [{**ROW, "gqa": True}]}, "expected a number"),
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
        ("[" * 5000, "is nested deeper than any file of this project"),  # was a RecursionError
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
    assert [path.name for path in files if re.search(r"\byaml\.\w*load", path.read_text())] == ["__init__.py"]
