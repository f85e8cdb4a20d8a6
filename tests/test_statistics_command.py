"""`vtr stats` on run folders written by hand."""

import itertools
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from eval import benchmarks, cli
from eval.answers.store import answer_id, settings_hash
from eval.metrics import Score
from eval.results.statistics import accuracy_terms, compare, terms_of
from eval.score import compare_command
from eval.statistics.answers import by_group, groups_of
from eval.statistics.command import Run, main, read_run, row_of
from llava.errors import UserError
from tests.eval_fakes import write_gqa

COUNT = 40


@pytest.fixture
def data(tmp_path):
    return write_gqa(tmp_path / "data", COUNT)


def write_run(folder, data, method, budget, wrong=(), limit=None, images=(), texts=None, records=(), **changes):
    """A finished run that answers every question right but those at the places in `wrong`.

    Args:
        images: name of an image -> its hash.
        texts: question id -> answer, in place of `wrong`.
        records: accounting of each question; none by default.
    """
    images = dict(images)
    found = benchmarks.get("gqa").load(data, "testdev")
    asked = found.questions[:limit]
    results = folder if limit is None else folder / f"limit{limit}"
    results.mkdir(parents=True)
    settings = {"benchmark": "gqa", "split": "testdev", "questions": found.questions_digest, "device": "cpu"}
    settings |= {"method": method, "config": {"budget": budget, "alpha": 0.5}}
    settings |= changes.pop("settings", {})
    rows = [
        {
            "question_id": q.id,
            "prompt": q.message,
            "text": texts[q.id] if texts else "wrong" if place in wrong else f"{q.answer.upper()}.",
            "answer_id": answer_id(settings_hash(settings), q.id),
            "metadata": {"images": images.get(q.image, f"hash-of-{q.image}")}
            | ({"accounting": records[place]} if records else {}),
        }
        for place, q in enumerate(asked)
    ]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = {
        "method": method,
        "budget": budget,
        "asked": len(asked),
        "partial": limit is not None,
        "limit": limit,
        "main": "accuracy",
        "metrics": {},
        "failed": [],
        "facts": dict(found.facts),
        "settings": settings,
        "labels": found.fingerprint,
        "config": {"retention_ratio": None},
        "accounting": {"mean_tokens_per_layer": float(budget)},
    }
    (results / "result.json").write_text(json.dumps(result | changes))
    return str(folder)


def run(data, *words, code=0):
    assert main([*words, "--data", str(data)]) == code


def test_the_table_has_every_statistic_of_every_run(data, tmp_path, capsys):
    full = write_run(tmp_path / "full", data, "full", 576, wrong={0})
    near = write_run(tmp_path / "m-64", data, "consensusdrop", 64, wrong={0, 1})
    far = write_run(tmp_path / "m-8", data, "consensusdrop", 8, wrong=set(range(10)))
    small = write_run(tmp_path / "d-64", data, "downsample", 64, wrong=set(range(20)))
    run(data, full, far, near, small, "--json", str(tmp_path / "out.json"))
    record = json.loads((tmp_path / "out.json").read_text())
    rows = {(row["method"], row["budget"]): row for row in record["rows"]}
    row = rows["consensusdrop", 64]
    assert (record["title"], record["questions"], record["full"]["mean"]) == ("GQA testdev", 40, 97.5)
    assert row["score"]["mean"] == pytest.approx(95) and row["test"]["of_full"] == pytest.approx(100 * 38 / 39)
    assert row["loyalty"]["mean"] == pytest.approx(97.5)
    assert row["loyalty_right"]["mean"] == pytest.approx(100 * 38 / 39) and row["loyalty_wrong"]["mean"] == 100
    assert (row["in_group_a"], row["in_group_b"]) == (19, 20)
    assert row["group_a"]["mean"] == pytest.approx(100 * 18 / 19) and row["group_b"]["mean"] == 100
    assert rows["consensusdrop", 8]["group_a"] is None, "no run of downsample at this budget"
    assert rows["downsample", 64]["group_a"]["mean"] == 0
    assert record["tokens_needed"]["consensusdrop"]["tokens"] is None
    printed = capsys.readouterr().out
    assert printed.startswith("GQA testdev, 40 questions, 5 images\n")
    assert "| full |  | 97.5 [" in printed and "| n/a | n/a |" in printed and "n=19 |" in printed
    assert "consensusdrop needs more than 64 tokens to keep 99 % of full (one-sided test at 5 %" in printed


def test_a_torn_last_line_and_a_damaged_result_are_no_traceback(data, tmp_path, capsys):
    """A line that a killed process had begun stopped the comparison of runs that had every answer."""
    full, method = (write_run(tmp_path / name, data, name, 64) for name in ("full", "consensusdrop"))
    with open(tmp_path / "full" / "answers.jsonl", "ab") as file:
        file.write(b'{"question_id": "1000", "te')
    run(data, full, method)
    result = json.loads((tmp_path / "full" / "result.json").read_text())
    for damaged in ([], None, {}, result | {"asked": "40"}, result | {"settings": []}, result | {"metrics": 3}):
        for content in (json.dumps(damaged), json.dumps(damaged)[:-1]):
            (tmp_path / "full" / "result.json").write_text(content)
            capsys.readouterr()
            run(data, full, method, code=2)
            assert "full/result.json" in capsys.readouterr().err
            assert compare_command([full, method, "--data", str(data)]) == 2
            assert "full/result.json" in capsys.readouterr().err


def test_the_first_questions_of_a_run_are_read_from_its_limit_folder(data, tmp_path, capsys):
    full = write_run(tmp_path / "full", data, "full", 576, limit=12)
    method = write_run(tmp_path / "m", data, "consensusdrop", 64, limit=12)
    run(data, full, f"{method}/limit12", "--share", "0.5")
    assert capsys.readouterr().out.startswith("GQA testdev, 12 questions")
    (tmp_path / "m" / "limit9").mkdir()
    (tmp_path / "m" / "limit9" / "result.json").write_text("{}")
    run(data, full, method, code=2)
    assert "several partial results" in capsys.readouterr().err


def test_methods_with_other_options_are_rows_of_their_own(data, tmp_path, capsys):
    full = write_run(tmp_path / "full", data, "full", 576)
    runs = [
        write_run(tmp_path / f"a{x}", data, "consensusdrop", 64, settings={"config": {"budget": 64, "alpha": x}})
        for x in (0, 1)
    ]
    run(data, full, *runs)
    assert "| consensusdrop alpha=0 | 64 |" in capsys.readouterr().out
    run(data, full, runs[0], runs[0], code=2)
    assert "are both consensusdrop at 64" in capsys.readouterr().err


def test_other_versions_of_libraries_are_said(data, tmp_path, capsys):
    """Runs with another torch stood side by side without a word."""
    full, *runs = (
        write_run(tmp_path / f"m{x}", data, "consensusdrop" if x else "full", 8 + x, versions={"torch": f"2.{x // 2}"})
        for x in range(3)
    )
    run(data, full, *runs)
    assert f"torch: 2.0 ({full}, {runs[0]}); 2.1 ({runs[1]})" in capsys.readouterr().out


def test_a_run_off_its_budget_is_named(data, tmp_path, capsys):
    """A method needed "64 tokens" that had kept 121."""
    full = write_run(tmp_path / "full", data, "full", 576)
    m = write_run(tmp_path / "m", data, "consensusdrop", 64, off_budget={"remark": "121.20 where 64.00 were asked."})
    run(data, full, m)
    assert f"{m} is off its budget: 121.20" in capsys.readouterr().out


def test_loyalty_is_about_the_questions_with_an_image(data):
    """Questions of text alone, which no method changes, made ScienceQA's loyalty 82.5 where it was 65.0."""
    load = benchmarks.get("gqa").load(data, "testdev")
    prose = {q.id for q in load.questions[:20]}
    load = replace(load, questions=tuple(replace(q, images=() if q.id in prose else q.images) for q in load.questions))
    texts = {q.id: q.answer for q in load.questions}
    half = {
        name: "wrong" if number % 2 and name not in prose else text for number, (name, text) in enumerate(texts.items())
    }

    def run_of(texts, method):
        score = load.score(list(texts), texts)
        stored = SimpleNamespace(texts=texts, images=dict.fromkeys(texts))
        return Run(stored, method, 64, {}, score, terms_of(score, load.labels()), score.correct)

    full, near = run_of(texts, "full"), run_of(half, "consensusdrop")
    row = row_of(near, full, run_of(half, "downsample"), load)
    assert row["loyalty"]["mean"] == 50 and row["loyalty_right"]["mean"] == 50
    assert (row["in_group_a"], row["in_group_b"]) == (10, 10)


def test_a_retention_ratio_counts_as_its_mean_of_tokens(data, tmp_path, capsys):
    full = write_run(tmp_path / "full", data, "full", 576)
    ratio = {"config": {"retention_ratio": 0.11}, "accounting": {"mean_tokens_per_layer": 63.7}}
    run(data, full, write_run(tmp_path / "m", data, "consensusdrop", 64, **ratio))
    assert "| consensusdrop | 64 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"failed": [{"question_id": "1"}]}, "1 questions have no answer in"),
        ({"main": "f1"}, "differ in main: accuracy and f1: compare equal runs."),
        ({"asked": 39}, "asked: 40 and 39"),
        ({"settings": {"dtype": "float16"}}, "dtype: absent and float16"),
        ({"settings": {"questions": "0"}}, "was asked other questions than the data folder holds"),
        ({"labels": "0"}, "was scored with other labels or question files than the data folder holds now"),
        ({"images": {"n0.jpg": "other"}}, "(11 questions: 1000, 1005, 1007, ...)"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(data, tmp_path, capsys, changes, problem):
    full = write_run(tmp_path / "full", data, "full", 576)
    run(data, full, write_run(tmp_path / "m", data, "consensusdrop", 64, **changes), code=2)
    assert problem in capsys.readouterr().err


def test_one_method_of_two_versions_is_refused(data, tmp_path, capsys):
    """Tokens needed were read off budgets that had been answered before and after the method's code changed."""
    full = write_run(tmp_path / "full", data, "full", 576)

    def at(budget, digest):
        code = {"method_code": {"consensusdrop/method.py": digest, "llava/reduction/merging.py": "same"}}
        return write_run(tmp_path / f"{budget}-{digest}", data, "consensusdrop", budget, settings=code)

    run(data, full, at(128, "old"), at(64, "old"))
    assert "no interval, consensusdrop at 64, loyalty: 5 images without spread" in capsys.readouterr().out
    run(data, full, at(192, "old"), at(64, "new"), code=2)
    assert "code of the method: consensusdrop/method.py" in capsys.readouterr().err


def test_mistakes_end_in_a_sentence(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["vtr"])
    method = write_run(tmp_path / "m", data, "consensusdrop", 64)
    for words, problem in (
        ([method, method], "The first folder should be a run of full, got one of consensusdrop"),
        ([str(tmp_path), method], "has no result.json; give the output folder of a finished run."),
        ([method, method, "--share", "99"], "--share should be a number between 0 and 1 such as 0.99, got '99'."),
    ):
        assert cli.main(["stats", *words, "--data", str(data)]) == 2
        assert problem in capsys.readouterr().err
    found = benchmarks.get("gqa").load(write_gqa(tmp_path / "other", 6), "testdev")
    with pytest.raises(UserError, match="m was asked other questions"):
        read_run(tmp_path / "m", found)
    (tmp_path / "m" / "answers.jsonl").write_text("")
    run(data, method, method, code=2)


# -- differences by group ----------------------------------------------------------------------------------------------


def typed(data, count=COUNT):
    """Every fifth question asks for a place; questions about one image are of both kinds."""
    path = data / "gqa" / "data" / "testdev_balanced_questions.json"
    questions = json.loads(path.read_text())
    for number, question in enumerate(questions.values()):
        question["types"]["detailed"] = ("side", "relate")[number % 2] if number % 5 == 0 else "color"
        question["imageId"] = f"n{number // 2}"
    path.write_text(json.dumps(questions))
    lines = data / "gqa" / "llava_gqa_testdev_balanced.jsonl"
    rows = [json.loads(line) | {"image": f"n{number // 2}.jpg"} for number, line in enumerate(lines.open())]
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data


def test_groups_are_compared_one_by_one_and_with_each_other(tmp_path, capsys):
    """B loses 10 of 40 places and 4 of 160 others, A 1 and 2: differences of 22.5 and 1.25, 21.25 apart."""
    data = typed(write_gqa(tmp_path / "data", 200, images=100))
    own = {str(1000 + n): f"n{n // 2}" for n in range(200)}
    places, others = range(0, 200, 5), [number for number in range(200) if number % 5]
    a = write_run(tmp_path / "a", data, "divprune", 64, wrong={places[0], *others[:2]})
    b = write_run(tmp_path / "b", data, "divprune", 64, wrong={*places[1:11], *others[2:6]}, settings={"seed": 1})
    words = [a, b, "--data", str(data), "--by", "detailed type=side,relate", "--json", str(tmp_path / "out.json")]
    assert compare_command(words) == 0
    record, shown = json.loads((tmp_path / "out.json").read_text()), capsys.readouterr().out
    first, second = record["groups"].values()
    assert list(record["groups"]) == ["side, relate", "the others"]
    assert (first["questions"], first["a"], first["b"], first["difference"]) == (40, 97.5, 75, 22.5)
    assert (second["questions"], second["a"], second["b"]) == (160, 98.75, 97.5)
    assert record["contrast"]["difference"] == pytest.approx(22.5 - 1.25)
    assert record["contrast"]["p"] < 0.05 < second["p"]
    lost = {places[0]}, set(places[1:11])
    single = compare(*(accuracy_terms({str(1000 + n): float(n not in wrong) for n in places}, own) for wrong in lost))
    assert first["p"] == pytest.approx(2 * single.p) and (first["low"], first["high"]) == (single.low, single.high)
    assert "| side, relate | 40 | 97.50 | 75.00 | +22.50 [" in shown and "corrected by Holm for 2 groups" in shown
    assert "A - B of side, relate minus A - B of the others  +21.25 (95 % CI +" in shown
    assert compare_command([a, b, "--data", str(data), "--by", "detailed type"]) == 0
    shown = capsys.readouterr().out
    assert [line.split(" |")[0] for line in shown.splitlines() if line.startswith("| ")][1:] == [
        "| color",
        "| relate",
        "| side",
    ]
    assert "A - B of" not in shown


def test_the_difference_between_groups_by_definition():
    """All 2^9 exchanges of the answers about an image, with the standard error of the delta method in each."""
    rng = np.random.default_rng(1)
    images = {str(number): f"image {number % 9}" for number in range(60)}
    groups = {"places": [n for n in images if int(n) % 4 == 0], "the others": [n for n in images if int(n) % 4]}
    a, b = ({n: float(rng.random() < share) for n in images} for share in (0.8, 0.5))

    def measured(a, b):
        """The difference of the differences, and its standard error."""
        total, shares = 0.0, dict.fromkeys(images.values(), 0.0)
        for run, sign in ((a, 1), (b, -1)):
            for ids, side in zip(groups.values(), (1, -1), strict=True):
                mean = sum(run[n] for n in ids) / len(ids)
                total += sign * side * 100 * mean
                for n in ids:
                    shares[images[n]] += sign * side * 100 * (run[n] - mean) / len(ids)
        values = np.array([*shares.values()])
        return total, np.sqrt(((values - values.mean()) ** 2).sum() * 9 / 8)

    statistics = []
    for flips in itertools.product((False, True), repeat=9):
        change = {f"image {number}": flip for number, flip in enumerate(flips)}
        swapped = [{n: (other if change[images[n]] else run)[n] for n in images} for run, other in ((a, b), (b, a))]
        difference, error = measured(*swapped)
        statistics.append(abs(difference) / error)
    observed, _ = measured(a, b)
    _, contrast = by_group(Score({}, {}, a), Score({}, {}, b), groups, images)
    assert contrast is not None and contrast.difference == pytest.approx(observed)
    p = np.mean([value >= statistics[0] * (1 - 1e-6) for value in statistics])
    assert contrast.p == pytest.approx(p) and 0.01 < p < 0.9
    assert contrast.low is None and "9 images" in contrast.note


@pytest.mark.parametrize(
    ("by", "said"),
    [
        ("detailed", "Unknown breakdown 'detailed'. Did you mean 'detailed type'?"),
        ("detailed type=sides", "Unknown group of detailed type 'sides'. Did you mean 'side'?"),
        ("detailed type=", "Unknown group of detailed type ''"),
    ],
)
def test_an_unknown_group_is_named(tmp_path, capsys, by, said):
    data = typed(write_gqa(tmp_path / "data", COUNT, images=20))
    folders = [write_run(tmp_path / name, data, "divprune", 64) for name in "ab"]
    assert compare_command([*folders, "--data", str(data), "--by", by]) == 2
    assert said in capsys.readouterr().err


def test_a_benchmark_without_groups_says_so():
    with pytest.raises(UserError, match="RefCOCO val has no breakdown into groups of questions; leave out --by"):
        groups_of(Score({}, {}, {"1": 1.0}), "type", "RefCOCO val")


def test_a_question_of_several_groups_counts_in_each():
    score = Score({}, {}, {"1": 1.0, "2": 0.0}, kinds={"type": {"1": ["a", "b"], "2": "b", "not asked": "c"}})
    assert groups_of(score, "type", "") == {"a": ["1"], "b": ["1", "2"]}
    assert groups_of(score, "type=a", "") == {"a": ["1"], "the others": ["2"]}
