"""`vtr eval` with several runs in a call, and over ranks that hold one model: the files of single runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from eval import sweep as sweep_module
from eval.__main__ import main
from eval.config import ROOT
from eval.parallel.ranks import Rank
from tests.eval_fakes import write_gqa

pytestmark = pytest.mark.process

LISTS = ("--benchmark", "gqa,pope", "--method", "fastervlm,full", "--budget", "8,1/4")


def evaluate(folder, patch, tiny_path, *words: str, ranks: str = "") -> int:
    """The command line in a folder of its own."""
    folder.mkdir(exist_ok=True)
    patch.chdir(folder)
    patch.setenv("RANKS", ranks)
    common = ["--limit", "6", "--max-new-tokens", "3", "--wandb", "disabled", "--device", "cpu"]
    return main([*words, "--model", str(tiny_path), *common])


def stores(folder) -> dict[str, tuple[str, str]]:
    """Folder of a run -> its answers and its settings."""
    found = sorted((folder / "results").rglob("answers.jsonl"))
    read = {path.parent: (path.read_text(), path.with_name("settings.json").read_text()) for path in found}
    return {str(path.relative_to(folder)): texts for path, texts in read.items()}


@pytest.fixture(scope="module")
def single(tiny_path, tmp_path_factory):
    """The stores of six single runs."""
    folder = tmp_path_factory.mktemp("single")
    with pytest.MonkeyPatch.context() as patch:
        for benchmark in ("gqa", "pope"):
            for words in (["full"], ["fastervlm", "--budget", "8"], ["fastervlm", "--budget", "1/4"]):
                assert not evaluate(folder, patch, tiny_path, "--benchmark", benchmark, "--method", *words)
    return stores(folder)


@pytest.mark.parametrize("ranks", ["", "2"])
def test_lists_write_the_stores_of_single_runs(single, tiny_path, tmp_path, monkeypatch, capfd, ranks):
    """One call took one benchmark, one method and one budget; the model was loaded anew for each.

    Here a rank works inside this process; tests/test_paper_tables.py starts several.
    """
    monkeypatch.setattr(sweep_module, "launch", lambda module, words, *_: sweep_module.main(words))
    monkeypatch.setattr("eval.parallel.ranks.current", Rank)
    loaded, real = [], sweep_module.load_model
    monkeypatch.setattr(sweep_module, "load_model", lambda config: loaded.append(config.model) or real(config))
    assert evaluate(tmp_path, monkeypatch, tiny_path, *LISTS, ranks=ranks) == 0
    assert len(single) == 6 and stores(tmp_path) == single and len(loaded) == 1
    out = capfd.readouterr().out.splitlines()
    assert len([line for line in out if line.endswith((" ms for a batch of 6.", " TTFT n/a."))]) == 6
    monkeypatch.setattr(sweep_module, "run_job", None)
    monkeypatch.setattr(sweep_module, "launch", None)
    assert evaluate(tmp_path, monkeypatch, tiny_path, *LISTS, ranks=ranks) == 0, "finished runs were asked again"


def test_every_combination_that_cannot_run_is_named_before_the_first_question(tiny_path, tmp_path, monkeypatch, capsys):
    words = ("--benchmark", "gqa,pope", "--method", "full,uniform,fastv", "--budget", "8,17,1")
    assert evaluate(tmp_path, monkeypatch, tiny_path, *words) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-7] == "Nothing was run, because this cannot be:" and not (tmp_path / "results").exists()
    named = [line.partition(":")[0] for line in said[-6:]]
    assert named == [
        f"{benchmark}, {run}" for benchmark in ("gqa", "pope") for run in ("uniform at 17", "fastv at 17", "fastv at 1")
    ]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--method", "uniform,unifrom", "--budget", "8"], "gqa, unifrom at 8: "),
        (["--method", "uniform", "--budget", "8,4", "--output", "o"], "--output is the folder of one run"),
        (["--method", "uniform", "--budget", "8,4", "--tensor-parallel", "2"], "one benchmark, method and budget"),
        (["--method", "uniform", "--budget", "8", "--benchmark", "gqa,pope", "--split", "testdev"], "split of pope"),
    ],
)
def test_wrong_lists_end_in_a_sentence(flags, sentence, tiny_path, tmp_path, monkeypatch, capsys):
    assert evaluate(tmp_path, monkeypatch, tiny_path, *flags, ranks="2" if "--tensor-parallel" in flags else "") == 2
    assert sentence in capsys.readouterr().err


def test_benchmarks_with_toy_models_of_their_own_are_grouped(tmp_path, monkeypatch, capsys):
    """GQA is asked of one toy model, TextVQA of another, and each is loaded once."""
    loaded, real = [], sweep_module.load_model
    monkeypatch.setattr(sweep_module, "load_model", lambda config: loaded.append(config.model) or real(config))
    monkeypatch.chdir(tmp_path)
    words = ["--benchmark", "gqa,textvqa,pope", "--method", "full", "--limit", "1", "--device", "cpu"]
    assert main([*words, "--wandb", "disabled"]) == 0
    assert [Path(name).name for name in loaded] == ["tinyllava", "tinyllava_instruct"]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3 and all(name in line for name, line in zip(("GQA", "TextVQA", "POPE"), said, strict=True))


# -- one model over several real ranks -------------------------------------------------------------------------------

SPLIT = {"tensor parallel": ["--tensor-parallel", "2"], "zero": ["--zero", "cpu", "--zero-ranks", "2"]}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_gqa(tmp_path_factory.mktemp("gqa"), count=30)


def ask(tiny_path, data, output, *words: str, **environment: str) -> dict:
    flags = ["--method=consensusdrop", "--budget=4", "--max-new-tokens=4", "--batch-size=3", "--wandb=disabled"]
    command = [sys.executable, "-m", "eval", *flags, "--model", str(tiny_path), "--data", str(data)]
    done = subprocess.run(
        [*command, "--output", str(output), *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((output / "result.json").read_text())


@pytest.fixture(scope="module")
def alone(tiny_path, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("alone") / "o"
    ask(tiny_path, data, output)
    return output


@pytest.mark.parametrize("how", SPLIT)
def test_ranks_that_hold_one_model_answer_as_one_process(how, tiny_path, data, alone, tmp_path):
    result = ask(tiny_path, data, tmp_path / "o", *SPLIT[how], RANKS="2")
    assert (tmp_path / "o" / "answers.jsonl").read_bytes() == (alone / "answers.jsonl").read_bytes()
    (part,) = result["throughput"]["ranks"]  # one replica
    assert part["questions"] == 30 and part["rank"] == 0
    assert result["timing"]["ttft"]["batches"] == 10, "both ranks take part in the pass that times the first token"
    before = json.loads((alone / "result.json").read_text())
    for key in ("metrics", "accounting", "flops", "settings"):
        assert result[key] == before[key]
