"""An evaluation whose model several real ranks hold together writes the answers of one process."""

import json
import os
import subprocess
import sys

import pytest

from eval.config import ROOT
from tests.eval_fakes import write_gqa

pytestmark = pytest.mark.process

WORDS = ["--method=consensusdrop", "--budget=4", "--max-new-tokens=4", "--batch-size=3", "--wandb=disabled"]
SPLIT = {"tensor parallel": ["--tensor-parallel", "2"], "zero": ["--zero", "cpu", "--zero-ranks", "2"]}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_gqa(tmp_path_factory.mktemp("gqa"), count=30)


def evaluate(tiny_path, data, output, *words: str, **environment: str) -> dict:
    command = [sys.executable, "-m", "eval", *WORDS, "--model", str(tiny_path), "--data", str(data)]
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
    evaluate(tiny_path, data, output)
    return output


@pytest.mark.parametrize("how", SPLIT)
def test_ranks_that_hold_one_model_answer_as_one_process(how, tiny_path, data, alone, tmp_path):
    result = evaluate(tiny_path, data, tmp_path / "o", *SPLIT[how], RANKS="2")
    assert (tmp_path / "o" / "answers.jsonl").read_bytes() == (alone / "answers.jsonl").read_bytes()
    (part,) = result["throughput"]["ranks"]  # one replica
    assert part["questions"] == 30 and part["rank"] == 0
    assert result["timing"]["ttft"]["batches"] == 10, "both ranks take part in the pass that times the first token"
    before = json.loads((alone / "result.json").read_text())
    for key in ("metrics", "audit", "flops", "settings"):
        assert result[key] == before[key]
