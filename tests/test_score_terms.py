"""The comparison of two answer files, and p-values where nothing differs."""

import json

import numpy as np
import pytest

from eval import compare
from eval.metrics import ratio_terms
from eval.results.statistics import compare as compare_terms
from tests.eval_fakes import fake_text, write_gqa


def test_null_p_values_are_not_small_too_often():
    """Two equally good noisy answerers: p below 0.1 in about a tenth of the trials, not in a third."""
    small = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        a, b = ({str(i): float(rng.random() < 0.6) for i in range(120)} for _ in range(2))
        small += compare_terms(ratio_terms(a), ratio_terms(b), resamples=500).p < 0.1
    assert small <= 14


@pytest.fixture
def files(tmp_path):
    data = write_gqa(tmp_path / "data", images=7)
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
    assert record["difference"] == 50 and record["p"] == 2 / 2**7 and record["low"] > 0 and record["drawn"] == "image"
    assert "A - B  +50.00 (95 % CI +45" in text and "GQA testdev, accuracy over 40 questions" in text
    assert "p  0.0156, paired permutation test by image: significant at 5 %" in text


def test_command_says_why_there_is_no_interval(files, capsys):
    data, write = files
    name = write("a", 30)
    assert compare.main([name, name, "--benchmark", "gqa", "--data", str(data)]) == 0
    shown = capsys.readouterr().out
    assert "A - B  +0.00 (95 % CI n/a: the difference is the same for every image)" in shown
    assert "p  1.0000, paired permutation test by image: not significant at 5 %" in shown


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
