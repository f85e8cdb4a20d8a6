"""The methods in lmms-eval and VLMEvalKit: arguments, what is refused, stand-ins for both, and the released lmms-eval
against our own run."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import datasets
import pytest

from eval import harnesses, vlmeval
from eval.config import ROOT, RunConfig
from eval.lmms_plugin import configuration
from eval.run import run
from llava import reduce
from llava.errors import UserError
from tests.conftest import QUESTIONS as ASKED
from tests.conftest import SHORT, drawn_image
from tests.stock_inputs import shared
from tests.test_llava_interface import ask, loaded

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
            "image.merge": "spatial",
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
        image_options={"merge": "spatial"},
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"metod": "fastv"}, r"Unknown model argument 'metod'\. Did you mean 'method'\?"),
        ({"alpha": 0.5}, "'alpha'"),
        ({"method": "fastv"}, "needs --budget"),
        ({"dtype": "bf16"}, "dtype: invalid choice: 'bf16'"),
        ({"batch_size": "auto"}, "batch-size should be"),
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
    with pytest.raises(UserError, match=r"needs lmms-eval, and lmms_eval\S* is not installed; see docs/harnesses\.md"):
        importlib.import_module(CLASS_MODULE)


def test_the_names_lmms_eval_looks_up_exist():
    """Its loader joins plug-in, "models", module and class; and finds the folder of tasks without importing it."""
    found = importlib.import_module("eval.lmms_plugin.models").AVAILABLE_MODELS
    assert found == {"llava_reduced": "LlavaReduced", "reduced": "Reduced"}
    assert all(importlib.util.find_spec(f"eval.lmms_plugin.models.{name}") for name in found)
    assert importlib.util.find_spec("eval.lmms_plugin.tasks").submodule_search_locations


# A stand-in for lmms-eval: the names that the plug-in imports, and one model class in its way.

CHAT = "USER: <image> {} ASSISTANT:"


class Lmms:
    def __init__(self):
        self.task_dict = {}


class LlavaHf(Lmms):
    """Asks in batches of two, the longest first, and takes errors for empty answers, as lmms-eval's class does."""

    def __init__(self, pretrained="llava", batch_size=2, chat=CHAT, images=True, **forgotten):
        super().__init__()
        self.stock, self.chat, self.images, self.seen = shared(pretrained), chat, images, []
        self.tokenizer, self.model = self.stock.tokenizer, self.stock.model

    def generate_until(self, requests):
        answers, order = {}, sorted(range(len(requests)), key=lambda number: -len(requests[number].args[0]))
        for pair in (order[start : start + 2] for start in range(0, len(order), 2)):
            texts = [self.chat.format(requests[number].args[0]) for number in pair]
            images = [drawn_image(number) for number in pair] if self.images else []
            inputs = self.stock.prepare([text if images else text.replace("<image>", "") for text in texts], images)
            try:
                ids = self.model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
                rows = ids[:, inputs["input_ids"].shape[1] :].tolist()
            except Exception:
                rows = [[], []]
            answers |= dict(zip(pair, rows, strict=False))
        return [answers[number] for number in range(len(requests))]


class Plain(Lmms):
    def __init__(self):
        super().__init__()
        self.model = object()


@pytest.fixture
def stand_in(monkeypatch):
    """`eval.lmms_plugin.models` beside the stand-in."""
    known = {"llava_hf": LlavaHf, "plain": Plain, "reduced": None, "missing": None}

    def get_model(name, force_simple=False):
        if known[name] is None:
            raise ModuleNotFoundError("No module named 'decord'")
        return known[name]

    for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model", "lmms_eval.models"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["lmms_eval.api.model"].lmms = Lmms
    sys.modules["lmms_eval.models"].get_model = get_model
    sys.modules["lmms_eval.models"].list_available_models = lambda include_aliases: list(known)

    def load(name):
        monkeypatch.delitem(sys.modules, f"eval.lmms_plugin.models.{name}", raising=False)
        return importlib.import_module(f"eval.lmms_plugin.models.{name}")

    return load


def asked(*texts):
    return [SimpleNamespace(args=(text, {}, None, number, "task", "test")) for number, text in enumerate(texts)]


TEXTS = [f"{question}\n{SHORT}" for question in ASKED]


def ended(capsys, call, *args, **kwargs):
    """What is on standard error after the process was ended; lmms-eval takes any other exception, and exits with 0."""
    with pytest.raises(SystemExit) as error:
        call(*args, **kwargs)
    assert error.value.code == 2
    return capsys.readouterr().err


def test_their_model_runs_under_a_method_with_the_questions_alone(stand_in, capsys):
    """Query-aware methods read template and answer format, and in batches the question of another prompt."""
    stock, handed = shared("llava"), []
    before = set(vars(stock.model))
    model = stand_in("reduced").Reduced(**{"base": "llava_hf", "method": "fastv", "budget": 7, "set.layer": 1})
    assert type(model).__mro__[2] is LlavaHf
    find = model.under._question
    model.under._question = lambda prompt: handed.append(find(prompt)) or handed[-1]
    answers = model.generate_until(asked(*TEXTS))
    assert handed == sorted(ASKED, key=len, reverse=True)
    assert set(vars(stock.model)) == before
    assert "fastv at 7: 7.0 visual tokens per layer, mean of 5 prompts with images." in capsys.readouterr().out
    for number, text in enumerate(TEXTS):
        inputs = stock.prepare([CHAT.format(text)], [drawn_image(number)])
        with reduce(stock.model, "fastv", 7, questions=[ASKED[number]], tokenizer=stock.tokenizer, layer=1):
            assert answers[number] == stock.generate(inputs)[0, :4].tolist()


def test_full_and_ratios_are_methods_too(stand_in, capsys):
    model = stand_in("reduced").Reduced(base="llava_hf", method="full")
    plain = LlavaHf().generate_until(asked(*TEXTS[:3]))
    assert model.generate_until(asked(*TEXTS[:3])) == plain
    assert "full: 16.0 visual tokens" in capsys.readouterr().out
    model = stand_in("reduced").Reduced(base="llava_hf", method="divprune", budget="1/4")
    assert model.generate_until(asked(*TEXTS[:3])) != plain
    assert "divprune at 0.25: 4.0 visual tokens" in capsys.readouterr().out
    assert model.generate_until([]) == []


def test_an_error_inside_generate_ends_the_run_and_restores_the_model(stand_in, capsys, monkeypatch):
    """Their class answered "" to every question, and the run was a success."""
    stock = shared("llava")
    before = set(vars(stock.model))
    model = stand_in("reduced").Reduced(
        base="llava_hf", method="fastv", budget=7, chat="{} <image>", **{"set.layer": 1}
    )
    assert "none of the 1 texts" in ended(capsys, model.generate_until, asked("what is <image 1> above"))
    assert set(vars(stock.model)) == before

    tried = []

    def fail(*args):
        tried.append(args)
        raise RuntimeError("no memory")

    monkeypatch.setattr(harnesses, "accounting_record", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        model.generate_until(asked(*TEXTS[:3]))
    assert len(tried) == 1  # of two batches
    assert set(vars(stock.model)) == before


def test_a_prompt_that_is_worded_otherwise_is_no_guess(stand_in, capsys):
    """Its text is not in the prompt, but a shorter one of another question is."""
    arguments = {"base": "llava_hf", "method": "fastv", "budget": 7, "set.layer": 1}
    model = stand_in("reduced").Reduced(**arguments)
    with model.under.asking(["is there a star?", "a dog"]):
        for text in ("is there a star?", "a dog"):
            inputs = model.stock.prepare([CHAT.format(text)], [drawn_image(0)])
            model.model.generate(**inputs, max_new_tokens=1)
            assert model.under.reduced.questions == [text]
    inputs = model.stock.prepare([CHAT.format("is there a dog or a cat")], [drawn_image(0)])
    with (
        pytest.raises(UserError, match="holds none of the 2 texts"),
        model.under.asking(["a dog", "is it a cat or dog"]),
    ):
        model.model.generate(**inputs, max_new_tokens=1)


def test_the_model_of_llavas_scripts_runs_under_a_method(tiny_path):
    """lmms-eval's `llava` holds one, which enters a block of its own in each call, without a method."""
    parts, other = loaded(tiny_path), loaded(tiny_path, method="fastv", budget=7, layer=1)
    own, arguments = parts[1].reduced, (f"{ASKED[0]}\n{SHORT}", drawn_image(0))
    under = harnesses.UnderMethod(parts[1], harnesses.Choice("fastv", "7", {"layer": "1"}))
    with under.asking([]):
        assert ask(parts, *arguments).tolist() == ask(other, *arguments).tolist()
    assert [record["mean"] for record in under.accounts] == [7]
    assert parts[1].reduced is own and "generate" not in vars(parts[1])


def test_no_reduced_prompt_is_an_error(stand_in, capsys):
    model = stand_in("reduced").Reduced(base="llava_hf", method="fastervlm", budget=4, images=False)
    assert "0 prompts were reduced by fastervlm" in ended(capsys, model.generate_until, asked(*TEXTS[:3]))


def test_another_mean_than_the_budget_is_a_warning(stand_in, capsys, monkeypatch):
    model = stand_in("reduced").Reduced(base="llava_hf", method="fastervlm", budget=4)
    record = harnesses.accounting_record
    monkeypatch.setattr(harnesses, "accounting_record", lambda accounting: record(accounting) | {"mean": 5.0})
    model.generate_until(asked(*TEXTS[:3]))
    assert "Warning: 5.00 visual tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"base": "lava_hf", "method": "full"}, "Unknown base model of lmms-eval 'lava_hf'. Did you mean 'llava_hf'?"),
        ({"base": "reduced", "method": "full"}, "'reduced'"),
        ({"base": "missing", "method": "full"}, "No module named 'decord'"),
        ({"base": "plain", "method": "full"}, "reduce() takes a Hugging Face model"),
        ({"base": "llava_hf", "metod": "fastv"}, "needs method in --model_args"),
        ({"base": "llava_hf", "method": "full", "pretraind": "x"}, "Did you mean 'pretrained'?"),
        ({"base": "llava_hf", "method": "fastvv"}, "Did you mean 'fastv'?"),
        ({"base": "llava_hf", "method": "fastv", "budget": 7, "set.layr": 1}, "Did you mean 'layer'?"),
        ({"base": "llava_hf", "method": "fastv"}, "fastv needs a budget"),
    ],
)
def test_what_reduced_refuses(stand_in, capsys, arguments, sentence):
    assert sentence in ended(capsys, stand_in("reduced").Reduced, **arguments)


def test_other_requests_and_several_processes_are_refused(stand_in, capsys, monkeypatch):
    """The sentence came with a traceback, and lmms-eval went on and exited with 0."""
    model, own = stand_in("reduced").Reduced(base="llava_hf", method="full"), stand_in("llava_reduced")
    for refusing in (model.loglikelihood, object.__new__(own.LlavaReduced).loglikelihood):
        assert "generate_until" in ended(capsys, refusing, [])
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name, refusing in (("reduced", stand_in("reduced").Reduced), ("llava_reduced", own.LlavaReduced)):
        assert ended(capsys, refusing).startswith(f"{name} runs in one process")
    assert own.max_new_tokens({"max_new_tokens": 16, "temperature": 0, "num_beams": 1}, "gqa") == 16
    assert own.max_new_tokens({"temperature": 0.7, "do_sample": False}, "gqa") == 1024
    for settings in ({"temperature": 0.2}, {"num_beams": 3}):
        with pytest.raises(UserError, match="gqa asks for sampling"):
            own.max_new_tokens(settings, "gqa")


# A stand-in for VLMEvalKit: run.py asks one question of a model whose class is BaseModel's.

RUN = """
import sys
from vlmeval.vlm.base import BaseModel
from tests.test_lmms_plugin import Toy
if __name__ == "__main__":
    try:
        model = type("LLaVA_Next", (Toy, BaseModel), {})()
        parts = [dict(type="image", value="0"), dict(type="text", value=sys.argv[2])]
        if "--twice" not in sys.argv or model.generate(parts):
            print("ANSWERED", model.generate(parts), model.handed, *sys.argv[3:])
    except Exception as error:
        print("TAKEN", error)
"""
BASE = """
class BaseModel:
    def preproc_content(self, message):
        return message
    def generate(self, message, dataset=None):
        return self.generate_inner(message, dataset)
"""


class Toy:
    """A model class of VLMEvalKit."""

    def __init__(self):
        stock = self.stock = shared("llava")
        self.model, self.processor, self.handed = stock.model, SimpleNamespace(tokenizer=stock.tokenizer), None

    def generate_inner(self, message, dataset=None):
        inputs = self.stock.prepare([CHAT.format(message[1]["value"])], [drawn_image(0)])
        ids = self.model.generate(**inputs, max_new_tokens=1)
        return ids[0, -1].item()


@pytest.fixture
def kit(tmp_path, monkeypatch):
    """run.py of the stand-in, and the exit code of `vtr run-vlmeval` with it."""
    (tmp_path / "vlmeval" / "vlm").mkdir(parents=True)
    (tmp_path / "vlmeval" / "vlm" / "base.py").write_text(BASE)
    (tmp_path / "run.py").write_text(RUN)
    for name in [name for name in sys.modules if name.partition(".")[0] == "vlmeval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("MMEVAL_ROOT", raising=False)

    def start(*words, script=tmp_path / "run.py"):
        monkeypatch.setattr(sys, "argv", ["vtr run-vlmeval", *words[:-1], "--", str(script), "--data", words[-1]])
        return vlmeval.main()

    return start


def test_vlmevalkits_model_runs_under_a_method(kit, capsys):
    """With the question alone, and in a folder of the method: VLMEvalKit names its files by the model."""
    assert kit("fastv", "7", "--set", "layer=1", f"is there a star?\n{SHORT}") == 0
    printed = capsys.readouterr().out
    assert "ANSWERED" in printed and "--work-dir outputs/fastv-7-layer-1" in printed
    assert "mean of 1 prompts" in printed
    assert not vars(shared("llava").model).keys() & {"generate", "forward"}


def test_vlmevalkit_ends_with_our_sentence(kit, capsys, tmp_path, monkeypatch):
    """run.py takes errors of a data set, goes on, and exits with 0."""
    assert "fastv needs a budget" in ended(capsys, kit, "fastv", "--set", "layer=1", "is there a star?")
    (tmp_path / "other.py").write_text("")
    assert kit("full", "x", script=tmp_path / "other.py") == 2
    assert "nothing ran under full" in capsys.readouterr().err
    assert kit("full", "x", script=tmp_path / "none.py") == 2
    assert str(tmp_path / "none.py") in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert kit("full", "x") == 2
    assert "runs in one process" in capsys.readouterr().err


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
        "def images(doc):\n    return [doc['image'].convert('RGB')]\n\n\n"
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
doc_to_visual: !function embedded_gqa.images
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
@pytest.mark.parametrize(
    ("model", "method", "budget"),
    [("llava_reduced", "full", None), ("llava_reduced", "consensusdrop", 64), ("reduced", "consensusdrop", 12)],
)
def test_the_released_package_gives_the_answers_of_our_own_run(task, tmp_path, model, method, budget):
    named = f"pretrained={ROOT / 'assets' / 'tinyllava'},method={method},dtype=float32"
    named += f",budget={budget}" if budget else ""
    if model == "reduced":
        pytest.importorskip("decord")
        named += ",base=llava_hf,force_simple=True,device_map=cpu"
    command = [sys.executable, "-m", "lmms_eval", "--model", model, "--model_args", named, "--tasks"]
    command += ["embedded_gqa", "--include_path", str(task), "--device", "cpu", "--log_samples", "--batch_size"]
    command += ["4" if model == "llava_reduced" else "1"]
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
            method=method,
            budget=budget,
            limit=QUESTIONS,
            device="cpu",
            dtype="float32",
            wandb="disabled",
            output=tmp_path / "ours",
        )
    )
    lines = (tmp_path / "ours" / "answers.jsonl").read_text().splitlines()
    assert theirs == [json.loads(line)["text"] for line in lines]
    summary = next((tmp_path / "theirs").rglob("*_results.json"))
    accuracy = json.loads(summary.read_text())["results"]["embedded_gqa"]["exact_match,none"]
    assert 100 * accuracy == pytest.approx(result["metrics"]["accuracy"])
