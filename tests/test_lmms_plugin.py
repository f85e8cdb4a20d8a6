"""The plug-in for lmms-eval: its arguments, what it refuses, and the released package against our own run."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from eval.config import ROOT, RunConfig
from eval.lmms_plugin import configuration
from eval.run import run
from llava.errors import UserError

CLASS_MODULE = "eval.lmms_plugin.models.llava_reduced"
INSTALLED = all(importlib.util.find_spec(name) is not None for name in ("lmms_eval", "loguru", "sacrebleu"))
needs_lmms_eval = pytest.mark.skipif(not INSTALLED, reason="lmms-eval is not installed")
QUESTIONS = 12


def test_arguments_are_those_of_our_own_command_line():
    found = configuration(
        {
            "pretrained": "some/model",
            "method": "consensusdrop",
            "budget": 64,
            "dtype": "bfloat16",
            "device": "cpu",
            "batch_size": "4",
            "max_batch_size": 2,
            "seed": 3,
            "set.alpha": 0.5,
            "set.flag": True,
            "set.layers": "'1,2'",
            "picture.merge": "spatial",
        }
    )
    assert found == RunConfig(
        method="consensusdrop",
        budget=64,
        model="some/model",
        dtype="bfloat16",
        device="cpu",
        batch_size=4,
        seed=3,
        options={"alpha": "0.5", "flag": "true", "layers": "1,2"},
        picture={"merge": "spatial"},
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"metod": "fastv"}, r"Unknown model argument 'metod'\. Did you mean 'method'\?"),
        ({"alpha": 0.5}, r"Unknown model argument 'alpha'\."),
        ({"method": "fastv"}, "needs --budget"),
        ({"dtype": "bf16"}, "dtype: invalid choice: 'bf16'"),
        ({"batch_size": "auto"}, "batch-size should be a whole number"),
        ({"method": "fastv", "budget": "1/9", "set.retention_ratio": 0.1}, "both given"),
        ({"method": "'fastv,dart'", "budget": 64}, "one method at one budget"),
    ],
)
def test_wrong_arguments_end_in_a_sentence(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        configuration(arguments)


def test_without_lmms_eval_the_class_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    monkeypatch.setitem(sys.modules, "lmms_eval.api.model", None)
    monkeypatch.delitem(sys.modules, CLASS_MODULE, raising=False)
    with pytest.raises(UserError, match=r"needs lmms-eval, and lmms_eval\S* is not installed; see docs/lmms_eval\.md"):
        importlib.import_module(CLASS_MODULE)


def test_the_names_lmms_eval_looks_up_exist():
    """Its loader joins plug-in, "models", module and class; and finds the folder of tasks without importing it."""
    assert importlib.import_module("eval.lmms_plugin.models").AVAILABLE_MODELS == {"llava_reduced": "LlavaReduced"}
    assert importlib.util.find_spec(CLASS_MODULE) is not None
    assert importlib.util.find_spec("eval.lmms_plugin.tasks").submodule_search_locations


@needs_lmms_eval
def test_other_requests_are_refused_and_limits_are_read():
    model = importlib.import_module(CLASS_MODULE)
    with pytest.raises(UserError, match="choose a task whose output_type is generate_until"):
        object.__new__(model.LlavaReduced).loglikelihood([])
    assert model.max_new_tokens({"max_new_tokens": 16, "temperature": 0, "num_beams": 1}, "gqa") == 16
    assert model.max_new_tokens({"temperature": 0.7, "do_sample": False}, "gqa") == 1024
    for settings in ({"temperature": 0.2}, {"num_beams": 3}):
        with pytest.raises(UserError, match="Task gqa asks for sampling or beams"):
            model.max_new_tokens(settings, "gqa")


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    """A task over the first embedded GQA questions, in the form of lmms-eval's own GQA task."""
    folder = tmp_path_factory.mktemp("tasks")
    gqa = ROOT / "assets" / "eval" / "gqa"
    records = json.loads((gqa / "data" / "testdev_balanced_questions.json").read_text())
    lines = [json.loads(line) for line in (gqa / "llava_gqa_testdev_balanced.jsonl").read_text().splitlines()]
    rows = [
        {
            "image": {"bytes": (gqa / "data" / "images" / line["image"]).read_bytes()},
            "question": records[line["question_id"]]["question"],
            "answer": records[line["question_id"]]["answer"],
        }
        for line in lines[:QUESTIONS]
    ]
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    table.to_parquet(str(folder / "test.parquet"))
    (folder / "embedded_gqa.py").write_text(
        "def pictures(doc):\n    return [doc['image'].convert('RGB')]\n\n\n"
        "def text(doc, lmms_eval_specific_kwargs=None):\n"
        "    return doc['question'] + '\\nAnswer the question using a single word or phrase.'\n"
    )
    (folder / "embedded_gqa.yaml").write_text(
        f"""task: embedded_gqa
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {folder / "test.parquet"}
test_split: test
output_type: generate_until
doc_to_visual: !function embedded_gqa.pictures
doc_to_text: !function embedded_gqa.text
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 16
  temperature: 0
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
    ignore_punctuation: true
metadata:
  - version: 0.0
"""
    )
    return folder


@needs_lmms_eval
@pytest.mark.parametrize(("method", "budget"), [("full", None), ("consensusdrop", 64)])
def test_the_released_package_gives_the_answers_of_our_own_run(task, tmp_path, method, budget):
    named = f"pretrained={ROOT / 'assets' / 'tinyllava'},method={method}" + (f",budget={budget}" if budget else "")
    command = [sys.executable, "-m", "lmms_eval", "--model", "llava_reduced", "--model_args", named, "--tasks"]
    command += ["embedded_gqa", "--include_path", str(task), "--batch_size", "4", "--device", "cpu", "--log_samples"]
    environment = {
        **os.environ,
        "LMMS_EVAL_PLUGINS": "eval.lmms_plugin",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
    }
    done = subprocess.run(
        [*command, "--output_path", str(tmp_path / "theirs")], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    files = list((tmp_path / "theirs").rglob("*_samples_embedded_gqa.jsonl"))
    assert len(files) == 1, done.stdout[-2000:] + done.stderr[-2000:]
    rows = sorted((json.loads(line) for line in files[0].read_text().splitlines()), key=lambda row: row["doc_id"])
    theirs = [row["filtered_resps"] for row in rows]

    result = run(
        RunConfig(
            method=method, budget=budget, limit=QUESTIONS, device="cpu", wandb="disabled", output=tmp_path / "ours"
        )
    )
    lines = (tmp_path / "ours" / "answers.jsonl").read_text().splitlines()
    assert theirs == [json.loads(line)["text"] for line in lines]
    summary = next((tmp_path / "theirs").rglob("*_results.json"))
    accuracy = json.loads(summary.read_text())["results"]["embedded_gqa"]["exact_match,none"]
    assert 100 * accuracy == pytest.approx(result["metrics"]["accuracy"])
