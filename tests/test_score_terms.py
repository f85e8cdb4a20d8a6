"""The comparison of two answer files, and p-values where nothing differs."""

import json

import numpy as np
import pytest
from PIL import Image

from eval import score
from eval.config import RunConfig
from eval.metrics import ratio_terms
from eval.results.statistics import compare as compare_terms
from eval.run import run
from tests.eval_fakes import FakeLlava, FakeReducer, fake_text, write_gqa


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
    assert score.compare_command(arguments) == 0
    record, text = json.loads(out.read_text()), capsys.readouterr().out
    assert record["difference"] == 50 and record["p"] == 2 / 2**7 and record["low"] > 0 and record["drawn"] == "image"
    assert "A - B  +50.00 (95 % CI +45" in text and "GQA testdev, accuracy over 40 questions" in text
    assert "p  0.0156, paired permutation test by image: significant at 5 %" in text


def test_command_says_why_there_is_no_interval(files, capsys):
    data, write = files
    name = write("a", 30)
    assert score.compare_command([name, name, "--benchmark", "gqa", "--data", str(data)]) == 0
    shown = capsys.readouterr().out
    assert "A - B  +0.00 (95 % CI n/a: the difference is the same for every image)" in shown
    assert "p  1.0000, paired permutation test by image: not significant at 5 %" in shown


def test_command_compares_what_both_answer_only_when_told(files, tmp_path, capsys):
    data, write = files
    short = tmp_path / "short"
    short.write_text(json.dumps({"question_id": "1000", "text": fake_text("1000")}) + "\n")
    arguments = [write("a", 40), str(short), "--benchmark", "gqa", "--data", str(data)]
    assert score.compare_command(arguments) == 2 and "39 questions without a prediction" in capsys.readouterr().err
    assert score.compare_command([*arguments, "--partial"]) == 0
    assert "compared on 1 of 40 questions" in capsys.readouterr().out


def test_command_needs_a_benchmark_for_bare_files(files, capsys):
    _, write = files
    assert score.compare_command([write("a", 1), write("b", 2)]) == 2
    assert "--benchmark is missing" in capsys.readouterr().err


# -- output folders of runs ----------------------------------------------------------------------------------------


def run_in(data, output, alpha=0.5, model=None, **changes) -> str:
    """The folder of a finished run of the stand-in model."""
    config = RunConfig(method="first", budget=16, data=data, output=output, batch_size=8, wandb="disabled", **changes)
    run(config, model or FakeLlava(), FakeReducer(alpha=alpha))
    return str(output)


def other_data(folder, change: str):
    """The questions of `write_gqa` with other images, labels or words."""
    data = write_gqa(folder / change)
    if change == "images":
        Image.effect_noise((32, 32), 90).convert("RGB").save(data / "gqa" / "data" / "images" / "n3.jpg")
    elif change == "labels":
        path = data / "gqa" / "data" / "testdev_balanced_questions.json"
        path.write_text(path.read_text().replace('"answer": "', '"answer": "not '))
    elif change == "questions":
        path = data / "gqa" / "llava_gqa_testdev_balanced.jsonl"
        path.write_text(path.read_text().replace("Is thing 30", "Was thing 30"))
    return data


def test_a_folder_without_a_run_is_one_sentence(tmp_path, capsys):
    """`vtr compare results results` said that --benchmark is missing."""
    assert score.compare_command([str(tmp_path), str(tmp_path)]) == 2
    assert f"{tmp_path} holds no run; give the folder that `vtr eval` printed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("images", "were asked about other images (6 questions: 1003, 1010, 1017, ...)"),
        ("labels", "they differ in labels: "),
        ("questions", "they differ in labels: "),
        ("model", "they differ in model_files: 0123abcd and ffff."),
        ("float16", "they differ in dtype: float32 and float16."),
        ("lmms", "they differ in max_new_tokens: 128 and 16; profile: absent and lmms"),
    ],
)
def test_runs_that_differ_in_more_than_the_method_are_not_compared(tmp_path, capsys, change, named):
    """Other images, labels or a whole other data folder gave "+100.00, p 0.0000"; two profiles gave a traceback."""
    data, model, options = write_gqa(tmp_path / "data"), FakeLlava(), {}
    second = other_data(tmp_path, change) if change in ("images", "labels", "questions") else data
    if change == "model":
        model.fingerprint = "ffff"
    elif change in ("float16", "lmms"):
        options = {"dtype": change} if change == "float16" else {"profile": change}
    a, b = run_in(data, tmp_path / "a"), run_in(second, tmp_path / "b", 0.7, model, **options)
    capsys.readouterr()
    assert score.compare_command([a, b, "--data", str(data)]) == 2
    assert named in capsys.readouterr().err
    files = [f"{folder}/answers.jsonl" for folder in (a, b)]
    code = score.compare_command([*files, "--benchmark", "gqa", "--data", str(data), "--partial"])
    shown = capsys.readouterr()
    if change == "images":
        assert code == 2 and "were asked about other images" in shown.err
    elif change != "questions":
        assert code == 0 and "note: A: an answer file: its model, code and options were not compared" in shown.out


def test_changed_labels_are_said_and_scored_anew(tmp_path, capsys):
    """The labels changed after both runs: the stored answers hold, the stored scores do not."""
    data = write_gqa(tmp_path / "data")
    folders = [run_in(data, tmp_path / name, alpha) for name, alpha in (("a", 0.5), ("b", 0.7))]
    path = data / "gqa" / "data" / "testdev_balanced_questions.json"
    path.write_text(path.read_text().replace('"answer": "', '"answer": "not '))
    assert score.compare_command([*folders, "--data", str(data)]) == 2
    assert "was scored with other labels or question files than the data folder holds now" in capsys.readouterr().err
    model = FakeLlava()
    for name, alpha in (("a", 0.5), ("b", 0.7)):
        run_in(data, tmp_path / name, alpha, model)
    assert model.asked == [] and json.loads((tmp_path / "a" / "result.json").read_text())["metrics"]["accuracy"] == 0
    capsys.readouterr()
    assert score.compare_command([*folders, "--data", str(data)]) == 0
    assert "A  0.00 %" in capsys.readouterr().out


def test_folders_of_a_limit_are_compared_on_its_questions(tmp_path, capsys):
    """`vtr eval --limit 12` prints the folder limit12, and with it "--benchmark is missing"."""
    data = write_gqa(tmp_path / "data")
    a, b = run_in(data, tmp_path / "a", limit=12), run_in(data, tmp_path / "b", 0.7)
    for first in (f"{a}/limit12", a):
        assert score.compare_command([first, b, "--data", str(data)]) == 0
        shown = capsys.readouterr().out
        assert "accuracy over 12 questions" in shown and "note: compared on 12 of 40 questions" in shown
    assert score.compare_command([a, f"{tmp_path}/c", "--data", str(data)]) == 2
    assert f"There is no file or folder {tmp_path}/c" in capsys.readouterr().err
