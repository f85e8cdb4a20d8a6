"""Intervals and paired tests of numbers that are functions of sums, and the comparison of two answer files."""

import dataclasses
import json

import numpy as np
import pytest

from eval import compare
from eval.metrics import Terms, ratio_terms
from eval.results.statistics import bootstrap, compare_terms, interval_of
from llava.errors import UserError
from tests.eval_fakes import fake_text, write_gqa


def f1_terms(rng, count: int = 200) -> Terms:
    """(true positives, predicted, actual) of yes/no questions, four to a picture; F1 is no mean of anything."""
    actual = rng.random(count) < 0.5
    said = np.where(rng.random(count) < 0.8, actual, ~actual)
    sums = np.stack([actual & said, said, actual], 1).astype(float)
    names = tuple(map(str, range(count)))
    return Terms(
        "question",
        names,
        tuple(str(i // 4) for i in range(count)),
        sums,
        lambda s: 200 * s[..., 0] / (s[..., 1] + s[..., 2]),
    )


def test_a_mean_has_the_interval_of_the_plain_bootstrap():
    credits = {str(i): float(i % 3 == 0) for i in range(400)}
    ours, plain = interval_of(ratio_terms(credits)), bootstrap([100 * value for value in credits.values()])
    assert ours.mean == pytest.approx(plain.mean)
    assert ours.low == pytest.approx(plain.low, abs=0.6) and ours.high == pytest.approx(plain.high, abs=0.6)


def test_interval_of_f1_is_that_of_drawing_pictures_by_hand():
    terms = f1_terms(np.random.default_rng(0))
    draw, values = np.random.default_rng(1), []
    for _ in range(3000):
        rows = (draw.integers(50, size=50)[:, None] * 4 + np.arange(4)).ravel()
        true, said, actual = terms.sums[rows].sum(0)
        values.append(200 * true / (said + actual))
    found = interval_of(terms)
    assert found.low == pytest.approx(np.quantile(values, 0.025), abs=0.5)
    assert found.high == pytest.approx(np.quantile(values, 0.975), abs=0.5)
    alone = interval_of(dataclasses.replace(terms, clusters=terms.names))
    assert alone.mean == found.mean


def test_paired_test_finds_a_difference_that_unpaired_intervals_hide():
    rng = np.random.default_rng(3)
    a = {str(i): float(rng.random() < 0.5) for i in range(400)}
    better = dict(a)
    for name in [name for name, credit in a.items() if not credit][:12]:
        better[name] = 1.0
    found = compare_terms(ratio_terms(better), ratio_terms(a))
    assert found.difference == pytest.approx(3) and found.p < 0.01 and found.low > 0
    assert interval_of(ratio_terms(better)).low < interval_of(ratio_terms(a)).high


def test_equal_files_do_not_differ():
    terms = f1_terms(np.random.default_rng(5))
    found = compare_terms(terms, terms)
    assert found.difference == found.low == found.high == 0 and found.p == 1


def test_null_p_values_are_not_small_too_often():
    """Two equally good noisy answerers: p below 0.1 in about a tenth of the trials, not in a third."""
    small = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        a, b = ({str(i): float(rng.random() < 0.6) for i in range(120)} for _ in range(2))
        small += compare_terms(ratio_terms(a), ratio_terms(b), resamples=500).p < 0.1
    assert small <= 14


def test_other_units_are_refused():
    with pytest.raises(UserError, match="same questions"):
        compare_terms(ratio_terms({"a": 1.0}), ratio_terms({"b": 1.0}))


@pytest.fixture
def files(tmp_path):
    data = write_gqa(tmp_path / "data")
    records = json.loads((data / "gqa" / "data" / "testdev_balanced_questions.json").read_text())

    def write(name: str, right: int) -> str:
        path = tmp_path / name
        rows = [
            {"question_id": key, "text": records[key]["answer"] if number < right else "wrong"}
            for number, key in enumerate(records)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return data, write


def test_command_compares_two_files(files, tmp_path, capsys):
    data, write = files
    out = tmp_path / "out.json"
    arguments = [write("a", 40), write("b", 20), "--benchmark", "gqa", "--data", str(data), "--json", str(out)]
    assert compare.main(arguments) == 0
    record, text = json.loads(out.read_text()), capsys.readouterr().out
    assert record["difference"] == 50 and record["p"] < 0.1 and record["low"] > 0
    assert "A - B  +50.00" in text and "GQA testdev, accuracy over 40 questions" in text


def test_command_compares_what_both_answer_only_when_told(files, tmp_path, capsys):
    data, write = files
    short = tmp_path / "short"
    short.write_text(json.dumps({"question_id": "1000", "text": fake_text("1000")}) + "\n")
    arguments = [write("a", 40), str(short), "--benchmark", "gqa", "--data", str(data)]
    assert compare.main(arguments) == 2 and "39 questions without a prediction" in capsys.readouterr().err
    assert compare.main([*arguments, "--partial"]) == 0
    assert "compared on 1 of 40 questions" in capsys.readouterr().out


def test_command_needs_a_benchmark_for_bare_files(files, capsys):
    _, write = files
    assert compare.main([write("a", 1), write("b", 2)]) == 2
    assert "--benchmark is missing" in capsys.readouterr().err
